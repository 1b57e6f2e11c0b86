"""The workbench: six panels of widgets over a stored run. What they show is also plain functions beside them.

bench = open_workbench("digits")
bench.functions, bench.samples, bench.layers, bench.runs, bench.own_class, bench.report
"""

from functools import cached_property
from html import escape

import ipywidgets as widgets
from IPython.display import display

from funlora_lab.continual import OpenRun, open_folder, open_run
from funlora_lab.errors import LabError
from funlora_lab.presets import configured
from funlora_lab.store import Run
from funlora_lab.workbench import report, runs
from funlora_lab.workbench.layers_panel import FunctionsPanel, LayersPanel
from funlora_lab.workbench.markup import Markup, data_address, problem
from funlora_lab.workbench.own_class_panel import OwnClassPanel
from funlora_lab.workbench.panel import Job, Panel, button, control, progress_bar, row
from funlora_lab.workbench.runs_panel import RunsPanel
from funlora_lab.workbench.samples_panel import SamplesPanel


class ReportPanel(Panel):
    def __init__(self, run: OpenRun):
        super().__init__(run)
        self.path, self.job = None, Job(run.runtime.device)
        names = runs.table(run.run.folder.parent, state="finished")["run"].tolist()
        self.chosen = control(widgets.Dropdown, "run", run.run.folder.name, "480px", options=names)
        self.write_button = button("Write the report", lambda: self.job.begin(self._write), "file-text-o", "primary")
        self.children = [row(self.chosen, self.write_button), self.job, self.picture]

    def _write(self) -> None:
        mine, folder = self.run.run.folder, self.run.run.folder.parent / self.chosen.value
        self.path = report.write(self.run if folder == mine else open_folder(folder))
        content = self.path.read_bytes()
        link = f'download="{escape(folder.name)}.html" href="{data_address(content, "text/html")}"'
        written = f"Written: <code>{escape(str(self.path))}</code>, {len(content) / 1000:.0f} kB."
        self.picture.value = str(Markup(f"{written} <a {link}>Save a copy</a>"))


class Workbench:
    def __init__(self, run: OpenRun):
        self.run = run

    functions = cached_property(lambda self: FunctionsPanel(self.run))
    samples = cached_property(lambda self: SamplesPanel(self.run))
    layers = cached_property(lambda self: LayersPanel(self.run))
    runs = cached_property(lambda self: RunsPanel(self.run))
    own_class = cached_property(lambda self: OwnClassPanel(self.run))
    report = cached_property(lambda self: ReportPanel(self.run))

    def __repr__(self) -> str:
        return f"Workbench over {self.run.run.folder.name}: {runs.scores(self.run.results)}"


def open_workbench(preset_name="digits", method="funlora", seed=0, settings="", device="auto") -> Workbench:
    """The workbench over a run, trained first if it is not stored; ``settings`` are further ``key=value`` words."""
    experiment, bar, note = configured(preset_name, settings, method=method, seed=seed), progress_bar(), widgets.HTML()
    if not Run.of(experiment).results():
        display(widgets.VBox([bar, note]))

    def show(event) -> None:
        bar.value, note.value = runs.described(event)

    try:
        run = open_run(experiment, device, show)
    except LabError as reason:
        note.value = problem(reason)
        raise
    bar.value, bar.bar_style, note.value = 1.0, "success", f"Trained: {run.run.folder.name}."
    return Workbench(run)
