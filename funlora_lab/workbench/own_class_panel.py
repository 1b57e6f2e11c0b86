"""A class of one's own: drawn or from a folder, trained before one's eyes, and every later class as a file."""

import tempfile
from copy import copy, deepcopy
from html import escape
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from traitlets import Bool, Int, List, Unicode

from funlora_lab.adapters import Adapters
from funlora_lab.continual import LEAST, OwnClass, images_in, learn
from funlora_lab.errors import LabError
from funlora_lab.store import safe_name, write_atomically
from funlora_lab.workbench import markup
from funlora_lab.workbench.controls import button, check, field, place, row, slider
from funlora_lab.workbench.layers import ALONE
from funlora_lab.workbench.panel import Working, held

ENOUGH = 10  # test images from which a share of them is called an accuracy
LARGEST = 12  # pixels a side of an image that is drawn on a grid
DRAWN = "Draw it: press and drag over pixels, or walk with the arrow keys and press Enter; then add the drawing."
SUFFIX = ".safetensors"


def outcome(own: OwnClass) -> str:
    """Samples of the new class, what its few test images say, and the other classes before and after."""
    frame = pd.DataFrame({"before": own.before, "after": {n: own.after.get(n) for n in own.before}}).T
    frame.insert(0, "mean", frame.mean(axis=1))
    share = f"an accuracy of {own.right / own.tested:.0%}" if own.tested >= ENOUGH else "too few to speak of accuracy"
    words = f"{own.right} of its {own.tested} test image{'s'[: own.tested > 1]} recognised: {share}."
    shown = markup.picture(own.samples[:12], f"samples of {own.name}")
    title = f"Samples of <b>{escape(own.name)}</b>, which started from class {escape(own.start)}; {words}"
    return f"<p>{title}</p>{shown}<p>The other classes, accuracy on real images</p>{markup.table(frame, 3)}"


