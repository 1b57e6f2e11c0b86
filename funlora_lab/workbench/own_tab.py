"""Panel 5: a class of one's own, from a folder of pictures or drawn by hand, over the stored base."""

import ipywidgets as widgets
import pandas as pd
import torch
from torch import Tensor

from funlora_lab.errors import LabError
from funlora_lab.opened import OpenRun
from funlora_lab.workbench import markup, ownclass
from funlora_lab.workbench.markup import Markup, problem
from funlora_lab.workbench.parts import Job, Panel, button, control, row

LARGEST = 12  # pixels a side of an image that is drawn on buttons
DARK, BRIGHT = "#20262e", "#f2c14e"


class Canvas(widgets.GridBox):
    """Pixels as buttons: a click lights one or darkens it again; Tab and Enter do as well."""

    def __init__(self, size: int):
        self.size = size
        cell = widgets.Layout(width="26px", height="26px", margin="1px", padding="0")
        self.cells = [
            widgets.Button(layout=cell, tooltip=f"row {i // size + 1}, column {i % size + 1}") for i in range(size**2)
        ]
        super().__init__(self.cells, layout=widgets.Layout(grid_template_columns=f"repeat({size}, 28px)"))
        for one in self.cells:
            one.style.button_color = DARK
            one.on_click(lambda clicked: self._turn(clicked))

    def _turn(self, cell: widgets.Button) -> None:
        cell.style.button_color = DARK if cell.style.button_color == BRIGHT else BRIGHT

    @property
    def pixels(self) -> Tensor:
        """uint8 (1, size, size): 255 where lit."""
        lit = [255 * (one.style.button_color == BRIGHT) for one in self.cells]
        return torch.tensor(lit, dtype=torch.uint8).reshape(1, self.size, self.size)

    def clear(self) -> None:
        for one in self.cells:
            one.style.button_color = DARK


class OwnClassPanel(Panel):
    """Pictures in, an adapter out: samples of the new class, the accuracy of all before and after, a file to share."""

    def __init__(self, opened: OpenRun):
        super().__init__()
        self.opened = opened
        self.drawings: list[Tensor] = []
        self.learned: ownclass.OwnClass | None = None
        e = opened.experiment
        self.name = control(widgets.Text, "name of the class", "mine", "240px")
        self.folder = control(
            widgets.Text, "folder of pictures", "", "380px", placeholder="empty: the drawings below are used"
        )
        self.canvas = Canvas(e.image_size) if e.image_size <= LARGEST and e.channels == 1 else None
        self.drawn = widgets.HTML()
        self.move = control(widgets.Checkbox, "also learn each shifted by one pixel", True, "300px", indent=False)
        self.images = control(
            widgets.IntSlider, "images seen in training", min(e.adapter_images, 4000), "360px", min=100, max=16_000
        )
        self.images.step = 100
        self.job = Job(opened.runtime.device)
        self.train_button = button("Train the class", self.train, "cogs", "primary")
        self.export_button = button("Export as a file", self.export, "download")
        self.export_button.disabled = True
        self.exported = widgets.HTML()
        draw = (
            [
                widgets.HTML("Draw it: light pixels by clicking, add the drawing, draw another way of writing it."),
                row(
                    self.canvas,
                    widgets.VBox(
                        [
                            button("Add the drawing", self.add_drawing, "plus"),
                            button("Clear the canvas", self.canvas.clear, "eraser"),
                            button("Forget all drawings", self.forget, "trash"),
                            self.drawn,
                        ]
                    ),
                ),
            ]
            if self.canvas is not None
            else []
        )
        self.children = [
            row(self.name, self.folder),
            *draw,
            row(self.move, self.images),
            row(self.train_button, self.job),
            self.picture,
            row(self.export_button, self.exported),
        ]
        self.forget()

    def add_drawing(self) -> None:
        """Keep what is on the canvas as one picture of the class."""
        if not self.canvas.pixels.any():
            self.drawn.value = str(problem("The canvas is empty: light some pixels first."))
            return
        self.drawings.append(self.canvas.pixels)
        images = torch.stack(self.drawings)
        count = f"{len(images)} drawing" + ("s" if len(images) > 1 else "")
        shown = markup.picture(markup.row_of_images(images), markup.scale_for(images), count)
        self.drawn.value = str(Markup(f"{count}<br>{shown}"))
        self.canvas.clear()

    def forget(self) -> None:
        self.drawings = []
        self.drawn.value = f"no drawing yet; at least {ownclass.LEAST} are needed"

    def pictures(self) -> Tensor:
        """The class's images, uint8 (N, C, H, W): of the folder, or the drawings."""
        e = self.opened.experiment
        if self.folder.value.strip():
            return ownclass.images_in(self.folder.value.strip(), e.image_size, e.channels)
        if not self.drawings:
            raise LabError("There is no picture of the class: name a folder, or draw some.")
        return torch.stack(self.drawings)

    def train(self) -> None:
        """Train the class in a thread; the same pictures and settings resume or reuse what is stored."""
        self.job.begin(self._train)

    def _train(self) -> None:
        self.export_button.disabled, self.learned = True, None
        events = ownclass.learn(
            self.opened,
            self.name.value,
            self.pictures(),
            self.move.value,
            self.job.runtime,
            adapter_images=self.images.value,
        )
        self.learned = self.job.follow(events)
        self.picture.value = str(outcome(self.learned))
        self.export_button.disabled = False

    def export(self) -> None:
        """Write the class as a file beside the run."""
        try:
            path = ownclass.export(self.opened, self.learned)
            self.exported.value = f"Written: <code>{path}</code>, {path.stat().st_size / 1000:.1f} kB."
        except LabError as reason:
            self.exported.value = str(problem(reason))


def outcome(learned: ownclass.OwnClass, count: int = 12) -> Markup:
    """Samples of the new class, and the accuracy of every class before and after it was added."""
    images = learned.samples[:count]
    shown = markup.picture(markup.row_of_images(images), markup.scale_for(images), f"samples of {learned.name}")
    frame = pd.DataFrame({"before": learned.before, "after": learned.after}).T
    means = frame.mean(axis=1)
    frame.insert(0, "mean", means)
    return Markup(
        f"<p>Samples of <b>{markup.escape(learned.name)}</b></p>{shown}"
        f"<p>Accuracy on real test images, by class</p>{markup.table(frame[['mean', *learned.after]], 3)}"
    )
