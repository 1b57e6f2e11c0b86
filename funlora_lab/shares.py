"""A run in shares: classes are independent after task 1, so any machine can learn some of them, in any order.

``learn`` trains the base if it is missing, then the adapters of some later classes, and draws their samples: a plain
command that can be repeated and interrupted. ``merge`` brings the finished artefacts of other homes into this one;
the run started there then finds them and equals a run made in one piece: bit for bit when a share holds whole groups
of classes trained side by side, and up to rounding otherwise.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from funlora_lab import data
from funlora_lab.config import Experiment
from funlora_lab.continual import provenance, sample_stage
from funlora_lab.disk import fingerprint, locked, make_folder, read_tensors, write_atomically
from funlora_lab.errors import LabError
from funlora_lab.frozen import FrozenBase
from funlora_lab.generators import generator_of
from funlora_lab.sampling import draw
from funlora_lab.store import FORMAT, Run, home, key_of
from funlora_lab.training import Event, Runtime
from funlora_lab.work import Work


def positions(words: str, tasks: list[list[int]]) -> list[int]:
    """The classes of ``20:40`` (positions in the order of learning, the last one excluded)."""
    order = [cls for task in tasks for cls in task]
    first, last = len(tasks[0]), len(order)
    found = re.fullmatch(r"(\d+):(\d+)", words)
    if not found or not first <= int(found[1]) < int(found[2]) <= last:
        raise LabError(
            f"--classes {words}: accepted are positions in the order of learning, from {first} (the first class after "
            f"task 1) up to {last}, as {first}:{last}."
        )
    return order[int(found[1]) : int(found[2])]


def part_of(words: str, groups: list[list[int]]) -> list[int]:
    """The classes of worker ``2/8``: whole groups of classes when there are enough of them, else single classes."""
    found = re.fullmatch(r"(\d+)/(\d+)", words)
    units = groups
    if found and len(groups) < int(found[2]):
        units = [[cls] for group in groups for cls in group]
    if not found or not 1 <= int(found[1]) <= int(found[2]) <= len(units):
        raise LabError(
            f"--worker {words}: accepted is a worker and the number of workers, from 1/{len(units)} to "
            f"{len(units)}/{len(units)} when each of the {len(units)} classes after task 1 has its own."
        )
    worker, workers = int(found[1]), int(found[2])
    mine = units[len(units) * (worker - 1) // workers : len(units) * worker // workers]
    return [cls for unit in mine for cls in unit]


def learn(
    experiment: Experiment,
    runtime: Runtime,
    home: Path | None = None,
    classes: str | None = None,
    worker: str | None = None,
) -> Iterator[Event]:
    """Learn the base and the share of the later classes that ``classes`` or ``worker`` names; neither: the base alone.

    Ends with a ``share`` event. Raises LabError before anything is written when the share does not fit.
    """
    dataset = data.load(experiment, home)
    tasks = data.tasks(experiment, len(dataset.classes))
    record = Run.of(experiment, home)
    work = Work(experiment, dataset, tasks, runtime.team.store(record.folder.parent), runtime)
    learner = generator_of(work)
    if learner is not None:
        learner.check()
    if (classes or worker) and not isinstance(learner, FrozenBase):
        raise LabError(f"method={experiment.method}: its classes are not learned apart, so a share cannot be.")
    groups = [group for k in range(1, len(tasks)) for group in learner.groups(k)] if classes or worker else []
    mine = positions(classes, tasks) if classes else part_of(worker, groups) if worker else []
    first = runtime.team.rank == 0
    if first:
        record.check()
        make_folder(record.folder)
    # of all shares at work in this home one trains the base
    with locked(record.folder, runtime.check, runtime.tell) if first else nullcontext():
        if first and not record.config_file.exists():
            record.open(provenance(runtime.device, dataset, experiment.precision))
        runtime.team.wait()
        if learner is not None:
            yield from learner.learn(0)
    for group in groups:
        if share := [cls for cls in group if cls in mine]:
            yield from learner.learn_side_by_side(share)
            for cls in share:
                source = learner.source(cls)
                stage = sample_stage(work, source, cls)
                yield from draw(stage, source.velocity, experiment, cls, experiment.samples_per_class, runtime)
    yield {
        "event": "share",
        "preset": experiment.preset,
        "method": experiment.method,
        "seed": experiment.seed,
        "classes": [dataset.classes[cls] for cls in mine],
        "seconds": sum(work.seconds.values()),
        "home": str(record.folder.parent),
    }


def _finished(stage: Path) -> list[Path]:
    """The tensor files of a finished artefact: its result, or its chunks of samples."""
    return sorted([*stage.glob("result.safetensors"), *stage.glob("chunk-*.safetensors")])


def _numbers(file: Path) -> str:
    """Fingerprint of a file's tensors, whenever and however long they were computed; verifies its checksum."""
    return fingerprint(read_tensors(file)[0])


