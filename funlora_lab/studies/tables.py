"""Which runs a table needs: a table is a function from an experiment to named variants of it (its rows).

Every row is repeated for every seed; all rows of a seed share the base, the judge and the classifier of task 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from funlora_lab.adapters import METHODS, Adapters
from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment, override
from funlora_lab.presets import PRESETS, preset
from funlora_lab.store import Run
from funlora_lab.studies import plots, published
from funlora_lab.studies.pretraining import coco
from funlora_lab.systems import meta_unet
from funlora_lab.unet import conv_layers, part_of

Rows = dict[str, Experiment]
SCORED_AFTER = {"rates": "none", "growth": "none"}  # tasks with a classifier; of every other table the last alone
FEW_WINDOWS = "0-64 5-54 15-44 25-44 25-54 40-54 45-49".split()  # of Table I: those that differ in a smaller network
BOUNDS = ("classifier-multitask", "generative-multitask", "label-embedding")
VARIANTS = ("funlora", "cosine-frozen", "power", "power-frozen", "shift")  # of Table II: one stands for them in Table V

# preset -> (method, operation, start) -> rate, chosen on seed 0 by the flow loss of held-out training images from 3e-3
# to 3e-1 in steps of about three (literal starts of additive forms: the identity start's); what is not listed did best
# at the method's own rate, or (compared methods) keeps it.
BEST_RATES = {"digits-small": {
    ("funlora", "mul", "literal"): 1e-1, ("shift", "mul", "identity"): 3e-1, ("power", "mul", "identity"): 3e-2,
    ("power-frozen", "mul", "identity"): 3e-2, ("vanilla-add", "mul", "identity"): 3e-3,
    ("funlora", "add", "identity"): 3e-3, ("funlora", "mul-add", "identity"): 3e-3,
    ("funlora", "add", "literal"): 3e-3, ("funlora", "mul-add", "literal"): 3e-3,
}}  # fmt: skip


def base_of(name: str, settings: Sequence[str] = (), compares_losses: bool = False) -> Experiment:
    """The experiment that tables vary, small where it can be; LabError where losses are compared but none held out."""
    base = override(preset(f"{name}-small" if f"{name}-small" in PRESETS else name), list(settings))
    if compares_losses and not base.valid_fraction:
        reason = "valid_fraction=0 holds no images out: set it, say, to 0.02"
        raise LabError(f"Tables of {name} compare losses, and {reason}.")
    return base


def _at_best_rate(base: Experiment, **changes) -> Experiment:
    e = base.but(**changes)
    rate = BEST_RATES.get(e.preset, {}).get((e.method, e.operation, e.start))
    return e.but(adapter_lr=rate) if rate else e


def scaled_window(window: str, base: Experiment) -> str:
    """A window of the paper's 65 convolutions at the same place of another network, part by part."""
    parts = [part_of(name) for name in conv_layers(meta_unet(base))]
    ours = [0, parts.index("middle"), parts.index("decoder"), len(parts) - 2, len(parts) - 1]
    places = np.interp([int(place) for place in window.split("-")], [0, 21, 25, 63, 64], ours)
    return "-".join(str(round(place)) for place in places)


def windows(base: Experiment) -> Rows:
    """Table I: vanilla mul in the paper's windows, at the same places of this network, and in its own window."""
    same = len(conv_layers(meta_unet(base))) == 65
    found = [scaled_window(window, base) for window in (published.WINDOWS if same else FEW_WINDOWS)]
    return {window: base.but(method="vanilla-mul", window=window) for window in dict.fromkeys([*found, base.window])}


def functions(base: Experiment) -> Rows:
    """Table II: every function, learned and frozen, and the three starts of the cosine."""
    rows = {
        "cosine, learned": {"method": "funlora"},
        "cosine, learned, equal start": {"method": "funlora", "start": "equal"},
        "cosine, learned, literal start": {"method": "funlora", "start": "literal"},
        "cosine, frozen": {"method": "cosine-frozen"}, "power, learned": {"method": "power"},
        "power, frozen": {"method": "power-frozen"}, "shift": {"method": "shift"},
        "vanilla mul": {"method": "vanilla-mul"}, "vanilla add": {"method": "vanilla-add"},
    }  # fmt: skip
    return {name: _at_best_rate(base, **changes) for name, changes in rows.items()}


def operations(base: Experiment) -> Rows:
    """Table IV: W*F, W+F and W*F+G with learned cosines, from the identity and as the paper's formula stands."""
    rows = {word: {"operation": word} for word in ("mul", "mul-add", "add")}
    rows |= {f"{word}, literal start": {"operation": word, "start": "literal"} for word in ("mul-add", "add")}
    return {name: _at_best_rate(base, method="funlora", **changes) for name, changes in rows.items()}


