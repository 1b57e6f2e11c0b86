"""Bytes on the disk: written whole or not at all, checked when read, held by one process at a time.

Every tensor file is a safetensors file with a checksum over its tensors and facts in its own header; everything else
is JSON. Nothing is ever unpickled, so reading a file can give wrong numbers (then it is refused) but cannot run code.

PyTorch is imported where a tensor is read or written, so that a stored result is shown without it.
"""

from __future__ import annotations

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
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from funlora_lab.errors import Damaged, LabError

if TYPE_CHECKING:
    from torch import Tensor


def canonical(value) -> str:
    """JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def safe_name(text: str) -> str:
    """``text`` as one file name that cannot leave its folder: other characters than letters, digits, - and _ go."""
    return re.sub(r"[^\w-]+", "_", text).strip("_")[:80] or "_"


def fingerprint(tensors: dict[str, Tensor], extra: dict[str, str] | None = None) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, and over accompanying words."""
    import torch

    digest = hashlib.sha256(canonical(extra or {}).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def asking(verb: str, path: Path):
    """Turn the system's refusal to write, read or make ``path`` (disk full, no permission) into one LabError."""
    try:
        yield
    except OSError as reason:
        if verb == "read" and isinstance(reason, FileNotFoundError):
            raise LabError(f"There is no file {path}.") from None
        more = "; what was saved before is untouched." if verb == "write" else "."
        raise LabError(f"Cannot {verb} {path}: {reason.strerror or reason}{more}") from None


def make_folder(folder: Path) -> None:
    with asking("make", folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Either the whole new file or the old one, whatever happens; raises LabError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with asking("write", path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def delete(*paths: Path) -> None:
    for path in paths:
        with asking("write", path):
            path.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Delete what ``write_atomically`` left when its process was killed; only for who holds the folder."""
    delete(*folder.glob(".*.tmp"))


def discard_damaged(*reads: Callable) -> list[Damaged]:
    """Call functions that read files and delete the files they find damaged; says which."""
    found = []
    for read in reads:
        try:
            read()
        except Damaged as reason:
            delete(reason.path)
            found.append(reason)
    return found


def append_line(path: Path, value) -> None:
    """Append one JSON line to a log and flush it."""
    with asking("write", path), open(path, "a") as file:
        file.write(json.dumps(value) + "\n")


def cut_log(path: Path, size: int) -> None:
    """Cut a log back to its first ``size`` bytes; raises Damaged when it is shorter than that."""
    if (found := sync(path)) < size:
        raise Damaged(path, f"{path} is shorter than the saved progress remembers")
    if found > size:
        with asking("write", path):
            os.truncate(path, size)


def sync(path: Path) -> int:
    """Have the system write a log to the disk, so that later files never remember lines that got lost -> its bytes."""
    if not path.exists():
        return 0
    with asking("write", path), open(path, "rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


def write_json(path: Path, value, sort_keys: bool = False) -> None:
    """Save a value as a JSON file, one entry a line, atomically."""
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=sort_keys) + "\n").encode())


def read_json(path: Path):
    """The content of a JSON file; raises LabError when it cannot be read and Damaged when it holds no JSON."""
    with asking("read", path), suppress(ValueError, RecursionError):
        return json.loads(path.read_bytes())
    raise Damaged(path, f"{path} is damaged or not a JSON file")


def update_json(path: Path, change: Callable[[dict], dict]) -> None:
    """Replace what a JSON file holds ({} where there is none) by ``change`` of it, while its folder is held."""
    with locked(path.parent):
        write_json(path, change(read_json(path) if path.exists() else {}), sort_keys=True)


def read_lines(path: Path) -> list[dict]:
    """The complete JSON lines of a log; a last line torn by a kill is left out, any other bad line raises Damaged."""
    if not path.exists():
        return []
    with asking("read", path), suppress(ValueError, RecursionError):
        values = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        if all(isinstance(value, dict) for value in values):
            return values
    raise Damaged(path, f"{path} is damaged: one of its lines is not a JSON object")


def packed(tensors: dict[str, Tensor], facts: dict | None = None) -> bytes:
    """Tensors and JSON-able facts as the content of one safetensors file, with a checksum over both."""
    import safetensors.torch

    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {name: canonical(value) for name, value in (facts or {}).items()}
    metadata["sha256"] = fingerprint(tensors, metadata)
    return safetensors.torch.save(tensors, metadata)


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict | None = None) -> None:
    write_atomically(path, packed(tensors, facts))


def parse_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of any safetensors file, its checksum unchecked; raises Damaged when it is not one."""
    import safetensors

    try:
        with asking("read", path), safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (safetensors.SafetensorError, ValueError) as reason:
        raise Damaged(path, f"{path} is damaged or not a safetensors file ({reason})") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, facts) of a file made by ``write_tensors``; raises LabError when it is missing, damaged or foreign."""
    tensors, metadata = parse_tensors(path)
    expected = metadata.pop("sha256", None)
    if expected is None:
        raise Damaged(path, f"{path} carries no checksum: it was not written by this program")
    if expected != fingerprint(tensors, metadata):
        raise Damaged(path, f"{path} is damaged: its checksum does not match its content")
    with suppress(ValueError, RecursionError):
        return tensors, {name: json.loads(value) for name, value in metadata.items()}
    raise Damaged(path, f"{path} carries facts that are not JSON: it was not written by this program")


@contextmanager
def locked(folder: Path, check: Callable = lambda: None, tell: Callable = lambda sentence: None, patience=math.inf):
    """Hold a folder, made where it is missing, for this thread; others wait for it, ``patience`` seconds at most.

    Who waits is told once who holds it (``tell(sentence)``) and asked now and then whether to go on (``check()`` may
    raise). The lock is gone the moment its process dies. The thread that holds a folder may hold it again.
    """
    make_folder(folder)
    lock, holder = FileLock(folder / ".lock", is_singleton=True), folder / ".holder"
    begun, who = time.monotonic(), ""
    while True:
        try:
            lock.acquire(timeout=0.2)
            break
        except Timeout:
            if not who:
                with suppress(OSError, ValueError):
                    who = holder.read_text()
                who = who or "another process"
                tell(f"Waiting for {who}, which holds {folder}.")
            check()
            if time.monotonic() - begun > patience:
                raise LabError(f"{folder} is in use by {who}; wait for it to end or stop it.") from None
        except OSError as reason:
            raise LabError(f"Cannot lock {folder}: {reason.strerror or reason}.") from None
    try:
        with suppress(OSError):
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        if lock.lock_counter == 1:  # else this thread goes on holding the folder
            with suppress(OSError):
                holder.unlink(missing_ok=True)
        lock.release()


def in_use(folder: Path) -> bool:
    """Whether another process or thread holds the folder at this moment."""
    try:
        if (folder / ".lock").exists():
            FileLock(folder / ".lock", is_singleton=True).acquire(timeout=0.1).lock.release()
    except OSError as reason:  # nobody holds a folder that may only be read
        return isinstance(reason, Timeout)
    return False
