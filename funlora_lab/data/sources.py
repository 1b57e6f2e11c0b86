"""Where images come from: one registered function a data set, and what all of them have in common.

    @data_source("stripes", "striped squares drawn for this notebook")
    def stripes(experiment, cache):
        return ("dark", "light"), Images(pixels, labels), Images(test_pixels, test_labels)

After this ``data=stripes`` is accepted. Runs and artefacts are known by the fingerprint of the images themselves.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from funlora_lab import store
from funlora_lab.data import pictures
from funlora_lab.data.images import Dataset, Images, tasks
from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment


class DataSource(NamedTuple):
    """A data set. Labels are positions in the class names; ``cache`` is a folder for what is slow to read."""

    name: str
    about: str
    read: Callable  # (experiment, cache) -> (class names, training Images, test Images)


SOURCES: dict[str, DataSource] = {}


def data_source(name: str, about: str) -> Callable:
    """Register the decorated function as the data source ``name``, in place of one of that name."""

    def register(read: Callable) -> Callable:
        SOURCES[name] = DataSource(name, about, read)
        return read

    return register


@data_source("digits", "scikit-learn's 1,797 digits of 8 x 8 pixels and 17 grey levels; a fixed stratified 80/20 split")
def _digits(experiment: Experiment, cache: Path):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    pixels = torch.from_numpy((source.images * (255 / 16)).round().astype("uint8"))[:, None]
    images = Images(pixels, torch.from_numpy(source.target.astype("int64")))
    train, test = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=source.target)
    return tuple("0123456789"), images.at(train), images.at(test)


@data_source("cifar100", "CIFAR100 in torchvision's files, 100 classes; of another size or in grey when asked for")
@data_source("cifar10", "CIFAR10 in torchvision's files, 10 classes; of another size or in grey when asked for")
def _cifar(experiment: Experiment, cache: Path):
    from torchvision.datasets import CIFAR10, CIFAR100

    kind, root = {"cifar10": CIFAR10, "cifar100": CIFAR100}[experiment.data], data_root(experiment)
    size, channels, folder = experiment.image_size, experiment.channels, root / kind.base_folder
    try:
        train, test = (kind(str(root), train=part) for part in (True, False))
    except (RuntimeError, OSError) as reason:
        what = "no complete copy" if folder.exists() else "no copy"
        raise LabError(
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
    root = Path(experiment.data_root or os.environ.get("FUNLORA_DATA") or "data").expanduser().absolute()
    named = experiment.data == "folder" and not experiment.data_root and not (root / "train").is_dir()
    return root / experiment.preset if named and (root / experiment.preset).is_dir() else root


@data_source("folder", "pictures of one's own: train/CLASS/* and test/CLASS/* in the folder data_root")
def _folder(experiment: Experiment, cache: Path):
    root = data_root(experiment)
    classes, paths = pictures.labelled(root)
    tasks(experiment, len(classes))  # before the long reading
    index = {name: cls for cls, name in enumerate(classes)}

    def images(part: str) -> Images:
        pixels = pictures.pixels_of(paths[part], root, experiment.image_size, experiment.channels, cache)
        return Images(pixels, torch.tensor([index[path.parent.name] for path in paths[part]]))

    return tuple(classes), images("train"), images("test")


def pictures_key(experiment: Experiment) -> str | None:
    """A hash of the names and sizes of a folder's pictures; None for other data, and for a folder that is not there."""
    root = data_root(experiment)
    if experiment.data != "folder" or not root.is_dir():
        return None
    paths = pictures.labelled(root)[1]
    return store.key_of({"pictures": pictures.sizes(paths["train"] + paths["test"], root)})


def check_unchanged(experiment: Experiment, results: dict) -> None:
    """Raise LabError when stored results are of other pictures than those that now lie in the experiment's folder."""
    before, now = results["provenance"].get("data", {}).get("pictures"), pictures_key(experiment)
    if before and now and before != now:
        raise LabError(f"The pictures have changed since {results['run']} was run: move that folder to run anew.")


def load(experiment: Experiment, home: Path | None = None) -> Dataset:
    """The experiment's images; raises LabError when they are missing or do not fit the experiment."""
    data, size, channels = experiment.data, experiment.image_size, experiment.channels
    if data not in SOURCES:
        raise LabError(f"data={data}: accepted is one of {', '.join(SOURCES)}.")
    cache = (home or store.home()) / "images"
    classes, train, test = SOURCES[data].read(experiment, cache)
    for pixels, labels in ((train.pixels, train.labels), (test.pixels, test.labels)):
        if (pixels.dtype, pixels.ndim, labels.dtype) != (torch.uint8, 4, torch.int64) or len(pixels) != len(labels):
            raise LabError(f"data={data}: accepted are pixels uint8 (N, C, H, W) and labels int64 (N,).")
        C, H, W = pixels.shape[1:]
        if (C, H, W) != (channels, size, size):
            accepted = f"accepted for data={data} is image_size={H} with channels={C}"
            raise LabError(f"image_size={size} with channels={channels}: {accepted}.")
        if labels.unique().tolist() != list(range(len(classes))):
            raise LabError(f"data={data}: accepted are labels from 0 to {len(classes) - 1}, each of them in use.")
    train, valid = train.divided(experiment.valid_fraction)
    pretrain = experiment.pretrain_root
    unlabelled = pictures.unlabelled(pretrain, size, channels, cache) if pretrain else None
    name = f"folder {data_root(experiment).name}" if data == "folder" else data
    return Dataset(name, tuple(classes), train, valid, test, unlabelled, pictures_key(experiment))
