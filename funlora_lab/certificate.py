"""The certificate of no forgetting: fingerprints taken after every task, and their proof at any later time.

After every task the run's log receives a ``certificate`` event: SHA-256 of the network, of each class's adapter, of
each class's stored samples, and of a few images of each class drawn there and then, from the weights in memory.
``verify`` compares every certificate with the first one of each class (did later tasks change it?) and with what the
artefacts hold and draw now (did anything change since?). Fingerprints by layer let it name the layer that changed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from funlora_lab import data
from funlora_lab.disk import fingerprint, parse_tensors, read_tensors
from funlora_lab.errors import LabError
from funlora_lab.flow import Solver, noise
from funlora_lab.generators import generator_of
from funlora_lab.network import WholeNetwork
from funlora_lab.store import Run, Store
from funlora_lab.training import Event, Runtime
from funlora_lab.work import Work

IMAGES = 4  # of each class, drawn anew for every certificate
SOLVER = Solver("euler", 2)  # passes every weight twice; the images need not be good, only sensitive
TOLERANCE = 1e-3  # between pixels drawn on two machines, whose last bits differ
KEPT_PIXELS = 8  # pixels noted beside a fingerprint, for that comparison


def place(device: torch.device) -> str:
    """What the last bits of a computation depend on: device, its name, threads and version of PyTorch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{models[0] if models else 'cpu'}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def by_layer(tensors: dict[str, Tensor]) -> dict[str, str]:
    """The first 16 digits of the SHA-256 of every layer's tensors, by the layer's name."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        layer = name.rpartition("/" if "/" in name else ".")[0] or name
        layers.setdefault(layer, {})[name] = value
    return {layer: fingerprint(parts)[:16] for layer, parts in sorted(layers.items())}


def draw_few(learner: WholeNetwork, work: Work, cls: int) -> Tensor:
    """A fixed few images (IMAGES, C, H, W) of a class from the weights in memory, in full precision, on the CPU."""
    e = work.experiment
    x0 = noise(e.seed, cls, 0, (IMAGES, e.channels, e.image_size, e.image_size)).to(work.runtime.device)
    return SOLVER.integrate(learner.source(cls).velocity(), x0)[0].cpu()


def certify(work: Work, learner: WholeNetwork, task: int, samples: dict[int, tuple[str, Tensor]]) -> Event:
    """The certificate after ``task``; ``samples`` are the stored ones of every class seen: (folder's name, images)."""
    network = learner.net.state_dict()
    classes = {}
    for cls in (cls for group in work.tasks[: task + 1] for cls in group):
        images = draw_few(learner, work, cls)
        folder, stored = samples[cls]
        classes[str(cls)] = {
            "images": fingerprint({"images": images}),
            "pixels": [round(value, 6) for value in images.flatten()[:: -(-images.numel() // KEPT_PIXELS)].tolist()],
            "samples": {"file": folder, "sha256": fingerprint({"images": stored}), "count": len(stored)},
        }
        row = getattr(learner, "rows", {}).get(cls)
        if row:
            classes[str(cls)]["adapter"] = {
                "file": learner.stage(cls).folder.name,
                "sha256": fingerprint(row),
                "layers": by_layer(row),
            }
    return {
        "event": "certificate",
        "task": task + 1,
        "place": place(work.runtime.device),
        "backbone": {
            "file": f"network-{learner.key}",
            "sha256": fingerprint(network),
            "layers": by_layer(network),
        },
        "classes": classes,
    }


@dataclass
class Report:
    """What ``verify`` found: one line per thing and task that was compared, and those that differ."""

    run: Path
    compared: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, task: int, cls: str | None, what: str, against: str, same: bool, layers: list[str], why: str = ""):
        """``cls`` is None for the backbone; ``against`` says with what the certificate of ``task`` was compared."""
        row = {"task": task, "class": cls, "what": what, "against": against, "unchanged": same, "layers": layers}
        self.compared.append(row | {"why": why})

    @property
    def differences(self) -> list[dict]:
        return [row for row in self.compared if not row["unchanged"]]

    @property
    def unchanged(self) -> bool:
        return not self.differences

    def json(self) -> dict:
        differences = [{k: v for k, v in row.items() if k != "unchanged"} for row in self.differences]
        return {
            "run": str(self.run),
            "unchanged": self.unchanged,
            "compared": len(self.compared),
            "differences": differences,
            "notes": self.notes,
        }

    def table(self) -> pd.DataFrame:
        """One line for the backbone and each class, one column a task: unchanged, CHANGED, or empty before it."""
        rows: dict[str, dict[str, str]] = {}
        for row in self.compared:
            name = "backbone" if row["class"] is None else f"class {row['class']}"
            cell = rows.setdefault(name, {})
            column = f"task {row['task']}"
            cell[column] = "CHANGED" if not row["unchanged"] or cell.get(column) == "CHANGED" else "unchanged"
        return pd.DataFrame.from_dict(rows, orient="index").fillna("")

    def sentences(self) -> list[str]:
        """The differences, one sentence each; what differs in the same way after several tasks is said once."""
        said: dict[tuple, list[int]] = {}
        for row in self.differences:
            key = (row["class"], row["what"], row["against"], tuple(row["layers"]), row["why"])
            said.setdefault(key, []).append(row["task"])
        return [
            f"{'the backbone' if cls is None else f'class {cls}'}{'' if what == 'backbone' else f', its {what}'}: "
            f"differs from {against} (certificate of task {', '.join(map(str, tasks))})"
            f"{f'; layers {_some(layers)}' if layers else ''}{f'; {why}' if why else ''}"
            for (cls, what, against, layers, why), tasks in said.items()
        ]


def _some(layers: tuple[str, ...], shown: int = 4) -> str:
    rest = f" and {len(layers) - shown} more" if len(layers) > shown else ""
    return ", ".join(layers[:shown]) + rest


class _ReadOnly(Runtime):
    """A runtime under which nothing can be made: verifying never trains what is missing."""

    def check(self) -> None:
        raise LabError("an artefact of the run is missing")


def certificates(run: Run) -> list[Event]:
    """The certificates of a run's log; raises LabError when there are none."""
    found = [event for event in run.events() if event["event"] == "certificate"]
    if not found:
        raise LabError(
            f"{run.folder} holds no certificates: accepted is a run with a generator, past its first task, "
            "trained by a version of this program that writes them."
        )
    return found


def verify(run: Run, device: torch.device | None = None) -> Report:
    """Recompute everything the run certified, from its artefacts, and compare; reads only, trains nothing."""
    report, stored = Report(run.folder), certificates(run)
    for now in stored:
        first = {cls: next(e for e in stored if cls in e["classes"]) for cls in now["classes"]}
        _compare(report, now, stored[0], first, "what it was when first learned", exact=True)
    if _check_files(report, stored, Store(run.folder.parent)):
        try:
            for before, now in zip(stored, _again(run, len(stored), device or torch.device("cpu")), strict=True):
                same_place = before["place"] == now["place"]
                if not same_place:
                    note = f"Drawn on {before['place']}, verified on {now['place']}: pixels agree within {TOLERANCE}."
                    report.notes += [note] if note not in report.notes else []
                _compare(report, before, now, dict.fromkeys(before["classes"], now), "what is drawn now", same_place)
        except LabError as reason:
            report.add(len(stored), None, "backbone", "what is stored now", False, [], str(reason))
    else:
        report.notes.append("No images were drawn anew, since stored files are missing or damaged.")
    return report


def _compare(report: Report, now: Event, backbone: Event, classes: dict[str, Event], against: str, exact: bool) -> None:
    """Compare the certificate ``now`` with that of another time: ``backbone``, and ``classes`` class by class."""
    task, mine, other = now["task"], now["backbone"], backbone["backbone"]
    report.add(task, None, "backbone", against, mine["sha256"] == other["sha256"], _unlike(mine, other))
    for cls, then in classes.items():
        mine, other = now["classes"][cls], then["classes"][cls]
        if "adapter" in mine:
            a, b = mine["adapter"], other["adapter"]
            report.add(task, cls, "adapter", against, a["sha256"] == b["sha256"], _unlike(a, b))
        same = mine["images"] == other["images"]
        if not exact and not same:
            pairs = zip(mine["pixels"], other["pixels"], strict=True)
            same = all(math.isclose(x, y, abs_tol=TOLERANCE) for x, y in pairs)
        report.add(task, cls, "images", against, same, [])


def _unlike(mine: dict, other: dict) -> list[str]:
    a, b = mine["layers"], other["layers"]
    return [layer for layer in sorted(a.keys() | b.keys()) if a.get(layer) != b.get(layer)]


def _check_files(report: Report, stored: list[Event], store: Store) -> bool:
    """Compare every stored file with the certificates that mention it; True when all can be loaded."""
    loadable = True
    for now in stored:
        parts = [(None, "backbone", now["backbone"])]
        for cls, entry in now["classes"].items():
            parts += [(cls, what, entry[what]) for what in ("adapter", "samples") if what in entry]
        for cls, what, entry in parts:
            same, layers, why, readable = _file(store.folder / "artefacts" / entry["file"], entry)
            loadable &= readable
            report.add(now["task"], cls, what, "what is stored now", same, layers, why)
    return loadable


def _file(folder: Path, entry: dict) -> tuple[bool, list[str], str, bool]:
    """(unchanged, layers that differ, why, loadable) of one artefact."""
    sampled, layers = "layers" not in entry, []
    paths = sorted(folder.glob("chunk-*.safetensors")) if sampled else [folder / "result.safetensors"]
    try:
        parts = [parse_tensors(path)[0] for path in paths]
        if sampled:
            tensors = {"images": torch.cat([part["images"] for part in parts])[: entry["count"]]}
        else:
            tensors, layers = parts[0], _unlike(entry, {"layers": by_layer(parts[0])})
        same = fingerprint(tensors) == entry["sha256"]
        for path in paths:
            read_tensors(path)
    except LabError as reason:
        return False, layers, str(reason).partition(";")[0], False
    except (KeyError, RuntimeError):
        return False, layers, f"{folder.name} holds no samples", False
    return same, layers, "" if same else f"{folder.name} holds other numbers", True


def _again(run: Run, tasks: int, device: torch.device) -> Iterator[Event]:
    """The certificates of the first tasks, made anew from the stored artefacts."""
    dataset = data.load(run.experiment)
    order = data.tasks(run.experiment, len(dataset.classes))
    work = Work(run.experiment, dataset, order, Store(run.folder.parent), _ReadOnly(device=device))
    learner = generator_of(work)
    nothing = dict.fromkeys((cls for group in order for cls in group), ("", torch.empty(0)))
    for task in range(tasks):
        for _ in learner.learn(task):
            pass
        yield certify(work, learner, task, nothing)
