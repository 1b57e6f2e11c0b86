"""Which runs a table needs: a table is a dictionary of named experiments (its rows), repeated for every seed.

All rows of a seed share the base, the judge and the classifier of task 1 through the artefact store.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from funlora_lab.config import METHODS, WHOLE_NETWORK, Experiment, override
from funlora_lab.errors import LabError
from funlora_lab.network import build_unet
from funlora_lab.presets import PRESETS, preset
from funlora_lab.store import Run
from funlora_lab.unet import conv_layers

Rows = dict[str, Experiment]
PAPER_WINDOWS = "0-64 5-54 15-44 15-54 25-44 25-54 35-54 40-54 45-54 40-49 45-49".split()  # Table I
FEW_WINDOWS = "0-64 5-54 15-44 25-44 25-54 40-54 45-49".split()  # those that stay apart in a smaller network


def base_of(name: str, settings: Sequence[str] = ()) -> Experiment:
    """The experiment that tables of a preset vary: its small variant (``digits-small``) where it has one.

    ``settings`` are further ``key=value`` words.
    """
    return override(preset(f"{name}-small" if f"{name}-small" in PRESETS else name), list(settings))


def compared_base(name: str, settings: Sequence[str] = ()) -> Experiment:
    """``base_of`` for tables that compare held-out flow losses; raises LabError when no images are held out."""
    base = base_of(name, settings)
    if not base.valid_fraction:
        raise LabError(
            f"Tables of {name} compare losses of held-out training images, and valid_fraction=0 holds none out: "
            "accepted is a share of them, such as valid_fraction=0.02 among the settings."
        )
    return base


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

RATES = {"funlora": (1e-2, 3e-2, 1e-1), "shift": (3e-2, 1e-1, 3e-1), "vanilla-add": (3e-3, 1e-2, 3e-2)}


def rates(base: Experiment) -> Rows:
    """Adam's rate for the adapters, chosen by the loss on held-out training images: three rates for three methods."""
    return {f"{m} at {rate:g}": base.but(method=m, adapter_lr=rate) for m, some in RATES.items() for rate in some}


def growth(base: Experiment) -> Rows:
    """The same training ended earlier, to see the rank grow; at a constant rate and without averaging.

    Nothing in such a training depends on its end, so a shorter run is the beginning of a longer one.
    """
    plain = base.but(adapter_schedule="constant", adapter_ema=0.0)
    marks = sorted({max(1, round(base.adapter_steps * share)) for share in (0.05, 0.25, 1.0)})
    return {
        f"{method} after {steps} steps": plain.but(method=method, adapter_images=steps * base.adapter_batch)
        for method in ("funlora", "shift", "power", "vanilla-mul")
        for steps in marks
    }


TABLES: dict[str, Callable[[Experiment], Rows]] = {
    "windows": windows,
    "functions": functions,
    "operations": operations,
    "ratios": ratios,
    "methods": methods,
    "rates": rates,
    "growth": growth,
}


# tasks with a classifier; every other table: the last task alone
SCORED_AFTER = {"rates": "none", "growth": "none"}


def _at_best_rate(experiment: Experiment) -> Experiment:
    """The experiment at the rate that did best for it on held-out images of seed 0, where the method's own is not."""
    e = experiment
    rate = BEST_RATES.get((e.preset, e.method, e.operation, e.start), 0.0)
    return e if e.method in WHOLE_NETWORK or not rate else e.but(adapter_lr=rate)


# (preset, method, operation, start) -> rate, chosen on seed 0 by the flow loss of held-out training images from 3e-3 to
# 3e-1 in steps of about three; what is not listed did best at the method's own rate, or (compared methods) keeps it
BEST_RATES: dict[tuple[str, str, str, str], float] = {
    ("digits-small", "funlora", "mul", "literal"): 1e-1,
    ("digits-small", "power", "mul", "identity"): 3e-2,
    ("digits-small", "power-frozen", "mul", "identity"): 3e-2,
    ("digits-small", "shift", "mul", "identity"): 3e-1,
    ("digits-small", "vanilla-add", "mul", "identity"): 3e-3,
    ("digits-small", "funlora", "add", "identity"): 3e-3,
    ("digits-small", "funlora", "mul-add", "identity"): 3e-3,
    ("digits-small", "funlora", "add", "literal"): 3e-3,  # that of the identity start
    ("digits-small", "funlora", "mul-add", "literal"): 3e-3,  # that of the identity start
}


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


def rows(wanted: list[Cell], names: list[str]) -> list[Cell]:
    """The cells of the rows of these names, or all when there are none; raises LabError for an unknown row."""
    known = dict.fromkeys(cell.row for cell in wanted)
    for name in names:
        if name not in known:
            raise LabError(f"Unknown row '{name}': accepted are {'; '.join(known)}.")
    return [cell for cell in wanted if not names or cell.row in names]