def _verify(file: Path, chosen: dict[str, Path]) -> None:
    """Raise LabError unless the artefact is whole, is what its name says, and lies over the base it was trained on."""
    stage = file.parent
    try:
        inputs = json.loads((stage / "inputs.json").read_text())
    except (OSError, ValueError):
        inputs = {}
    if stage.name != f"{inputs.get('kind')}-{key_of(inputs)}" or inputs.get("format") != FORMAT:
        raise LabError(f"{stage} is not what its name says, or of another version of the program: leave it out.")
    _, facts = read_tensors(file)
    base = chosen.get(f"network-{inputs.get('base')}/result.safetensors")
    if base and facts.get("base", (mine := _numbers(base))) != mine:
        raise LabError(
            f"{stage} (class {facts['cls']}) was trained over another base than {base.parent}, computed on another "
            "machine: train the base once and copy it to the others before they start."
        )


def merge(folders: list[Path], into: Path | None = None) -> dict:
    """Copy the finished artefacts of other homes into this one; returns how many of each kind, and what was left out.

    Everything is verified before anything is copied: every checksum and every key, that adapters belong to the base,
    and that artefacts of the same key hold the same numbers wherever they are. Raises LabError naming the artefact.
    """
    into = into or home()
    chosen = {f"{file.parent.name}/{file.name}": file for stage in _stages(into) for file in _finished(stage)}
    fresh: dict[str, Path] = {}
    known = unfinished = 0
    for folder in folders:
        stages = _stages(folder)
        if not stages:
            raise LabError(f"{folder} holds no artefacts: accepted is a folder that served as FUNLORA_HOME.")
        for stage in stages:
            files = _finished(stage)
            unfinished += not files
            for file in files:
                name = f"{stage.name}/{file.name}"
                if name not in chosen:
                    chosen[name] = fresh[name] = file
                    continue
                known += 1
                if _numbers(file) != _numbers(chosen[name]):
                    raise LabError(
                        f"{file} and {chosen[name]} hold different numbers under one name: two machines computed the "
                        "same part; keep one of them, and for a base only what was trained over it."
                    )
    for file in fresh.values():
        _verify(file, chosen)
    for name, file in fresh.items():
        target = into / "artefacts" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        for beside in ("inputs.json", "log.jsonl"):
            if file.with_name(beside).exists():
                write_atomically(target.with_name(beside), file.with_name(beside).read_bytes())
        write_atomically(target, file.read_bytes())
        target.with_name("state.safetensors").unlink(missing_ok=True)
    kinds = Counter(stage.rpartition("-")[0] for stage in {name.partition("/")[0] for name in fresh})
    return {"home": str(into), "brought": dict(sorted(kinds.items())), "known": known, "unfinished": unfinished}


def _stages(folder: Path) -> list[Path]:
    return sorted((folder / "artefacts").glob("*-*"))
