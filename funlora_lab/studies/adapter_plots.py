"""Figures about layers, functions and methods: tidy tables of analysis.py and sweeps.py -> Drawing."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from funlora_lab.studies.plots import COLOURS, INK, MARKERS, Drawing, drawing


def _mark_parts(axis, parts: Sequence[str], heights: bool = True) -> None:
    """Name encoder, middle and decoder above an axis whose x runs over layer indices, with a line between them."""
    starts = [i for i, part in enumerate(parts) if not i or parts[i - 1] != part]
    for start, stop in zip(starts, [*starts[1:], len(parts)], strict=True):
        if start:
            axis.axvline(start - 0.5, color=INK, linewidth=0.8, linestyle=":")
        if heights and parts[start] != "output":  # one layer: no room for its name
            middle = (start + stop - 1) / 2
            axis.text(middle, 1.02, parts[start], transform=axis.get_xaxis_transform(), ha="center", fontsize=9)


def importance(frame: pd.DataFrame, parts: Sequence[str]) -> Drawing:
    """Fig. 3: importance of every layer (x) and class (y), and below its mean over classes with their spread."""
    figure, (top, bottom) = drawing(7.4, 5.2, 2, 1, sharex=True, height_ratios=[1.15, 1])
    heat, line = top[0], bottom[0]
    table = frame.pivot_table(index="class", columns="layer", values="importance", sort=False)
    image = heat.imshow(table, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    heat.set_yticks(range(len(table)), table.index)
    heat.set_ylabel("class")
    heat.grid(False)
    _mark_parts(heat, parts)
    figure.colorbar(image, ax=heat, label="importance (Eq. 20)", pad=0.01)
    mean, sd = table.mean(), table.std().fillna(0)
    line.errorbar(table.columns, mean, sd, color=COLOURS[0], marker="o", markersize=4, capsize=2.5, linewidth=1.2)
    _mark_parts(line, parts, heights=False)
    line.set_ylim(0)
    line.set_xticks(range(0, len(parts), 1 if len(parts) < 30 else 5))
    line.set_xlabel("layer")
    line.set_ylabel("mean over classes (Eq. 21)\nand their spread")
    return figure


def dots(table: pd.DataFrame, panels: dict[str, str]) -> Drawing:
    """Rows of a summary on y, one panel a measure (``panels``: measure -> label), mean with standard deviation."""
    rows = list(table.index)
    figure, axes = drawing(2.2 + 2.4 * len(panels), 0.29 * len(rows) + 1.1, 1, len(panels), sharey=True)
    for axis, (measure, label) in zip(axes[0], panels.items(), strict=True):
        for y, row in enumerate(rows):
            sd = table.loc[row].get(f"{measure} sd")
            sd = None if sd is None or pd.isna(sd) else sd
            axis.errorbar(table.loc[row, measure], y, xerr=sd, color=COLOURS[0], marker="o", markersize=5, capsize=3)
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=3)
    axes[0, 0].set_yticks(range(len(rows)), rows)
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def ranks(frames: dict[str, pd.DataFrame], layers: Sequence[int]) -> Drawing:
    """Fig. 4: numerical rank of F per layer: mean over classes and seeds, range as a band; dashes: formula's bound."""
    figure, axes = drawing(7.4, 3.9)
    axis = axes[0, 0]
    for i, (name, frame) in enumerate(frames.items()):
        grouped = frame.groupby("layer")
        colour, mean = COLOURS[i % len(COLOURS)], grouped["rank"].mean()
        axis.plot(mean.index, mean, marker=MARKERS[i % len(MARKERS)], markersize=4.5, color=colour, label=name)
        axis.fill_between(mean.index, grouped["rank"].min(), grouped["rank"].max(), color=colour, alpha=0.18, lw=0)
        bound = grouped["bound"].first()
        axis.hlines(bound, bound.index - 0.38, bound.index + 0.38, color=colour, linestyle=(0, (2, 1)), linewidth=1)
    axis.set_xticks(list(layers))
    axis.set_xlabel("layer")
    axis.set_ylabel("numerical rank of F")
    axis.set_ylim(0)
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    return figure


def curves(frame: pd.DataFrame, x: str, y: str, by: str, labels: tuple[str, str]) -> Drawing:
    """Mean of ``y`` against ``x`` with its range as a band, one line for every value of ``by``."""
    figure, axes = drawing(6.4, 3.4)
    axis = axes[0, 0]
    for i, (name, part) in enumerate(frame.groupby(by, sort=False)):
        grouped = part.groupby(x)[y]
        colour = COLOURS[i % len(COLOURS)]
        axis.plot(grouped.mean(), marker=MARKERS[i % len(MARKERS)], markersize=4.5, color=colour, label=name)
        axis.fill_between(grouped.mean().index, grouped.min(), grouped.max(), color=colour, alpha=0.18, lw=0)
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.set_ylim(0)
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    return figure


