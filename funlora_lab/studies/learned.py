"""What the learned numbers say about a network: importance, rank, spectra, ponderations; a table and its figure each.

All tables have ``seed``, ``class`` (its name) and ``layer`` (index of the convolution, as in Fig. 3). Matrices F are
computed in float64 from the stored float32 numbers, so that a rank is a property of the formula, not of rounding.
"""

from collections.abc import Iterable, Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor

from funlora_lab import adapters
from funlora_lab.continual import OpenRun
from funlora_lab.experiment import Experiment
from funlora_lab.flow import flow_loss
from funlora_lab.seeds import seed_of, stream
from funlora_lab.studies import rank
from funlora_lab.studies.plots import COLOURS, INK, Drawing, bands, drawing, legend, style
from funlora_lab.systems import meta_unet
from funlora_lab.systems.network import noisy_batch
from funlora_lab.unet import conv_layers, part_of


def parts(experiment: Experiment) -> list[str]:
    """encoder, middle, decoder or output for every convolution, in module order."""
    return [part_of(name) for name in conv_layers(meta_unet(experiment))]


def matrix(run: OpenRun, cls: int, layer: str) -> Tensor:
    """F (O, I) of one class and layer, by the layer's name, in float64; LabError for a method that has no F."""
    numbers = adapters.numbers_by_layer(run.row(cls))[layer]
    return run.adapters.matrix(layer, {name: value.double().cpu()[None] for name, value in numbers.items()})[0]


def _each(runs: Iterable[OpenRun]) -> Iterator[tuple[dict, OpenRun, int, str]]:
    """(what all tables have, run, class, layer's name) of every later class and adapted layer."""
    for run in runs:
        adapted = [(i, name) for i, name in enumerate(conv_layers(run.network)) if name in run.adapters.layers]
        for cls in run.order[len(run.tasks[0]) :]:
            for i, layer in adapted:
                yield {"seed": run.experiment.seed, "class": run.classes[cls], "layer": i}, run, cls, layer


def importances(runs: Iterable[OpenRun]) -> pd.DataFrame:
    """Eq. 20 of runs with vanilla mul: one line a seed, class and layer; Eq. 21 is its mean over classes."""
    lines = []
    for about, run, cls, layer in _each(runs):
        A, B = (run.row(cls)[f"{layer}/{name}"].double().cpu() for name in "AB")
        lines.append(about | {"importance": rank.importance(A, B)})
    return pd.DataFrame(lines)


