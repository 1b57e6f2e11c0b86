"""Doing the runs that tables lack, and reading the results of all of them.

Runs of a table share bases, judges and classifiers through the artefact store, whoever makes them first.
"""

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from funlora_lab import continual
from funlora_lab.config import WHOLE_NETWORK, Experiment
from funlora_lab.opened import OpenRun, exhaust, open_run
from funlora_lab.store import Run, home
from funlora_lab.studies.designs import Cell
from funlora_lab.training import Runtime


def missing(wanted: list[Cell], folder: Path | None = None) -> list[Experiment]:
    """The experiments of some cells that are not finished, each once."""
    experiments = dict.fromkeys(cell.experiment for cell in wanted)
    return [experiment for experiment in experiments if not Run.of(experiment, folder).results()]


def status(wanted: list[Cell], folder: Path | None = None) -> pd.DataFrame:
    """One line a table: runs it needs, finished and remaining."""
    lines = {}
    for table in dict.fromkeys(cell.table for cell in wanted):
        mine = [cell for cell in wanted if cell.table == table]
        left = len(missing(mine, folder))
        lines[table] = {"runs": len(mine), "finished": len(mine) - left, "remaining": left}
    return pd.DataFrame.from_dict(lines, orient="index")


def costs(run: Run) -> dict[str, float]:
    """Seconds of a finished run: base, the rest of the generator's training, sampling, classifiers, from its log."""
    spent = {"base": 0.0, "sampling": {}, "classifier": {}}
    judged = False  # the first classifier is the judge, no part of the method; what follows it is
    for event in run.events():
        if event["event"] == "loss" and event["stage"] == "base":
            spent["base"], judged = event["seconds"], True
        elif event["event"] == "samples":
            spent["sampling"][event["class"]], judged = event["seconds"], True
        elif event["event"] == "loss" and event["stage"] == "classifier" and judged:
            spent["classifier"][event["classes"]] = event["seconds"]
    parts = {name: sum(value.values()) if isinstance(value, dict) else value for name, value in spent.items()}
    return {"generator": run.results()["seconds"] - sum(parts.values()), **parts}


def _trial(experiment: Experiment, device: str) -> dict[str, float]:
    """Seconds a run would take, from a run of a few steps in a temporary folder."""
    e = experiment
    short = e.but(
        base_images=4 * e.base_batch,
        adapter_images=4 * e.adapter_batch,
        samples_per_class=min(8, e.chunk),
        chunk=min(8, e.chunk),
        classifier_epochs=1,
        score_after="last",
    )
    with TemporaryDirectory() as folder:
        events = list(continual.run(short, Runtime(device=continual.pick_device(device)), Path(folder)))
    spent = {event["stage"]: event["seconds"] / event["step"] for event in events if event["event"] == "loss"}
    drawn = sum(event["seconds"] for event in events if event["event"] == "samples")
    tasks = next(event["tasks"] for event in events if event["event"] == "run")
    fits = {"every": len(tasks), "last": 1, "none": 0}[e.score_after]
    adapters = spent.get("adapter", 0.0) * e.adapter_steps
    groups = 1 if e.lanes >= sum(map(len, tasks[1:])) else len(tasks) - 1
    classifier = spent["classifier"] * e.classifier_epochs * sum(map(len, tasks)) * e.samples_per_class
    own = adapters * groups + drawn * e.samples_per_class / short.chunk + fits * classifier / e.classifier_batch
    return {"base": spent.get("base", 0.0) * e.base_steps, "own": own}


def workers_for(experiments: list[Experiment], device: str) -> int:
    """Processes at once: one a processor core, or one on a GPU."""
    return 1 if continual.pick_device(device).type == "cuda" else max(1, min(len(experiments), os.cpu_count() or 1))


def _base_and_own(run: Run) -> dict[str, float]:
    base = costs(run)["base"]
    return {"base": base, "own": run.results()["seconds"] - base}


def estimate(wanted: list[Cell], device: str = "auto", folder: Path | None = None) -> float:
    """Seconds until all cells are done: from what finished runs took, or, when there are none, from a short trial."""
    todo = missing(wanted, folder)
    if not todo:
        return 0.0
    finished = {cell.experiment: cell.run(folder) for cell in wanted if cell.experiment not in todo}
    known = {experiment: _base_and_own(run) for experiment, run in finished.items()}
    if not known:
        longest = next((e for e in todo if e.method not in WHOLE_NETWORK), todo[0])
        known = {longest: _trial(longest, device)}
    usual = {part: mean(cost[part] for cost in known.values()) for part in ("base", "own")}
    same_row = {e.but(seed=0): cost["own"] for e, cost in known.items()}
    new_seeds = {e.seed for e in todo} - {e.seed for e in finished}
    seconds = usual["base"] * len(new_seeds) + sum(same_row.get(e.but(seed=0), usual["own"]) for e in todo)
    return seconds / workers_for(todo, device)


