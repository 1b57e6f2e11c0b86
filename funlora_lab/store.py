"""What is kept: stages that are trained once, logged, saved, resumed exactly and reused, and the runs made of them.

A *stage* is one artefact in the making or finished: the base model, one class's adapter, one class's samples, one
classifier. Its folder is named by a hash of everything it depends on, so a table of fourteen methods over one base
trains the base once, and nothing is ever mistaken for something else.

    <home>/artefacts/<kind>-<key>/   inputs.json          what it depends on, in full
                                     log.jsonl            its events, one JSON object a line, flushed
                                     state.safetensors    progress, while it is in the making
                                     result.safetensors   the result; its presence means finished
    <home>/<run>/                    config.json, metrics.jsonl, results.json and pictures of one run
"""

import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

from torch import Tensor

from funlora_lab import __version__
from funlora_lab.config import Experiment
from funlora_lab.disk import (
    append_line,
    canonical,
    clear_leftovers,
    cut_log,
    locked,
    make_folder,
    read_json,
    read_lines,
    read_tensors,
    size_of,
    sync,
    write_atomically,
    write_tensors,
    writing,
)
from funlora_lab.errors import Damaged, LabError

FORMAT = 1  # of the artefacts; raised when old ones must not be reused


def checkout() -> Path | None:
    """The clone this package is used from, if it is: the folder that holds its pyproject.toml."""
    folder = Path(__file__).resolve().parent.parent
    return folder if (folder / "pyproject.toml").exists() else None


def home() -> Path:
    """Where runs live: FUNLORA_HOME, or ``runs`` in the clone (without a clone, in the current folder)."""
    chosen = os.environ.get("FUNLORA_HOME")
    return Path(chosen).absolute() if chosen else (checkout() or Path.cwd()) / "runs"


def key_of(inputs: dict) -> str:
    """The name of an artefact among those of its kind: a hash of everything it depends on."""
    return hashlib.sha256(canonical(inputs).encode()).hexdigest()[:16]


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

    @contextmanager
    def held(self, runtime):
        """Hold the stage while it is worked on: no two processes ever make the same artefact at once.

        ``runtime`` (training.py) is told who is waited for, and may refuse, or stop the waiting.
        """
        if runtime.team.size == 1:  # of several processes none may leave while the others go on
            runtime.check()
        make_folder(self.folder)
        with locked(self.folder, runtime.check, runtime.tell):
            clear_leftovers(self.folder)
            self.open()
            yield

    def open(self) -> None:
        """Make the folder and write down what the artefact depends on, before any work."""
        make_folder(self.folder)
        inputs = self.folder / "inputs.json"
        if not inputs.exists():
            write_atomically(inputs, (json.dumps(self.inputs, indent=1, sort_keys=True) + "\n").encode())

    def write(self, path: Path, tensors: dict[str, Tensor], facts: dict) -> None:
        """Save a file of this stage, signed with its key."""
        write_tensors(path, tensors, {**facts, "stage": f"{self.kind}-{self.key}"})

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict]:
        """(tensors, facts) of a file of this stage; raises Damaged when it is one of another stage."""
        tensors, facts = read_tensors(path)
        name = facts.pop("stage", self.folder.name)
        if name != f"{self.kind}-{self.key}":
            raise Damaged(path, f"{path} is foreign: it belongs to {name}")
        return tensors, facts

    def result(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, facts) of the finished artefact."""
        return self.read(self.result_file)

    def events(self) -> list[dict]:
        return read_lines(self.log_file)

    def log(self, event: dict) -> dict:
        """Append one event and flush it."""
        append_line(self.log_file, event)
        return event

    def save_state(self, tensors: dict[str, Tensor], **facts) -> None:
        """Save progress, remembering how long the log was then."""
        sync(self.log_file)
        self.write(self.state_file, tensors, {**facts, "log_bytes": size_of(self.log_file)})

    def resume(self) -> tuple[dict[str, Tensor], dict] | None:
        """The saved progress, with the log cut back to that moment; None (and an empty log) when there is none."""
        saved = self.read(self.state_file) if self.state_file.exists() else None
        cut_log(self.log_file, saved[1]["log_bytes"] if saved else 0)
        return saved

    def finish(self, tensors: dict[str, Tensor], **facts) -> None:
        """Save the result; the artefact counts as finished from this moment on."""
        sync(self.log_file)
        self.write(self.result_file, tensors, facts)
        self.forget_progress()

    def forget_progress(self) -> None:
        """Delete the saved progress of a finished artefact: again, where a run died before it had come to that."""
        if self.state_file.exists():
            with writing(self.state_file):
                self.state_file.unlink(missing_ok=True)


class Store:
    """All artefacts under one home."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder or home()

    def stage(self, kind: str, **inputs) -> Stage:
        """The stage of that kind with exactly these inputs, whether it is finished, begun or not yet begun."""
        inputs = {"format": FORMAT, "kind": kind, **inputs}
        key = key_of(inputs)
        return Stage(self.folder / "artefacts" / f"{kind}-{key}", kind, key, inputs)

    def discard_damaged(self) -> list[Damaged]:
        """Delete every artefact, state and log that cannot be trusted, so that it is made again; says which."""
        found = []
        for folder in sorted((self.folder / "artefacts").glob("*-*")):
            kind, _, key = folder.name.rpartition("-")
            stage = Stage(folder, kind, key, {})
            for path in sorted(folder.glob("[!.]*.safetensors")) + [stage.log_file]:
                try:
                    _ = stage.read(path) if path.suffix == ".safetensors" else read_lines(path)
                except Damaged as reason:
                    found.append(reason)
                    with writing(path):
                        path.unlink(missing_ok=True)
                        if path == stage.log_file:  # a log cannot be made again without its artefact
                            stage.result_file.unlink(missing_ok=True)
                            stage.state_file.unlink(missing_ok=True)
        return found


