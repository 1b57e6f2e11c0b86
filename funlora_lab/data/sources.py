"""Where images come from: one registered function a data set, and what all of them have in common.

    @data_source("stripes", "striped squares drawn for this notebook")
    def stripes(experiment, cache):
        return ("dark", "light"), Images(pixels, labels), Images(test_pixels, test_labels)

After this ``data=stripes`` is accepted. Runs and artefacts are known by the fingerprint of the images themselves. A
source that reads for long may have a third parameter, ``check``, which it calls now and then and which may raise.
"""

import os
from collections.abc import Callable
from functools import cache as once
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from funlora_lab import store
from funlora_lab.data import pictures
from funlora_lab.data.images import Dataset, Images, Later, tasks
from funlora_lab.errors import Absent, LabError
from funlora_lab.experiment import Experiment, place


class DataSource(NamedTuple):
    """A data set. Labels are positions in the class names; ``cache`` is a folder for what is slow to read."""

    name: str
    about: str
    read: Callable  # (experiment, cache[, check]) -> (class names, training Images, test Images)
    fixed: bool = False  # its images never change: it checks itself what lies on the disk


SOURCES: dict[str, DataSource] = {}


def data_source(name: str, about: str, fixed: bool = False) -> Callable:
    """Register the decorated function as the data source ``name``, in place of one of that name."""

    def register(read: Callable) -> Callable:
        SOURCES[name] = DataSource(name, about, read, fixed)
        return read

    return register


@data_source(
    "digits", "scikit-learn's 1,797 digits of 8 x 8 pixels and 17 grey levels; a fixed stratified 80/20 split", True
)
def _digits(experiment: Experiment, cache: Path):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    pixels = torch.from_numpy((source.images * (255 / 16)).round().astype("uint8"))[:, None]
    images = Images(pixels, torch.from_numpy(source.target.astype("int64")))
    train, test = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=source.target)
    return tuple("0123456789"), images.at(train), images.at(test)


@data_source(
    "cifar100", "CIFAR100 in torchvision's files, 100 classes; of another size or in grey when asked for", True
)
@data_source("cifar10", "CIFAR10 in torchvision's files, 10 classes; of another size or in grey when asked for", True)
def _cifar(experiment: Experiment, cache: Path):
    from torchvision.datasets import CIFAR10, CIFAR100

    kind, root = {"cifar10": CIFAR10, "cifar100": CIFAR100}[experiment.data], data_root(experiment)
    size, channels, folder = experiment.image_size, experiment.channels, root / kind.base_folder
    try:
        train, test = (kind(str(root), train=part) for part in (True, False))
    except (RuntimeError, OSError) as reason:
        what = "no complete copy" if folder.exists() else "no copy"
        raise Absent(
            f"data={experiment.data}: {what} in {root} ({str(reason).split('.')[0]}); unpack {kind.filename} from "
            f"{kind.url} so that {folder} exists, or say with data_root or FUNLORA_DATA where it lies."
        ) from None

    def images(part) -> Images:
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        if (size, channels) != (32, 3):
            pixels = torch.stack([pictures.fitted(Image.fromarray(image), size, channels) for image in part.data])
        return Images(pixels, torch.tensor(part.targets))

    return tuple(train.classes), images(train), images(test)


def data_root(experiment: Experiment) -> Path:
    """The setting data_root, else FUNLORA_DATA or ``data``, or the folder with the preset's name in there."""
    root = place(experiment.data_root or os.environ.get("FUNLORA_DATA") or "data")
    named = experiment.data == "folder" and not experiment.data_root and not (root / "train").is_dir()
    return root / experiment.preset if named and (root / experiment.preset).is_dir() else root


