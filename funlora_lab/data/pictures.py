"""Folders of pictures of any size and format, read once and kept as uint8 tensors.

A labelled folder holds ``train/<class>/*`` and ``test/<class>/*``; an unlabelled one holds pictures at any depth.
Hidden files and what operating systems leave behind do not count. Every picture is turned upright, laid on white where
it is transparent, cut to its central square and resized. The pixels are kept in <home>/images/<key>.safetensors; the
key is a hash of the files' names, sizes, dates and inodes (a new content changes one), and of the pixels' shape.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from funlora_lab.errors import Absent, LabError, memory_for
from funlora_lab.experiment import place
from funlora_lab.store import asking, key_of, locked, read_tensors, write_tensors

READING = 1  # raised when pictures are read in another way, so that older tensors are not reused
PARTS = ("train", "test")
Image.init()
# what Pillow reads by itself: for two others it starts programs, of four it only knows the name
FORMATS = sorted(Image.OPEN.keys() - {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"})
ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
SYSTEM = {  # what Windows, macOS and network storage leave in folders, beside names that begin with a dot
    *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "__macosx"),
    *("@eadir", "#recycle", "#snapshot", "$recycle.bin", "recycler", "system volume information", "lost+found"),
}


def fitted(image: Image.Image, size: int, channels: int) -> Tensor:
    """The central square of a picture in grey (1) or colour (3 channels), resized: uint8 (C, size, size)."""
    if channels not in (1, 3):
        raise LabError(f"channels={channels}: accepted for pictures is 1 (grey) or 3 (colour).")
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).reshape(size, size, channels).permute(2, 0, 1)


def read_picture(path: Path, size: int, channels: int) -> Tensor:
    """The central square of one picture, uint8 (C, size, size); raises LabError naming a file that cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
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
        raise LabError(f"{path} is not a picture in any format that Pillow reads; mend it or move it away.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as reason:
        raise LabError(f"{path} cannot be read as a picture ({reason}); mend it or move it away.") from None


def entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name, without hidden and system files; LabError for a link that leads nowhere."""
    if not folder.is_dir():
        accepted = "a folder of pictures holds train/CLASS/PICTURES and test/CLASS/PICTURES"
        raise LabError(f"There is no folder {folder}: {accepted}.")
    with asking("read the folder", folder):
        found = sorted(folder.iterdir())
    found = [path for path in found if not path.name.startswith((".", "~$")) and path.name.lower() not in SYSTEM]
    if dead := [path for path in found if path.is_symlink() and not path.exists()]:
        raise LabError(f"{dead[0]} is a link to {dead[0].readlink()}, which is not there: mend it or move it away.")
    return found


def pictures_of(folder: Path) -> list[Path]:
    """The pictures of the folder of one class; LabError when it holds none, or something else."""
    if not (paths := entries(folder)):
        raise LabError(f"{folder} is empty: accepted is at least one picture of every class.")
    if others := [path for path in paths if not path.is_file()]:
        raise LabError(f"{others[0]} is not a file: a class's folder holds pictures only.")
    return paths


def pictures_below(root: Path, check: Callable[[], None] = lambda: None) -> list[Path]:
    """The files with a picture's ending at any depth below a folder, sorted, each real folder read once."""
    found, seen, waiting = [], set(), [root]
    while waiting:
        check()
        folder = waiting.pop(0)
        if (real := folder.resolve()) not in seen:
            seen.add(real)
            inside = entries(folder)
            waiting += [path for path in inside if path.is_dir()]
            found += [path for path in inside if path.suffix.lower() in ENDINGS and path.is_file()]
    return sorted(found)


def labelled(root: Path, check: Callable[[], None] = lambda: None) -> dict[str, dict[str, list[Path]]]:
    """Class name -> part -> pictures, in the order of the names; raises LabError for what is missing.

    Names that look alike are alike: macOS and Linux spell accents apart, here they are composed (Unicode's NFC).
    """
    if not root.is_dir():
        raise Absent(f"There is no folder {root}: accepted is one with train/CLASS/PICTURES and test/CLASS/PICTURES.")
    classes: dict[str, dict[str, list[Path]]] = {}
    for part in PARTS:
        folders = [path for path in entries(root / part) if path.is_dir()]
        if not folders:
            raise LabError(f"{root / part} holds no class: accepted is one folder of pictures for every class.")
        if bad := [path.name for path in folders if "\\" in path.name or not path.name.isprintable()]:
            accepted = "accepted are printable names without backslashes"
            raise LabError(f"The class name {bad[0]!r} in {root / part} could escape a folder or a line: {accepted}.")
        for folder in folders:
            check()
            classes.setdefault(normalize("NFC", folder.name), {}).setdefault(part, []).append(folder)
    for part, other in (PARTS, PARTS[::-1]):
        if alone := [name for name, parts in classes.items() if other not in parts]:
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            lacks = f"{root / part} has the class {alone[0]} that {root / other} lacks{more}"
            raise LabError(f"{lacks}: accepted is every class in both.")
    return {
        name: {part: [path for folder in parts[part] for path in pictures_of(folder)] for part in PARTS}
        for name, parts in sorted(classes.items())
    }


def pixels_of(paths: list[Path], root: Path, size: int, channels: int, cache: Path, check=lambda: None) -> Tensor:
    """Pictures as uint8 (N, C, size, size), read from the files once and from ``cache`` from then on.

    ``check()`` is called after every picture and may raise. LabError counts and names the files that cannot be read.
    """
    about = [(path.relative_to(root).as_posix(), path.stat()) for path in paths]
    facts = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in about]
    stored = cache / f"{key_of([READING, str(root.resolve()), size, channels, facts])}.safetensors"
    with suppress(LabError):  # missing or damaged: the pictures themselves are read
        return read_tensors(stored)[0]["pixels"]
    with locked(cache, check), memory_for("image_size"):
        with suppress(LabError):  # another process read them meanwhile
            return read_tensors(stored)[0]["pixels"]
        pixels = read_pictures(paths, size, channels, check)
        write_tensors(stored, {"pixels": pixels}, {"root": str(root), "read": READING})
    return pixels


