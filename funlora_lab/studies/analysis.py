"""What the learned numbers say about a network: one tidy table a question, made from opened runs.

Columns shared by all tables: ``seed``, ``class`` (its name), ``layer`` (index of the convolution, as in Fig. 3).
Matrices F are computed in float64 from the stored float32 numbers, so that a rank is a property of the formula and not
of rounding.
"""

from collections.abc import Iterable, Iterator

import pandas as pd
import torch
from torch import Tensor

from funlora_lab import functions, metrics
from funlora_lab.adapters import Adapters, Row, by_layer, functional_matrix, stack
from funlora_lab.config import FUNCTIONAL_METHODS, Experiment
from funlora_lab.network import build_unet
from funlora_lab.opened import OpenRun
from funlora_lab.streams import stream
from funlora_lab.unet import conv_layers


def parts(experiment: Experiment) -> list[str]:
    """encoder, middle, decoder or output for every convolution, in module order."""
    with torch.device("meta"):
        names = conv_layers(build_unet(experiment, 1))
    words = {"input_blocks": "encoder", "middle_block": "middle", "output_blocks": "decoder", "out": "output"}
    return [words[name.split(".")[0]] for name in names]


def in_float64(numbers: Row) -> Row:
    return {name: value.double() for name, value in numbers.items()}


def numbers(opened: OpenRun) -> Iterator[tuple[int, int, Row]]:
    """(class, index of the convolution, its numbers in float64) for every class after task 1 and adapted layer."""
    index = {name: i for i, name in enumerate(conv_layers(opened.network))}
    for task in opened.tasks[1:]:
        for cls in task:
            layers = by_layer(opened.row(cls))
            for layer in opened.adapters.layers:
                yield cls, index[layer], in_float64(layers[layer])


def _frame(runs: Iterable[OpenRun], values) -> pd.DataFrame:
    """``values(opened, numbers)`` -> dictionaries of one class and layer, with seed, class and layer added to each."""
    return pd.DataFrame(
        {"seed": opened.experiment.seed, "class": opened.classes[cls], "layer": layer, **line}
        for opened in runs
        for cls, layer, row in numbers(opened)
        for line in values(opened, row)
    )


def importances(runs: Iterable[OpenRun]) -> pd.DataFrame:
    """Eq. 20 of runs with vanilla mul: one line a seed, class and layer; Eq. 21 is its mean over classes."""
    return _frame(runs, lambda opened, row: [{"importance": metrics.importance(row["A"], row["B"])}])


def matrix(opened: OpenRun, row: Row) -> Tensor:
    """F (O, I) of one class and layer in float64."""
    return functional_matrix(opened.experiment, stack([row]))[0]


def ranks(runs: Iterable[OpenRun], tolerance: float = metrics.TOLERANCE) -> pd.DataFrame:
    """Numerical rank of F, the bound its formula sets, and how many singular values count by their entropy."""

    def values(opened: OpenRun, row: Row):
        F, function = matrix(opened, row), FUNCTIONAL_METHODS[opened.experiment.method][0]
        bound = functions.rank_bound(function, opened.experiment.functions, *F.shape)
        rank, effective = metrics.numerical_rank(F, tolerance), metrics.effective_rank(F)
        return [{"rank": int(rank), "bound": bound, "effective": float(effective), "full": min(F.shape)}]

    return _frame(runs, values)


def spectra(runs: Iterable[OpenRun]) -> pd.DataFrame:
    """Singular values of F divided by the largest: one line a seed, class, layer and ``position`` (from 1)."""

    def values(opened: OpenRun, row: Row):
        found = metrics.singular_values(matrix(opened, row))
        return [{"position": i, "value": v} for i, v in enumerate((found / found[0]).tolist(), 1)]

    return _frame(runs, values)


def series(runs: Iterable[OpenRun], name: str) -> pd.DataFrame:
    """``ponderation``, ``frequency`` or ``exponent`` of every function: one line a seed, class, layer, ``function``.

    ``first`` is the value at which training started.
    """

    def values(opened: OpenRun, row: Row):
        e = opened.experiment
        start = torch.arange(1.0, e.functions + 1)
        if name == "ponderation":
            start = functions.first_ponderation(FUNCTIONAL_METHODS[e.method][0], e.start, e.functions)
        both = zip(row[name].tolist(), start.tolist(), strict=True)
        return [{"function": i, "value": value, "first": first} for i, (value, first) in enumerate(both, 1)]

    return _frame(runs, values)


@torch.no_grad()
def start_difference(opened: OpenRun, experiment: Experiment, images: int = 16) -> float:
    """Largest |v_adapted - v_base| at step 0 of ``experiment``'s adapters over the run's base, on random inputs."""
    device, size = opened.runtime.device, experiment.image_size
    adapters = Adapters(opened.network, experiment)
    x = torch.randn(images, experiment.channels, size, size, generator=stream(0, "start difference")).to(device)
    t = torch.linspace(0, 1, images, device=device)
    row = {name: value.to(device) for name, value in stack([adapters.start(opened.tasks[1][0])]).items()}
    base = opened.network(t, x, adapters.mean_embedding().expand(images, -1))
    return float((adapters.velocity(row, 1)(t, x) - base).abs().max())
