"""Data -> Drawing (a matplotlib Figure), one function a figure; nothing here reads files or trains.

Colours are told apart by colour-blind readers and in grey; every figure is legible at the size a notebook shows it.
"""

import io
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

INK, GRID = "#222222", "#d9d9d9"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#000000")
MARKERS = "osD^v<>P"


class Drawing(Figure):
    """A figure that a notebook shows by itself: without pyplot nobody else tells it how."""

    def _repr_png_(self) -> bytes:
        return self.png()

    def png(self) -> bytes:
        """The figure as PNG with a palette of 256 colours: a third of the size, and nothing lost that one could see."""
        buffer, small = io.BytesIO(), io.BytesIO()
        self.savefig(buffer, format="png")
        Image.open(buffer).convert("RGB").quantize(256).save(small, format="png", optimize=True)
        return small.getvalue()


def drawing(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs) -> tuple[Drawing, np.ndarray]:
    """A drawing of that many inches and its axes (rows, columns), in the style all figures share."""
    figure = Drawing(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def tile(images: Tensor, columns: int, gap: int = 1) -> np.ndarray:
    """uint8 images (N, C, H, W) laid out row by row with white gaps -> (height, width, C) array of bytes."""
    N, C, H, W = images.shape
    rows = -(-N // columns)
    sheet = np.full((rows * (H + gap) - gap, columns * (W + gap) - gap, C), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = (i // columns) * (H + gap), (i % columns) * (W + gap)
        sheet[top : top + H, left : left + W] = image
    return sheet


def sample_columns(
    columns: Sequence[tuple[str, dict[int, Tensor]]], order: Sequence[int], names: Sequence[str]
) -> Drawing:
    """A row a class, a column a source (real images, samples after task k, ...), some images of each side by side.

    ``columns`` pairs a title with images by class, uint8 (n, C, H, W) with the same n in a column; a class that a
    column lacks stays blank.
    """
    counts = [len(next(iter(images.values()))) for _, images in columns]
    C, H, W = next(iter(columns[0][1].values())).shape[1:]
    scale = min(0.34, 11 / sum(counts))  # inches an image
    figure, axes = drawing(
        scale * sum(counts) + 0.25 * len(columns) + 0.8,
        scale * len(order) * H / W + 0.5,
        1,
        len(columns),
        width_ratios=counts,
    )
    for k, (axis, (title, images), count) in enumerate(zip(axes[0], columns, counts, strict=True)):
        blank = torch.full((count, C, H, W), 255, dtype=torch.uint8)
        sheet = tile(torch.cat([images[cls][:count] if cls in images else blank for cls in order]), count)
        axis.imshow(sheet.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.set_title(title, color=INK, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([i * (H + 1) + (H - 1) / 2 for i in range(len(order))] if k == 0 else [])
        if k == 0:
            axis.set_yticklabels([names[cls] for cls in order])
            axis.tick_params(length=0)
    return figure


def training_curves(losses: dict[str, tuple[Sequence[float], Sequence[float]]], title: str) -> Drawing:
    """Losses against images seen, one line a name: ``losses[name] = (images, loss)``."""
    figure, axes = drawing(6.4, 3.2)
    axis = axes[0, 0]
    for i, (name, (images, loss)) in enumerate(losses.items()):
        dashed = (i // len(COLOURS)) % 2
        axis.plot(images, loss, label=name, color=COLOURS[i % len(COLOURS)], linestyle="--" if dashed else "-")
    axis.set_xlabel("images seen")
    axis.set_ylabel("flow-matching loss")
    axis.set_title(title, fontsize=11)
    if len(losses) > 1:
        figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def accuracy_per_task(curves: dict[str, Sequence[float]]) -> Drawing:
    """A_k of Eq. 22 against the task number, one line a method, labelled at its end."""
    figure, axes = drawing(6.8, 3.6)
    axis = axes[0, 0]
    for i, (name, values) in enumerate(curves.items()):
        tasks = range(1, len(values) + 1)
        axis.plot(
            tasks, values, marker=MARKERS[i % len(MARKERS)], markersize=4, color=COLOURS[i % len(COLOURS)], label=name
        )
    axis.set_xticks(range(1, max(map(len, curves.values())) + 1))
    axis.set_xlabel("task")
    axis.set_ylabel("accuracy over classes seen")
    axis.set_ylim(0, 1.02)
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Drawing:
    """Confusion matrix: rows are true classes, columns what the classifier said, in per cent of the row."""
    counts = np.asarray(counts, float)
    share = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    figure, axes = drawing(0.42 * len(names) + 1.8, 0.42 * len(names) + 1.2)
    axis = axes[0, 0]
    axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axis.grid(False)
    axis.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 3 else 60)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("classifier's answer")
    axis.set_ylabel("true class")
    if len(names) <= 20:
        for (i, j), value in np.ndenumerate(share):
            if value >= 0.5:
                axis.text(
                    j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value > 50 else INK
                )
    return figure