def read_pictures(paths: list[Path], size: int, channels: int, check: Callable[[], None] = lambda: None) -> Tensor:
    """Pictures as uint8 (N, C, size, size); LabError counts and names the files that cannot be read."""

    def read(path: Path) -> Tensor | LabError:
        try:
            return read_picture(path, size, channels)
        except LabError as reason:
            return reason

    fitted(Image.new("L", (1, 1)), 1, channels)  # refuses what no picture can have
    pixels, bad = torch.empty(len(paths), channels, size, size, dtype=torch.uint8), {}
    with ThreadPoolExecutor() as pool:
        for i, found in enumerate(tqdm(pool.map(read, paths), "reading pictures ", len(paths), leave=False, delay=2)):
            check()
            if isinstance(found, Tensor):
                pixels[i] = found
            else:
                bad[paths[i]] = found
    if len(bad) > 1:
        names = ", ".join(map(str, list(bad)[:4])) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
        raise LabError(f"{len(bad)} of {len(paths)} pictures cannot be read: {names}; mend them or move them away.")
    if bad:
        raise bad.popitem()[1]
    return pixels


def unlabelled(folder: str, size: int, channels: int, cache: Path, check=lambda: None) -> Tensor:
    """All pictures below a folder, at any depth, uint8 (N, C, size, size); other files are passed over."""
    root = place(folder)
    if not root.is_dir():
        raise Absent(f"pretrain_root={root}: there is no such folder; accepted is a folder with pictures in it.")
    if not (paths := pictures_below(root, check)):
        raise LabError(f"pretrain_root={root}: no pictures there; accepted is a folder with pictures, at any depth.")
    return pixels_of(paths, root, size, channels, cache, check)
