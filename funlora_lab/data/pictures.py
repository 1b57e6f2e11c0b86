"""Folders of pictures of any size and format, read once and kept as uint8 tensors.

A labelled folder holds ``train/<class>/*`` and ``test/<class>/*``; an unlabelled one holds pictures at any depth.
Every picture is turned upright, laid on white where it is transparent, cut to its central square and resized.
The pixels are kept in <home>/images/<key>.safetensors; the key is a hash of the files' names, sizes and dates, of the
size and the channels.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from funlora_lab.errors import LabError
from funlora_lab.store import asking, key_of, locked, read_tensors, write_tensors

READING = 1  # raised when pictures are read in another way, so that older tensors are not reused
PARTS = ("train", "test")


def fitted(image: Image.Image, size: int, channels: int) -> Tensor:
    """The central square of a picture in grey (1) or colour (3 channels), resized: uint8 (C, size, size)."""
    if channels not in (1, 3):
        raise LabError(f"channels={channels}: accepted for pictures is 1 (grey) or 3 (colour).")
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).reshape(size, size, channels).permute(2, 0, 1)


def read_picture(path: Path, size: int, channels: int) -> Tensor:
    """The central square of one picture, uint8 (C, size, size); raises LabError naming a file that cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size, never below
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError("its 32-bit numbers have no agreed black and white")
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return fitted(image, size, channels)
    except UnidentifiedImageError:
        raise LabError(f"{path} is not a picture in any format that Pillow reads; mend or remove it.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as reason:
        raise LabError(f"{path} cannot be read as a picture ({reason}); mend or remove it.") from None


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name; hidden entries do not count."""
    if not folder.is_dir():
        accepted = "a folder of pictures holds train/CLASS/PICTURES and test/CLASS/PICTURES"
        raise LabError(f"There is no folder {folder}: {accepted}.")
    with asking("read the folder", folder):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    paths = _entries(folder)
    if not paths:
        raise LabError(f"{folder} is empty: accepted is at least one picture of every class.")
    if others := [path for path in paths if not path.is_file()]:
        raise LabError(f"{others[0]} is not a file: a class's folder holds pictures only.")
    return paths


def labelled(root: Path) -> tuple[list[str], dict[str, list[Path]]]:
    """(class names, part -> pictures, class after class) of a labelled folder; raises LabError for what is missing."""
    classes = {part: [path.name for path in _entries(root / part) if path.is_dir()] for part in PARTS}
    for part, other in (PARTS, PARTS[::-1]):
        folder, found = root / part, classes[part]
        if not found:
            raise LabError(f"{folder} holds no class: accepted is one folder of pictures for every class.")
        if bad := [name for name in found if "\\" in name or not name.isprintable()]:
            accepted = "accepted are printable names without backslashes"
            raise LabError(f"The class name {bad[0]!r} in {folder} could escape a folder or a line: {accepted}.")
        if alone := [name for name in found if name not in classes[other]]:
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            lacks = f"{folder} has the class {alone[0]} that {root / other} lacks{more}"
            raise LabError(f"{lacks}: accepted is every class in both.")
    names = classes["train"]
    return names, {part: [path for name in names for path in _pictures(root / part / name)] for part in PARTS}


def sizes(paths: list[Path], root: Path) -> list[list]:
    """[name, bytes] of every file: what tells whether pictures are still the same ones, also after a copy."""
    return [[path.relative_to(root).as_posix(), path.stat().st_size] for path in paths]


def pixels_of(paths: list[Path], root: Path, size: int, channels: int, cache: Path) -> Tensor:
    """Pictures as uint8 (N, C, size, size), read from the files once and from ``cache`` from then on."""
    facts = [[*names, path.stat().st_mtime_ns] for names, path in zip(sizes(paths, root), paths, strict=True)]
    stored = cache / f"{key_of([READING, str(root.resolve()), size, channels, facts])}.safetensors"
    with locked(cache):
        with suppress(LabError):  # missing or damaged: the pictures themselves are read
            return read_tensors(stored)[0]["pixels"]
        pixels = torch.empty(len(paths), channels, size, size, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda path: read_picture(path, size, channels), paths)
            for i, picture in enumerate(tqdm(found, "reading pictures ", len(paths), leave=False, delay=2)):
                pixels[i] = picture
        write_tensors(stored, {"pixels": pixels}, {"root": str(root), "read": READING})
    return pixels


def unlabelled(folder: str, size: int, channels: int, cache: Path) -> Tensor:
    """All pictures below a folder, at any depth, uint8 (N, C, size, size); other files are passed over."""
    Image.init()
    root = Path(folder).expanduser().absolute()
    if not root.is_dir():
        raise LabError(f"pretrain_root={root}: there is no such folder; accepted is a folder with pictures in it.")
    paths = [Path(where, name) for where, _, names in os.walk(root, followlinks=True) for name in names]
    paths = [p for p in paths if p.suffix.lower() in Image.EXTENSION and not p.name.startswith(".")]
    if not paths:
        raise LabError(f"pretrain_root={root}: no pictures there; accepted is a folder with pictures, at any depth.")
    return pixels_of(sorted(paths), root, size, channels, cache)
