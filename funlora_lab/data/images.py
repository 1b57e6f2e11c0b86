"""Images and labels as tensors, the order of classes, and their division into tasks.

Images are uint8 (N, C, H, W) and become floats in [-1, 1] only inside a training step.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment
from funlora_lab.seeds import stream
from funlora_lab.store import fingerprint


def to_floats(images: Tensor) -> Tensor:
    """uint8 -> floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8, rounded and clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Images:
    """pixels uint8 (N, C, H, W) and labels int64 (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, classes: list[int] | int) -> "Images":
        """Only the images of one class or several, in their stored order."""
        return self.at(torch.isin(self.labels, torch.tensor(classes)))

    def at(self, index: Tensor) -> "Images":
        """Only the images of these indices, or where a mask (N,) is true."""
        return Images(self.pixels[index], self.labels[index])

    def on(self, device: torch.device, order: list[int]) -> tuple[Tensor, Tensor]:
        """(pixels, the places of their labels in ``order`` (N,)) on a device, for a training."""
        places = torch.tensor([order.index(cls) for cls in self.labels.tolist()])
        return self.pixels.to(device), places.to(device)

    def divided(self, fraction: float) -> tuple["Images", "Images"]:
        """(the rest, a fixed share of every class): what is held out is the same for every seed of an experiment."""
        held = torch.zeros(len(self), dtype=torch.bool)
        for cls in self.labels.unique().tolist():
            mine = (self.labels == cls).nonzero()[:, 0]
            order = torch.randperm(len(mine), generator=stream(0, "valid", cls))
            held[mine[order[: round(fraction * len(mine))]]] = True
            if held[mine].all():
                raise LabError(f"valid_fraction={fraction} leaves no images of class {cls} to train on: lower it.")
        return self.at(~held), self.at(held)


class Later(Images):
    """Images that ``read()`` gives when they are first looked at: who only reads what is stored needs none."""

    def __init__(self, read: Callable[[], Images]):
        object.__setattr__(self, "read", cache(read))

    pixels = property(lambda self: self.read().pixels)
    labels = property(lambda self: self.read().labels)

    def of(self, classes: list[int] | int) -> Images:
        return Later(lambda: self.read().of(classes))


@dataclass(frozen=True)
class Dataset:
    """``train`` to learn from, ``valid`` (held out of the training images) for choices, ``test`` for the score."""

    name: str
    classes: tuple[str, ...]
    train: Images
    valid: Images
    test: Images
    unlabelled: Images | None = None  # those on which the base is pre-trained; their labels mean nothing

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every pixel and label: what an artefact trained on these images depends on."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for part in (self.train, self.valid, self.test):
            digest.update(part.pixels.numpy().tobytes())
            digest.update(part.labels.numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def unlabelled_fingerprint(self) -> str | None:
        return self.unlabelled and fingerprint({"pixels": self.unlabelled.pixels})[:16]


def class_order(order: str, classes: int) -> list[int]:
    """The order in which classes are learned: natural, shuffled-SEED, or indices such as 3,0,1,2."""
    if order.startswith("shuffled-"):
        seed = int(order.removeprefix("shuffled-"))
        return torch.randperm(classes, generator=stream(seed, "class order")).tolist()
    indices = list(range(classes)) if order == "natural" else [int(word) for word in order.split(",")]
    if sorted(indices) != list(range(classes)):
        raise LabError(f"class_order={order}: accepted is every class index from 0 to {classes - 1} exactly once.")
    return indices


def tasks(experiment: Experiment, classes: int) -> list[list[int]]:
    """The classes of every task; ``split=a-b`` gives task 1 a classes and every later task b."""
    if classes < 2:
        raise LabError(f"data={experiment.data}: there is 1 class; accepted are at least two, to divide into tasks.")
    first, later = (int(word) for word in experiment.split.split("-"))
    order = class_order(experiment.class_order, classes)
    if first >= classes or (classes - first) % later:
        few = classes // 5 or 1
        fault = f"{classes} classes cannot be divided into {first} and then {later} at a time"
        raise LabError(f"split={experiment.split}: {fault}; accepted is for example {few + classes % few}-{few}.")
    return [order[:first]] + [order[i : i + later] for i in range(first, classes, later)]