class OwnClassPanel(Working):
    title = "which learns a class of your own"
    name, folder, move, images = held(Unicode, "mine"), held(Unicode), held(Bool, True), held(Int)
    pixels, drawn, outcome, files = held(List), held(Unicode), held(Unicode), held(Unicode)

    def __init__(self, bench):
        self.learned, self.drawings = None, []
        super().__init__(bench)

    def renew(self) -> None:
        e, run, size = self.run.experiment, self.run, self.run.experiment.image_size
        draws = size <= LARGEST and e.channels == 1
        if self.learned and self.learned.run.run is not run.run:
            self.outcome = self.seen = self.bar = ""
        if not run.generator.frozen:
            self.body = markup.problem(f"The method {e.method} has no frozen base to add a class to: open another run.")
            return
        if self.drawings and self.drawings[0].shape != (e.channels, size, size):
            self.drawings = []
        with self.quietly():
            self.images = self.images or min(e.adapter.images, 4000)
            self.pixels = self.pixels if len(self.pixels) == size**2 else [False] * size**2
            hint = "empty: the drawings are used" if draws else "a folder of pictures of one class"
            what = field("name", "name of the class"), field("folder", "folder of pictures", width=300, hint=hint)
            how = check("move", "also learn each moved by a pixel"), slider("images", "images seen", 100, 16000, 100)
            begin = row(button("train", "Train the class", "main"), self.work_places)
            top = row(*what), self._canvas(size) if draws else "", row(*how), begin, place("note", "note")
            self.body = "".join(top) + row(place("seen"), place("outcome")) + place("files")
        self._list()
        self._show_drawings()

    def _canvas(self, size: int) -> str:
        cells = (
            f'<button type="button" data-cell="{i}" aria-label="row {i // size + 1}, column {i % size + 1}"></button>'
            for i in range(size**2)
        )
        grid = f'<div class="cells" style="grid-template-columns:repeat({size},24px)">{"".join(cells)}</div>'
        acts = ("add", "Add the drawing"), ("clear", "Clear the canvas"), ("forget", "Forget all drawings")
        return f"<p>{DRAWN}</p>" + row(grid, f"<div>{row(*(button(*act) for act in acts))}{place('drawn')}</div>")

    def press_add(self) -> None:
        if not any(self.pixels):
            raise LabError("The canvas is empty: light some pixels first.")
        size = self.run.experiment.image_size
        self.drawings = [*self.drawings, 255 * torch.tensor(self.pixels, dtype=torch.uint8).reshape(1, size, size)]
        self.press_clear()
        self._show_drawings()

    def press_clear(self) -> None:
        self.pixels = [False] * len(self.pixels)

    def press_forget(self) -> None:
        self.drawings = []
        self._show_drawings()

    def _show_drawings(self) -> None:
        count = f"{len(self.drawings)} drawing{'s'[: len(self.drawings) != 1]}"
        few = f"; at least {LEAST} are needed, four or more are better" if len(self.drawings) < 4 else ""
        drawn = markup.picture(torch.stack(self.drawings), count) if self.drawings else ""
        self.drawn = f"{count}{few}<br>{drawn}"

    def given(self) -> Tensor:
        """The class's images, uint8 (N, C, H, W): of the folder, or the drawings."""
        e, folder = self.run.experiment, self.folder.strip()
        if not folder and not self.drawings:
            raise LabError("There is no picture of the class: name a folder, or draw some.")
        return images_in(folder, e.image_size, e.channels) if folder else torch.stack(self.drawings)

    def press_train(self) -> None:
        """Train the class; the same pictures and settings resume or reuse what is stored."""
        images, name = self.given(), self.name
        if name in self.run.known.values():
            raise LabError(f"This run already knows a class {name}: choose another name, or remove it first.")
        self.begin(lambda: self._train(name, images))

    def _train(self, name: str, images: Tensor) -> None:
        self.outcome = ""
        with ALONE:  # a network of its own: the panels draw with the run's meanwhile
            run, generator = copy(self.run), copy(self.run.generator)
            generator.net = deepcopy(generator.net)
            generator.adapters = Adapters(generator.net, run.experiment)
        run.generator = generator
        self.learned = learn(run, name, images, self.move, self.runtime, adapter_images=self.images)
        self.outcome = outcome(self.learned)
        self._import(self.learned.export())

    def _import(self, file: Path) -> None:
        """Put the class of a file into the run; every panel then knows it."""
        with ALONE:
            self.run.import_class(file)
        self.bench.renew()

    def press_upload(self, name: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{safe_name(name.removesuffix(SUFFIX))}{SUFFIX}"
            write_atomically(path, content)
            self._import(path)

    def press_remove(self, cls: str) -> None:
        with ALONE:
            self.run.remove_class(int(cls))
        self.bench.renew()

    def press_restore(self, cls: str) -> None:
        """Undo the removal of a class."""
        self._import(self.run.removed_file(int(cls)))

    def press_save(self, cls: str) -> None:
        """Hand the class's file to the browser, which saves it where the user's downloads go."""
        name = f"{cls}-{safe_name(self.run.known[int(cls)])}{SUFFIX}"
        with tempfile.TemporaryDirectory() as folder, ALONE:
            content = self.run.export_class(int(cls), Path(folder) / name).read_bytes()
        self.send({"save": name}, [content])

    def _list(self) -> None:
        """Every class that stands alone, with its file, and those that were taken out."""
        removed, rows = self.run.removed, []
        names = self.run.known | removed
        for cls in sorted({*self.run.generator.rows, *removed}, reverse=True):
            about = "learned by the run" if cls < len(self.run.classes) else "your own"
            acts = {"restore": "Bring back"} if cls in removed else {"save": "Download", "remove": "Remove"}
            pressed = [button(act, words, "", cls, f"{words} class {names[cls]}") for act, words in acts.items()]
            rows.append([f"<b>{escape(names[cls])}</b>", f"{about}{', taken out' * (cls in removed)}", *pressed])
        listed = f'<div class="scrolls" style="max-height:180px">{markup.sheet(rows)}</div>'
        brought = f'<label>Import a class <input type="file" accept="{SUFFIX}" data-press="upload"></label>'
        self.files = f"<b>Classes of this run as files</b>{listed}{row(brought)}"
