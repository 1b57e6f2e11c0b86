"""Doing the runs that tables lack, which share bases and classifiers through the store, and reading all results."""

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from funlora_lab.adapters import METHODS
from funlora_lab.continual import OpenRun, open_run
from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment
from funlora_lab.store import Run, canonical, home, listing
from funlora_lab.studies.cost import seconds_of
from funlora_lab.studies.tables import Cell
from funlora_lab.training import ignore, pick_device

MEASURES = {  # measure -> (heading, digits, factor)
    "LA": ("LA %", 1, 100), "AIA": ("AIA %", 1, 100), "recognition": ("recognised %", 1, 100),
    "flow_loss": ("flow loss", 4, 1), "seconds": ("seconds", 0, 1),
}  # fmt: skip
NOT_RUN, NOT_MEASURED = "not run", "not measured"


def missing(wanted: list[Cell], folder: Path | None = None) -> list[Experiment]:
    return [e for e in dict.fromkeys(cell.experiment for cell in wanted) if not Run.of(e, folder).results()]


def status(wanted: list[Cell], folder: Path | None = None) -> pd.DataFrame:
    """One line a table: runs it needs, finished and remaining."""
    runs = [(cell.table, bool(cell.run(folder).results())) for cell in wanted]
    runs = pd.DataFrame(runs, columns=["table", "finished"])
    counts = runs.groupby("table", sort=False)["finished"].agg(runs="count", finished="sum").rename_axis(None)
    return counts.assign(remaining=counts["runs"] - counts["finished"])


def _trial(e: Experiment, device: str) -> dict[str, float]:
    """Seconds by kind of work that a run would take, from one of a few steps in a temporary folder."""
    few = e.but(base_images=4 * e.base.batch, adapter_images=4 * e.adapter.batch, samples_per_class=8, chunk=8)
    few, drawn = few.but(classifier_epochs=1), e.samples_per_class / 8
    with TemporaryDirectory() as folder:
        spent = seconds_of(open_run(few, device, home=Path(folder)).run)
    times = {"generator": e.adapter.steps / 4, "base": e.base.steps / 4, "sampling": drawn}
    return {kind: seconds * times.get(kind, e.classifier.epochs * drawn) for kind, seconds in spent.items()}


def workers_for(experiments: list[Experiment], device: str) -> int:
    return 1 if pick_device(device).type == "cuda" else max(1, min(len(experiments), os.cpu_count() or 1))


def estimate(wanted: list[Cell], device: str = "auto", folder: Path | None = None) -> float:
    """Seconds until all cells are done: from what finished runs took, or, when there are none, from a short trial."""
    todo = missing(wanted, folder)
    if not todo:
        return 0.0
    done = {cell.experiment: seconds_of(cell.run(folder)) for cell in wanted if cell.experiment not in todo}
    new_seeds = {e.seed for e in todo} - {e.seed for e in done}
    longest = next((e for e in todo if e.method in METHODS), todo[0])
    known = done or {longest: _trial(longest, device)}
    own = {e: sum(spent.values()) - spent["base"] for e, spent in known.items()}
    same_row = {e.but(seed=0): seconds for e, seconds in own.items()}
    seconds = sum(same_row.get(e.but(seed=0), mean(own.values())) for e in todo)
    return (seconds + len(new_seeds) * mean(spent["base"] for spent in known.values())) / workers_for(todo, device)


def perform(wanted: list[Cell], device="auto", folder: Path | None = None, show=ignore, each=ignore, prepare=None):
    """Run every cell that is not finished, on processors as many side by side as there are cores.

    ``show`` gets what there is to do, how long it should take and then took, ``each`` a line for every finished run;
    ``prepare()`` registers what a user's files define in every process. The first error stops all; what is saved stays.
    """
    folder, begun = folder or home(), time.monotonic()
    todo, count = missing(wanted, folder), len({cell.experiment for cell in wanted})
    if not todo:
        return show(f"{count} runs, all stored")
    workers, duration = workers_for(todo, device), _duration(estimate(wanted, device, folder))
    show(f"{count} runs: {count - len(todo)} stored, {len(todo)} to do in about {duration}, {workers} at once")
    in_turn = (_run(experiment, device, folder) for experiment in todo)
    for line in in_turn if workers == 1 else side_by_side(todo, workers, device, folder, prepare):
        each(line)
    show(f"done in {_duration(time.monotonic() - begun)}")


def side_by_side(todo: list[Experiment], workers: int, device: str, folder: Path, prepare=None) -> Iterator[str]:
    """The closing line of each experiment, ``workers`` processes at once; the first error stops them all."""
    others, threads = set(multiprocessing.active_children()), max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for job in as_completed([pool.submit(_job, e, device, folder, threads, prepare) for e in todo]):
                yield job.result()
        except BrokenExecutor:
            raise LabError("A process of the sweep was killed, perhaps for lack of memory.") from None
        finally:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()


def _job(experiment: Experiment, device: str, folder: Path, threads: int, prepare) -> str:
    """``_run`` in a process of its own; every error comes back as a plain LabError, which can be sent."""
    torch.set_num_threads(threads)
    try:
        if prepare:
            prepare()
        return _run(experiment, device, folder)
    except LabError as reason:
        raise LabError(str(reason)) from None


