"""Which runs a table needs: a table is a function from an experiment to named variants of it (its rows).

Every row is repeated for every seed; all rows of a seed share the base, the judge and the classifier of task 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from funlora_lab.adapters import BUILT_IN, METHODS, Adapters
from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment, override
from funlora_lab.presets import PRESETS, preset
from funlora_lab.store import Run
from funlora_lab.studies import plots, published
from funlora_lab.studies.ledger import RANK_TWO
from funlora_lab.studies.pretraining import coco
from funlora_lab.systems import meta_unet
from funlora_lab.unet import conv_layers, part_of

Rows = dict[str, Experiment]
# tasks with a classifier, where the paper's table has no AIA; of every other table those of ``score_after``
SCORED_AFTER = {"operations": "last", "systems": "last", "coco": "last", "rates": "none", "growth": "none"}
BOUNDS = ("classifier-multitask", "generative-multitask", "label-embedding")
VARIANTS = ("funlora", "cosine-frozen", "power", "power-frozen", "shift")  # of Table II: one stands for them in Table V
# rows of Table VI beside ours, in the published order, the best first: a name in ``published.PRIOR_SYSTEMS`` -> method
PRIOR = {"JDCL": "jdcl", "GUIDE": "guide", "DGR diffusion": "dgr-diffusion", "DDGR": "ddgr"}

# preset -> (method, operation, start) -> rate, chosen on seed 0 by the flow loss of held-out training images from 1e-3
# to 1 in steps of about three; with "everywhere" that in all layers, where it is another. Each has worse neighbours on
# both sides. What is not listed did best at the method's own rate, or (compared methods) keeps it.
BEST_RATES = {"digits-small": {
    ("funlora", "mul", "literal"): 1e-1, ("shift", "mul", "identity"): 3e-1, ("power", "mul", "identity"): 3e-2,
    ("power-frozen", "mul", "identity"): 3e-2, ("vanilla-add", "mul", "identity"): 3e-3,
    ("funlora", "add", "identity"): 3e-3, ("funlora", "mul-add", "identity"): 3e-3,
    ("funlora", "add", "kaiming"): 3e-2, ("funlora", "mul-add", "kaiming"): 3e-2,
    ("shift", "everywhere"): 1e-1, ("power", "everywhere"): 1e-2, ("power-frozen", "everywhere"): 1e-2,
}}  # fmt: skip


def base_of(name: str, settings: Sequence[str] = ()) -> Experiment:
    """The experiment that tables vary, small where it can be."""
    return override(preset(f"{name}-small" if f"{name}-small" in PRESETS else name), list(settings))


def compared_by(base: Experiment) -> str:
    """The measure by which rows are compared: the held-out flow loss, or LA where no images are held out."""
    return "flow_loss" if base.valid_fraction else "LA"


def panels(base: Experiment) -> dict[str, str]:
    """The measures that a figure of rows shows, with their labels."""
    every = {"flow_loss": "held-out flow loss", "recognition": "samples recognised", "LA": "LA"}
    return {measure: label for measure, label in every.items() if base.valid_fraction or measure != "flow_loss"}


def best_first(summary: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A summary without its table's name, the best row first: of losses the lowest."""
    return summary.droplevel("table").sort_values(measure, ascending=measure == "flow_loss")


def _at_best_rate(base: Experiment, **changes) -> Experiment:
    """At the rate chosen for the preset, else at that chosen on digits; at ``adapter_lr`` where that is given."""
    e = base.but(**changes)
    tuned = BEST_RATES.get(e.preset, BEST_RATES["digits-small"])
    everywhere = e.window == scaled_window("0-64", e) and (e.method, "everywhere")
    rate = None if e.adapter.lr else tuned.get(everywhere) or tuned.get((e.method, e.operation, e.start))
    return e.but(adapter_lr=rate) if rate else e


def scaled_window(window: str, base: Experiment) -> str:
    """A window of the paper's 65 convolutions at the same place of another network, part by part."""
    parts = [part_of(name) for name in conv_layers(meta_unet(base))]
    ours = [0, parts.index("middle"), parts.index("decoder"), len(parts) - 2, len(parts) - 1]
    places = np.interp([int(place) for place in window.split("-")], [0, 21, 25, 63, 64], ours)
    return "-".join(str(round(place)) for place in places)


def windows(base: Experiment) -> Rows:
    """Table I: vanilla mul in the paper's windows, at the same places of this network, and in its own window."""
    found = [scaled_window(window, base) for window in published.WINDOWS]
    return {window: base.but(method="vanilla-mul", window=window) for window in dict.fromkeys([*found, base.window])}


def _rank_two(base: Experiment) -> tuple[int, ...]:
    """The layers given rank 2 in Table II's "rank 1 and 2": at the places of ``RANK_TWO``, or next in the window."""
    first, last = map(int, base.window.split("-"))
    places = [int(scaled_window(str(layer), base)) for layer in RANK_TWO]
    return tuple(dict.fromkeys(min(max(place, first), last) for place in places))


