"""Tables of many runs over one base: which runs a table needs, doing those that are missing, reading the results.

A table is a dictionary of named experiments (its rows), the same for every seed. All rows of a seed share the base,
the judge and the classifier of task 1 through the artefact store. Seeds share nothing, so each has a process of its own.
"""

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch

from funlora_lab import continual
from funlora_lab.config import METHODS, PRESETS, WHOLE_NETWORK, Experiment, preset
from funlora_lab.errors import LabError
from funlora_lab.generators import build_unet
from funlora_lab.opened import exhaust
from funlora_lab.store import Run, home
from funlora_lab.training import Runtime
from funlora_lab.unet import conv_layers

Rows = dict[str, Experiment]
PAPER_WINDOWS = "0-64 5-54 15-44 15-54 25-44 25-54 35-54 40-54 45-54 40-49 45-49".split()  # Table I
FEW_WINDOWS = "0-64 5-54 15-44 25-44 25-54 40-54 45-49".split()  # those that stay apart in a smaller network


def base_of(name: str) -> Experiment:
    """The experiment that tables of a preset are made from: its small variant (``digits-small``) where it has one.

    FUNLORA_PRESET, when set, takes the place of ``name``: so tests execute the notebooks as they are, on ``smoke``.
    """
    name = os.environ.get("FUNLORA_PRESET") or name
    return preset(f"{name}-small" if f"{name}-small" in PRESETS else name)


def seeds_of(base: Experiment, seeds: int) -> range:
    """Seeds 0 up to ``seeds``; one alone for ``smoke``, which only shows that everything runs."""
    return range(1 if base.preset == "smoke" else seeds)


# --- what the tables hold: rows by name, from the experiment they vary ---------------------------------------------


def _network(base: Experiment):
    with torch.device("meta"):
        return build_unet(base, 1)


def scaled_window(window: str, base: Experiment) -> str:
    """A window of the paper's 65 convolutions at the same place of another network: encoder, middle, decoder, output.

    Positions inside the encoder and the decoder are scaled by their lengths.
    """
    names = list(conv_layers(_network(base)))
    middle = next(i for i, name in enumerate(names) if name.startswith("middle_block"))
    decoder = next(i for i, name in enumerate(names) if name.startswith("output_blocks"))
    last = len(names) - 1
    places = np.interp([int(i) for i in window.split("-")], [0, 21, 25, 63, 64], [0, middle, decoder, last - 1, last])
    return "-".join(str(round(place)) for place in places)


def windows(base: Experiment) -> Rows:
    """Table I: vanilla mul in the paper's windows, at the same places of this network, and in its own window."""
    same = len(conv_layers(_network(base))) == 65
    found = [scaled_window(window, base) for window in (PAPER_WINDOWS if same else FEW_WINDOWS)]
    return {window: base.but(method="vanilla-mul", window=window) for window in dict.fromkeys([*found, base.window])}


def functions(base: Experiment) -> Rows:
    """Table II: every function, learned and frozen, and the three starts of the cosine."""
    rows = {
        "cosine, learned": base.but(method="funlora"),
        "cosine, learned, equal start": base.but(method="funlora", start="equal"),
        "cosine, learned, literal start": base.but(method="funlora", start="literal"),
        "cosine, frozen": base.but(method="cosine-frozen"),
        "power, learned": base.but(method="power"),
        "power, frozen": base.but(method="power-frozen"),
        "shift": base.but(method="shift"),
        "vanilla mul": base.but(method="vanilla-mul"),
        "vanilla add": base.but(method="vanilla-add"),
    }
    return {name: _at_best_rate(e) for name, e in rows.items()}


def operations(base: Experiment) -> Rows:
    """Table IV: W*F, W+F and W*F+G with learned cosines, from the identity and as the paper's formula stands."""
    rows = {
        "mul": base.but(method="funlora"),
        "mul-add": base.but(method="funlora", operation="mul-add"),
        "add": base.but(method="funlora", operation="add"),
        "mul-add, literal start": base.but(method="funlora", operation="mul-add", start="literal"),
        "add, literal start": base.but(method="funlora", operation="add", start="literal"),
    }
    return {name: _at_best_rate(e) for name, e in rows.items()}


