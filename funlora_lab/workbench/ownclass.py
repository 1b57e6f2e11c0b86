"""A class of one's own over a stored base: an adapter trained on a few images, its samples and what all classes score.

Letters: N images, C channels, H x W pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from funlora_lab import classfiles, continual
from funlora_lab.data import Dataset, Images
from funlora_lab.disk import make_folder, safe_name, write_atomically
from funlora_lab.errors import LabError
from funlora_lab.folders import read_picture
from funlora_lab.frozen import FrozenBase
from funlora_lab.opened import OpenRun
from funlora_lab.sampling import draw
from funlora_lab.training import Event, Runtime
from funlora_lab.work import Work

LEAST = 2  # images of a class: one to learn from and one to be scored on


@dataclass(frozen=True)
class OwnClass:
    """What came of it: the generator that now also knows class ``cls``, its samples and accuracies by class name."""

    name: str
    cls: int
    learner: FrozenBase
    samples: Tensor  # uint8 (N, C, H, W)
    before: dict[str, float]  # accuracy on real test images among the run's classes
    after: dict[str, float]  # among those and the new one


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
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    H, W = images.shape[-2:]
    return torch.cat([padded[..., 1 + y : 1 + y + H, 1 + x : 1 + x + W] for y in (0, -1, 1) for x in (0, -1, 1)])


def with_class(dataset: Dataset, name: str, images: Tensor, move: bool) -> Dataset:
    """The data set with one class more: a fifth of its images (one or more) to test, the others to learn from."""
    e = dataset.train.pixels.shape[1:]
    if not name.strip() or not name.isprintable() or name in dataset.classes:
        raise LabError(f"The class name '{name}': accepted is a new printable name, not {', '.join(dataset.classes)}.")
    if len(images) < LEAST:
        raise LabError(f"{len(images)} image of the class {name}: accepted are at least {LEAST}.")
    if images.shape[1:] != e:
        raise LabError(f"Images of {tuple(images.shape[1:])}: accepted by this run are {tuple(e)}.")
    held = max(1, len(images) // 5)
    learned = shifted(images[held:]) if move else images[held:]
    cls = len(dataset.classes)

    def joined(part: Images, more: Tensor) -> Images:
        labels = torch.full((len(more),), cls)
        return Images(torch.cat([part.pixels, more]), torch.cat([part.labels, labels]))

    return replace(
        dataset,
        classes=(*dataset.classes, name),
        train=joined(dataset.train, learned),
        test=joined(dataset.test, images[:held]),
    )


def learn(
    opened: OpenRun, name: str, images: Tensor, move: bool = False, runtime: Runtime | None = None, **settings
) -> Iterator[Event]:
    """Train an adapter for a new class over the run's base and score all classes; yields events, returns OwnClass.

    ``images`` uint8 (N, C, H, W); ``move`` adds copies shifted by a pixel; ``settings`` change the experiment, for
    example adapter_images. Everything is stored as stages, so the same images are trained once and a stop resumes.
    Nothing of the run itself changes.
    """
    old = opened.learner
    if not isinstance(old, FrozenBase):
        raise LabError(
            f"The method {opened.experiment.method} has no frozen base to add a class to: choose another run."
        )
    runtime = runtime or opened.runtime
    dataset = with_class(opened.work.dataset, name, images, move)
    cls = len(dataset.classes) - 1
    experiment = opened.experiment.but(**settings)
    work = Work(experiment, dataset, [*opened.tasks, [cls]], opened.work.store, runtime)
    learner = FrozenBase(work)
    learner.net, learner.key, learner.labels, learner.adapters = old.net, old.key, old.labels, old.adapters
    learner.rows, learner.keys = dict(old.rows), dict(old.keys)
    yield from learner.learn_side_by_side([cls])

    known = {*learner.labels, *learner.rows}  # without classes that were taken out of the run
    everything = [c for classes in work.tasks for c in classes if c in known]
    samples, sources = {}, {c: learner.source(c) for c in everything}
    for c, source in sources.items():
        stage = continual.sample_stage(work, source, c)
        samples[c], _ = yield from draw(stage, source.velocity, experiment, c, experiment.samples_per_class, runtime)
    drawn, origin = continual.synthetic(work, sources, samples)
    _, predicted, true = yield from continual.train_classifier(work, everything, drawn, origin)
    after = {dataset.classes[c]: (predicted == true)[true == c].float().mean().item() for c in everything}
    return OwnClass(name, cls, learner, samples[cls], accuracies(opened), after)


def export(opened: OpenRun, learned: OwnClass) -> Path:
    """Write the class as a file that ``funlora import`` brings into any run over the same base; returns its path."""
    folder = opened.run.folder / "exported"
    make_folder(folder)
    path = folder / f"{learned.cls}-{safe_name(learned.name)}.safetensors"
    base = classfiles.base_fingerprint(opened.network)
    row, adapters = learned.learner.rows[learned.cls], opened.adapters
    write_atomically(path, classfiles.content(adapters, row, base, learned.cls, learned.name))
    return path


def accuracies(opened: OpenRun) -> dict[str, float]:
    """The run's closing accuracy on the real test images of each class, by name."""
    return {
        name: row[i] / sum(row)
        for i, (name, row) in enumerate(zip(opened.classes, opened.results["confusion"], strict=True))
    }
