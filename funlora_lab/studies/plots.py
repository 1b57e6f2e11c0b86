"""Data -> Drawing: what all figures are made of, in colours that colour-blind readers tell apart, also in grey."""

import io
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

INK, GREY, GRID = "#222222", "#666666", "#d9d9d9"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b47a00", "#2a8fcf", "#666666", "#000000")
MARKERS = "osD^v<>P"
DPI, LARGEST = 110, 40.0  # inches a side: at most 20 million pixels, whatever is drawn
CJK = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Micro Hei", "IPAGothic", "Hiragino Sans", "Microsoft YaHei")
FONTS = ["DejaVu Sans", *(font for font in CJK if font in fontManager.get_font_names())]  # for names in any script
LETTERS = 32  # of a line of a name; longer ones are shortened in their middle


class Drawing(Figure):
    """A figure that a notebook shows by itself, without pyplot. Whatever it says is text, never markup."""

    def draw(self, renderer) -> None:
        for axis in self.axes:
            axis.get_xticklabels(), axis.get_yticklabels()  # written now
        for text in self.findobj(Text):  # only the numbers of matplotlib's own ticks are formulas
            text.set_parse_math("\\mathdefault" in text.get_text())
            text.set_fontfamily(FONTS)
        super().draw(renderer)

    def png(self) -> bytes:
        """The figure as PNG with a palette of 256 colours: a third of the size, and nothing lost that one could see."""
        buffer, small = io.BytesIO(), io.BytesIO()
        self.savefig(buffer, format="png")
        Image.open(buffer).convert("RGB").quantize(256).save(small, format="png", optimize=True)
        return small.getvalue()

    def words(self) -> str:
        """What the figure shows, in its own words: the titles and labels of its axes, and its legend."""
        said = [text.get_text() for axis in self.axes for text in (axis.title, axis.xaxis.label, axis.yaxis.label)]
        said += [text.get_text() for legend in self.legends for text in legend.get_texts()]
        return "; ".join(dict.fromkeys(filter(None, (" ".join(words.split()) for words in said)))) or "a figure"

    def _repr_png_(self) -> tuple[bytes, dict]:
        return self.png(), {"alt": self.words()}


def short(name: object) -> str:
    """A name of at most ``LETTERS`` characters a line, its middle left out where it has more."""
    half, hidden = LETTERS // 2, "\u200b" * str(name).startswith("_")  # matplotlib hides what begins with a line
    lines = [n if len(n) <= LETTERS else f"{n[:half]}…{n[1 - half :]}" for n in str(name).split("\n")]
    return hidden + "\n".join(lines)


def named(axis: Axes, which: str, at: Sequence[float], names: Sequence, inches: float = np.inf, **look):
    """Names along the axis x or y at the positions ``at``, which take ``inches``: in smaller letters, or only some."""
    pitch = inches / max(1, len(names))
    some = slice(None, None, max(1, int(np.ceil(0.1 / pitch))))
    size = min(10.0, max(6.0, 60 * pitch))
    put = axis.set_xticks if which == "x" else axis.set_yticks
    put(at[some], [short(name) for name in names[some]], **{"fontsize": size} | look)


def room(names: Sequence) -> float:
    """Inches that names take beside an axis."""
    return 0.09 * max((len(short(name)) for name in names), default=0)


