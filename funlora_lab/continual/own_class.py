"""A class of one's own over a stored base, learned from a few pictures (N, C, H, W).

What it is, its name and its pictures say. Its adapter is trained as if it were the first class after those of the data,
so it comes out the same whichever others the run has, from the numbers of the class of the data whose flow loss on its
images is lowest; beside them it stands under an index that is free.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from unicodedata import normalize

import torch
from torch import Tensor

from funlora_lab.adapters import LABEL
from funlora_lab.continual import class_files
from funlora_lab.continual.classifier import synthetic, train_classifier
from funlora_lab.continual.finished import OpenRun
from funlora_lab.data import Dataset, Images, pictures_of, read_pictures, to_floats
from funlora_lab.errors import LabError
from funlora_lab.experiment import place
from funlora_lab.flow import flow_loss
from funlora_lab.seeds import stream
from funlora_lab.store import fingerprint, make_folder, safe_name, write_atomically
from funlora_lab.systems import Generator, draw
from funlora_lab.training import Runtime

LEAST = 2  # images of a class: one to learn from and one to be scored on


def images_in(folder: Path | str, size: int, channels: int, check: Callable[[], None] = lambda: None) -> Tensor:
    """Every picture of a folder as uint8 (N, C, size, size), cut to its central square; ``check()`` may stop it."""
    folder = place(folder)
    if not folder.is_dir():
        raise LabError(f"There is no folder {folder}: accepted is a folder of pictures of one class.")
    return read_pictures(pictures_of(folder), size, channels, check)


def shifted(images: Tensor) -> Tensor:
    """Every image and its eight copies moved by one pixel, dark at the edge: (N, C, H, W) -> (9 N, C, H, W)."""
    padded, (H, W) = torch.nn.functional.pad(images, (1, 1, 1, 1)), images.shape[-2:]
    return torch.cat([padded[..., 1 + y : 1 + y + H, 1 + x : 1 + x + W] for y in (0, -1, 1) for x in (0, -1, 1)])


def with_class(dataset: Dataset, name: str, images: Tensor, move: bool) -> Dataset:
    """The data set with one class more: a fifth of its images (one or more) to test, the others to learn from."""
    accepted, cls = dataset.train.pixels.shape[1:], len(dataset.classes)
    name, known = normalize("NFC", name), [normalize("NFC", known) for known in dataset.classes]
    if not name.strip() or not name.isprintable() or name in known:
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


@torch.no_grad()
def nearest(run: OpenRun, images: Tensor) -> int:
    """The class of the run whose flow loss on uint8 images (N, C, H, W), at most 64 of them, is lowest."""
    x1 = to_floats(images[:64]).repeat(max(1, 32 // len(images)), 1, 1, 1)
    generator, device = stream(0, "nearest class"), run.runtime.device
    x0, t = torch.randn(x1.shape, generator=generator), torch.rand(len(x1), generator=generator)
    given = [one.to(device) for one in (x1, x0, t)]
    known = [cls for cls in run.known if cls < len(run.classes)]
    return min(known, key=lambda cls: flow_loss(run.source(cls).velocity(), *given).mean().item())


@dataclass(frozen=True)
class OwnClass:
    """What came of it: the generator that also knows class ``cls``, its samples and accuracies by class name."""

    run: OpenRun
    name: str
    cls: int
    generator: Generator
    start: str  # the class from whose numbers it started
    samples: Tensor  # uint8 (N, C, H, W)
    right: int  # of its test images
    tested: int
    before: dict[str, float]  # accuracy on real test images among the run's classes
    after: dict[str, float]  # among all that the run knows now and the new one

    def export(self) -> Path:
        """Write the class as a file that ``funlora import`` brings into any run over the same base; its path."""
        row, base = self.generator.rows[self.cls], fingerprint(self.run.network.state_dict())
        path = self.run.run.folder / "exported" / f"{fingerprint(row)[:8]}-{safe_name(self.name)}.safetensors"
        make_folder(path.parent)
        write_atomically(path, class_files.content(self.run.adapters, row, base, self.cls, self.name))
        return path


def learn(run: OpenRun, name: str, images: Tensor, move=False, runtime: Runtime | None = None, **settings) -> OwnClass:
    """Train an adapter for a class of uint8 images (N, C, H, W) and score all classes; the run itself does not change.

    ``move`` adds copies shifted by a pixel, ``settings`` change the experiment.
    A stopped training resumes.
    """
    if not run.generator.frozen:
        raise LabError(f"The method {run.experiment.method} has no frozen base to add a class to: choose another run.")
    e, dataset = run.experiment.but(**settings), with_class(run.context.dataset, name, images, move)
    near = nearest(run, images)
    first, cls, known = len(run.classes), run.free_index(name), run.generator
    generator, start = copy(known), run.full_row(near)
    start = {name: value for name, value in start.items() if name != LABEL or run.adapters.learns_label}
    what = {"dataset": dataset, "tasks": [*run.tasks, [first]], "runtime": runtime or run.runtime, "seconds": {}}
    context = generator.context = replace(run.context, experiment=e, **what)
    artefact = generator.artefact_of(first, start=fingerprint(start)[:16])
    row = generator.learned_alone(artefact, first, dataset.train.of(first).pixels, start)
    generator.rows, generator.keys = known.rows | {cls: row}, known.keys | {cls: artefact.key}
    test = replace(dataset.test, labels=dataset.test.labels.where(dataset.test.labels != first, cls))
    context = replace(context, dataset=replace(dataset, test=test) if cls != first else dataset)
    others = sorted(c for c in known.rows if c >= first and c != cls)
    sources = {c: generator.source(c) for c in [*run.order, *others, cls]}
    samples = {c: draw(context, source, c, e.samples_per_class)[0] for c, source in sources.items()}
    _, predicted, true = train_classifier(context, list(sources), *synthetic(context, sources, samples))
    scored = {c: dataset.classes[min(c, first)] for c in [*run.order, cls]}  # of the others there are no real images
    after = {known: (predicted == true)[true == c].float().mean().item() for c, known in scored.items()}
    right, tested = int((predicted == true)[true == cls].sum()), int((true == cls).sum())
    what = generator, run.known[near], samples[cls], right, tested
    return OwnClass(run, name, cls, *what, run.class_accuracies, after)
