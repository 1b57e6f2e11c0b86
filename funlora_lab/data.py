"""Images and labels as tensors, the order of classes, and their division into tasks.

Images are uint8 (N, C, H, W) and become floats in [-1, 1] only inside a training step.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from funlora_lab import folders, store
from funlora_lab.config import Experiment
from funlora_lab.errors import LabError
from funlora_lab.streams import stream


def to_floats(images: Tensor) -> Tensor:
    """uint8 -> floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8, rounded and clipped: how samples are stored, like the images they imitate."""
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
        wanted = torch.tensor([classes] if isinstance(classes, int) else classes)
        keep = torch.isin(self.labels, wanted)
        return Images(self.pixels[keep], self.labels[keep])


@dataclass(frozen=True)
class Dataset:
    """``train`` to learn from, ``valid`` (held out of the training images) for choices, ``test`` for the score.

    ``unlabelled`` holds the pictures (N, C, H, W) on which the base is pre-trained, if any; ``pictures`` is the
    hash of a folder's files, as ``pictures()`` gives it.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    valid: Images
    test: Images
    unlabelled: Tensor | None = None
    pictures: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every pixel and label: what an artefact trained on these images depends on."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for part in (self.train, self.valid, self.test):
            digest.update(part.pixels.numpy().tobytes())
            digest.update(part.labels.numpy().tobytes())
        return digest.hexdigest()[:16]


Parts = tuple[tuple[str, ...], Images, Images]  # class names, training images, test images


