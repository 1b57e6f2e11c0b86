"""Every stored run in a table, their differences and curves, and runs started, stopped and resumed."""

import threading
import time
from contextlib import suppress
from html import escape

import pandas as pd
from traitlets import Bool, Int, List, Unicode

from funlora_lab.continual import OpenRun
from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment
from funlora_lab.presets import PRESETS, configured
from funlora_lab.store import Run
from funlora_lab.studies import plots, sweeps
from funlora_lab.systems import all_methods
from funlora_lab.workbench import markup, runs
from funlora_lab.workbench.controls import button, check, field, place, row, select
from funlora_lab.workbench.panel import Panel, held

CURVES = ("accuracy", "base", "adapter", "classifier")
STATES = ("finished", "running", "unfinished", "damaged", "other version")
EVERY = 1.0  # seconds between two looks at running runs


class RunsPanel(Panel):
    title = "which lists, compares and starts runs"
    words, state, by = held(Unicode), held(Unicode), held(Unicode, "started")
    descending, seeds, curve = held(Bool, True), held(Bool, False), held(Unicode, CURVES[0])
    chosen, preset, method, seed, settings = held(List), held(Unicode), held(Unicode), held(Int), held(Unicode)
    table, compared, acts, progress = (held(Unicode) for _ in range(4))

    def __init__(self, bench):
        self.watcher, self.started, self.known, self.going = threading.Thread(), {}, {}, []
        super().__init__(bench)
        self.on_change(self.refresh, "words", "state", "by", "descending", "seeds", "chosen")
        self.on_change(self.compare, "chosen", "curve")
        self.on_change(bench.redraw, "chosen")

    home = property(lambda self: self.run.run.folder.parent)

    def renew(self) -> None:
        e, name = self.run.experiment, self.run.run.folder.name
        with self.quietly():
            self.preset, self.method = self.preset or e.preset, self.method or e.method
            self.chosen = self.chosen if name in self.chosen else [*self.chosen, name]
            listed = (
                field("words", "name holds", "search", 170, "funlora seed0"),
                select("state", "state", [("any", ""), *((state, state) for state in STATES)]),
                select("by", "sorted by", [(column, column) for column in runs.COLUMNS]),
                check("descending", "largest first"),
                check("seeds", "mean over seeds"),
                button("refresh", "Refresh"),
            )
            begun = (
                select("preset", "preset", [(name, name) for name in PRESETS | {e.preset: e}]),
                select("method", "method", [(name, name) for name in all_methods()]),
                field("seed", "seed", "number", 80),
                field("settings", "settings", width=220, hint="key=value key=value"),
                button("start", "Start a run", "main"),
            )
            curves = select("curve", "curves of", [(f"losses: {c}" if c != "accuracy" else c, c) for c in CURVES])
            self.body = row(*listed) + place("table") + row(curves) + place("compared")
            self.body += row(*begun) + place("acts") + place("progress") + place("note", "note")
        self.refresh()
        self.compare()

    def frame(self) -> pd.DataFrame:
        return runs.table(self.home, self.words, self.state, self.by, self.descending)

    def refresh(self) -> None:
        """The table, a row a button that chooses the run, and one button a run to stop or to resume."""
        frame = self.frame()
        if self.seeds:
            shown = markup.table(sweeps.over_seeds(self.home, frame["run"]).set_index("preset"))
            self.table = f'<div class="scrolls" style="height:240px">{shown}</div>'
            return
        shown = self.run.run.folder.name
        named = [button("choose", name, "", name, pressed=name in self.chosen) for name in frame["run"]]
        table = frame.drop(columns=["run", "preset", "method", "seed", "seconds"]).map(_shown)
        table.insert(0, "run", named)
        count = f"{len(frame)} run{'s'[: len(frame) != 1]}, {len(self.chosen)} chosen; the panels show {shown}"
        look = 'class="scrolls runs" style="height:240px" tabindex="0" role="region" aria-label="runs"'
        self.table = f"<div {look}>{table.to_html(border=0, index=False, escape=False)}</div>{count}"
        states, acts = frame.set_index("run")["state"].to_dict(), []
        started = [name for name, run in self.started.items() if run.going]
        self.going = sorted({name for name in self.chosen if states.get(name) == "running"} | {*started})
        self.known = {name: self.known.get(name, runs.Progress()) for name in self.going}
        for name in self.chosen:
            if name in self.going:
                acts.append(button("stop", f"Stop {name}", "halt", name))
            elif states.get(name) == "unfinished":
                acts.append(button("resume", f"Resume {name}", "", name))
            elif states.get(name) == "finished" and name != shown:
                acts.append(button("open", f"Show {name} in all panels", "", name))
        self.acts = row(*acts)
        if self.going and not self.watcher.is_alive():
            self.watcher = threading.Thread(target=self._look, daemon=True)
            self.watcher.start()

    def press_refresh(self) -> None:
        self.refresh()
        self.compare()

    def press_choose(self, name: str) -> None:
        self.chosen = [one for one in self.chosen if one != name] if name in self.chosen else [*self.chosen, name]

    def choose(self, name: str) -> None:
        """Compare a run with the others that are chosen; methods and runs may be new."""
        self.chosen = [*dict.fromkeys([*self.chosen, name])]
        self.renew()

    def press_open(self, name: str) -> None:
        self.bench.open(name)

    def compare(self) -> None:
        """Settings in which the chosen runs differ, and their curves over one another, named by what differs."""
        averages, losses, unlike = {}, {}, runs.differences(self.chosen, self.home)
        names = runs.short_names(unlike)
        for name in self.chosen:
            with suppress(LabError):  # damaged or of another version: its log has no agreed meaning
                run = OpenRun(Run.at(self.home / name), self.run.runtime)
                loss = run.losses(self.curve).groupby("images")["loss"].mean()
                scored = {event["task"]: event["average"] for event in run.accuracies}
                if self.curve == "accuracy" and scored:  # perhaps after the last task alone
                    averages[names[name]] = [scored.get(task) for task in range(1, max(scored) + 1)]
                elif len(loss):
                    losses[names[name]] = (loss.index, loss)
        drawn = plots.accuracy_per_task({"": averages}) if averages else None
        drawn = plots.training_curves(losses, f"losses of the {self.curve}") if losses else drawn
        parts = [markup.figure(drawn, f"{self.curve} of {', '.join(names.values())}")] if drawn else []
        if len(unlike):
            parts.append(f"<div><b>Settings that differ</b>{markup.table(unlike.rename(columns=names))}</div>")
        self.compared = row(*parts)

    def press_start(self) -> None:
        """Start (or resume) the run of the settings, in a process of its own."""
        self._begin(configured(self.preset, self.settings, method=self.method, seed=self.seed))

    def press_resume(self, name: str) -> None:
        self._begin(Run.at(self.home / name).experiment)

    def _begin(self, experiment: Experiment) -> None:
        started = runs.Started(experiment, self.home, str(self.run.runtime.device))
        name = started.run.folder.name
        self.started[name] = started
        with self.quietly():
            self.chosen = [*dict.fromkeys([*self.chosen, name])]
        self.progress = f"{escape(name)}: starting."
        self.refresh()

    def press_stop(self, name: str) -> None:
        """Ask a running run to save and leave."""
        here = self.started.get(name)
        here.terminate() if here and here.going else runs.stop(Run.at(self.home / name))
        self.progress = f"{escape(name)}: asked to stop."

    def _look(self) -> None:
        """Look at the chosen runs that go on, here or elsewhere, until none of them does."""
        while names := self.going:
            self.refresh()  # what has ended since is shown once more
            lines = []
            for name in names:
                here = self.started.get(name)
                share, sentence = runs.progress(here.run if here else Run.at(self.home / name), self.known.get(name))
                lines.append(markup.bar(share, f"{escape(name)}: {escape((here and here.reason()) or sentence)}"))
                looks = [[path.stem, markup.stored(path)] for path in (here.looks if here else [])]
                lines += [markup.sheet(looks)] * bool(looks)
            self.progress = "<br>".join(lines)
            self.compare()
            time.sleep(EVERY)


def _shown(value) -> str:
    if pd.isna(value):
        return "–"
    form = "{:.4f}" if isinstance(value, float) else "{:,}" if isinstance(value, int) else "{}"
    return escape(form.format(value))
