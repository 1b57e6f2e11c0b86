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

from funlora_lab import cluster, data
from funlora_lab.adapters import METHODS
from funlora_lab.continual import OpenRun, open_run, stages
from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment
from funlora_lab.store import Run, canonical, home, listing
from funlora_lab.studies import published
from funlora_lab.studies.cost import seconds_of
from funlora_lab.studies.tables import Cell
from funlora_lab.systems import Context, generator_of
from funlora_lab.training import Runtime, ignore, pick_device

MEASURES = {  # measure -> (heading, digits, factor)
    "LA": ("LA %", 1, 100), "AIA": ("AIA %", 1, 100), "recognition": ("recognised %", 1, 100),
    "flow_loss": ("flow loss", 4, 1), "seconds": ("seconds", 0, 1),
}  # fmt: skip
PAPER = {"cifar10": ("FunLoRA, CIFAR10", 10), "imagenet100": ("FunLoRA, ImageNet100", 100)}  # row of COST, classes
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


def on_gpus(todo: list[Experiment], gpus: int) -> str:
    """How long runs take on 1, 8 and ``gpus`` GPUs, each stage on one, at the paper's pace, and what bounds it.

    Graham's bounds (1969) of any schedule that leaves no GPU idle without need: with W the hours of all stages and C
    those of the longest chain of stages, n GPUs take from max(W / n, C) to W / n + C (1 - 1 / n).
    """
    if not todo:
        return "Nothing remains."
    if (e := todo[0]).preset not in PAPER:
        raise LabError(f"gpus={gpus}: accepted for {' and '.join(PAPER)}, whose hours the paper prints.")
    (whole, longest, name, parts), row = _costs(todo), PAPER[e.preset][0]
    pace = 3600 * float(published.COST.loc[row, "total h"]) / _costs([e.but(method="funlora", score_after="every")])[0]
    lines = [f"{len(todo)} runs at the paper's pace ({row}):"]
    for n in sorted({1, 8, gpus}):
        bounds = max(whole / n, longest), whole / n + longest * (1 - 1 / n)
        lines.append(f"{n:>6} GPU{'s'[n < 2 :]:1}  {' to '.join(dict.fromkeys(duration(pace * b) for b in bounds))}")
    steps = ", ".join(f"{kind} {duration(pace * cost)}" for kind, cost in parts.items() if cost)
    bound = "that chain" if gpus > whole / longest else "their number"
    lines.append(f"The longest chain of stages takes {duration(pace * longest)}: {name} ({steps}).")
    return "\n".join([*lines, f"{gpus} GPUs are bound by {bound}: {whole / longest:.0f} at most are busy on average."])


def _costs(experiments: list[Experiment]) -> tuple[float, float, str, dict[str, float]]:
    """What all stages of runs cost, those shared by runs of a seed once; then the longest chain, whose, and of what."""
    costs, chain = {}, (0.0, "", {})
    for e in experiments:
        context = Context(e, None, data.tasks(e, PAPER[e.preset][1]), None, Runtime())
        generator, ends, own = generator_of(context), {}, set()
        for stage, before in stages.plan(context, generator).items():
            mine = stages.cost(stage, context, generator)
            if stage.task or before & own:
                own.add(stage)
            costs[e if stage in own else e.seed, stage, mine] = mine
            end, parts = max((ends[each] for each in before), key=lambda found: found[0], default=(0.0, {}))
            ends[stage] = end + mine, parts | {stage.kind: parts.get(stage.kind, 0.0) + mine}
        end, parts = ends[stage]  # the result
        chain = max(chain, (end, f"{e.method}, seed {e.seed}", parts), key=lambda found: found[0])
    return sum(costs.values()), *chain


def perform(
    wanted: list[Cell], device="auto", folder: Path | None = None, show=ignore, each=ignore, prepare=None, report=ignore
):
    """Run every cell that is not finished, on processors as many side by side as there are cores, or on a cluster.

    ``show`` gets what there is to do, how long it should take and then took, ``each`` a line for every finished run;
    ``prepare()`` registers what a user's files define in every process. The first error stops all; what is saved stays.
    On the cluster that FUNLORA_RAY names all others go on, and ``report`` gets its events.
    """
    folder, begun = folder or home(), time.monotonic()
    todo, count = missing(wanted, folder), len({cell.experiment for cell in wanted})
    if not todo:
        return show(f"{count} runs, all stored")
    cluster.do(todo, device, folder, Runtime(report=report, tell=show), prepare or bool)
    if todo := missing(wanted, folder):
        workers, expected = workers_for(todo, device), duration(estimate(wanted, device, folder))
        show(f"{count} runs: {count - len(todo)} stored, {len(todo)} to do in about {expected}, {workers} at once")
        in_turn = (_run(experiment, device, folder) for experiment in todo)
        for line in in_turn if workers == 1 else side_by_side(todo, workers, device, folder, prepare):
            each(line)
    show(f"done in {duration(time.monotonic() - begun)}")


def side_by_side(todo: list[Experiment], workers: int, device: str, folder: Path, prepare=None) -> Iterator[str]:
    """The closing line of each experiment, ``workers`` processes at once; the first error stops them all."""
    others, threads = set(multiprocessing.active_children()), max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for job in as_completed([pool.submit(_run, e, device, folder, threads, prepare) for e in todo]):
                yield job.result()
        except BrokenExecutor:
            raise LabError("A process of the sweep was killed, perhaps for lack of memory.") from None
        finally:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()


def _run(e: Experiment, device: str, folder: Path, threads: int = 0, prepare=None) -> str:
    """Run one experiment; returns its closing line. What two processes need, one makes while the other waits."""
    if threads:  # a process of its own
        torch.set_num_threads(threads)
        (prepare or bool)()
    seconds = open_run(e, device, home=folder).results["seconds"]
    return f"{e.preset} {e.method} {e.operation} {e.start} window {e.window} seed {e.seed}: {seconds:.0f} s"


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


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


def over_seeds(where: Path | None = None, names: Sequence[str] | None = None) -> pd.DataFrame:
    """Finished runs (of ``names``) that differ in their seed alone: how many, mean ± standard deviation of measures."""
    stored, measures = {run["name"]: run for run in listing(where)}, ["LA", "AIA", "recognition", "flow_loss"]
    finished = [stored[name] for name in (stored if names is None else names) if stored[name]["results"]]
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