def _digits(experiment: Experiment, cache: Path) -> Parts:
    """scikit-learn's 1,797 digits of 8 x 8 pixels and 17 grey levels, with a fixed stratified 80/20 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    pixels = torch.from_numpy(np.rint(source.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(source.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    part = {name: Images(pixels[index], labels[index]) for name, index in (("train", train), ("test", test))}
    return tuple("0123456789"), part["train"], part["test"]


def data_root(experiment: Experiment) -> Path:
    """Where data sets lie: the setting data_root, else FUNLORA_DATA, else ``data`` in the current folder."""
    return Path(experiment.data_root or os.environ.get("FUNLORA_DATA") or "data").expanduser().absolute()


def _cifar(experiment: Experiment, cache: Path) -> Parts:
    """CIFAR10 or CIFAR100 as torchvision reads its "python version", whose files it knows by their checksums.

    Images of another size or in grey are made of them as a folder's pictures are.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    size, channels = experiment.image_size, experiment.channels
    folders.check_channels(channels)

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[experiment.data]
    root = data_root(experiment)
    try:
        parts = [kind(str(root), train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError) as reason:
        what = "no complete copy" if (root / kind.base_folder).exists() else "no copy"
        raise LabError(
            f"data={experiment.data}: {what} in {root} ({str(reason).split('.')[0]}); unpack {kind.filename} from "
            f"{kind.url} so that {root / kind.base_folder} exists, or say with data_root or FUNLORA_DATA where it lies."
        ) from None

    def pixels(images: np.ndarray) -> Tensor:
        if (size, channels) == (32, 3):
            return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return torch.stack([folders.fitted(Image.fromarray(image), size, channels) for image in images])

    train, test = (Images(pixels(part.data), torch.tensor(part.targets)) for part in parts)
    return tuple(parts[0].classes), train, test


def _folder_root(experiment: Experiment) -> Path:
    """The folder is data_root; without that, FUNLORA_DATA or ``data``, or what is named after the preset in there."""
    root = data_root(experiment)
    if not experiment.data_root and not (root / "train").is_dir() and (root / experiment.preset).is_dir():
        root = root / experiment.preset
    return root


def pictures(experiment: Experiment) -> str | None:
    """A hash of the names and sizes of a folder's pictures; None for other data, and for a folder that is not there."""
    root = _folder_root(experiment)
    if experiment.data != "folder" or not root.is_dir():
        return None
    found = [path for part in folders.listing(root).values() for paths in part.values() for path in paths]
    return store.key_of({"pictures": folders.sizes(found, root)})


def check_unchanged(experiment: Experiment, results: dict) -> None:
    """Raise LabError when stored results are of other pictures than those that now lie in the experiment's folder."""
    before, now = results["provenance"].get("data", {}).get("pictures"), pictures(experiment)
    if before and now and before != now:
        raise LabError(f"The pictures have changed since {results['run']} was run: move that folder to run anew.")


def _folder(experiment: Experiment, cache: Path) -> Parts:
    """``train/<class>/*`` and ``test/<class>/*``; the classes are the folders' names, sorted."""
    root = _folder_root(experiment)
    files = folders.listing(root)
    classes = tuple(files["train"])
    tasks(experiment, len(classes))  # before the long reading

    def images(part: str) -> Images:
        paths = [path for found in files[part].values() for path in found]
        counts = torch.tensor([len(found) for found in files[part].values()])
        pixels = folders.pixels_of(paths, root, experiment.image_size, experiment.channels, cache)
        return Images(pixels, torch.arange(len(classes)).repeat_interleave(counts))

    return classes, images("train"), images("test")


SOURCES = {"digits": _digits, "cifar10": _cifar, "cifar100": _cifar, "folder": _folder}


def _hold_out(images: Images, fraction: float, classes: int) -> tuple[Images, Images]:
    """(train, valid): a fixed share of every class held out, the same for every seed of an experiment."""
    held = torch.zeros(len(images), dtype=torch.bool)
    for cls in range(classes):
        mine = (images.labels == cls).nonzero()[:, 0]
        order = torch.randperm(len(mine), generator=stream(0, "valid", cls))
        held[mine[order[: round(fraction * len(mine))]]] = True
    empty = [cls for cls in range(classes) if not ((images.labels == cls) & ~held).any()]
    if empty:
        raise LabError(f"valid_fraction={fraction} leaves no images of class {empty[0]} to train on: lower it.")
    return Images(images.pixels[~held], images.labels[~held]), Images(images.pixels[held], images.labels[held])


def load(experiment: Experiment, home: Path | None = None) -> Dataset:
    """The experiment's images; raises LabError when they are missing or do not fit the experiment.

    Pictures from folders are kept as tensors in ``<home>/images``.
    """
    cache = (home or store.home()) / "images"
    classes, train, test = SOURCES[experiment.data](experiment, cache)
    C, H, W = train.pixels.shape[1:]
    if (C, H, W) != (experiment.channels, experiment.image_size, experiment.image_size):
        raise LabError(
            f"image_size={experiment.image_size} with channels={experiment.channels}: "
            f"accepted for data={experiment.data} is image_size={H} with channels={C}."
        )
    train, valid = _hold_out(train, experiment.valid_fraction, len(classes))
    unlabelled = None
    if experiment.pretrain_root:
        root = Path(experiment.pretrain_root).expanduser().absolute()
        unlabelled = folders.unlabelled(root, experiment.image_size, experiment.channels, cache)
    name = f"folder {_folder_root(experiment).name}" if experiment.data == "folder" else experiment.data
    return Dataset(name, classes, train, valid, test, unlabelled, pictures(experiment))


def class_order(order: str, classes: int) -> list[int]:
    """The order in which classes are learned: natural, shuffled-SEED, or indices such as 3,0,1,2."""
    if order == "natural":
        return list(range(classes))
    if order.startswith("shuffled-"):
        seed = int(order.removeprefix("shuffled-"))
        return torch.randperm(classes, generator=stream(seed, "class order")).tolist()
    indices = [int(word) for word in order.split(",")]
    if sorted(indices) != list(range(classes)):
        raise LabError(f"class_order={order}: accepted is every class index from 0 to {classes - 1} exactly once.")
    return indices


def tasks(experiment: Experiment, classes: int) -> list[list[int]]:
    """The classes of every task; ``split=a-b`` gives task 1 a classes and every later task b."""
    first, later = (int(word) for word in experiment.split.split("-"))
    order = class_order(experiment.class_order, classes)
    if first >= classes or (classes - first) % later:
        few = classes // 5 or 1
        raise LabError(
            f"split={experiment.split}: {classes} classes cannot be divided into {first} and then {later} at a time; "
            f"accepted is for example {few + classes % few}-{few}."
        )
    return [order[:first]] + [order[i : i + later] for i in range(first, classes, later)]
