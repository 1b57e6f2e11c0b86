"""Bytes on the disk: written whole or not at all, read with suspicion, held by one process at a time.

Every tensor file is a safetensors file with a checksum over its tensors and facts in its own header; everything else
is JSON. Nothing is ever unpickled, so reading a file can give wrong numbers (then it is refused) but cannot run code.
"""

import hashlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from funlora_lab.errors import Damaged, LabError

CHECKSUM = "sha256"


def canonical(value) -> str:
    """JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def safe_name(text: str) -> str:
    """``text`` as one file name that cannot leave its folder: other characters than letters, digits, - and _ go."""
    return re.sub(r"[^\w-]+", "_", text).strip("_")[:80] or "_"


def fingerprint(tensors: dict[str, Tensor], extra: dict[str, str] | None = None) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, and over accompanying words."""
    digest = hashlib.sha256(canonical(extra or {}).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; raises LabError when that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise LabError(f"Cannot make {folder}: {reason.strerror or reason}.") from None


@contextmanager
def writing(path: Path):
    """Turn the system's refusal to write ``path`` (disk full, no permission, read-only) into one sentence."""
    try:
        yield
    except OSError as reason:
        raise LabError(
            f"Cannot write {path}: {reason.strerror or reason}; what was saved before is untouched."
        ) from None


def write_atomically(path: Path, content: bytes) -> None:
    """Either the whole new file or the old one, whatever happens; raises LabError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def clear_leftovers(folder: Path) -> None:
    """Remove what ``write_atomically`` left when its process was killed; only for who holds the folder."""
    with writing(folder):
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def append_line(path: Path, value) -> None:
    """Append one JSON line to a log and flush it."""
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(value) + "\n")


def cut_log(path: Path, size: int) -> None:
    """Cut a log back to its first ``size`` bytes; raises Damaged when it is shorter than that."""
    now = size_of(path)
    if now < size:
        raise Damaged(path, f"{path} is shorter than the saved progress remembers")
    if now > size:
        with writing(path):
            os.truncate(path, size)


def sync(path: Path) -> None:
    """Have the system write a log's lines to the disk, so that later files never remember lines that got lost."""
    if path.exists():
        with writing(path), open(path, "rb") as file:
            os.fsync(file.fileno())


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def read_json(path: Path):
    """The content of a JSON file; raises Damaged when it is not one."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise LabError(f"There is no file {path}.") from None
    except OSError as reason:
        raise LabError(f"Cannot read {path}: {reason.strerror or reason}.") from None
    except (ValueError, RecursionError):
        raise Damaged(path, f"{path} is damaged or not a JSON file") from None


def read_lines(path: Path) -> list[dict]:
    """The complete JSON lines of a log; a last line torn by a kill is left out, any other bad line raises Damaged."""
    if not path.exists():
        return []
    try:
        values = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except OSError as reason:
        raise LabError(f"Cannot read {path}: {reason.strerror or reason}.") from None
    except (ValueError, RecursionError):
        values = [None]
    if not all(isinstance(value, dict) for value in values):
        raise Damaged(path, f"{path} is damaged: one of its lines is not a JSON object")
    return values


def packed(tensors: dict[str, Tensor], facts: dict | None = None) -> bytes:
    """Tensors and JSON-able facts as the content of one safetensors file, with a checksum over both."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {name: canonical(value) for name, value in (facts or {}).items()}
    metadata[CHECKSUM] = fingerprint(tensors, metadata)
    return safetensors.torch.save(tensors, metadata)


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict | None = None) -> None:
    """Save ``packed`` tensors and facts atomically."""
    write_atomically(path, packed(tensors, facts))


def parse_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of any safetensors file, its checksum unchecked; raises Damaged when it is not one."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise LabError(f"There is no file {path}.") from None
    except PermissionError as reason:
        raise LabError(f"Cannot read {path}: {reason.strerror}.") from None
    except (safetensors.SafetensorError, OSError, ValueError) as reason:
        raise Damaged(path, f"{path} is damaged or not a safetensors file ({reason})") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, facts) of a file made by ``write_tensors``; raises LabError when it is missing, damaged or foreign."""
    tensors, metadata = parse_tensors(path)
    expected = metadata.pop(CHECKSUM, None)
    if expected is None:
        raise Damaged(path, f"{path} carries no checksum: it was not written by this program")
    if expected != fingerprint(tensors, metadata):
        raise Damaged(path, f"{path} is damaged: its checksum does not match its content")
    return tensors, {name: json.loads(value) for name, value in metadata.items()}


@contextmanager
def locked(
    folder: Path,
    check: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda sentence: None,
    patience: float = math.inf,
):
    """Hold an existing folder for this process and thread; others wait for it, for ``patience`` seconds at most.

    Who waits is told once who holds it (``tell``) and asked now and then whether to go on (``check`` may raise).
    The lock belongs to the process, so it is gone the moment the process dies, however it dies. The thread that holds
    a folder may hold it again.
    """
    lock = FileLock(folder / ".lock", is_singleton=True)
    holder = folder / ".holder"
    begun, told = time.monotonic(), False
    while True:
        try:
            lock.acquire(timeout=0.2)
            break
        except Timeout:
            if not told:
                tell(f"Waiting for {_word(holder)}, which holds {folder}.")
            told = True
            check()
            if time.monotonic() - begun > patience:
                raise LabError(f"{folder} is in use by {_word(holder)}; wait for it to end or stop it.") from None
        except OSError as reason:
            raise LabError(f"Cannot lock {folder}: {reason.strerror or reason}.") from None
    try:
        with suppress(OSError):
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def _word(holder: Path) -> str:
    try:
        return holder.read_text() or "another process"
    except (OSError, ValueError):
        return "another process"
