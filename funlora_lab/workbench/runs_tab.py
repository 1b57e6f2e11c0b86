"""Panel 4: every stored run in a table, their curves over one another, and runs started, stopped and resumed."""

import threading
from pathlib import Path

import ipywidgets as widgets
import pandas as pd

from funlora_lab.config import METHODS, override
from funlora_lab.errors import LabError
from funlora_lab.opened import OpenRun
from funlora_lab.presets import PRESETS, preset
from funlora_lab.store import Run
from funlora_lab.studies import plots
from funlora_lab.workbench import markup, runs
from funlora_lab.workbench.markup import Markup, problem
from funlora_lab.workbench.parts import Panel, button, card, control, row

CURVES = ("accuracy", "losses of the base", "losses of the adapters", "losses of the classifiers")
EVERY = 1.0  # seconds between two looks at running runs


class RunsPanel(Panel):
    """A table to filter and sort, curves of the chosen runs that follow a running one, and its buttons."""

    def __init__(self, opened: OpenRun):
        super().__init__()
        self.home: Path = opened.run.folder.parent
        self.device = str(opened.runtime.device)
        self.started: dict[str, runs.Started] = {}
        self._watcher: threading.Thread | None = None
        self._leave = threading.Event()
        e = opened.experiment
        self.filter = control(widgets.Text, "name holds", "", "240px", placeholder="for example funlora seed0")
        self.state = control(
            widgets.Dropdown, "state", "", "180px", options=[("any", ""), *((state, state) for state in runs.STATES)]
        )
        self.by = control(widgets.Dropdown, "sorted by", "started", "190px", options=runs.COLUMNS)
        self.down = control(widgets.Checkbox, "largest first", True, "130px", indent=False)
        self.chosen = control(widgets.SelectMultiple, "curves of", (), "460px", options=[], rows=5)
        self.curve = control(widgets.Dropdown, "of their", CURVES[0], "260px", options=CURVES)
        self.curves = card()
        self.follow = control(widgets.Checkbox, "follow runs of other processes", False, "240px", indent=False)
        self.preset = control(widgets.Dropdown, "preset", e.preset, "200px", options=list(PRESETS))
        self.method = control(widgets.Dropdown, "method", e.method, "240px", options=METHODS)
        self.seed = control(widgets.BoundedIntText, "seed", 0, "120px", min=0, max=10**6)
        self.settings = control(widgets.Text, "settings", "", "320px", placeholder="key=value key=value")
        self.start_button = button("Start", self.start, "play", "success")
        self.stop_button = button("Stop", self.stop, "stop", "warning")
        self.resume_button = button("Resume", self.resume, "step-forward")
        self.bar = widgets.FloatProgress(value=0.0, max=1.0, layout=widgets.Layout(width="320px"))
        self.note = widgets.HTML()
        self.children = [
            row(self.filter, self.state, self.by, self.down, button("Refresh", self.refresh, "refresh")),
            self.picture,
            row(self.chosen, widgets.VBox([self.curve, self.follow])),
            self.curves,
            row(self.preset, self.method, self.seed, self.settings),
            row(self.start_button, self.stop_button, self.resume_button, self.bar),
            self.note,
        ]
        self.on_change(self.refresh, self.filter, self.state, self.by, self.down)
        self.on_change(self.draw_curves, self.chosen, self.curve)
        self.on_change(self._watch, self.follow)
        self.refresh()
        with self.quietly():
            self.chosen.value = [name for name in self.chosen.options if name == opened.run.folder.name]
        self.draw_curves()

    def table(self):
        """The table as shown, as a data frame."""
        everything = runs.table(self.home)
        return runs.chosen(everything, self.filter.value, self.state.value, self.by.value, self.down.value)

    def refresh(self) -> None:
        """Read all runs again."""
        frame = self.table()
        shown = frame.drop(columns=["preset"]).set_index("run")
        shown["PPC"] = ["–" if pd.isna(number) else f"{number:,}" for number in shown["PPC"]]
        self.show(lambda: Markup(markup.table(shown)))
        names = frame["run"].tolist()
        if names != list(self.chosen.options):
            new = set(self.started) - set(self.chosen.options)  # a started run shows its curve as soon as it has one
            kept = [name for name in names if name in self.chosen.value or name in new]
            with self.quietly():
                self.chosen.options = names
                self.chosen.value = kept
            self.draw_curves()

    def _run(self, name: str) -> Run:
        return self.started[name].run if name in self.started else Run.at(self.home / name)

    def draw_curves(self) -> None:
        """The chosen runs' curves over one another, as far as they have come."""
        curves, kind = {}, self.curve.value
        for name in self.chosen.value:
            try:
                run = self._run(name)
            except LabError:
                continue  # of another version: its log has no agreed meaning
            if kind == CURVES[0]:
                values = runs.accuracies(run)
            else:
                frame = runs.losses(run, kind.removeprefix("losses of the ").removesuffix("s"))
                values = (frame["images"], frame["loss"]) if len(frame) else ()
            if len(values):
                curves[name] = values
        self.curves.layout.display = "" if curves else "none"
        if curves:
            drawn = plots.accuracy_per_task(curves) if kind == CURVES[0] else plots.training_curves(curves, kind)
            self.curves.value = drawn.png()

    def start(self) -> None:
        """Start (or resume) the run of the settings below, in a process of its own."""

        def begin():
            words = [*self.settings.value.split(), f"method={self.method.value}", f"seed={self.seed.value}"]
            self._begin(override(preset(self.preset.value), words))

        self._try(begin)

    def resume(self) -> None:
        """Go on with the chosen runs that are unfinished."""

        def begin():
            for name in self._picked():
                run = self._run(name)
                if run.results():
                    raise LabError(f"The run {name} is finished: choose an unfinished one.")
                self._begin(run.experiment)

        self._try(begin)

    def _begin(self, experiment) -> None:
        started = runs.start(experiment, self.home, self.device)
        self.started[started.run.folder.name] = started
        self.note.value = f"{started.run.folder.name}: starting."
        self._watch()

    def stop(self) -> None:
        """Ask the chosen running runs to save and leave; when none of them runs, all that were started here."""

        def end():
            going = [name for name, started in self.started.items() if started.going]
            running = [name for name in self.chosen.value if name in going or runs.in_use(self.home / name)]
            for name in running or going or self._picked():
                if name in going:
                    self.started[name].stop()
                else:
                    runs.stop(self._run(name))
                self.note.value = f"{name}: asked to stop."

        self._try(end)

    def _picked(self) -> list[str]:
        if not self.chosen.value:
            raise LabError("No run is chosen: choose one in the list.")
        return list(self.chosen.value)

    def _try(self, act) -> None:
        try:
            act()
        except LabError as reason:
            self.note.value = str(problem(reason))

    def _watch(self) -> None:
        """Look at running runs every second, in a thread, until there is none to look at."""
        if self._watcher is None or not self._watcher.is_alive():
            self._leave.clear()
            self._watcher = threading.Thread(target=self._look, daemon=True)
            self._watcher.start()

    def _look(self) -> None:
        told: set[str] = set()
        while not self._leave.is_set():
            going = [started for started in self.started.values() if started.going]
            for name, started in self.started.items():
                if started.going or name not in told:
                    share, sentence = runs.progress(started.run)
                    self.bar.value = share
                    last = "" if started.going else started.last_words()
                    self.note.value = f"{name}: {last or sentence}"
                    if not started.going:
                        told.add(name)
            self.refresh()
            self.draw_curves()
            if not going and not self.follow.value:
                return
            self._leave.wait(EVERY)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until nothing is watched any more; for scripts and tests."""
        if self._watcher is not None:
            self._watcher.join(seconds)