def spectra(frames: dict[str, pd.DataFrame], tolerance: float) -> Drawing:
    """Singular values over the largest, on a log scale: median over classes and layers, range as a band."""
    figure, axes = drawing(7.4, 3.6)
    axis, floor = axes[0, 0], 1e-18
    for i, (name, frame) in enumerate(frames.items()):
        grouped = frame.assign(value=frame["value"].clip(lower=floor)).groupby("position")["value"]
        colour = COLOURS[i % len(COLOURS)]
        marker = MARKERS[i % len(MARKERS)]
        axis.semilogy(grouped.median(), marker=marker, markersize=3.5, color=colour, label=name, linewidth=1.2)
        axis.fill_between(grouped.median().index, grouped.min(), grouped.max(), color=colour, alpha=0.13, lw=0)
    axis.axhline(tolerance, color=INK, linewidth=1, linestyle="--", label=f"tolerance {tolerance:g}")
    axis.set_xlabel("position among the singular values")
    axis.set_ylabel("singular value / largest")
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    return figure


def series(frame: pd.DataFrame, label: str, columns: int = 5) -> Drawing:
    """Fig. 5: one panel a layer: every function: mean and spread over classes; dashes: the start."""
    layers = sorted(frame["layer"].unique())
    rows = -(-len(layers) // columns)
    figure, axes = drawing(8, 1.35 * rows + 0.7, rows, columns, sharex=True, sharey=True)
    for axis, layer in zip(axes.flat, layers, strict=False):
        grouped = frame[frame["layer"] == layer].groupby("function")
        mean, sd = grouped["value"].mean(), grouped["value"].std().fillna(0)
        axis.plot(grouped["first"].first(), color=COLOURS[1], linestyle="--", linewidth=1.2)
        axis.plot(mean, color=COLOURS[0], marker="o", markersize=2.5, linewidth=1)
        axis.fill_between(mean.index, mean - sd, mean + sd, color=COLOURS[0], alpha=0.25, lw=0)
        axis.set_title(f"layer {layer}", fontsize=9, pad=2)
        axis.set_xticks([n for n in (1, 4, 7, 10) if n <= len(mean)])
    for above, axis in zip(list(axes.flat)[len(layers) - columns :], list(axes.flat)[len(layers) :], strict=False):
        axis.axis("off")
        above.tick_params(labelbottom=True)
    figure.supxlabel("function index", fontsize=10)
    figure.supylabel(label, fontsize=10)
    handles = [axes[0, 0].lines[0], axes[0, 0].lines[1]]
    figure.legend(handles, ["start", "learned: mean and spread over classes"], frameon=False, fontsize=9, ncols=2,
                  loc="outside upper right")  # fmt: skip
    return figure


def rate_grid(frame: pd.DataFrame) -> Drawing:
    """Held-out flow loss against Adam's rate, one line a method; the chosen rate is ringed."""
    figure, axes = drawing(6.0, 3.2)
    axis = axes[0, 0]
    for i, (method, part) in enumerate(frame.groupby("method", sort=False)):
        part = part.sort_values("rate")
        colour = COLOURS[i % len(COLOURS)]
        axis.plot(part["rate"], part["flow_loss"], marker=MARKERS[i], markersize=5, color=colour, label=method)
        least = part.loc[part["flow_loss"].idxmin()]
        axis.plot(least["rate"], least["flow_loss"], "o", markersize=12, markerfacecolor="none", color=colour)
    axis.set_xscale("log")
    axis.set_xticks(rates := sorted(frame["rate"].unique()), [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    axis.set_xlabel("Adam's rate for the adapters")
    axis.set_ylabel("held-out flow loss")
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    return figure


def cost_and_score(table: pd.DataFrame, measure: str, label: str) -> Drawing:
    """Parameters a class (log x) against a measure with its spread, one labelled point a row."""
    figure, axes = drawing(6.6, 3.8)
    axis = axes[0, 0]
    order = np.argsort(table["PPC"].to_numpy())
    for k, i in enumerate(order):
        line = table.iloc[i]
        sd = line.get(f"{measure} sd")
        yerr = None if sd is None or pd.isna(sd) else sd
        axis.errorbar(line["PPC"], line[measure], yerr=yerr, color=COLOURS[k % 6], marker="o", capsize=3)
        axis.annotate(
            table.index[i], (line["PPC"], line[measure]), textcoords="offset points", xytext=(6, 4), fontsize=8
        )
    axis.set_xscale("log")
    axis.margins(x=0.12)
    axis.set_xticks(ticks := sorted(set(table["PPC"])), [f"{n:,.0f}" for n in ticks], fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel("parameters per class")
    axis.set_ylabel(label)
    return figure