def _work(experiment: Experiment, device: str, folder: Path, threads: int) -> None:
    """What a process does: run one experiment. What two processes need, one makes while the other waits."""
    torch.set_num_threads(threads)
    exhaust(continual.run(experiment, Runtime(device=continual.pick_device(device)), folder))


def perform(
    wanted: list[Cell],
    device: str = "auto",
    folder: Path | None = None,
    show: Callable[[str], None] = lambda line: None,
    each: Callable[[str], None] = lambda line: None,
) -> None:
    """Run every cell that is not finished, on processors as many side by side as there are cores.

    ``show`` gets what there is to do and how long it should take before anything starts, and how long it took;
    ``each`` gets a line for every finished run. Raises the first error of a run, after the others have been stopped;
    what was finished or saved stays.
    """
    folder = folder or home()
    todo = missing(wanted, folder)
    all_of = len({cell.experiment for cell in wanted})
    if not todo:
        return show(f"{all_of} runs, all stored")
    workers = workers_for(todo, device)
    duration = _duration(estimate(wanted, device, folder))
    show(f"{all_of} runs: {all_of - len(todo)} stored, {len(todo)} to do in about {duration}, {workers} at once")
    begun = time.monotonic()
    ended = _side_by_side(todo, workers, device, folder) if workers > 1 else _in_turn(todo, device, folder)
    for experiment in ended:
        each(_finished(experiment, folder))
    show(f"done in {_duration(time.monotonic() - begun)}")


def _in_turn(experiments: list[Experiment], device: str, folder: Path) -> Iterator[Experiment]:
    for experiment in experiments:
        _work(experiment, device, folder, torch.get_num_threads())
        yield experiment


def _side_by_side(experiments: list[Experiment], workers: int, device: str, folder: Path) -> Iterator[Experiment]:
    """Each experiment in one of ``workers`` processes; yields it when it has ended, raises the first error."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            futures = {pool.submit(_work, e, device, folder, threads): e for e in experiments}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _finished(experiment: Experiment, folder: Path) -> str:
    e, results = experiment, Run.of(experiment, folder).results()
    return f"{e.preset} {e.method} {e.operation} {e.start} window {e.window} seed {e.seed}: {results['seconds']:.0f} s"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


MEASURES = ("LA", "AIA", "recognition", "flow_loss", "seconds")


def collect(wanted: list[Cell], folder: Path | None = None) -> pd.DataFrame:
    """One line a cell: table, row, seed, PPC, MEASURES (NaN when not measured), device; unfinished ones have NaN."""
    lines = []
    for cell in wanted:
        results = cell.run(folder).results() or {}
        about = results.get("provenance", {})
        line = {"table": cell.table, "row": cell.row, "method": cell.experiment.method, "seed": cell.experiment.seed}
        line |= {name: results.get(name) for name in ("PPC", *MEASURES)} | {"device": about.get("device")}
        lines.append(line | {"rate": None if cell.experiment.method in WHOLE_NETWORK else cell.experiment.adapter_rate})
    frame = pd.DataFrame(lines)
    return frame.astype(dict.fromkeys((*MEASURES, "PPC", "rate"), float))


def open_row(wanted: list[Cell], row: str, device: str = "auto") -> list[OpenRun]:
    """The opened runs of one row, a seed each."""
    return [open_run(cell.experiment, device) for cell in wanted if cell.row == row]


def summary(frame: pd.DataFrame, measures=MEASURES) -> pd.DataFrame:
    """One line a row of a table: PPC, rate, n (finished seeds), and mean and standard deviation over seeds."""
    grouped = frame.groupby(["table", "row"], sort=False)
    wide = grouped[list(measures)].agg(["mean", "std"])
    wide.columns = [name if kind == "mean" else f"{name} sd" for name, kind in wide.columns]
    first = grouped.agg(PPC=("PPC", "first"), rate=("rate", "first"), n=("seconds", "count"))
    return first.join(wide)


def paired(frame: pd.DataFrame, row: str, measure: str = "flow_loss") -> pd.DataFrame:
    """How much more than ``row`` every other row has of a measure, seed by seed: mean, standard deviation, worst."""
    wide = frame.pivot(index="seed", columns="row", values=measure)
    more = wide.drop(columns=row).sub(wide[row], axis=0)
    return pd.DataFrame({"mean": more.mean(), "sd": more.std(), "least": more.min(), "n": more.count()})


def describe(base: Experiment, seeds) -> str:
    """One sentence that says what a notebook's numbers rest on."""
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    return (
        "Preset {preset}: {base_channels} channels, {base_images:,} images for the base and {adapter_images:,} for "
        "every later class, {samples_per_class} samples a class".format(**fields)
        + f"; n = {len(seeds)} seed{'s' if len(seeds) > 1 else ''}."
    )
