"""The workbench: six panels of widgets over a stored run. Every panel is also plain functions (see panels.py).

bench = open_workbench("digits")
bench.functions, bench.samples, bench.layers, bench.runs, bench.own_class, bench.report
"""

from functools import cached_property
from html import escape
from pathlib import Path

import ipywidgets as widgets
from IPython.display import display

from funlora_lab.config import override
from funlora_lab.errors import LabError
from funlora_lab.opened import OpenRun, open_folder, open_run
from funlora_lab.presets import preset
from funlora_lab.store import Run
from funlora_lab.workbench import markup, report, runs
from funlora_lab.workbench.functions_tab import FunctionsPanel
from funlora_lab.workbench.layers_tab import LayersPanel
from funlora_lab.workbench.markup import Markup
from funlora_lab.workbench.own_tab import OwnClassPanel
from funlora_lab.workbench.parts import Job, Panel, button, control, row, told
from funlora_lab.workbench.runs_tab import RunsPanel
from funlora_lab.workbench.samples_tab import SamplesPanel


class ReportPanel(Panel):
    """Panel 6: one click writes a run as a single HTML page."""

    def __init__(self, opened: OpenRun):
        super().__init__()
        self.opened = opened
        frame = runs.chosen(runs.table(opened.run.folder.parent), state="finished")
        names = frame["run"].tolist()
        self.run = control(widgets.Dropdown, "run", opened.run.folder.name, "480px", options=names)
        self.write_button = button("Write the report", self.write, "file-text-o", "primary")
        self.job = Job(opened.runtime.device)
        self.path: Path | None = None
        self.children = [row(self.run, self.write_button), self.job, self.picture]

    def write(self) -> None:
        self.job.begin(self._write)

    def _write(self) -> None:
        mine = self.run.value == self.opened.run.folder.name
        opened = self.opened if mine else open_folder(self.opened.run.folder.parent / self.run.value)
        self.path = report.write(opened)
        content = self.path.read_bytes()
        address = markup.data_address(content, "text/html")
        self.picture.value = str(
            Markup(
                f"Written: <code>{escape(str(self.path))}</code>, {len(content) / 1000:.0f} kB. "
                f'<a download="{escape(self.run.value)}.html" href="{address}">Save a copy</a>'
            )
        )


class Workbench:
    """The panels over one run, each made when it is first asked for."""

    def __init__(self, opened: OpenRun):
        self.opened = opened

    functions = cached_property(lambda self: FunctionsPanel(self.opened))
    samples = cached_property(lambda self: SamplesPanel(self.opened))
    layers = cached_property(lambda self: LayersPanel(self.opened))
    runs = cached_property(lambda self: RunsPanel(self.opened))
    own_class = cached_property(lambda self: OwnClassPanel(self.opened))
    report = cached_property(lambda self: ReportPanel(self.opened))

    def __repr__(self) -> str:
        r = self.opened.results
        return f"Workbench over {self.opened.run.folder.name}: LA {r['LA']:.4f}, AIA {r['AIA']:.4f}"


def open_workbench(
    preset_name: str = "digits", method: str = "funlora", seed: int = 0, settings: str = "", device: str = "auto"
) -> Workbench:
    """The workbench over the stored run of these settings; a missing run is trained first, with its progress shown.

    ``settings`` are further ``key=value`` words with spaces between them.
    """
    experiment = override(preset(preset_name), [*settings.split(), f"method={method}", f"seed={seed}"])
    if Run.of(experiment).results():
        return Workbench(open_run(experiment, device))
    bar, note = widgets.FloatProgress(value=0.0, max=1.0, layout=widgets.Layout(width="420px")), widgets.HTML()
    display(widgets.VBox([bar, note]))

    def show(event) -> None:
        bar.value, note.value = told(event)

    try:
        opened = open_run(experiment, device, show)
    except LabError as reason:
        note.value = str(markup.problem(reason))
        raise
    bar.value, bar.bar_style, note.value = 1.0, "success", f"Trained: {opened.run.folder.name}."
    return Workbench(opened)
