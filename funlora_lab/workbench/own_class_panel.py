"""Panel 5: a class of one's own over a stored base, from pictures (N, C, H, W) of a folder or drawn by hand."""

from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
import torch
from torch import Tensor

from funlora_lab.continual import OpenRun, class_files, synthetic, train_classifier
from funlora_lab.data import Dataset, Images, read_picture
from funlora_lab.errors import LabError
from funlora_lab.store import fingerprint, make_folder, safe_name, write_atomically
from funlora_lab.systems import Generator, draw
from funlora_lab.training import Runtime
from funlora_lab.workbench import markup
from funlora_lab.workbench.panel import Job, Panel, button, control, errors_shown_in, row
from funlora_lab.workbench.report import class_accuracies

LEAST = 2  # images of a class: one to learn from and one to be scored on
LARGEST = 12  # pixels a side of an image that is drawn on buttons
DARK, BRIGHT = "#20262e", "#f2c14e"


def images_in(folder: Path | str, size: int, channels: int) -> Tensor:
    """Every picture of a folder as uint8 (N, C, size, size), cut to its central square."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise LabError(f"There is no folder {folder}: accepted is a folder of pictures of one class.")
    pictures = [read_picture(path, size, channels) for path in sorted(folder.iterdir()) if path.name[0] != "."]
    if not pictures:
        raise LabError(f"{folder} holds no picture: accepted is at least {LEAST} pictures of one class.")
    return torch.stack(pictures)


def shifted(images: Tensor) -> Tensor:
    """Every image and its eight copies moved by one pixel, dark at the edge: (N, C, H, W) -> (9 N, C, H, W)."""
    padded, (H, W) = torch.nn.functional.pad(images, (1, 1, 1, 1)), images.shape[-2:]
    return torch.cat([padded[..., 1 + y : 1 + y + H, 1 + x : 1 + x + W] for y in (0, -1, 1) for x in (0, -1, 1)])


def with_class(dataset: Dataset, name: str, images: Tensor, move: bool) -> Dataset:
    """The data set with one class more: a fifth of its images (one or more) to test, the others to learn from."""
    accepted, cls = dataset.train.pixels.shape[1:], len(dataset.classes)
    if not name.strip() or not name.isprintable() or name in dataset.classes:
        raise LabError(f"The class name '{name}': accepted is a new printable name, not {', '.join(dataset.classes)}.")
    if len(images) < LEAST:
        raise LabError(f"{len(images)} image of the class {name}: accepted are at least {LEAST}.")
    if images.shape[1:] != accepted:
        raise LabError(f"Images of {tuple(images.shape[1:])}: accepted by this run are {tuple(accepted)}.")

    def joined(known: Images, more: Tensor) -> Images:
        return Images(torch.cat([known.pixels, more]), torch.cat([known.labels, torch.full((len(more),), cls)]))

    held = max(1, len(images) // 5)
    learned = shifted(images[held:]) if move else images[held:]
    train, test = joined(dataset.train, learned), joined(dataset.test, images[:held])
    return replace(dataset, classes=(*dataset.classes, name), train=train, test=test)


@dataclass(frozen=True)
class OwnClass:
    """What came of it: the generator that also knows class ``cls``, its samples and accuracies by class name."""

    run: OpenRun
    name: str
    cls: int
    generator: Generator
    samples: Tensor  # uint8 (N, C, H, W)
    before: dict[str, float]  # accuracy on real test images among the run's classes
    after: dict[str, float]  # among those and the new one

    def outcome(self) -> markup.Markup:
        """Samples of the new class, and the accuracy of every class before and after it was added."""
        frame = pd.DataFrame({"before": self.before, "after": self.after}).T
        frame.insert(0, "mean", frame.mean(axis=1))
        samples = markup.picture(self.samples[:12], f"samples of {self.name}")
        scores = markup.table(frame[["mean", *self.after]], 3)
        title = f"<p>Samples of <b>{markup.escape(self.name)}</b></p>"
        return markup.Markup(f"{title}{samples}<p>Accuracy on real test images, by class</p>{scores}")

    def export(self) -> Path:
        """Write the class as a file that ``funlora import`` brings into any run over the same base; its path."""
        path = self.run.run.folder / "exported" / f"{self.cls}-{safe_name(self.name)}.safetensors"
        make_folder(path.parent)
        row, base = self.generator.rows[self.cls], fingerprint(self.run.network.state_dict())
        write_atomically(path, class_files.content(self.run.adapters, row, base, self.cls, self.name))
        return path


def learn(run: OpenRun, name: str, images: Tensor, move=False, runtime: Runtime | None = None, **settings) -> OwnClass:
    """Train an adapter for a class of uint8 images (N, C, H, W) and score all classes; the run itself does not change.

    ``move`` adds copies shifted by a pixel; ``settings`` change the experiment. A stopped training resumes.
    """
    if not run.generator.frozen:
        raise LabError(f"The method {run.experiment.method} has no frozen base to add a class to: choose another run.")
    e, dataset = run.experiment.but(**settings), with_class(run.context.dataset, name, images, move)
    cls, generator = len(run.classes), copy(run.generator)
    generator.rows, generator.keys = dict(generator.rows), dict(generator.keys)
    what = {"dataset": dataset, "tasks": [*run.tasks, [cls]], "runtime": runtime or run.runtime, "seconds": {}}
    context = generator.context = replace(run.context, experiment=e, **what)
    generator.learn_classes([cls])
    known = {*generator.labels, *generator.rows}  # without classes that were taken out of the run
    sources = {c: generator.source(c) for c in context.classes if c in known}
    samples = {c: draw(context, source, c, e.samples_per_class)[0] for c, source in sources.items()}
    _, predicted, true = train_classifier(context, list(sources), *synthetic(context, sources, samples))
    after = {dataset.classes[c]: (predicted == true)[true == c].float().mean().item() for c in sources}
    return OwnClass(run, name, cls, generator, samples[cls], class_accuracies(run), after)


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

    def pictures(self) -> Tensor:
        """The class's images, uint8 (N, C, H, W): of the folder, or the drawings."""
        e, folder = self.run.experiment, self.folder.value.strip()
        if not folder and not self.drawings:
            raise LabError("There is no picture of the class: name a folder, or draw some.")
        return images_in(folder, e.image_size, e.channels) if folder else torch.stack(self.drawings)

    def _train(self) -> None:
        """Train the class; the same pictures and settings resume or reuse what is stored."""
        self.export_button.disabled, self.learned = True, None
        what = (self.name.value, self.pictures(), self.move.value, self.job.runtime)
        self.learned = learn(self.run, *what, adapter_images=self.images.value)
        self.picture.value = str(self.learned.outcome())
        self.export_button.disabled = False

    def export(self) -> None:
        with errors_shown_in(self.exported):
            path = self.learned.export()
            self.exported.value = f"Written: <code>{path}</code>, {path.stat().st_size / 1000:.1f} kB."
