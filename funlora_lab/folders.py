"""Images of one's own: folders of pictures of any size and format, read once and kept as uint8 tensors.

A labelled folder holds ``train/<class>/*`` and ``test/<class>/*``; an unlabelled one holds pictures at any depth.
Every picture is turned upright, laid on white where it is transparent, cut to its central square and resized.

    <home>/images/<key>.safetensors    pixels (N, C, size, size), uint8; the key is a hash of the names, sizes and
                                       dates of the files, of the size and the channels
"""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from funlora_lab.disk import canonical, locked, read_tensors, write_tensors
from funlora_lab.errors import LabError

READING = 1  # raised when pictures are read in another way, so that older tensors are not reused
PARTS = ("train", "test")


def fitted(image: Image.Image, size: int, channels: int) -> Tensor:
    """The central square of a picture in grey (1) or colour (3 channels), resized: uint8 (C, size, size)."""
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
        raise LabError(
            f"There is no folder {folder}: a folder of pictures holds train/CLASS/PICTURES and test/CLASS/PICTURES."
        )
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as reason:
        raise LabError(f"Cannot read the folder {folder}: {reason.strerror or reason}.") from None


def _classes(folder: Path) -> list[str]:
    found = [path.name for path in _entries(folder) if path.is_dir()]
    if not found:
        raise LabError(f"{folder} holds no class: accepted is one folder of pictures for every class.")
    for name in found:
        if "\\" in name or not name.isprintable():
            raise LabError(
                f"The class name {name!r} in {folder} could escape a folder or a line: "
                "accepted are printable names without backslashes."
            )
    return found


def listing(root: Path) -> dict[str, dict[str, list[Path]]]:
    """part -> class -> its pictures, of a labelled folder; nothing is decoded. Raises LabError for what is missing."""
    classes = {part: _classes(root / part) for part in PARTS}
    for part, other in (PARTS, PARTS[::-1]):
        if alone := [name for name in classes[part] if name not in classes[other]]:
            raise LabError(
                f"{root / part} has the class {alone[0]} that {root / other} lacks"
                + (f" (and {len(alone) - 1} more)" if len(alone) > 1 else "")
                + ": accepted is every class in both."
            )
    files = {part: {name: _entries(root / part / name) for name in classes[part]} for part in PARTS}
    for by_class in files.values():
        for paths in by_class.values():
            for path in paths:
                if not path.is_file():
                    raise LabError(f"{path} is not a file: a class's folder holds pictures only.")
    for part in PARTS:
        for name, paths in files[part].items():
            if not paths:
                raise LabError(f"{root / part / name} is empty: accepted is at least one picture of every class.")
    return files


def _read(paths: list[Path], size: int, channels: int) -> Tensor:
    pixels = torch.empty(len(paths), channels, size, size, dtype=torch.uint8)
    pool = ThreadPoolExecutor()
    try:
        pictures = pool.map(lambda path: read_picture(path, size, channels), paths)
        shown = tqdm(pictures, "reading pictures ", len(paths), file=sys.stderr, leave=False, delay=2)
        for i, picture in enumerate(shown):
            pixels[i] = picture
    finally:
        pool.shutdown(cancel_futures=True)
    return pixels


def sizes(paths: list[Path], root: Path) -> list[list]:
    """[name, bytes] of every file: what tells whether pictures are still the same ones, also after a copy."""
    return [[path.relative_to(root).as_posix(), path.stat().st_size] for path in paths]


def check_channels(channels: int) -> None:
    """Raise LabError for what is neither grey nor colour."""
    if channels not in (1, 3):
        raise LabError(f"channels={channels}: accepted for pictures is 1 (grey) or 3 (colour).")


def pixels_of(paths: list[Path], root: Path, size: int, channels: int, cache: Path) -> Tensor:
    """Pictures as uint8 (N, C, size, size), read from the files once and from ``cache`` from then on."""
    check_channels(channels)
    facts = [[*names, path.stat().st_mtime_ns] for names, path in zip(sizes(paths, root), paths, strict=True)]
    key = hashlib.sha256(canonical([READING, str(root.resolve()), size, channels, facts]).encode()).hexdigest()[:16]
    stored = cache / f"{key}.safetensors"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise LabError(f"Cannot make {cache}: {reason.strerror or reason}.") from None
    with locked(cache):
        if stored.exists():
            try:
                return read_tensors(stored)[0]["pixels"]
            except LabError:
                stored.unlink()  # damaged: the pictures themselves are read again
        pixels = _read(paths, size, channels)
        write_tensors(stored, {"pixels": pixels}, {"root": str(root), "read": READING})
    return pixels


def unlabelled(root: Path, size: int, channels: int, cache: Path) -> Tensor:
    """All pictures below a folder, at any depth, uint8 (N, C, size, size); other files are passed over."""
    Image.init()
    if not root.is_dir():
        raise LabError(f"pretrain_root={root}: there is no such folder; accepted is a folder with pictures in it.")
    paths = [
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in Image.EXTENSION and not name.startswith(".")
    ]
    if not paths:
        raise LabError(f"pretrain_root={root}: no pictures there; accepted is a folder with pictures, at any depth.")
    return pixels_of(sorted(paths), root, size, channels, cache)
