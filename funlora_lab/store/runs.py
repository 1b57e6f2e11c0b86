"""Runs: the folder of one experiment, written before its work begins and put together from artefacts.

<home>/<run>/    config.json (settings and provenance), metrics.jsonl (events), results.json and pictures
"""

import json
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path

from funlora_lab import __version__
from funlora_lab.errors import Damaged, LabError
from funlora_lab.experiment import FLAT, REGISTERED_TEXTS, Experiment, place
from funlora_lab.store import files
from funlora_lab.store.artefacts import FORMAT, Store, home, key_of

UNFINISHED = ".pictures"  # lies in a run's folder while its pictures are drawn
ANEW = "the same `funlora run` command makes it anew."


class OtherVersion(LabError):
    """A stored run was made by another version of this package, whose settings or files this one does not read."""


def _config(path: Path) -> dict:
    """config.json of a run, its settings as a flat dictionary; raises Damaged when it does not hold a run's."""
    config = files.read_json(path)
    if not isinstance(config, dict) or not all(isinstance(config.get(n), dict) for n in ("experiment", "provenance")):
        raise Damaged(path, f"{path} holds no configuration of a run")
    return config


def _experiment(path: Path, config: dict) -> Experiment:
    """The experiment of a run's config.json; raises OtherVersion or Damaged."""
    if (version := config.get("format", 1)) != FORMAT:
        age = "an earlier" if version == 1 else "another"
        raise OtherVersion(f"{path.parent} was made by {age} version of funlora-lab: {ANEW}")
    if unknown := ", ".join(sorted(config["experiment"].keys() - FLAT.keys())):
        made = f"{path.parent} was made by another version of funlora-lab"
        raise OtherVersion(f"{made} (unknown settings: {unknown}): {ANEW}")
    try:
        return Experiment.from_flat(config["experiment"])
    except (TypeError, LabError) as reason:
        raise Damaged(path, f"{path} is damaged ({str(reason).rstrip('.')})") from None


class Run:
    """The folder of one run: its configuration, the log of its events, its results and pictures."""

    def __init__(self, folder: Path, experiment: Experiment):
        self.folder, self.experiment, self.store = folder, experiment, Store(folder.parent)
        self.config_file = folder / "config.json"
        self.results_file = folder / "results.json"
        self.log_file = folder / "metrics.jsonl"

    @classmethod
    def of(cls, experiment: Experiment, folder: Path | None = None) -> "Run":
        """The run of this experiment under ``folder`` (default: ``home()``); nothing is written yet."""
        name = f"{experiment.preset}-{experiment.method}-seed{experiment.seed}-{key_of(experiment.identity)[:8]}"
        return cls((folder or home()) / name, experiment)

    @classmethod
    def at(cls, word: Path | str) -> "Run":
        """The run stored in the folder ``word``, or in the folder of that name under ``home()``; else LabError."""
        for folder in (place(word), home() / word):
            if (path := folder / "config.json").is_file():
                return cls(folder, _experiment(path, _config(path)))
        raise LabError(f"'{word}' is no run: accepted is a run's folder or its name under {home()}.")

    def results(self) -> dict | None:
        """The closing results of a finished run, with the folder as it is called now, else None."""
        if not self.results_file.exists():
            return None
        results = files.read_json(self.results_file)
        scores = [results.get(name, "") for name in ("LA", "AIA")] if isinstance(results, dict) else [""]
        if not all(isinstance(score, float | None) for score in scores) or results.get("event") != "result":
            raise Damaged(self.results_file, f"{self.results_file} holds no results of a run")
        return results | {"run": str(self.folder)}

    def provenance(self) -> dict:
        """Where, with what and from which images the run was made, as its configuration says; {} before it is begun."""
        return _config(self.config_file)["provenance"] if self.config_file.exists() else {}

    def replay(self, report: Callable[[dict], None]) -> dict:
        """Report the events of a finished run again, marked as replayed -> its results."""
        for event in self.events():
            report({**event, "replayed": True})
        return self.results()

    @property
    def pictures(self) -> list[Path]:
        """The pictures in the folder; none when their drawing was broken off."""
        return [] if (self.folder / UNFINISHED).exists() else sorted(self.folder.glob("*.png"))

    def events(self) -> list[dict]:
        """The log, with the folder as it is called now."""
        here = {"run": str(self.folder)}
        return [event | here if event.get("event") == "result" else event for event in files.read_lines(self.log_file)]

    def repair(self) -> list[Damaged]:
        """Delete what is damaged among the files of this run and the artefacts beside it; says what."""
        found = self.store.discard_damaged() + files.discard_damaged(self.check, self.events, self.results)
        if found:  # the run is put together again from its artefacts
            files.delete(self.results_file)
        return found

    def check(self) -> None:
        """Raise LabError when the folder holds something else than this run, saying where the two differ."""
        if not self.config_file.exists():
            return
        stored = _config(self.config_file)
        defaults = {name: field.default for name, (_, field) in FLAT.items() if field.default is not MISSING}
        theirs, mine = json.loads(files.canonical([defaults | stored["experiment"], self.experiment.flat]))
        pairs = [(name, theirs.get(name, "absent"), mine.get(name, "absent")) for name in sorted(theirs | mine)]
        differing = [f"{name} is {there} there and {here} here" for name, there, here in pairs if there != here]
        if (version := stored.get("format", 1)) != FORMAT:
            differing.append(f"its format is {version} and this program's {FORMAT}")
        versions = stored["provenance"].get("versions")
        begun_by = versions.get("funlora-lab", __version__) if isinstance(versions, dict) else __version__
        if begun_by != __version__ and not self.results_file.exists():
            differing.append(f"it was begun by funlora-lab {begun_by} and this is {__version__}")
        if differing:
            raise LabError(f"{self.folder} holds another run than asked for ({'; '.join(differing)}): move it away.")

    def open(self, provenance: dict) -> None:
        """Write config.json (settings and provenance), the text of a user's own method, and an empty log."""
        config = {"format": FORMAT, "experiment": self.experiment.flat, "provenance": provenance}
        files.write_json(self.config_file, config)
        if text := REGISTERED_TEXTS.get(self.experiment.method):
            files.write_atomically(self.folder / "method.py", text.encode())
        files.write_atomically(self.log_file, b"")

    def log(self, event: dict) -> None:
        files.append_line(self.log_file, event)

    def finish(self, results: dict) -> None:
        files.sync(self.log_file)
        files.write_json(self.results_file, results)


def listing(folder: Path | None = None) -> list[dict]:
    """Every run stored under ``folder`` (default: ``home()``), sorted by name: name, folder, settings (flat; None when
    damaged), state (finished, running, unfinished, damaged or other version), results (None unless finished), started.
    """
    found = []
    for path in sorted((folder or home()).glob("*/config.json")):
        line = {"name": path.parent.name, "folder": path.parent, "settings": None, "results": None, "started": ""}
        try:
            config = _config(path)
            line["started"] = str(config["provenance"].get("started", ""))
            run = Run(path.parent, _experiment(path, config))
            line["settings"] = run.experiment.flat
            results = line["results"] = run.results()
            line["state"] = "finished" if results else "running" if files.in_use(run.folder) else "unfinished"
        except OtherVersion:
            line |= {"state": "other version", "settings": config["experiment"]}
        except (LabError, OSError):
            line["state"] = "damaged"
        found.append(line)
    return found
