"""The disk: stages that are trained once, logged, saved atomically, resumed exactly and reused.

A *stage* is one artefact in the making or finished: the base model, one class's adapter, one class's samples, one
classifier. Its folder is named by a hash of everything it depends on, so a table of fourteen methods over one base
trains the base once, and nothing is ever mistaken for something else.

    <home>/artefacts/<kind>-<key>/   inputs.json          what it depends on, in full
                                     log.jsonl            its events, one JSON object a line, flushed
                                     state.safetensors    progress, while it is in the making
                                     result.safetensors   the result; its presence means finished
    <home>/<run>/                    config.json, metrics.jsonl, results.json and pictures of one run

Every tensor file carries a checksum in its own header; nothing is ever unpickled.
"""

import hashlib
import json
import os
import socket
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from funlora_lab.config import Experiment
from funlora_lab.errors import LabError

FORMAT = 1  # of the artefacts; raised when old ones must not be reused
CHECKSUM = "sha256"


def checkout() -> Path | None:
    """The clone this package is used from, if it is: the folder that holds its pyproject.toml."""
    folder = Path(__file__).resolve().parent.parent
    return folder if (folder / "pyproject.toml").exists() else None


def home() -> Path:
    """Where runs live: FUNLORA_HOME, or ``runs`` in the clone (without a clone, in the current folder)."""
    chosen = os.environ.get("FUNLORA_HOME")
    return Path(chosen).absolute() if chosen else (checkout() or Path.cwd()) / "runs"


def canonical(value) -> str:
    """JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def fingerprint(tensors: dict[str, Tensor], extra: dict[str, str] | None = None) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, and over accompanying words."""
    digest = hashlib.sha256(canonical(extra or {}).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Either the whole new file or the old one, whatever happens; raises LabError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as reason:
        temporary.unlink(missing_ok=True)
        raise LabError(
            f"Cannot write {path}: {reason.strerror or reason}; what was saved before is untouched."
        ) from None


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict | None = None) -> None:
    """Save tensors and JSON-able facts as one safetensors file with a checksum over both."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {name: canonical(value) for name, value in (facts or {}).items()}
    metadata[CHECKSUM] = fingerprint(tensors, metadata)
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, facts) of a file made by ``write_tensors``; raises LabError when it is missing, damaged or foreign."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise LabError(f"There is no file {path}.") from None
    except (safetensors.SafetensorError, OSError, ValueError) as reason:
        raise LabError(f"{path} is damaged or not a safetensors file ({reason}); delete it to make it again.") from None
    expected = metadata.pop(CHECKSUM, None)
    if expected is None:
        raise LabError(f"{path} carries no checksum: it was not written by this program.")
    if expected != fingerprint(tensors, metadata):
        raise LabError(f"{path} is damaged: its checksum does not match its content; delete it to make it again.")
    return tensors, {name: json.loads(value) for name, value in metadata.items()}


def read_lines(path: Path) -> list[dict]:
    """The complete JSON lines of a log; a last line torn by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


@contextmanager
def locked(folder: Path, patience: float = -1):
    """Hold a folder for this process; others wait, or after ``patience`` seconds learn who holds it.

    The lock belongs to the process, so it is gone the moment the process dies, however it dies.
    """
    lock = FileLock(folder / ".lock")
    holder = folder / ".holder"
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        who = holder.read_text() if holder.exists() else "another process"
        raise LabError(f"{folder} is in use by {who}; wait for it to end or stop it.") from None
    except OSError as reason:
        raise LabError(f"Cannot lock {folder}: {reason.strerror or reason}.") from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@dataclass(frozen=True)