def functions(base: Experiment) -> Rows:
    """Table II in the window: every function, learned and frozen, and the three starts of the cosine."""
    two = {"extra_rank": _rank_two(base)}
    rows = {
        "cosine, learned": {"method": "funlora"},
        "cosine, learned, equal start": {"method": "funlora", "start": "equal"},
        "cosine, learned, literal start": {"method": "funlora", "start": "literal"},
        "cosine, frozen": {"method": "cosine-frozen"}, "power, learned": {"method": "power"},
        "power, frozen": {"method": "power-frozen"}, "shift": {"method": "shift"},
        "vanilla mul": {"method": "vanilla-mul"}, "vanilla mul, rank 1 and 2": {"method": "vanilla-mul"} | two,
        "vanilla add": {"method": "vanilla-add"}, "vanilla add, rank 1 and 2": {"method": "vanilla-add"} | two,
    }  # fmt: skip
    return {name: _at_best_rate(base, **changes) for name, changes in rows.items()}


def functions_everywhere(base: Experiment) -> Rows:
    """Table II in all layers: the rows that the paper has."""
    rows = functions(base.but(window=scaled_window("0-64", base)))
    return {name: rows[name] for name in published.FUNCTIONS}


def operations(base: Experiment) -> Rows:
    """Table IV: W*F, W+F and W*F+G with learned cosines, from the identity and from the starts that the text says."""
    rows = {word: {"operation": word} for word in ("mul", "mul-add", "add")} | {
        "mul, literal start": {"start": "literal"}
    }
    rows |= {f"{word}, literal start": {"operation": word, "start": "kaiming"} for word in ("mul-add", "add")}
    return {name: _at_best_rate(base, method="funlora", **changes) for name, changes in rows.items()}


def ratios(base: Experiment) -> Rows:
    """Table IV: A and B with r times fewer entries, for every r that divides this network's channels."""
    funlora = base.but(method="funlora")
    channels = [n for layer in Adapters(meta_unet(base), funlora).layers.values() for n in layer.weight.shape[:2]]
    return {str(r): _at_best_rate(funlora, ratio=r) for r in published.RATIOS if not any(n % r for n in channels)}


def methods(base: Experiment) -> Rows:
    """Table V: the bounds, vanilla conditioning, every compared adapter of this package and FunLoRA."""
    compared = [method for method in METHODS if method in BUILT_IN and method not in (*VARIANTS, *BOUNDS)]
    return {method: _at_best_rate(base, method=method) for method in (*BOUNDS, *compared, "funlora")}


def systems(base: Experiment) -> Rows:
    """Table VI: FunLoRA, the same classifier on ten times the samples, and the prior systems that are run here."""
    rows = {"FunLoRA": {}, "FunLoRA, 10x samples": {"samples_per_class": 10 * base.samples_per_class}}
    rows |= {name: {"method": method} for name, method in PRIOR.items()}
    return {name: _at_best_rate(base, **{"method": "funlora"} | changes) for name, changes in rows.items()}


def rates(base: Experiment) -> Rows:
    """Adam's rate for the adapters, chosen by the loss on held-out training images: a grid for some rows of the tables.

    No rows where nothing is held out: a rate is never chosen by test images.
    """
    chosen = {"cosine, learned": (1e-2, 3e-2, 1e-1), "shift": (1e-1, 3e-1, 1.0), "vanilla add": (1e-3, 3e-3, 1e-2)}
    tried = {name: (functions(base)[name], some) for name, some in chosen.items() if base.valid_fraction}
    return {f"{name} at {rate:g}": e.but(adapter_lr=rate) for name, (e, some) in tried.items() for rate in some}


def growth(base: Experiment) -> Rows:
    """The same training ended earlier, to see the rank grow; constant rate, no average: nothing depends on the end."""
    plain = base.but(adapter_schedule="constant", adapter_ema=0.0)
    marks = sorted({max(1, round(base.adapter.steps * share)) for share in (0.05, 0.25, 1.0)})
    grown = [plain.but(adapter_images=steps * base.adapter.batch) for steps in marks]
    some = ("funlora", "shift", "power", "vanilla-mul")
    return {f"{method} after {e.adapter.steps} steps": e.but(method=method) for method in some for e in grown}


_ALL = (windows, functions, functions_everywhere, operations, ratios, methods, systems, rates, growth, coco)
TABLES = {table.__name__: table for table in _ALL}  # under the function's name; a study of one's own adds to them


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
        for row, e in TABLES[name](base.but(score_after=SCORED_AFTER.get(name, base.score_after))).items():
            wanted += [Cell(name, row, e.but(seed=seed)) for seed in seeds]
    known = dict.fromkeys(cell.row for cell in wanted)
    if unknown := [row for row in rows if row not in known]:
        raise LabError(f"Unknown row '{unknown[0]}': accepted are {'; '.join(known)}.")
    return [cell for cell in wanted if not rows or cell.row in rows]


def plot_rates(frame: pd.DataFrame) -> plots.Drawing:
    """Held-out flow loss against Adam's rate, one line a ``name``; the chosen rate is ringed."""
    figure, axis = plots.chart(6.0, 3.2, "Adam's rate for the adapters", "held-out flow loss")
    for i, (method, part) in enumerate(frame.groupby("name", sort=False)):
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
