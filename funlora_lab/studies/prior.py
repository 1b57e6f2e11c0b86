"""The systems that the paper compares with, on one backbone and protocol: accuracies, costs, the published order.

A system's *own* LA is that of the classifier it trains along, as its paper measures it; *on samples* is that of this
program's protocol, a classifier from scratch on images drawn of every class seen. They differ only where it has one.
"""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pandas as pd

from funlora_lab.adapters import METHODS
from funlora_lab.continual import OpenRun, open_folder
from funlora_lab.experiment import Experiment
from funlora_lab.studies import plots, published, sweeps
from funlora_lab.studies.tables import PRIOR, Cell, Rows

NAMES = {method: name for name, method in PRIOR.items()} | {"funlora": "FunLoRA"}
COSTS = ("trained", "drawn", "evaluations", "seconds")


def systems(base: Experiment) -> Rows:
    """FunLoRA, the memory it compresses, the lower bound and the prior systems, all at the same images a class."""
    return {method: base.but(method=method) for method in ("funlora", "gan-memory", "fine-tune", *PRIOR.values())}


def budgets(base: Experiment) -> Rows:
    """The same systems on as many images as FunLoRA sees in all, and JDCL at its own proportions of base and tasks."""
    rows = {f"{method}, FunLoRA's images": {"method": method} for method in ("guide", "jdcl")}
    a_class = -(-base.base.images // int(base.split.split("-")[1]))
    rows["jdcl, its proportions"] = {"method": "jdcl", "adapter_images": a_class}
    return {name: base.but(replay_budget="new", **changes) for name, changes in rows.items()}


def cells(rows: Rows, seeds: Iterable[int]) -> list[Cell]:
    """Their runs, scored after every task."""
    return [Cell("prior", row, e.but(seed=seed, score_after="every")) for row, e in rows.items() for seed in seeds]


def costs(run: OpenRun) -> dict[str, float]:
    """COSTS: images the generator was trained on, images drawn, evaluations of the network for these, seconds."""
    made, chunk = {}, run.experiment.chunk  # what was drawn -> (images, evaluations); read again, it is logged again
    for event in run.events:
        if event["event"] == "samples":
            what = event.get("artefact", (event["class"], event["seconds"]))  # older logs name no artefact
            made.setdefault((what, event["drawn"]), (chunk, chunk * event["evaluations"]))
        elif "generated" in event and event["step"] == event["steps"]:
            made[event["classes"]] = event["generated"], event["evaluations"]
    drawn = map(sum, zip(*made.values(), strict=True))
    return dict(zip(COSTS, (int(run.costs["images"].sum()), *drawn, run.results["seconds"]), strict=True))


def collect(wanted: list[Cell]) -> pd.DataFrame:
    """One line a run: row, method, seed, and of a finished one both LA, averages after every task, PPC and COSTS."""
    lines = []
    for cell in wanted:
        lines.append({"row": cell.row, "method": cell.experiment.method, "seed": cell.experiment.seed})
        if cell.run().results():
            run = open_folder(cell.run().folder)
            own = [event.get("own_average", event["average"]) for event in run.accuracies]
            lines[-1] |= {"own": own, "samples": run.averages, "own LA": own[-1], "LA": run.results["LA"]}
            lines[-1] |= {"PPC": run.results["PPC"]} | costs(run)
    return pd.DataFrame(lines, columns=["row", "method", "seed", "own", "samples", "own LA", "LA", "PPC", *COSTS])


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """One line a row as text: both LA in per cent with their deviation over seeds, numbers and cost, the paper's LA."""
    lines = {}
    for row, part in frame.groupby("row", sort=False):
        n, means = int(part["LA"].count()), part.mean(numeric_only=True)
        line = {f"{m} %": sweeps.cell_text(means[m], part[m].std(), n, scale=100) for m in ("own LA", "LA")} | {"n": n}
        line |= {name: f"{means[name]:,.0f}" if n else sweeps.NOT_RUN for name in ("PPC", *COSTS)}
        line |= {} if part["method"].iloc[0] in METHODS else {"PPC": "all weights"}
        lines[row] = line | {"published LA, CIFAR10": published.PRIOR_SYSTEMS["CIFAR10 2-2"].get(NAMES.get(row)) or ""}
    headings = {"LA %": "LA % on samples", "trained": "images trained", "drawn": "images drawn"}
    return pd.DataFrame.from_dict(lines, orient="index").rename(columns=headings)


def speed(frame: pd.DataFrame) -> dict[str, bool | str]:
    """Whether FunLoRA's image costs fewer evaluations of the network than that of any prior system, and the numbers."""
    means = frame.groupby("row")[["evaluations", "drawn"]].mean()
    each = (means["evaluations"] / means["drawn"])[["funlora", *PRIOR.values()]].dropna().sort_values()
    words = ", ".join(f"{row} {value:.0f}" for row, value in each.items())
    return {"true": each.index[0] == "funlora", "ours": f"evaluations an image: {words}"}


def both(wanted: list[Cell]) -> dict[str, str]:
    """Row -> both LA as text, of finished runs of the prior systems."""
    frame = collect([cell for cell in wanted if cell.experiment.method in PRIOR.values()])
    means = 100 * frame.groupby("row")[["own LA", "LA"]].mean().dropna()
    return {row: f"{own:.1f} own, {samples:.1f} on samples" for row, own, samples in means.itertuples()}


def order(frame: pd.DataFrame) -> pd.DataFrame:
    """The published order pair by pair: LA of both by their own classifiers, on samples, seeds that agree, verdict."""
    lines = {}
    for better, worse in pairwise(PRIOR.values()):
        line = lines[f"{NAMES[better]} > {NAMES[worse]}"] = {}
        for heading, name in {"own classifiers": "own LA", "on samples": "LA"}.items():
            scores = frame.pivot(index="seed", columns="row", values=name)
            more = (scores[better] - scores[worse]).dropna()
            verdict = "shown" if (more > 0).all() else "contradicted" if (more < 0).all() else "not decided"
            text = f"{100 * more.mean():+.1f} points, {(more > 0).sum()} of {len(more)} seeds: {verdict}"
            line[heading] = text if len(more) else sweeps.NOT_RUN
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("published")


def plot_averages(frame: pd.DataFrame) -> plots.Drawing:
    """Accuracy over the classes seen after every task, mean over seeds: by own classifiers, and on samples."""
    rows = frame.groupby("row", sort=False)
    own, samples = ({row: np.mean(A.dropna().tolist() or [[]], 0) for row, A in rows[m]} for m in ("own", "samples"))
    return plots.accuracy_per_task({"by the system's own classifier": own, "by a classifier of its samples": samples})