def ratios(base: Experiment) -> Rows:
    """Table IV: A and B with r times fewer entries, for every r that divides this network's channels."""
    channels = [n for layer in conv_layers(_network(base)).values() for n in layer.weight.shape[:2]]
    first, last = base.window_range
    channels = channels[2 * first : 2 * last + 2]
    return {
        str(r): _at_best_rate(base.but(method="funlora", ratio=r))
        for r in (1, 2, 4, 8, 16)
        if not any(n % r for n in channels)
    }


def methods(base: Experiment) -> Rows:
    """Table V: the bounds, vanilla conditioning, every compared adapter and FunLoRA."""
    bounds = ["classifier-multitask", "generative-multitask", "label-embedding"]
    variants = set(FUNCTION_VARIANTS) | set(WHOLE_NETWORK) | set(bounds)
    rivals = [method for method in METHODS if method not in variants and method != "funlora"]
    return {method: _at_best_rate(base.but(method=method)) for method in [*bounds, *rivals, "funlora"]}


FUNCTION_VARIANTS = ("cosine-frozen", "power", "power-frozen", "shift")  # of Table II, not compared again in Table V

RATES = (1e-2, 3e-2, 1e-1)


def rates(base: Experiment) -> Rows:
    """Adam's rate for the adapters, chosen by the loss on held-out training images: a grid on a few methods."""
    few = ("funlora", "shift", "vanilla-add")
    return {f"{method} at {rate:g}": base.but(method=method, adapter_lr=rate) for method in few for rate in RATES}


TABLES: dict[str, Callable[[Experiment], Rows]] = {
    "windows": windows,
    "functions": functions,
    "operations": operations,
    "ratios": ratios,
    "methods": methods,
    "rates": rates,
}


SCORED_AFTER = {"methods": "every", "rates": "none"}  # tasks with a classifier; the other tables: the last


def _at_best_rate(experiment: Experiment) -> Experiment:
    """The experiment at the rate that did best for it on held-out images of seed 0, where the method's own is not."""
    e = experiment
    rate = BEST_RATES.get((e.preset, e.method, e.operation, e.start), 0.0)
    return e if e.method in WHOLE_NETWORK or not rate else e.but(adapter_lr=rate)


# chosen on seed 0 among RATES by the flow loss of held-out training images; (preset, method, operation, start)
BEST_RATES: dict[tuple[str, str, str, str], float] = {}


# --- doing what is missing -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One run of a table: row ``row`` for the seed of ``experiment``."""

    table: str
    row: str
    experiment: Experiment

    def run(self, folder: Path | None = None) -> Run:
        return Run.of(self.experiment, folder)


def cells(tables: list[str], base: Experiment, seeds) -> list[Cell]:
    """Every run of some tables; raises LabError for an unknown table."""
    for name in tables:
        if name not in TABLES:
            raise LabError(f"Unknown table '{name}': accepted are {', '.join(TABLES)}.")
    return [
        Cell(name, row, experiment.but(seed=seed, score_after=SCORED_AFTER.get(name, "last")))
        for name in tables
        for row, experiment in TABLES[name](base).items()
        for seed in seeds
    ]


def missing(wanted: list[Cell], folder: Path | None = None) -> list[Experiment]:
    """The experiments of some cells that are not finished, each once."""
    experiments = dict.fromkeys(cell.experiment for cell in wanted)
    return [experiment for experiment in experiments if not Run.of(experiment, folder).results()]


def _cost(run: Run) -> dict[str, float]:
    """Seconds of a finished run: of its ``base``, and of everything of its ``own``."""
    losses = [event for event in run.events() if event["event"] == "loss" and event["stage"] == "base"]
    base = losses[-1]["seconds"] if losses else 0.0
    return {"base": base, "own": run.results()["seconds"] - base}


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
    """Processes at once: one a seed on processors, as many as there are; one on a GPU."""
    if continual.pick_device(device).type == "cuda":
        return 1
    return max(1, min(len({e.seed for e in experiments}), os.cpu_count() or 1))


