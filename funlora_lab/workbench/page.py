"""The workbench: panels over one stored run that know of each other. What they show is also plain functions.

bench = open_workbench("digits")
bench.lens, bench.layers, bench.samples, bench.confusion, bench.own_class, bench.runs, bench.report
"""

from functools import cached_property
from html import escape

from IPython import get_ipython
from IPython.display import DisplayHandle, display
from traitlets import Unicode

from funlora_lab.adapters import METHODS
from funlora_lab.continual import OpenRun, open_folder, open_run
from funlora_lab.continual import run as run_experiment
from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment
from funlora_lab.presets import configured
from funlora_lab.store import Run
from funlora_lab.training import Runtime
from funlora_lab.workbench import report, runs
from funlora_lab.workbench.controls import button, place, row
from funlora_lab.workbench.images import Watching
from funlora_lab.workbench.lens_panel import LayerPanel, LensPanel
from funlora_lab.workbench.markup import Markup, data_address, problem
from funlora_lab.workbench.own_class_panel import OwnClassPanel
from funlora_lab.workbench.panel import Working, held
from funlora_lab.workbench.runs_panel import RunsPanel
from funlora_lab.workbench.samples_panel import RUNS, ConfusionPanel, SamplesPanel


class ReportPanel(Working):
    title, path, written = "which writes a run as a page", None, held(Unicode)

    def renew(self) -> None:
        self.written = ""
        words = f"Write the report of {self.run.run.folder.name}"
        self.body = row(button("write", words, "main"), self.work_places) + place("note") + place("written")

    def press_write(self) -> None:
        self.begin(self._write)

    def _write(self) -> None:
        self.path = report.write(self.run)
        content = self.path.read_bytes()
        link = f'download="{escape(self.run.run.folder.name)}.html" href="{data_address(content, "text/html")}"'
        self.written = f"{len(content) / 1000:.0f} kB in the run's folder. <a {link}>Save a copy</a>"


class Workbench:
    """Panels over ``run``, made when first asked for."""

    PANELS = ("lens", "layers", "samples", "confusion", "own_class", "runs", "report")

    def __init__(self, run: OpenRun):
        self.run, self._opened = run, {}
        self._texts = {name: method.text for name, method in METHODS.items()}

    lens = cached_property(lambda self: LensPanel(self))
    layers = cached_property(lambda self: LayerPanel(self))
    samples = cached_property(lambda self: SamplesPanel(self))
    confusion = cached_property(lambda self: ConfusionPanel(self))
    runs = cached_property(lambda self: RunsPanel(self))
    own_class = cached_property(lambda self: OwnClassPanel(self))
    report = cached_property(lambda self: ReportPanel(self))

    def __repr__(self) -> str:
        return f"Workbench over {self.run.run.folder.name}: {runs.scores(self.run.results)}"

    chosen = property(lambda self: self.runs.chosen)  # the runs to compare, by name

    def opened(self) -> list[OpenRun]:
        """The finished runs among those that are chosen."""
        home, here = self.run.run.folder.parent, self.run.run.folder.name
        for name in self.chosen:
            if name != here and name not in self._opened and Run.at(home / name).results():
                self._opened[name] = open_folder(home / name, str(self.run.runtime.device))
        known = self._opened | {here: self.run}
        return [known[name] for name in self.chosen if name in known]

    def redraw(self) -> None:
        """Draw the samples anew that depend on the runs that are chosen."""
        if "samples" in vars(self) and self.samples.view == RUNS:
            self.samples.redraw()

    def renew(self) -> None:
        """Have every panel take over the run and its classes as they are now."""
        for name in self.PANELS:
            if name in vars(self):
                getattr(self, name).renew()

    def open(self, name: str) -> None:
        """Show another finished run in all panels."""
        self.run = open_folder(self.run.run.folder.parent / name, str(self.run.runtime.device))
        self.renew()

    def train(self, experiment: Experiment, runtime: Runtime) -> None:
        """Train a run beside the others, or read it back, and choose it with them."""
        home = self.run.run.folder.parent
        run_experiment(experiment, runtime=runtime, home=home)
        self.runs.choose(Run.of(experiment, home).folder.name)

    def look(self, *_) -> None:
        """Take note of functions that a cell has registered: the newest one is looked at in the lens."""
        known, self._texts = self._texts, {name: method.text for name, method in METHODS.items()}
        new = [name for name, text in self._texts.items() if text != known.get(name) and METHODS[name].matrix]
        if new and self.lens.lens:
            self.lens.renew()
            self.runs.renew()
            with self.lens.telling():
                self.lens.function = new[-1]


def trained(experiment: Experiment, device: str = "auto") -> OpenRun:
    """The run of an experiment; what is missing of it is trained before the reader's eyes."""
    cell = DisplayHandle().display_id

    def show(progress: str, seen: str) -> None:
        display({"text/html": str(Markup(progress + seen))}, raw=True, display_id=cell, update=watching.shown > 0)

    watching = Watching(show)
    return open_run(experiment, device, watching.report, watch=watching.watch)


def open_workbench(preset_name="digits", method="funlora", seed=0, settings="", device="auto") -> Workbench:
    """The workbench over a run, trained first if it is not stored; ``settings`` are further ``key=value`` words."""
    try:
        bench = Workbench(trained(configured(preset_name, settings, method=method, seed=seed), device))
    except LabError as reason:
        display({"text/html": problem(reason)}, raw=True)
        raise
    if shell := get_ipython():
        shell.events.register("post_run_cell", bench.look)
    return bench