class Stage:
    """One artefact: its folder, and what it depends on."""

    folder: Path
    kind: str
    key: str
    inputs: dict

    @property
    def result_file(self) -> Path:
        return self.folder / "result.safetensors"

    @property
    def state_file(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def log_file(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def done(self) -> bool:
        return self.result_file.exists()

    def open(self) -> None:
        """Make the folder and write down what the artefact depends on, before any work."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            raise LabError(f"Cannot make {self.folder}: {reason.strerror or reason}.") from None
        inputs = self.folder / "inputs.json"
        if not inputs.exists():
            write_atomically(inputs, (json.dumps(self.inputs, indent=1, sort_keys=True) + "\n").encode())

    def result(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, facts) of the finished artefact."""
        return read_tensors(self.result_file)

    def events(self) -> list[dict]:
        return read_lines(self.log_file)

    def log(self, event: dict) -> dict:
        """Append one event and flush it."""
        with open(self.log_file, "a") as file:
            file.write(json.dumps(event) + "\n")
        return event

    def save_state(self, tensors: dict[str, Tensor], **facts) -> None:
        """Save progress, remembering how long the log was then."""
        write_tensors(self.state_file, tensors, {**facts, "log_bytes": _size(self.log_file)})

    def resume(self) -> tuple[dict[str, Tensor], dict] | None:
        """The saved progress, with the log cut back to that moment; None (and an empty log) when there is none."""
        saved = read_tensors(self.state_file) if self.state_file.exists() else None
        if self.log_file.exists():
            os.truncate(self.log_file, saved[1]["log_bytes"] if saved else 0)
        return saved

    def finish(self, tensors: dict[str, Tensor], **facts) -> None:
        """Save the result; the artefact counts as finished from this moment on."""
        write_tensors(self.result_file, tensors, facts)
        self.state_file.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class Store:
    """All artefacts under one home."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder or home()

    def stage(self, kind: str, **inputs) -> Stage:
        """The stage of that kind with exactly these inputs, whether it is finished, begun or not yet begun."""
        inputs = {"format": FORMAT, "kind": kind, **inputs}
        key = hashlib.sha256(canonical(inputs).encode()).hexdigest()[:16]
        return Stage(self.folder / "artefacts" / f"{kind}-{key}", kind, key, inputs)


@dataclass(frozen=True)
class Run:
    """The folder of one run: its configuration, the log of its events, its results and pictures."""

    folder: Path
    experiment: Experiment

    @classmethod
    def of(cls, experiment: Experiment, folder: Path | None = None) -> "Run":
        """The run of this configuration under ``folder`` (default: ``home()``); nothing is written yet."""
        config = asdict(experiment)
        key = hashlib.sha256(canonical(config).encode()).hexdigest()[:8]
        name = f"{experiment.preset}-{experiment.method}-seed{experiment.seed}-{key}"
        return cls((folder or home()) / name, experiment)

    @classmethod
    def named(cls, word: str, folder: Path | None = None) -> "Run":
        """The finished run of that name under ``folder`` (default: ``home()``), or lying at that path."""
        places = [(folder or home()) / word, Path(word).absolute()]
        found = next((place for place in places if (place / "results.json").exists()), None)
        if found is None:
            known = sorted(path.parent.name for path in (folder or home()).glob("*/results.json"))
            raise LabError(f"There is no finished run '{word}': accepted are {', '.join(known) or 'none yet'}.")
        try:
            kept = json.loads((found / "config.json").read_text())["experiment"]
            fields = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
            return cls(found, Experiment(**fields))
        except (OSError, ValueError, KeyError, TypeError) as reason:
            raise LabError(f"{found / 'config.json'} is not the configuration of a run ({reason}).") from None

    @property
    def results_file(self) -> Path:
        return self.folder / "results.json"

    @property
    def log_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @cached_property
    def store(self) -> Store:
        return Store(self.folder.parent)

    def results(self) -> dict | None:
        """The closing results of a finished run, else None."""
        return json.loads(self.results_file.read_text()) if self.results_file.exists() else None

    def events(self) -> list[dict]:
        return read_lines(self.log_file)

    def open(self, provenance: dict) -> None:
        """Make the folder and write config.json (configuration and provenance) before any work."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            raise LabError(f"Cannot make {self.folder}: {reason.strerror or reason}.") from None
        config = {"experiment": asdict(self.experiment), "provenance": provenance}
        write_atomically(self.folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())

    def finish(self, results: dict) -> None:
        write_atomically(self.results_file, (json.dumps(results, indent=1) + "\n").encode())