def drawing(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs) -> tuple[Drawing, np.ndarray]:
    """A drawing of that many inches and its axes (rows, columns), in the style all figures share."""
    figure = Drawing(figsize=(min(width, LARGEST), min(height, LARGEST)), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def chart(width: float, height: float, xlabel: str, ylabel: str) -> tuple[Drawing, Axes]:
    figure, axes = drawing(width, height)
    axes[0, 0].set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes[0, 0]


def style(i: int, size: float = 4.5, **more) -> dict:
    """Colour and marker of the i-th line of a figure, with further settings of matplotlib."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": size} | more


def legend(figure: Drawing, loc: str = "outside right upper", **more):
    """A legend beside the axes, where it covers no line; of the first panel, unless ``handles`` are given."""
    handles = more.pop("handles", None) or figure.axes[0].get_legend_handles_labels()[0]
    look = {"frameon": False, "fontsize": 9, "loc": loc} | more
    most = int(72 * figure.get_figheight() / (1.5 * look["fontsize"])) * look.get("ncols", 1)
    labels = [handle.get_label() for handle in handles[:most]]
    if len(handles) > most:
        labels[-1] = f"… and {len(handles) - most + 1} more"
    return figure.legend(handles[:most], labels, **look)


def bands(frames: dict[str, pd.DataFrame], x: str, y: str, labels: tuple[str, str], middle="mean", size=4.5) -> Drawing:
    """The mean (or median) of ``y`` against ``x`` with its range as a band, one line a frame; y starts at 0."""
    figure, axis = chart(7.4, 3.7, *labels)
    for i, (name, frame) in enumerate(frames.items()):
        line = frame.groupby(x)[y].agg(["min", middle, "max"])
        axis.plot(line[middle], label=name, **style(i, size))
        axis.fill_between(line.index, line["min"], line["max"], color=COLOURS[i % len(COLOURS)], alpha=0.16, lw=0)
    axis.set_ylim(0)
    legend(figure)
    return figure


def dots(table: pd.DataFrame, panels: dict[str, str], marked: str = "funlora") -> Drawing:
    """Rows of a summary on y, one panel a measure (``panels``: measure -> label), mean with standard deviation.

    The row ``marked``, if there is one, stands out.
    """
    rows, own = np.arange(len(table)), table.index == marked
    size = 1.4 + room(table.index) + 2.4 * len(panels), 0.29 * len(rows) + 1.1
    figure, axes = drawing(*size, 1, len(panels), sharey=True)
    for axis, (measure, label) in zip(axes[0], panels.items(), strict=True):
        for i, some in enumerate((~own, own)):
            part, spread = table[some], f"{measure} sd" if f"{measure} sd" in table else None
            axis.errorbar(part[measure], rows[some], xerr=spread and part[spread], capsize=3, ls="none", **style(i, 5))
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=3)
    named(axes[0, 0], "y", rows, table.index, min(0.29 * len(rows), LARGEST))
    axes[0, 0].set(ylim=(len(rows) - 0.5, -0.5))
    for label in axes[0, 0].get_yticklabels():
        if label.get_text() == short(marked):
            label.set(fontweight="bold", color=COLOURS[1])
    return figure


def heatmaps(
    tables: dict[str, pd.DataFrame], width: float, height: float, form="{:.2f}", least=-np.inf, unit="", **scale
):
    """(figure, axes): tables by title, with the numbers from ``least`` up written in; ``scale``: vmin, vmax of all.

    ``unit`` is what the numbers count: with it the scale of colours stands beside every table, or once for all.
    """
    columns = sum(table.shape[1] for table in tables.values())
    figure, axes = drawing(width, height, 1, len(tables), width_ratios=[table.shape[1] for table in tables.values()])
    for axis, (title, table) in zip(axes[0], tables.items(), strict=True):
        values = table.to_numpy(float)
        image = axis.imshow(values, cmap="Blues", aspect="auto", **scale)
        axis.grid(False)
        axis.set_title(title, fontsize=10)
        inches = min(width, LARGEST) - 1.5, min(height, LARGEST) - 1.0
        named(axis, "x", range(table.shape[1]), table.columns, inches[0] * table.shape[1] / columns)
        named(axis, "y", range(len(table)), table.index, inches[1])
        for (i, j), value in np.ndenumerate(values):
            if value >= least:
                colour = "white" if image.norm(value) > 0.6 else INK
                axis.text(j, i, form.format(value), ha="center", va="center", fontsize=7, color=colour)
        if unit and (not scale or axis is axes[0, -1]):
            beside = list(axes[0]) if scale else axis
            figure.colorbar(image, ax=beside, label=unit, pad=0.02).outline.set_visible(False)
    return figure, axes[0]


def tile(images: Tensor, columns: int) -> np.ndarray:
    """uint8 images (N, C, H, W) laid out row by row with white gaps of a pixel -> (height, width, C) array of bytes."""
    padded = torch.nn.functional.pad(images, (0, 1, 0, 1, 0, 0, 0, -len(images) % columns), value=255)
    sheet = padded.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # (rows, H + 1, columns, W + 1, C)
    return sheet.flatten(2, 3).flatten(0, 1)[:-1, :-1].numpy()


def show_images(axis: Axes, images: Tensor, columns: int, rows: Sequence[str], **text) -> None:
    """``tile`` of images on an axis that says nothing but the names of the rows."""
    axis.imshow(tile(images, columns).squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.grid(False)
    axis.spines[:].set_visible(False)
    H = images.shape[2]
    inches = axis.figure.get_figheight() * 0.9 / axis.get_subplotspec().get_gridspec().nrows
    named(axis, "y", [i * (H + 1) + (H - 1) / 2 for i in range(len(rows))], rows, inches, **text)
    axis.set_xticks([])
    axis.tick_params(length=0)


def sample_columns(columns: list[tuple[str, dict[int, Tensor]]], order: list[int], names: Sequence[str]) -> Drawing:
    """A row a class, a column a title and uint8 images (n, C, H, W) by class; a class that a column lacks is blank."""
    counts = [len(next(iter(images.values()))) for _, images in columns]
    C, H, W = next(iter(columns[0][1].values())).shape[1:]
    scale = min(0.34, 11 / sum(counts))  # inches an image
    shown_names = [names[cls] for cls in order]
    size = scale * sum(counts) + 0.25 * len(columns) + 0.3 + room(shown_names), scale * len(order) * H / W + 0.6
    figure, axes = drawing(*size, 1, len(columns), width_ratios=counts)
    for axis, (title, images), count in zip(axes[0], columns, counts, strict=True):
        blank = torch.full((count, C, H, W), 255, dtype=torch.uint8)
        shown = torch.cat([images.get(cls, blank)[:count] for cls in order])
        show_images(axis, shown, count, shown_names if axis is axes[0, 0] else ())
        axis.set_title(title, color=INK, fontsize=10)
    return figure


def training_curves(losses: dict[str, tuple[Sequence[float], Sequence[float]]], title: str) -> Drawing:
    """Losses against images seen, one line a name: ``losses[name] = (images, loss)``."""
    figure, axis = chart(6.4, 3.2, "images seen", "flow-matching loss")
    for i, (name, (images, loss)) in enumerate(losses.items()):
        axis.plot(
            images, loss, "--" if i // len(COLOURS) % 2 else "-", label=short(name), color=COLOURS[i % len(COLOURS)]
        )
    axis.set_title(title, fontsize=11)
    if len(losses) > 1:
        legend(figure, fontsize=8)
    return figure


def accuracy_per_task(panels: dict[str, dict[str, Sequence[float | None]]]) -> Drawing:
    """A_k of Eq. 22 against the task number: a panel a title, a line a name; a task not scored has None and no mark."""
    figure, axes = drawing(3.4 + 3.5 * len(panels), 3.6, 1, len(panels), sharey=True)
    for axis, (title, averages) in zip(axes[0], panels.items(), strict=True):
        for i, (name, values) in enumerate(averages.items()):
            look = style(i, 4, label=short(name), linestyle=("-", "--")[i % 2])  # two that coincide are both seen
            axis.plot(range(1, len(values) + 1), np.array(values, float), **look)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set(xlabel="task", ylim=(0, 1.02))
        axis.set_title(title, fontsize=10)
    axes[0, 0].set_ylabel("accuracy over classes seen")
    legend(figure, "outside right center")
    return figure


def distance_per_task(averages: dict[str, Sequence[float | None]], bound: str) -> Drawing:
    """How many points each name's A_k of Eq. 22 lies below that of ``bound``, by task; above 1 on a log scale.

    Accuracies that coincide at the top of a scale from 0 to 1 are told apart here.
    """
    figure, axis = chart(7.4, 3.7, "task", f"points below {bound}")
    best = 100 * np.array(averages[bound], float)
    axis.axhline(0, color=GREY, linewidth=1)
    for i, (name, values) in enumerate((name, values) for name, values in averages.items() if name != bound):
        below = best - 100 * np.array(values, float)
        axis.plot(range(1, len(below) + 1), below, **style(i, 5, label=name))
    axis.set_yscale("symlog", linthresh=1, linscale=0.6)
    ticks = [-10, -1, 0, 1, 2, 5, 10, 20, 50, 100]
    low, high = axis.get_ylim()
    axis.set_yticks([tick for tick in ticks if low <= tick <= high], minor=False)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set(xticks=range(1, len(best) + 1), xmargin=0.08)
    axis.invert_yaxis()
    legend(figure)
    figure.draw_without_rendering()  # now the ends of lines have their places
    free, last = np.inf, [line.get_xydata()[-1] for line in axis.lines[1:]]
    for point in sorted(last, key=lambda point: point[1]):  # from above; numbers of close lines stand below each other
        height = axis.transData.transform(point)[1] * 72 / DPI
        free = min(free - 10, height)
        axis.annotate(f"{point[1]:.1f}", point, (7, free - height - 3), textcoords="offset points", fontsize=8)
    return figure


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Drawing:
    """Confusion matrix in images: rows are true classes, columns what the classifier said; colours show the errors."""
    counts, size = pd.DataFrame(np.asarray(counts, float), names, names), min(max(1.4, 0.42 * len(names)), 24)
    beside = room(names)
    errors = counts.mask(np.eye(len(names), dtype=bool))
    least = 0.5 if len(names) <= 20 else np.inf
    most = max(1.0, errors.max(axis=None))
    figure, (axis,) = heatmaps(
        {"": errors}, size + beside + 2.3, size + beside + 1.1, "{:.0f}", least, "images", vmin=0, vmax=most
    )
    for i, count in enumerate(np.diag(counts) if least < np.inf else ()):
        axis.text(i, i, f"{count:.0f}", ha="center", va="center", fontsize=7, color=GREY)
    axis.set(xlabel="classifier's answer", ylabel="true class", facecolor=GRID)
    figure.axes[-1].locator_params(axis="y", integer=True)
    if max(map(len, map(str, names))) > 2:
        for label in axis.get_xticklabels():
            label.set(rotation=60, ha="right", rotation_mode="anchor")
    return figure