def _run(e: Experiment, device: str, folder: Path) -> str:
    """Run one experiment; returns its closing line. What two processes need, one makes while the other waits."""
    seconds = open_run(e, device, home=folder).results["seconds"]
    return f"{e.preset} {e.method} {e.operation} {e.start} window {e.window} seed {e.seed}: {seconds:.0f} s"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def collect(wanted: list[Cell], folder: Path | None = None) -> pd.DataFrame:
    """One line a cell: table, row, method, seed, rate, device, PPC and MEASURES; NaN where nothing was measured."""
    lines = []
    for cell in wanted:
        e, results = cell.experiment, cell.run(folder).results() or {}
        line = {"table": cell.table, "row": cell.row, "method": e.method, "seed": e.seed}
        line["rate"] = METHODS[e.method].rate_of(e) if e.method in METHODS else None
        line["device"] = results.get("provenance", {}).get("device")
        lines.append(line | {name: results.get(name) for name in ("PPC", *MEASURES)})
    columns = ["table", "row", "method", "seed", "rate", "device", "PPC", *MEASURES]
    return pd.DataFrame(lines, columns=columns).astype(dict.fromkeys((*MEASURES, "PPC", "rate"), float))


def open_row(wanted: list[Cell], row: str, device: str = "auto") -> list[OpenRun]:
    return [open_run(cell.experiment, device) for cell in wanted if cell.row == row]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One line a row of a table: PPC, rate, n (finished seeds), and mean and standard deviation over seeds."""
    grouped = frame.groupby(["table", "row"], sort=False)
    first = grouped.agg(PPC=("PPC", "first"), rate=("rate", "first"), n=("seconds", "count"))
    return first.join(grouped[list(MEASURES)].mean()).join(grouped[list(MEASURES)].std().add_suffix(" sd"))


def cell_text(value: float, spread: float, n: int, digits: int = 1, scale: float = 1.0) -> str:
    """``97.1 ± 0.4``: mean and standard deviation over seeds; the mean alone for n = 1; what is missing in words."""
    if not n or pd.isna(value):
        return NOT_MEASURED if n else NOT_RUN
    text = f"{scale * value:.{digits}f}"
    return text if n == 1 or pd.isna(spread) else f"{text} ± {scale * spread:.{digits}f}"


def readable(summary: pd.DataFrame, measures: Sequence[str] = tuple(MEASURES)) -> pd.DataFrame:
    """A summary as text: one line a row, its PPC, n, and every measure as mean ± standard deviation.

    The column of flow losses is empty where no run has one, since nothing is held out.
    """
    lines, none_held_out = {}, summary["flow_loss"].isna().all() and summary["n"].any()
    for (_, row), line in summary.iterrows():
        n = int(line["n"])
        lines[row] = {"PPC": f"{line['PPC']:,.0f}" if n else NOT_RUN, "n": n}
        for measure in measures:
            heading, digits, scale = MEASURES[measure]
            lines[row][heading] = cell_text(line[measure], line[f"{measure} sd"], n, digits, scale)
            if measure == "flow_loss" and none_held_out:
                lines[row][heading] = ""
    return pd.DataFrame.from_dict(lines, orient="index")


def over_seeds(where: Path | None = None) -> pd.DataFrame:
    """Finished runs that differ in their seed alone: how many, and mean ± standard deviation of what they reached."""
    finished, measures = [run for run in listing(where) if run["results"]], ["LA", "AIA", "recognition", "flow_loss"]
    alike = [canonical({k: v for k, v in run["settings"].items() if k != "seed"}) for run in finished]
    known = [run["settings"] | run["results"] for run in finished]
    frame = pd.DataFrame(known, columns=["preset", "method", *measures]).astype(dict.fromkeys(measures, float))
    groups = frame.groupby(pd.Series(alike, dtype=str), sort=False)
    table, mean, spread = groups[["preset", "method"]].first(), groups[measures].mean(), groups[measures].std()
    table["seeds"] = groups.size()
    for name in measures:
        table[name] = [cell_text(*of, 4) for of in zip(mean[name], spread[name], table["seeds"], strict=True)]
    return table


def paired(frame: pd.DataFrame, row: str, measure: str = "flow_loss") -> pd.DataFrame:
    """How much more than ``row`` every other row has of a measure, seed by seed: mean, standard deviation, least."""
    wide = frame.pivot(index="seed", columns="row", values=measure)
    more = wide.drop(columns=row).sub(wide[row], axis=0)
    return pd.DataFrame({"mean": more.mean(), "sd": more.std(), "least": more.min(), "n": more.count()})


def describe(base: Experiment, seeds: Sequence[int]) -> str:
    """What a notebook's numbers rest on, in a sentence; where nothing is held out, a second one says what follows."""
    images = f"{base.base.images:,} images for the base and {base.adapter.images:,} for every later class"
    about = f"Preset {base.preset}: {base.network.base_channels} channels, {images}, {base.samples_per_class} samples a"
    about += f" class; n = {len(seeds)} seed{'s' if len(seeds) > 1 else ''}."
    why = "Nothing is held out (valid_fraction=0): no flow loss, rows compare by LA, rates are those chosen on digits."
    return about if base.valid_fraction else f"{about} {why}"
