"""Panel 4: every stored run in a table, their curves over one another, and runs started, stopped and resumed."""

import threading
import time
from contextlib import suppress

import ipywidgets as widgets
import pandas as pd

from funlora_lab.continual import OpenRun
from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment
from funlora_lab.presets import PRESETS, configured
from funlora_lab.store import Run, in_use
from funlora_lab.studies import plots
from funlora_lab.systems import all_methods
from funlora_lab.workbench import markup, runs
from funlora_lab.workbench.panel import Panel, button, control, errors_shown_in, picture_card, progress_bar, row

ACCURACY = "accuracy"
CURVES = [(ACCURACY, ACCURACY), ("losses of the base", "base")]
CURVES += [(f"losses of the {stage}s", stage) for stage in ("adapter", "classifier")]
STATES = [("any", ""), *((state, state) for state in ("finished", "running", "unfinished", "damaged", "other version"))]
EVERY = 1.0  # seconds between two looks at running runs


class RunsPanel(Panel):
    def __init__(self, run: OpenRun):
        super().__init__(run)
        self.home, self.watcher, e = run.run.folder.parent, threading.Thread(), run.experiment
        self.started: dict[str, runs.Started] = {}
        self.filter = control(widgets.Text, "name holds", "", "240px", placeholder="for example funlora seed0")
        self.state = control(widgets.Dropdown, "state", "", "180px", options=STATES)
        self.by = control(widgets.Dropdown, "sorted by", "started", "190px", options=runs.COLUMNS)
        self.descending = control(widgets.Checkbox, "largest first", True, "130px", indent=False)
        self.chosen = control(widgets.SelectMultiple, "curves of", (), "460px", options=[], rows=5)
        self.curve = control(widgets.Dropdown, "of their", ACCURACY, "260px", options=CURVES)
        self.follow = control(widgets.Checkbox, "follow runs of other processes", False, "240px", indent=False)
        self.preset = control(widgets.Dropdown, "preset", e.preset, "200px", options=list(PRESETS | {e.preset: e}))
        self.method = control(widgets.Dropdown, "method", e.method, "240px", options=list(all_methods()))
        self.seed = control(widgets.BoundedIntText, "seed", 0, "120px", max=10**6)
        self.settings = control(widgets.Text, "settings", "", "320px", placeholder="key=value key=value")
        self.start_button = button("Start", self.start, "play", "success")
        self.stop_button = button("Stop", self.stop, "stop", "warning")
        self.resume_button = button("Resume", self.resume, "step-forward")
        self.curves, self.bar, self.note = picture_card(), progress_bar(), widgets.HTML()
        self._listed = (self.filter, self.state, self.by, self.descending)
        listed = row(*self._listed, button("Refresh", self.refresh, "refresh"))
        chosen = row(self.chosen, widgets.VBox([self.curve, self.follow]))
        settings = row(self.preset, self.method, self.seed, self.settings)
        acts = row(self.start_button, self.stop_button, self.resume_button, self.bar)
        self.children = [listed, self.picture, chosen, self.curves, settings, acts, self.note]
        self.on_change(self.refresh, *self._listed)
        self.on_change(self.draw_curves, self.chosen, self.curve)
        self.on_change(self._watch, self.follow)
        self.refresh()
        self.chosen.value = [name for name in self.chosen.options if name == run.run.folder.name]

    def table(self) -> pd.DataFrame:
        return runs.table(self.home, *(one.value for one in self._listed))

    def refresh(self) -> None:
        shown = self.table().drop(columns=["preset"]).set_index("run")
        shown["PPC"] = ["–" if pd.isna(number) else f"{number:,}" for number in shown["PPC"]]
        self.picture.value, names = str(markup.Markup(markup.table(shown))), shown.index.tolist()
        if names != list(self.chosen.options):
            new = set(self.started) - set(self.chosen.options)  # a started run shows its curve as soon as it has one
            kept = [name for name in names if name in self.chosen.value or name in new]
            with self.quietly():
                self.chosen.options = names
                self.chosen.value = kept
            self.draw_curves()

    def draw_curves(self) -> None:
        stage, averages, losses = self.curve.value, {}, {}
        for name in self.chosen.value:
            with suppress(LabError):  # damaged or of another version: its log has no agreed meaning
                run = OpenRun(Run.at(self.home / name), self.run.runtime)
                loss = run.losses(stage).groupby("images")["loss"].mean()
                if stage == ACCURACY and run.averages:
                    averages[name] = run.averages
                elif len(loss):
                    losses[name] = (loss.index, loss)
        self.curves.layout.display = "" if averages or losses else "none"
        if averages:
            self.curves.value = plots.accuracy_per_task(averages).png()
        elif losses:
            self.curves.value = plots.training_curves(losses, self.curve.label).png()

    def start(self) -> None:
        """Start (or resume) the run of the settings below, in a process of its own."""
        with errors_shown_in(self.note):
            chosen = {"method": self.method.value, "seed": self.seed.value}
            self._begin(configured(self.preset.value, self.settings.value, **chosen))

    def resume(self) -> None:
        with errors_shown_in(self.note):
            for name in self._picked():
                if (run := Run.at(self.home / name)).results():
                    raise LabError(f"The run {name} is finished: choose an unfinished one.")
                self._begin(run.experiment)

    def _begin(self, experiment: Experiment) -> None:
        started = runs.Started(experiment, self.home, str(self.run.runtime.device))
        self.started[started.run.folder.name] = started
        self.note.value = f"{started.run.folder.name}: starting."
        self._watch()

    def stop(self) -> None:
        """Ask the chosen running runs to save and leave; when none of them runs, all that were started here."""
        with errors_shown_in(self.note):
            going = [name for name, started in self.started.items() if started.going]
            running = [name for name in self.chosen.value if name in going or in_use(self.home / name)]
            for name in running or going or self._picked():
                self.started[name].terminate() if name in going else runs.stop(Run.at(self.home / name))
                self.note.value = f"{name}: asked to stop."

    def _picked(self) -> list[str]:
        if not self.chosen.value:
            raise LabError("No run is chosen: choose one in the list.")
        return list(self.chosen.value)

    def _watch(self) -> None:
        """Look at running runs every second, in a thread, until there is none to look at."""
        if not self.watcher.is_alive():
            self.watcher = threading.Thread(target=self._look, daemon=True)
            self.watcher.start()

    def _look(self) -> None:
        ended: set[str] = set()  # runs whose end was shown
        while True:
            going = {name for name, started in self.started.items() if started.going}
            for name in self.started.keys() - ended:
                self.bar.value, sentence = runs.progress(self.started[name].run)
                self.note.value = f"{name}: {self.started[name].reason() or sentence}"
            ended = set(self.started) - going
            self.refresh()
            self.draw_curves()
            if not (going or self.follow.value or any(started.going for started in self.started.values())):
                return
            time.sleep(EVERY)