def ratios(base: Experiment) -> Rows:
    """Table IV: A and B with r times fewer entries, for every r that divides this network's channels."""
    funlora = base.but(method="funlora")
    channels = [n for layer in Adapters(meta_unet(base), funlora).layers.values() for n in layer.weight.shape[:2]]
    return {str(r): _at_best_rate(funlora, ratio=r) for r in published.RATIOS if not any(n % r for n in channels)}


def methods(base: Experiment) -> Rows:
    """Table V: the bounds, vanilla conditioning, every compared adapter and FunLoRA."""
    compared = [method for method in METHODS if method not in (*VARIANTS, *BOUNDS)]
    return {method: _at_best_rate(base, method=method) for method in (*BOUNDS, *compared, "funlora")}


def rates(base: Experiment) -> Rows:
    """Adam's rate for the adapters, chosen by the loss on held-out training images: three rates for three methods."""
    tried = {"funlora": (1e-2, 3e-2, 1e-1), "shift": (3e-2, 1e-1, 3e-1), "vanilla-add": (3e-3, 1e-2, 3e-2)}
    return {f"{m} at {rate:g}": base.but(method=m, adapter_lr=rate) for m, some in tried.items() for rate in some}


def growth(base: Experiment) -> Rows:
    """The same training ended earlier, to see the rank grow; constant rate, no average: nothing depends on the end."""
    plain = base.but(adapter_schedule="constant", adapter_ema=0.0)
    marks = sorted({max(1, round(base.adapter.steps * share)) for share in (0.05, 0.25, 1.0)})
    grown = [plain.but(adapter_images=steps * base.adapter.batch) for steps in marks]
    some = ("funlora", "shift", "power", "vanilla-mul")
    return {f"{method} after {e.adapter.steps} steps": e.but(method=method) for method in some for e in grown}


# a table under the name of its function; a study of one's own adds to them
TABLES = {table.__name__: table for table in (windows, functions, operations, ratios, methods, rates, growth, coco)}


class Cell(NamedTuple):
    table: str
    row: str
    experiment: Experiment

    def run(self, folder: Path | None = None) -> Run:
        return Run.of(self.experiment, folder)


def cells(names: Sequence[str], base: Experiment, seeds: Sequence[int], rows: Sequence[str] = ()) -> list[Cell]:
    """Every run of some tables, or those of some rows alone; raises LabError for an unknown table or row."""
    wanted = []
    for name in names:
        if name not in TABLES:
            raise LabError(f"Unknown table '{name}': accepted are {', '.join(TABLES)}.")
        for row, e in TABLES[name](base.but(score_after=SCORED_AFTER.get(name, "last"))).items():
            wanted += [Cell(name, row, e.but(seed=seed)) for seed in seeds]
    known = dict.fromkeys(cell.row for cell in wanted)
    if unknown := [row for row in rows if row not in known]:
        raise LabError(f"Unknown row '{unknown[0]}': accepted are {'; '.join(known)}.")
    return [cell for cell in wanted if not rows or cell.row in rows]


def plot_rates(frame: pd.DataFrame) -> plots.Drawing:
    """Held-out flow loss against Adam's rate, one line a method; the chosen rate is ringed."""
    figure, axis = plots.chart(6.0, 3.2, "Adam's rate for the adapters", "held-out flow loss")
    for i, (method, part) in enumerate(frame.groupby("method", sort=False)):
        part, look = part.sort_values("rate"), plots.style(i, 5)
        axis.plot(part["rate"], part["flow_loss"], label=method, **look)
        least = part.loc[part["flow_loss"].idxmin()]
        axis.plot(least["rate"], least["flow_loss"], "o", markersize=12, mfc="none", color=look["color"])
    rates = sorted(set(frame["rate"]))
    axis.set(xscale="log", xticks=rates, xticklabels=[f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    plots.legend(figure)
    return figure


def plot_cost_and_score(summary: pd.DataFrame, measure: str, label: str) -> plots.Drawing:
    """Parameters a class (log x) against a measure with its spread, one labelled point a row."""
    figure, axis = plots.chart(6.6, 3.8, "parameters per class", label)
    for row, line in summary.sort_values("PPC").iterrows():
        axis.errorbar(line["PPC"], line[measure], line.get(f"{measure} sd"), **plots.style(0, 6, capsize=3))
        axis.annotate(row, (line["PPC"], line[measure]), (6, 4), textcoords="offset points", fontsize=8)
    axis.set(xscale="log", xmargin=0.12)
    axis.set_xticks(counts := sorted(set(summary["PPC"])), [f"{count:,.0f}" for count in counts], fontsize=8)
    axis.minorticks_off()
    return figure