@dataclass(frozen=True)
class Run:
    """The folder of one run: its configuration, the log of its events, its results and pictures."""

    folder: Path
    experiment: Experiment

    @classmethod
    def of(cls, experiment: Experiment, folder: Path | None = None) -> "Run":
        """The run of this configuration under ``folder`` (default: ``home()``); nothing is written yet."""
        key = hashlib.sha256(canonical(experiment.identity).encode()).hexdigest()[:8]
        name = f"{experiment.preset}-{experiment.method}-seed{experiment.seed}-{key}"
        return cls((folder or home()) / name, experiment)

    @classmethod
    def at(cls, word: Path | str) -> "Run":
        """The run stored in the folder ``word``, or in the folder of that name under ``home()``.

        Raises LabError when there is no run, or its config.json is damaged or of another version of this package.
        """
        folder = Path(word).absolute()
        if not (folder / "config.json").is_file():
            folder = home() / word
        if not (folder / "config.json").is_file():
            raise LabError(f"'{word}' is no run: accepted is a run's folder or its name under {home()}.")
        try:
            stored = read_json(folder / "config.json")["experiment"]
            names = set(stored)
        except (TypeError, KeyError):
            raise LabError(f"{folder}/config.json is damaged: it does not hold a run's settings.") from None
        if unknown := names - {field.name for field in fields(Experiment)}:
            raise LabError(
                f"{folder} is a run of another version of funlora-lab (settings that this one lacks: "
                f"{', '.join(sorted(unknown))}); the same `funlora run` command makes it anew and reuses what it can."
            )
        tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        try:
            return cls(folder, Experiment(**tuples))
        except TypeError:
            raise LabError(f"{folder}/config.json is damaged: a setting has a value of the wrong kind.") from None

    @property
    def config_file(self) -> Path:
        return self.folder / "config.json"

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
        """The closing results of a finished run, with the folder as it is called now, else None."""
        if not self.results_file.exists():
            return None
        results = read_json(self.results_file)
        if not isinstance(results, dict) or results.get("event") != "result":
            raise Damaged(self.results_file, f"{self.results_file} holds no results of a run")
        return results | {"run": str(self.folder)}

    def events(self) -> list[dict]:
        """The log, with the folder as it is called now."""
        return [
            event | {"run": str(self.folder)} if event.get("event") == "result" else event
            for event in read_lines(self.log_file)
        ]

    def repair(self) -> list[Damaged]:
        """Delete what is damaged among the files of this run and the artefacts beside it; says what."""
        found = self.store.discard_damaged()
        for read in (self.check, self.events, self.results):
            try:
                read()
            except Damaged as reason:
                found.append(reason)
        if found:  # the run is put together again from its artefacts
            with writing(self.folder):
                for path in (self.results_file, *(reason.path for reason in found)):
                    path.unlink(missing_ok=True)
        return found

    def check(self) -> None:
        """Raise LabError when the folder holds something else than this run, saying where the two differ."""
        if not self.config_file.exists():
            return
        stored, mine = read_json(self.config_file), json.loads(canonical(asdict(self.experiment)))
        if not isinstance(stored, dict) or not isinstance(stored.get("experiment"), dict):
            raise Damaged(self.config_file, f"{self.config_file} holds no configuration of a run")
        theirs = json.loads(canonical(asdict(Experiment()))) | stored["experiment"]
        differing = [
            f"{key} is {theirs.get(key, 'absent')} there and {mine.get(key, 'absent')} here"
            for key in sorted(theirs.keys() | mine.keys())
            if theirs.get(key) != mine.get(key) or (key in theirs) != (key in mine)
        ]
        if stored.get("format", FORMAT) != FORMAT:
            differing.append(f"its format is {stored['format']} and this program's {FORMAT}")
        version = stored.get("provenance", {}).get("versions", {}).get("funlora-lab", __version__)
        if version != __version__ and not self.results_file.exists():
            differing.append(f"it was begun by funlora-lab {version} and this is {__version__}")
        if differing:
            raise LabError(f"{self.folder} holds another run than asked for ({'; '.join(differing)}): move it away.")

    def open(self, provenance: dict) -> None:
        """Write config.json (configuration and provenance) and begin an empty log, before any work."""
        config = {"format": FORMAT, "experiment": asdict(self.experiment), "provenance": provenance}
        write_atomically(self.config_file, (json.dumps(config, indent=1) + "\n").encode())
        write_atomically(self.log_file, b"")

    def log(self, event: dict) -> None:
        append_line(self.log_file, event)

    def finish(self, results: dict) -> None:
        sync(self.log_file)
        write_atomically(self.results_file, (json.dumps(results, indent=1) + "\n").encode())
