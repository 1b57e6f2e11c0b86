"""Artefacts: what is trained once, logged, saved, resumed exactly and reused by every run that needs it.

An artefact is the base model, one class's adapter, one class's samples or one classifier. Its key is a hash of all
that it depends on, so runs share it and nothing is ever mistaken for something else.

    <home>/artefacts/<kind>-<key>/   inputs.json          what it depends on, in full
                                     log.jsonl            its events, one JSON object a line, flushed
                                     state.safetensors    progress, while it is in the making
                                     result.safetensors   the result; its presence means finished
"""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from funlora_lab.errors import Damaged
from funlora_lab.experiment import place
from funlora_lab.store import files

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2  # of artefacts and runs; raised when those of earlier versions must not be reused


def checkout() -> Path | None:
    """The clone this package is used from, if it is: the folder that holds its pyproject.toml."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "pyproject.toml").exists() else None


def home() -> Path:
    """Where runs live: FUNLORA_HOME, or ``runs`` in the clone (without a clone, in the current folder)."""
    chosen = os.environ.get("FUNLORA_HOME")
    return place(chosen) if chosen else (checkout() or Path.cwd()) / "runs"


def key_of(inputs: dict) -> str:
    """A hash of everything an artefact depends on."""
    return hashlib.sha256(files.canonical(inputs).encode()).hexdigest()[:16]


class Artefact:
    """One artefact, finished, begun or not: its folder, and what it depends on."""

    def __init__(self, folder: Path, inputs: dict):
        self.folder, self.name, self.inputs = folder, folder.name, inputs
        self.kind, _, self.key = folder.name.rpartition("-")
        self.result_file = folder / "result.safetensors"
        self.state_file = folder / "state.safetensors"
        self.log_file = folder / "log.jsonl"

    done = property(lambda self: self.result_file.exists())

    @contextmanager
    def held(self, check, tell):
        """Hold the folder (as ``locked`` does) while the artefact is made, so that no other process makes it too."""
        with files.locked(self.folder, check, tell):
            files.clear_leftovers(self.folder)
            self.open()
            yield

    def open(self) -> None:
        """Make the folder and write down what the artefact depends on, before any work."""
        files.make_folder(self.folder)
        if not (self.folder / "inputs.json").exists():
            files.write_json(self.folder / "inputs.json", self.inputs, sort_keys=True)

    def write(self, path: Path, tensors: dict[str, Tensor], facts: dict) -> None:
        """Save a file of this artefact, signed with its name."""
        files.write_tensors(path, tensors, {**facts, "artefact": self.name})

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict]:
        """(tensors, facts) of a file of this artefact; raises Damaged when it is one of another artefact."""
        tensors, facts = files.read_tensors(path)
        if (name := facts.pop("artefact", self.name)) != self.name:
            raise Damaged(path, f"{path} is foreign: it belongs to {name}")
        return tensors, facts

    def result(self) -> tuple[dict[str, Tensor], dict]:
        return self.read(self.result_file)

    def events(self) -> list[dict]:
        return files.read_lines(self.log_file)

    def log(self, event: dict) -> dict:
        files.append_line(self.log_file, event)
        return event

    def save_state(self, tensors: dict[str, Tensor], **facts) -> None:
        """Save progress, remembering how long the log was then."""
        self.write(self.state_file, tensors, {**facts, "log_bytes": files.sync(self.log_file)})

    def resume(self) -> tuple[dict[str, Tensor], dict] | None:
        """The saved progress, with the log cut back to that moment; None (and an empty log) when there is none."""
        saved = self.read(self.state_file) if self.state_file.exists() else None
        files.cut_log(self.log_file, saved[1]["log_bytes"] if saved else 0)
        return saved

    def finish(self, tensors: dict[str, Tensor], **facts) -> None:
        """Save the result; the artefact counts as finished from this moment on."""
        files.sync(self.log_file)
        self.write(self.result_file, tensors, facts)
        self.forget_progress()

    def forget_progress(self) -> None:
        """Delete the saved progress of a finished artefact: again, where a run died before it had come to that."""
        if self.state_file.exists():
            files.delete(self.state_file)


class Store:
    """All artefacts under one home."""

    def __init__(self, folder: Path, artefact_class: type[Artefact] = Artefact):
        self.folder, self.artefact_class = folder, artefact_class

    def artefact(self, kind: str, **inputs) -> Artefact:
        """The artefact of that kind with exactly these inputs, whether it is finished, begun or not yet begun."""
        inputs = {"format": FORMAT, "kind": kind, **inputs}
        return self.artefact_class(self.folder / "artefacts" / f"{kind}-{key_of(inputs)}", inputs)

    def discard_damaged(self) -> list[Damaged]:
        """Delete every artefact, state and log that cannot be trusted, so that it is made again; says which."""
        found = []
        for folder in sorted((self.folder / "artefacts").glob("*-*")):
            artefact, paths = Artefact(folder, {}), sorted(folder.glob("[!.]*.safetensors"))
            found += files.discard_damaged(*(partial(artefact.read, path) for path in paths))
            if log := files.discard_damaged(artefact.events):  # it cannot be made again without its artefact
                files.delete(artefact.result_file, artefact.state_file)
                found += log
        return found