def plot_importance(frame: pd.DataFrame, parts: Sequence[str]) -> Drawing:
    """Fig. 3: importance of every layer (x) and class (y), and below its mean over classes with their spread."""
    figure, ((heat,), (line,)) = drawing(7.4, 5.2, 2, 1, sharex=True, height_ratios=[1.15, 1])
    table = frame.pivot_table(index="class", columns="layer", values="importance", sort=False)
    image = heat.imshow(table, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    heat.set(ylabel="class", yticks=range(len(table)), yticklabels=table.index)
    heat.grid(False)
    figure.colorbar(image, ax=heat, label="importance (Eq. 20)", pad=0.01)
    line.errorbar(table.columns, table.mean(), table.std().fillna(0), **style(0, 4, capsize=2.5, linewidth=1.2))
    ticks = range(0, len(parts), 1 if len(parts) < 30 else 5)
    line.set(xlabel="layer", ylabel="mean over classes (Eq. 21)\nand their spread", ylim=(0, None), xticks=ticks)
    for part in dict.fromkeys(parts):
        first, size = parts.index(part), parts.count(part)
        for axis in (heat, line) if first else ():
            axis.axvline(first - 0.5, color=INK, linewidth=0.8, linestyle=":")
        if part != "output":  # one layer: no room for its name
            heat.text(first + (size - 1) / 2, 1.02, part, transform=heat.get_xaxis_transform(), ha="center", fontsize=9)
    return figure


def ranks(runs: Iterable[OpenRun], tolerance: float = rank.TOLERANCE) -> pd.DataFrame:
    """Numerical rank of F, the bound its formula sets, and how many singular values count by their entropy."""
    lines = []
    for about, run, cls, layer in _each(runs):
        F, bound = matrix(run, cls, layer), run.adapters.bound(layer)
        found, effective = rank.numerical_rank(F, tolerance), rank.effective_rank(F)
        lines.append(about | {"rank": int(found), "bound": bound, "effective": float(effective), "full": min(F.shape)})
    return pd.DataFrame(lines)


def plot_ranks(frames: dict[str, pd.DataFrame]) -> Drawing:
    """Fig. 4: numerical rank of F per layer: mean over classes and seeds, range as a band; dashes: formula's bound."""
    figure, every = bands(frames, "layer", "rank", ("layer", "numerical rank of F")), pd.concat(frames.values())
    for i, frame in enumerate(frames.values()):
        bound, look = frame.groupby("layer")["bound"].first(), {"color": style(i)["color"], "linestyle": (0, (2, 1))}
        figure.axes[0].hlines(bound, bound.index - 0.38, bound.index + 0.38, linewidth=1, **look)
    figure.axes[0].set(xticks=sorted(set(every["layer"])), ylim=(0, 1.04 * every["bound"].max()))
    return figure


def plot_growth(frame: pd.DataFrame) -> Drawing:
    """Rank against ``steps`` of training, one line a ``method``: mean over classes and layers, range as a band."""
    methods = dict(list(frame.groupby("method", sort=False)))
    return bands(methods, "steps", "rank", ("steps of training", "numerical rank of F"))


def spectra(runs: Iterable[OpenRun]) -> pd.DataFrame:
    """Singular values of F divided by the largest: one line a seed, class, layer and ``position`` (from 1)."""
    lines = []
    for about, *where in _each(runs):
        found = rank.singular_values(matrix(*where))
        lines += [about | {"position": i, "value": v} for i, v in enumerate((found / found[0]).tolist(), 1)]
    return pd.DataFrame(lines)


def plot_spectra(frames: dict[str, pd.DataFrame], tolerance: float) -> Drawing:
    """Singular values over the largest, on a log scale: median over classes and layers, range as a band."""
    labels = ("position among the singular values", "singular value / largest")
    figure = bands(frames, "position", "value", labels, "median", 3.5)
    axis = figure.axes[0]
    axis.axhline(tolerance, color=INK, linewidth=1, linestyle="--")
    axis.text(1, tolerance, f"tolerance {tolerance:g}", ha="right", va="bottom", transform=axis.get_yaxis_transform())
    axis.set(yscale="log", ylim=(1e-18, 2))
    return figure


def series(runs: Iterable[OpenRun], name: str) -> pd.DataFrame:
    """``ponderation``, ``frequency`` or ``exponent`` of every ``function``; ``first``: where training started."""
    lines = []
    for about, run, cls, layer in _each(runs):
        values, first = (row[f"{layer}/{name}"].tolist() for row in (run.row(cls), run.adapters.start(cls)))
        lines += [about | {"function": i + 1, "value": v, "first": first[i]} for i, v in enumerate(values)]
    return pd.DataFrame(lines)


def plot_series(frame: pd.DataFrame, label: str, columns: int = 5) -> Drawing:
    """Fig. 5: a panel a layer, mean and spread over classes of every function; dashes: the start."""
    layers = sorted(frame["layer"].unique())
    rows = -(-len(layers) // columns)
    figure, axes = drawing(8, 1.35 * rows + 0.7, rows, columns, sharex=True, sharey=True)
    for axis, layer in zip(axes.flat, layers, strict=False):
        grouped = frame[frame["layer"] == layer].groupby("function")
        mean, sd = grouped["value"].mean(), grouped["value"].std().fillna(0)
        axis.plot(grouped["first"].first(), color=COLOURS[1], linestyle="--", linewidth=1.2, label="start")
        axis.plot(mean, linewidth=1, **style(0, 2.5, label="learned: mean and spread over classes"))
        axis.fill_between(mean.index, mean - sd, mean + sd, color=COLOURS[0], alpha=0.25, lw=0)
        axis.set_title(f"layer {layer}", fontsize=9, pad=2)
        axis.set_xticks([n for n in (1, 4, 7, 10) if n <= len(mean)])
    for above, axis in zip(list(axes.flat)[len(layers) - columns :], list(axes.flat)[len(layers) :], strict=False):
        axis.axis("off")
        above.tick_params(labelbottom=True)
    figure.supxlabel("function index", fontsize=10)
    figure.supylabel(label, fontsize=10)
    legend(figure, "outside upper right", ncols=2)
    return figure


@torch.no_grad()
def start_difference(run: OpenRun, experiment: Experiment, images: int = 16) -> float:
    """Largest |v_adapted - v_base| at step 0 of ``experiment``'s adapters over the run's base, on random inputs."""
    device, size = run.runtime.device, experiment.image_size
    adapted = adapters.Adapters(run.network, experiment)
    x = torch.randn(images, experiment.channels, size, size, generator=stream(0, "start difference")).to(device)
    t = torch.linspace(0, 1, images, device=device)
    row = {name: value.to(device) for name, value in adapters.stack([adapted.start(run.tasks[1][0])]).items()}
    base = run.network(t, x, adapted.mean_embedding().expand(images, -1))
    return float((adapted.velocity(row, 1)(t, x) - base).abs().max())


def first_gradients(run: OpenRun, experiment: Experiment, images: int = 16) -> dict[str, float]:
    """Largest |gradient| of Eq. 1 at step 0 of ``experiment``'s adapters over the run's base, by number (A, G.A)."""
    cls, device = run.tasks[1][0], run.runtime.device
    adapted = adapters.Adapters(run.network, experiment)
    row = {name: value.to(device).requires_grad_() for name, value in adapters.stack([adapted.start(cls)]).items()}
    pixels, seeds = run.context.dataset.train.of(cls).pixels[:images], torch.tensor([seed_of(0, "first gradients")])
    x1, x0, t, *_ = noisy_batch(pixels.to(device), torch.arange(len(pixels))[None], False, seeds.to(device))
    flow_loss(adapted.velocity(row, 1), x1, x0, t).mean().backward()
    largest: dict[str, float] = {}
    for name, value in row.items():
        number = name.rpartition("/")[2]
        largest[number] = max(largest.get(number, 0.0), float(value.grad.abs().max()))
    return largest