@data_source("folder", "pictures of one's own: train/CLASS/* and test/CLASS/* in the folder data_root")
def _folder(experiment: Experiment, cache: Path, check: Callable[[], None] = lambda: None):
    root = data_root(experiment)
    classes = pictures.labelled(root, check)
    tasks(experiment, len(classes))  # before the long reading
    paths = {part: [path for found in classes.values() for path in found[part]] for part in pictures.PARTS}
    size, channels, indices = experiment.image_size, experiment.channels, torch.arange(len(classes))
    pixels = pictures.pixels_of([*paths["train"], *paths["test"]], root, size, channels, cache, check)
    labels = {p: indices.repeat_interleave(torch.tensor([len(found[p]) for found in classes.values()])) for p in paths}
    train, test = pixels.split([len(paths["train"]), len(paths["test"])])
    return tuple(classes), Images(train, labels["train"]), Images(test, labels["test"])


def load(experiment: Experiment, home: Path | None = None, check: Callable[[], None] = lambda: None) -> Dataset:
    """The experiment's images; LabError when they do not fit it, Absent when they are not there.

    ``check`` is called during long readings and may raise.
    """
    data, size, channels = experiment.data, experiment.image_size, experiment.channels
    if data not in SOURCES:
        raise Absent(f"data={data}: accepted is one of {', '.join(SOURCES)}.")
    cache, read = (home or store.home()) / "images", SOURCES[data].read
    classes, train, test = read(*(experiment, cache, check)[: len(signature(read).parameters)])
    for pixels, labels in ((train.pixels, train.labels), (test.pixels, test.labels)):
        if (pixels.dtype, pixels.ndim, labels.dtype) != (torch.uint8, 4, torch.int64) or len(pixels) != len(labels):
            raise LabError(f"data={data}: accepted are pixels uint8 (N, C, H, W) and labels int64 (N,).")
        if (shape := tuple(pixels.shape[1:])) != (channels, size, size):
            accepted = f"accepted for data={data} is image_size={shape[1]} with channels={shape[0]}"
            raise LabError(f"image_size={size} with channels={channels}: {accepted}.")
        if labels.unique().tolist() != list(range(len(classes))):
            raise LabError(f"data={data}: accepted are labels from 0 to {len(classes) - 1}, each of them in use.")
    train, valid = train.divided(experiment.valid_fraction)
    unlabelled = None
    if experiment.pretrain_root:
        pixels = pictures.unlabelled(experiment.pretrain_root, size, channels, cache, check)
        unlabelled = Images(pixels, torch.full((len(pixels),), -1))
    name = f"folder {data_root(experiment).name}" if data == "folder" else data
    return Dataset(name, tuple(classes), train, valid, test, unlabelled)


def check_unchanged(experiment: Experiment, about: dict, home: Path | None, check: Callable[[], None]) -> None:
    """Raise LabError when other images lie there than those a run was made of (``about``), Absent when none do."""
    if experiment.pretrain_root or not (experiment.data in SOURCES and SOURCES[experiment.data].fixed):
        _same(load(experiment, home, check), experiment, about)


def _same(dataset: Dataset, experiment: Experiment, about: dict) -> Dataset:
    where = data_root(experiment) if experiment.data == "folder" else f"data={experiment.data}"
    if about.get("unlabelled", dataset.unlabelled_fingerprint) != dataset.unlabelled_fingerprint:
        where = f"pretrain_root={experiment.pretrain_root}"
    elif about["fingerprint"] == dataset.fingerprint:
        return dataset
    raise LabError(f"The images of {where} have changed since this run was made: move its folder away to run anew.")


def remembered(experiment: Experiment, about: dict, classes: list[str], home: Path, check: Callable) -> Dataset:
    """The images of a stored run, known by the fingerprints in ``about``, and read when they are first looked at."""
    whole = once(lambda: _same(load(experiment, home, check), experiment, about))
    parts = {part: Later(lambda part=part: getattr(whole(), part)) for part in ("train", "valid", "test")}
    unlabelled = Later(lambda: whole().unlabelled) if experiment.pretrain_root else None
    dataset = Dataset(about["name"], tuple(classes), **parts, unlabelled=unlabelled)
    known = {"fingerprint": about["fingerprint"], "unlabelled_fingerprint": about.get("unlabelled")}
    vars(dataset).update({name: value for name, value in known.items() if value})
    return dataset
