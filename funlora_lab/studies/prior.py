"""The systems that the paper compares with, on one backbone and protocol: accuracies, costs, the published order.

A system's *own* LA is that of the classifier it trains along, as its paper measures it; *on samples* is that of this
program's protocol, a classifier from scratch on images drawn of every class seen. They differ only where it has one.
"""

from collections.abc import Iterable
from itertools import pairwise
from statistics import mean

import numpy as np
import pandas as pd

from funlora_lab.adapters import METHODS
from funlora_lab.continual import OpenRun, open_run
from funlora_lab.experiment import Experiment
from funlora_lab.studies import plots, published, sweeps
from funlora_lab.studies.tables import PRIOR, Cell, Rows

RUN_HERE = {name: settings["method"] for name, settings in PRIOR.items()}  # in the published order, the best first
NAMES = {method: name for name, method in RUN_HERE.items()} | {"funlora": "FunLoRA"}


def systems(base: Experiment) -> Rows:
    """FunLoRA, the memory it compresses, the lower bound and the prior systems, all at the same images a class."""
    return {method: base.but(method=method) for method in ("funlora", "gan-memory", "fine-tune", *RUN_HERE.values())}


def budgets(base: Experiment) -> Rows:
    """The same systems on as many images as FunLoRA sees in all, and JDCL at its own proportions of base and tasks."""
    own = {
        "method": "jdcl",
        "replay_budget": "new",
        "adapter_images": -(-base.base.images // int(base.split.split("-")[1])),
    }
    few = {f"{m}, FunLoRA's images": {"method": m, "replay_budget": "new"} for m in ("guide", "jdcl")}
    return {name: base.but(**changes) for name, changes in (few | {"jdcl, its proportions": own}).items()}


def cells(rows: Rows, seeds: Iterable[int]) -> list[Cell]:
    """Their runs, scored after every task."""
    return [Cell("prior", row, e.but(seed=seed, score_after="every")) for row, e in rows.items() for seed in seeds]


def costs(run: OpenRun) -> dict[str, float]:
    """Images that the generator was trained on, images drawn, evaluations of the network for these, seconds."""
    drawn, evaluations, known = 0, 0, set()  # a set that is read again is logged again
    for event in run.events:
        if event["event"] == "samples":
            key = (
                event.get("artefact", (event["class"], event["seconds"])),
                event["drawn"],
            )  # older logs name no artefact
            if key in known:
                continue
            known.add(key)
            drawn += run.experiment.chunk
            evaluations += run.experiment.chunk * event["evaluations"]
        elif event["event"] == "loss" and event["step"] == event["steps"]:
            drawn += event.get("generated", 0)
            evaluations += event.get("evaluations", 0)
    trained, seconds = int(run.costs["images"].sum()), run.results["seconds"]
    return {"trained": trained, "drawn": drawn, "evaluations": evaluations, "seconds": seconds}


def collect(wanted: list[Cell], device: str = "auto") -> pd.DataFrame:
    """One line a run: row, method, seed, both LA and the averages after every task, PPC, and ``costs``."""
    lines = []
    for cell in wanted:
        run = open_run(cell.experiment, device)
        own = [event.get("own_average", event["average"]) for event in run.accuracies]
        line = {"row": cell.row, "method": cell.experiment.method, "seed": cell.experiment.seed, "own": own}
        line |= {"samples": run.averages, "own LA": own[-1], "LA": run.results["LA"], "PPC": run.results["PPC"]}
        lines.append(line | costs(run))
    return pd.DataFrame(lines)


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """One line a row as text: both LA in per cent with their deviation over seeds, numbers and cost, the paper's LA."""
    lines = {}
    for row, part in frame.groupby("row", sort=False):
        n, method, means = len(part), part["method"].iloc[0], part.mean(numeric_only=True)
        for name in ("own LA", "LA"):
            lines.setdefault(row, {})[f"{name} %"] = sweeps.cell_text(means[name], part[name].std(), n, 1, 100)
        lines[row] |= {"n": n, "PPC": f"{means['PPC']:,.0f}" if method in METHODS else "all weights"}
        lines[row] |= {f"images {name}": f"{means[name]:,.0f}" for name in ("trained", "drawn")}
        lines[row] |= {name: f"{means[name]:,.0f}" for name in ("evaluations", "seconds")}
        theirs = published.PRIOR_SYSTEMS["CIFAR10 2-2"].get(NAMES.get(row))
        lines[row]["published LA, CIFAR10"] = theirs or ""
    return pd.DataFrame.from_dict(lines, orient="index").rename(columns={"LA %": "LA % on samples"})


def speed(frame: pd.DataFrame) -> dict[str, bool | str]:
    """Whether FunLoRA's image costs fewer evaluations of the network than that of any prior system, and the numbers."""
    means = frame.groupby("row")[["evaluations", "drawn"]].mean()
    each = (means["evaluations"] / means["drawn"])[["funlora", *RUN_HERE.values()]].sort_values()
    words = ", ".join(f"{row} {value:.0f}" for row, value in each.items())
    return {"true": each.index[0] == "funlora", "ours": f"evaluations an image: {words}"}


def both(wanted: list[Cell]) -> dict[str, str]:
    """Row -> both LA as text, of finished runs whose system has a classifier of its own."""
    lines: dict[str, list[dict]] = {}
    for cell in wanted:
        if "own_LA" in (results := cell.run().results() or {}):
            lines.setdefault(cell.row, []).append(results)
    means = {row: [100 * mean(r[key] for r in found) for key in ("own_LA", "LA")] for row, found in lines.items()}
    return {row: "{:.1f} own, {:.1f} on samples".format(*pair) for row, pair in means.items()}


def order(frame: pd.DataFrame) -> pd.DataFrame:
    """The published order pair by pair: LA of both by their own classifiers, on samples, seeds that agree, verdict."""
    lines = []
    for better, worse in pairwise(RUN_HERE.values()):
        line = {"published": f"{NAMES[better]} > {NAMES[worse]}"}
        for name in ("own LA", "LA"):
            wide = frame[frame["row"].isin((better, worse))].pivot(index="seed", columns="row", values=name)
            more = wide[better] - wide[worse]
            verdict = "shown" if (more > 0).all() else "contradicted" if (more < 0).all() else "not decided"
            heading = "on samples" if name == "LA" else "own classifiers"
            line[heading] = f"{100 * more.mean():+.1f} points, {(more > 0).sum()} of {len(more)} seeds: {verdict}"
        lines.append(line)
    return pd.DataFrame(lines).set_index("published")


def plot_averages(frame: pd.DataFrame) -> plots.Drawing:
    """Accuracy over the classes seen after every task, mean over seeds: by own classifiers, and on samples."""
    figure, axes = plots.drawing(10.4, 3.6, 1, 2, sharey=True)
    panels = {"own": "by the system's own classifier", "samples": "by a classifier trained on its samples"}
    for axis, (name, title) in zip(axes[0], panels.items(), strict=True):
        for i, (row, part) in enumerate(frame.groupby("row", sort=False)):
            values = np.array(part[name].tolist(), float)
            axis.plot(range(1, values.shape[1] + 1), values.mean(0), **plots.style(i, 4, label=row))
        axis.set(xlabel="task", xticks=range(1, values.shape[1] + 1), ylim=(0, 1.02))
        axis.set_title(title, fontsize=10)
    axes[0, 0].set_ylabel("accuracy over classes seen")
    plots.legend(figure, "outside right center", fontsize=8)
    return figure
