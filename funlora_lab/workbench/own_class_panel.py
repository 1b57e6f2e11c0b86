"""Panel 5: a class of one's own over a stored base, from pictures (N, C, H, W) of a folder or drawn by hand."""

from collections.abc import Callable

import ipywidgets as widgets
import pandas as pd
import torch
from torch import Tensor

from funlora_lab.continual import LEAST, OpenRun, OwnClass, images_in, learn
from funlora_lab.errors import LabError
from funlora_lab.workbench import markup
from funlora_lab.workbench.panel import Job, Panel, button, control, errors_shown_in, row

LARGEST = 12  # pixels a side of an image that is drawn on buttons
DARK, BRIGHT = "#20262e", "#f2c14e"


def outcome(learned: OwnClass) -> markup.Markup:
    """Samples of the new class, and the accuracy of every class before and after it was added."""
    frame = pd.DataFrame({"before": learned.before, "after": learned.after}).T
    frame.insert(0, "mean", frame.mean(axis=1))
    samples = markup.picture(learned.samples[:12], f"samples of {learned.name}")
    scores = markup.table(frame[["mean", *learned.after]], 3)
    title = f"<p>Samples of <b>{markup.escape(learned.name)}</b></p>"
    return markup.Markup(f"{title}{samples}<p>Accuracy on real test images, by class</p>{scores}")


class Canvas(widgets.GridBox):
    """Pixels as buttons: a click lights one or darkens it again; Tab and Enter do as well."""

    def __init__(self, size: int):
        layout = widgets.Layout(width="26px", height="26px", margin="1px", padding="0")
        names = [f"row {i // size + 1}, column {i % size + 1}" for i in range(size**2)]
        self.size, self.cells = size, [widgets.Button(layout=layout, tooltip=name) for name in names]
        super().__init__(self.cells, layout=widgets.Layout(grid_template_columns=f"repeat({size}, 28px)"))
        for one in self.cells:
            one.on_click(self._turn)
        self.clear()

    def _turn(self, cell: widgets.Button) -> None:
        cell.style.button_color = BRIGHT if cell.style.button_color == DARK else DARK

    @property
    def pixels(self) -> Tensor:
        """uint8 (1, size, size): 255 where lit."""
        lit = [255 * (one.style.button_color == BRIGHT) for one in self.cells]
        return torch.tensor(lit, dtype=torch.uint8).reshape(1, self.size, self.size)

    def clear(self) -> None:
        for one in self.cells:
            one.style.button_color = DARK


class OwnClassPanel(Panel):
    def __init__(self, run: OpenRun):
        super().__init__(run)
        e, self.learned, self.job = run.experiment, None, Job(run.runtime.device)
        empty, seen = "empty: the drawings below are used", min(e.adapter.images, 4000)
        self.name = control(widgets.Text, "name of the class", "mine", "240px")
        self.folder = control(widgets.Text, "folder of pictures", "", "380px", placeholder=empty)
        self.move = control(widgets.Checkbox, "also learn each shifted by one pixel", True, "300px", indent=False)
        self.images = control(widgets.IntSlider, "images seen in training", seen, "360px", min=100, max=16000, step=100)
        self.train_button = button("Train the class", lambda: self.job.begin(self._train), "cogs", "primary")
        self.export_button = button("Export as a file", self.export, "download", disabled=True)
        self.drawn, self.exported = widgets.HTML(), widgets.HTML()
        what, how, begin = row(self.name, self.folder), row(self.move, self.images), row(self.train_button, self.job)
        drawing = self._drawing() if e.image_size <= LARGEST and e.channels == 1 else []
        self.children = [what, *drawing, how, begin, self.picture, row(self.export_button, self.exported)]
        self.forget()

    def _drawing(self) -> list[widgets.Widget]:
        self.canvas = Canvas(self.run.experiment.image_size)
        words = "Draw it: light pixels by clicking, add the drawing, draw another way of writing it."
        add = button("Add the drawing", self.add_drawing, "plus")
        clear = button("Clear the canvas", self.canvas.clear, "eraser")
        forget = button("Forget all drawings", self.forget, "trash")
        return [widgets.HTML(words), row(self.canvas, widgets.VBox([add, clear, forget, self.drawn]))]

    def add_drawing(self) -> None:
        if not self.canvas.pixels.any():
            self.drawn.value = markup.problem("The canvas is empty: light some pixels first.")
            return
        self.drawings.append(self.canvas.pixels)
        count = f"{len(self.drawings)} drawing" + ("s" if len(self.drawings) > 1 else "")
        self.drawn.value = str(markup.Markup(f"{count}<br>{markup.picture(torch.stack(self.drawings), count)}"))
        self.canvas.clear()

    def forget(self) -> None:
        self.drawings: list[Tensor] = []
        self.drawn.value = f"no drawing yet; at least {LEAST} are needed"

    def pictures(self, check: Callable[[], None] = lambda: None) -> Tensor:
        """The class's images, uint8 (N, C, H, W): of the folder, or the drawings."""
        e, folder = self.run.experiment, self.folder.value.strip()
        if not folder and not self.drawings:
            raise LabError("There is no picture of the class: name a folder, or draw some.")
        return images_in(folder, e.image_size, e.channels, check) if folder else torch.stack(self.drawings)

    def _train(self) -> None:
        """Train the class; the same pictures and settings resume or reuse what is stored."""
        self.export_button.disabled, self.learned = True, None
        what = (self.name.value, self.pictures(self.job.runtime.check), self.move.value, self.job.runtime)
        self.learned = learn(self.run, *what, adapter_images=self.images.value)
        self.picture.value = str(outcome(self.learned))
        self.export_button.disabled = False

    def export(self) -> None:
        with errors_shown_in(self.exported):
            path = self.learned.export()
            self.exported.value = f"Written: <code>{path}</code>, {path.stat().st_size / 1000:.1f} kB."
