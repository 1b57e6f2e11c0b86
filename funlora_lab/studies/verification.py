"""Did anything change? A run's certificates compared with each other, with its files, and with what is drawn anew."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from funlora_lab.continual import OpenRun
from funlora_lab.continual.certificate import certify, fingerprints_by_layer
from funlora_lab.errors import LabError
from funlora_lab.store import Run, fingerprint, parse_tensors, read_tensors
from funlora_lab.systems import generator_of
from funlora_lab.training import Event, Runtime

TOLERANCE = 1e-3  # root mean square between pixels of a class drawn on two machines, whose last bits differ


def _entries(event: Event) -> Iterator[tuple[str | None, str, dict]]:
    """(class, what, entry) of everything that a certificate speaks of; the class of the backbone is None."""
    yield None, "backbone", event["backbone"]
    for cls, entries in event["classes"].items():
        for what, entry in entries.items():
            yield cls, what, entry


@dataclass
class Verification:
    """What ``verify`` found: one line per thing and task that was compared, and notes on what could not be."""

    run: Path
    compared: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, task: int, cls: str | None, what: str, against: str, same: bool, layers=(), why: str = ""):
        """``cls`` is None for the backbone; ``against`` says with what the certificate of ``task`` was compared."""
        row = {"task": task, "class": cls, "what": what, "against": against, "unchanged": same}
        self.compared.append(row | {"layers": list(layers), "why": why})

    @property
    def differences(self) -> list[dict]:
        return [row for row in self.compared if not row["unchanged"]]

    @property
    def unchanged(self) -> bool:
        return not self.differences

    def json(self) -> dict:
        about = {"run": str(self.run), "unchanged": self.unchanged, "compared": len(self.compared)}
        return about | {"differences": self.differences, "notes": self.notes}

    def table(self) -> pd.DataFrame:
        """One line for the backbone and each class, one column a task: unchanged, CHANGED, or empty before it."""
        names = ["backbone" if row["class"] is None else f"class {row['class']}" for row in self.compared]
        frame = pd.DataFrame(self.compared).assign(name=names)
        same = frame.groupby(["name", "task"], sort=False)["unchanged"].all().unstack(sort=False)
        words = same.apply(lambda column: column.map({True: "unchanged", False: "CHANGED"})).fillna("")
        return words.rename(columns=lambda task: f"task {task}").rename_axis(index=None, columns=None)

    def sentences(self) -> list[str]:
        """The differences, one sentence each; what differs in the same way after several tasks is said once."""
        said: dict[str, list[int]] = {}
        for row in self.differences:
            name = "the backbone" if row["class"] is None else f"class {row['class']}, its {row['what']}"
            layers, more = row["layers"][:4], len(row["layers"]) - 4
            some = f"; layers {', '.join(layers)}{f' and {more} more' if more > 0 else ''}" if layers else ""
            sentence = f"{name}: differs from {row['against']} (certificate of task TASKS){some}"
            said.setdefault(sentence + (f"; {row['why']}" if row["why"] else ""), []).append(row["task"])
        return [sentence.replace("TASKS", ", ".join(map(str, tasks)), 1) for sentence, tasks in said.items()]


def certificates(run: Run) -> list[Event]:
    """The certificates of a run's log; raises LabError when there are none."""
    found = [event for event in run.events() if event["event"] == "certificate"]
    if not found:
        raise LabError(f"{run.folder} holds no certificates: accepted is a run with a generator, past its first task.")
    return found


def verify(run: Run, device: torch.device | None = None) -> Verification:
    """Compare everything a run certified with its first certificate, with its files, and with what is drawn anew.

    Reads only: nothing is trained or written. Where the run cannot be opened or drawn from (its pictures have moved,
    say), the stored files alone are compared, and a note says why.
    """
    found, stored = Verification(run.folder), certificates(run)
    for now in stored:
        first = {cls: next(event for event in stored if cls in event["classes"]) for cls in now["classes"]}
        _compare(found, now, first | {None: stored[0]}, "what it was when first learned")
    if not all([_check_files(found, now, run.store.folder / "artefacts") for now in stored]):
        found.notes.append("No images were drawn anew, since stored files are missing or damaged.")
        return found
    try:
        context = OpenRun(run, Runtime(device=device or torch.device("cpu")), read_only=True).context
        generator, learned = generator_of(context), 0
        for before in stored:
            for task in range(learned, before["task"]):
                generator.learn(task)
            learned = before["task"]
            now = certify(context, generator, learned - 1)
            same_machine = before["machine"] == now["machine"]
            note = f"Drawn on {before['machine']}, verified on {now['machine']}: pixels agree within {TOLERANCE}."
            found.notes += [] if same_machine or note in found.notes else [note]
            _compare(found, before, dict.fromkeys([None, *before["classes"]], now), "what is drawn now", same_machine)
    except LabError as reason:
        found.notes.append(f"The stored files were compared; no images were drawn anew: {reason}")
    return found


def compare_runs(run: OpenRun, other: OpenRun) -> Verification:
    """Everything that certificates speak of, as it stands in two opened runs over one base: which of it differs?

    Made for a run and the one that ``tune_class`` returns; classes that only one of the two knows are left out.
    """
    now, then = (certify(each.context, each.generator, len(each.tasks) - 1) for each in (run, other))
    now["classes"] = {cls: entry for cls, entry in now["classes"].items() if cls in then["classes"]}
    found = Verification(run.run.folder)
    _compare(found, now, dict.fromkeys([None, *now["classes"]], then), "that of the other run")
    return found


def _compare(found: Verification, now: Event, then: dict[str | None, Event], against: str, exact: bool = True) -> None:
    """Compare the certificate ``now`` with the one that ``then`` holds for each class, and for the backbone (None)."""
    for cls, what, mine in _entries(now):
        if what != "samples":
            other = then[cls]["classes"][cls][what] if cls else then[cls]["backbone"]
            pixels, others = (entry.get("pixels", ()) for entry in (mine, other))
            close = what == "images" and not exact and math.dist(pixels, others) <= TOLERANCE * math.sqrt(len(pixels))
            same = close or mine["sha256"] == other["sha256"]
            found.add(now["task"], cls, what, against, same, _unlike(mine, other.get("layers", {})))


def _unlike(entry: dict, layers: dict[str, str]) -> list[str]:
    mine = entry.get("layers", {})
    return [name for name in sorted(mine.keys() | layers) if mine.get(name) != layers.get(name)]


def _check_files(found: Verification, now: Event, artefacts: Path) -> bool:
    """Compare every stored file that a certificate mentions; True when all can be loaded."""
    loadable = True
    for cls, what, entry in _entries(now):
        if what == "images":
            continue
        folder, layers, why, same = artefacts / entry["file"], [], "", False
        paths = sorted(folder.glob("chunk-*.safetensors")) if what == "samples" else [folder / "result.safetensors"]
        try:
            tensors = [parse_tensors(path)[0] for path in paths]
            if what == "samples":
                numbers = {"images": torch.cat([chunk["images"] for chunk in tensors])[: entry["count"]]}
            else:
                numbers, layers = tensors[0], _unlike(entry, fingerprints_by_layer(tensors[0]))
            same = fingerprint(numbers) == entry["sha256"]
            why = "" if same else f"{folder.name} holds other numbers"
            for path in paths:
                read_tensors(path)
        except LabError as reason:
            same, loadable, why = False, False, str(reason).partition(";")[0]
        except (KeyError, RuntimeError):
            same, loadable, why = False, False, f"{folder.name} holds no samples"
        found.add(now["task"], cls, what, "what is stored now", same, layers, why)
    return loadable
