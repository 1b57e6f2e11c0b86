"""Figures of the sampling budget, of image quality and of the growth of cost: data in, Drawing out."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.lines import Line2D
from torch import Tensor

from funlora_lab.studies.plots import COLOURS, INK, MARKERS, Drawing, drawing, tile


def budget_lines(table: pd.DataFrame, value: str, title: str, floor: float | None = None) -> Drawing:
    """``value`` against evaluations an image, one panel a number of images, one line a solver."""
    numbers = sorted(table["images"].unique())
    figure, axes = drawing(2.6 * len(numbers) + 1.9, 3.1, 1, len(numbers), sharey=True)
    for axis, n in zip(axes[0], numbers, strict=True):
        for i, (solver, part) in enumerate(table[table["images"] == n].groupby("solver", sort=False)):
            part = part.sort_values("evaluations")
            spread = part["spread"].fillna(0) if value == "LA" else None
            axis.errorbar(part["evaluations"], part[value], spread, label=solver, color=COLOURS[i % len(COLOURS)],
                          marker=MARKERS[i % len(MARKERS)], markersize=4, capsize=2, linewidth=1.2)  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.set_title(f"{n} images a class", fontsize=10)
        axis.set_xlabel("evaluations an image")
        if floor is not None:
            axis.axhline(floor, color="#666666", linewidth=0.9, linestyle=":")
    axes[0, 0].set_ylabel(value)
    figure.legend(*axes[0, -1].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    figure.suptitle(title, fontsize=11)
    return figure


def budget_tables(ours: pd.DataFrame, theirs: pd.DataFrame) -> Drawing:
    """Two heatmaps of LA in per cent: Table VII as published, and ours; rows images, columns the sampler."""
    figure, axes = drawing(
        12, 0.34 * max(len(ours), len(theirs)) + 1.9, 1, 2, width_ratios=[len(theirs.columns), len(ours.columns)]
    )
    for axis, table, title in ((axes[0, 0], theirs, "paper, CIFAR100, RK4"), (axes[0, 1], ours, "ours")):
        heat(
            axis,
            100 * table.to_numpy(),
            [str(name) for name in table.columns],
            [str(name) for name in table.index],
            "{:.1f}",
        )
        axis.set_title(title, fontsize=10)
    return figure


def heat(axis, values: np.ndarray, columns: Sequence[str], rows: Sequence[str], form: str = "{:.2f}", **scale) -> None:
    """Values as a heatmap with the numbers written in; nan stays blank."""
    low, high = scale.get("vmin", np.nanmin(values)), scale.get("vmax", np.nanmax(values))
    axis.imshow(values, cmap="Blues", aspect="auto", vmin=low, vmax=high)
    axis.grid(False)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = value > low + 0.6 * (high - low)
            axis.text(j, i, form.format(value), ha="center", va="center", fontsize=7, color="white" if dark else INK)


def pareto_front(table: pd.DataFrame, front: pd.DataFrame, cost: str, gain: str, xlabel: str) -> Drawing:
    """Every cell as a point, colour by solver and size by images; the front as a line, its settings numbered."""
    figure, axes = drawing(9.2, 4)
    axis = axes[0, 0]
    for i, (solver, part) in enumerate(table.groupby("solver", sort=False)):
        size = 14 + 110 * part["images"] / table["images"].max()
        axis.scatter(
            part[cost], part[gain], size, color=COLOURS[i % len(COLOURS)], alpha=0.75, label=solver, linewidth=0
        )
    axis.plot(front[cost], front[gain], color=INK, linewidth=0.9, drawstyle="steps-post")
    settings = []
    for i, row in enumerate(front.to_dict("records"), 1):
        axis.annotate(str(i), (row[cost], row[gain]), (0, 8), textcoords="offset points", ha="center", fontsize=8)
        label = f"{row['solver']} {row['setting']}, {row['images']} images"
        settings.append(Line2D([], [], marker=f"${i}$", color=INK, linestyle="none", markersize=5, label=label))
    figure.legend(handles=settings, frameon=False, fontsize=8, loc="outside right upper", title="front")
    axis.set_xscale("log")
    axis.set_xlabel(xlabel)
    axis.set_ylabel(gain)
    legend = figure.legend(frameon=False, fontsize=8, loc="outside right lower", title="solver")
    for handle in legend.legend_handles:
        handle.set_sizes([36])
    return figure


def quality_bars(tables: dict[str, pd.DataFrame], measures: Sequence[str]) -> Drawing:
    """A panel a measure, a group of classes a line: one point with its interval a source, real halves as the floor."""
    groups = list(dict.fromkeys(next(iter(tables.values()))["group"]))
    figure, axes = drawing(3.0 * len(measures) + 0.9, 0.3 * len(groups) + 1.3, 1, len(measures), sharey=True)
    first = next(iter(tables.values()))
    sources = {name: table[table["of"] == "samples"] for name, table in tables.items()}
    sources = {"other real images": first[first["of"] == "real"]} | sources
    shifts = np.linspace(-0.28, 0.28, len(sources))
    for axis, measure in zip(axes[0], measures, strict=True):
        for i, (name, table) in enumerate(sources.items()):
            part = table[table["measure"] == measure].set_index("group").loc[groups]
            reach = np.abs(np.stack([part["value"] - part["low"], part["high"] - part["value"]]))
            axis.errorbar(part["value"], np.arange(len(groups)) + shifts[i], xerr=reach, label=name, linestyle="none",
                          color="#666666" if i == 0 else COLOURS[i - 1], marker=MARKERS[i], markersize=4)  # fmt: skip
        axis.set_yticks(range(len(groups)), groups)
        axis.set_title(measure, fontsize=10)
        axis.locator_params(axis="x", nbins=4)
    axes[0, 0].invert_yaxis()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=len(sources), loc="outside lower center")
    return figure


def neighbours(rows: Sequence[tuple[str, Tensor, Tensor, Sequence[float]]]) -> Drawing:
    """A line a class: samples (top) above their nearest training images (bottom), with the distance in grey levels."""
    count, (H, W) = len(rows[0][1]), rows[0][1].shape[2:]
    figure, axes = drawing(0.46 * count + 1.2, 1.16 * len(rows) * H / W + 0.3, len(rows), 1)
    for (name, drawn, real, distance), axis in zip(rows, axes[:, 0], strict=True):
        sheet = tile(torch.cat([drawn, real]), count)
        axis.imshow(sheet.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.set_yticks([(H - 1) / 2, H + 1 + (H - 1) / 2], [f"{name}: sample", "nearest"], fontsize=7)
        axis.set_xticks([i * (W + 1) + (W - 1) / 2 for i in range(count)], [f"{d:.0f}" for d in distance], fontsize=7)
        axis.tick_params(length=0)
    return figure


def cost_growth(costs: dict[str, pd.DataFrame]) -> Drawing:
    """Seconds of every task stacked by kind of work, and images trained on; one group of bars a method."""
    figure, axes = drawing(9.6, 3.3, 1, 2)
    left, right = axes[0]
    width = 0.8 / len(costs)
    for i, (name, table) in enumerate(costs.items()):
        place = table["task"] + (i - (len(costs) - 1) / 2) * width
        bottom = np.zeros(len(table))
        for kind, shade in (("train", 1.0), ("sample", 0.6), ("classify", 0.3)):
            left.bar(place, table[kind], 0.92 * width, bottom, color=COLOURS[i], alpha=shade, label=f"{name}: {kind}")
            bottom += table[kind].to_numpy()
        right.bar(place, table["images"] / 1000, 0.92 * width, color=COLOURS[i], label=name)
    left.set_ylabel("seconds of the task")
    right.set_ylabel("images trained on, thousands")
    for axis in (left, right):
        axis.set_xticks(list(next(iter(costs.values()))["task"]))
        axis.set_xlabel("task")
        axis.set_ylim(top=1.4 * axis.get_ylim()[1])
        axis.legend(frameon=False, fontsize=7.5, loc="upper left", ncols=len(costs))
    return figure


def recognition_maps(tables: dict[str, pd.DataFrame]) -> Drawing:
    """A heatmap a method: recognition of every class (rows) after every task (columns), blank before it is learned."""
    first = next(iter(tables.values()))
    figure, axes = drawing(3.2 * len(tables) + 0.6, 0.29 * len(first) + 1.1, 1, len(tables), sharey=True)
    least = min(table.min(axis=None) for table in tables.values())
    for axis, (name, table) in zip(axes[0], tables.items(), strict=True):
        heat(axis, table.to_numpy(float), table.columns.astype(str), table.index.astype(str), vmin=least, vmax=1)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("after task")
    axes[0, 0].set_ylabel("class")
    return figure


def decay_lines(tables: dict[str, pd.DataFrame], measure: str) -> Drawing:
    """A measure of the classes of task 1 after every task, one line a method; other real images as the floor."""
    figure, axes = drawing(6.4, 3.2)
    axis = axes[0, 0]
    for i, (name, table) in enumerate(tables.items()):
        part = table[(table["measure"] == measure) & (table["of"] == "samples")]
        reach = np.abs(np.stack([part["value"] - part["low"], part["high"] - part["value"]]))
        axis.errorbar(part["task"], part["value"], reach, marker=MARKERS[i], color=COLOURS[i], capsize=3, label=name)
    floor = table[(table["measure"] == measure) & (table["of"] == "real")]
    axis.plot(floor["task"], floor["value"], color="#666666", linestyle=":", label="other real images")
    axis.set_xticks(list(floor["task"]))
    axis.set_xlabel("after task")
    axis.set_ylabel(f"{measure} distance, classes of task 1")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)
    return figure