def estimate(wanted: list[Cell], device: str = "auto", folder: Path | None = None) -> float:
    """Seconds until all cells are done: from what finished runs took, or, when there are none, from a short trial."""
    todo = missing(wanted, folder)
    if not todo:
        return 0.0
    finished = {cell.experiment: cell.run(folder) for cell in wanted if cell.experiment not in todo}
    known = {experiment: _cost(run) for experiment, run in finished.items()}
    if not known:
        longest = next((e for e in todo if e.method not in WHOLE_NETWORK), todo[0])
        known = {longest: _trial(longest, device)}
    usual = {part: mean(cost[part] for cost in known.values()) for part in ("base", "own")}
    same_row = {e.but(seed=0): cost["own"] for e, cost in known.items()}
    new_seeds = {e.seed for e in todo} - {e.seed for e in finished}
    seconds = usual["base"] * len(new_seeds) + sum(same_row.get(e.but(seed=0), usual["own"]) for e in todo)
    return seconds / workers_for(todo, device)


def _work(experiments: list[Experiment], device: str, folder: Path | None, threads: int) -> None:
    """What one process does: run some experiments in turn."""
    torch.set_num_threads(threads)
    for experiment in experiments:
        exhaust(continual.run(experiment, Runtime(device=continual.pick_device(device)), folder))


def perform(
    wanted: list[Cell],
    device: str = "auto",
    folder: Path | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> None:
    """Run every cell that is not finished, seeds side by side; ``show`` gets one line before, and one a finished run.

    Raises the first error of a run, after the others have been stopped; what was finished or saved stays.
    """
    folder = folder or home()
    todo = missing(wanted, folder)
    experiments = dict.fromkeys(cell.experiment for cell in wanted)
    show(f"{len(experiments)} runs: {len(experiments) - len(todo)} stored, {len(todo)} to do")
    if not todo:
        return
    workers = workers_for(todo, device)
    show(f"about {_duration(estimate(wanted, device, folder))} on {workers} process{'es' if workers > 1 else ''}")
    begun = time.monotonic()
    by_seed = [[e for e in todo if e.seed == seed] for seed in dict.fromkeys(e.seed for e in todo)]
    if workers == 1:
        for experiment in todo:
            _work([experiment], device, folder, torch.get_num_threads())
            show(_finished(experiment, folder))
    else:
        for experiment in _side_by_side(by_seed, workers, device, folder):
            show(_finished(experiment, folder))
    show(f"done in {_duration(time.monotonic() - begun)}")


def _side_by_side(lists: list[list[Experiment]], workers: int, device: str, folder: Path) -> Iterator[Experiment]:
    """Each list in a process of its own, ``workers`` at once; yields every experiment when its results appear."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    waiting = [e for experiments in lists for e in experiments]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_work, experiments, device, folder, threads) for experiments in lists}
        try:
            while futures:
                done, futures = wait(futures, timeout=1.0, return_when="FIRST_EXCEPTION")
                for experiment in [e for e in waiting if Run.of(e, folder).results()]:
                    waiting.remove(experiment)
                    yield experiment
                for future in done:
                    future.result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _finished(experiment: Experiment, folder: Path) -> str:
    e, results = experiment, Run.of(experiment, folder).results()
    return f"{e.preset} {e.method} {e.operation} {e.start} window {e.window} seed {e.seed}: {results['seconds']:.0f} s"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


# --- reading the results -------------------------------------------------------------------------------------------

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


def sweep(tables: list[str], base: Experiment, seeds, device: str = "auto", show=print) -> pd.DataFrame:
    """Run what is missing of some tables and read everything: what notebooks call."""
    wanted = cells(tables, base, seeds)
    perform(wanted, device, show=show)
    return collect(wanted)


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
