"""What an adapter does to a layer: F and its rank, and what classes learned, as tables and as colours over the U-Net.

Letters: O = Cout, I = Cin, p functions, r ratio. A layer is given by its index among all convolutions, as in Fig. 3.
"""

from collections import namedtuple
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from funlora_lab.adapters import METHODS, Row, Settings, numbers_by_layer
from funlora_lab.continual import OpenRun
from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment
from funlora_lab.presets import preset
from funlora_lab.seeds import stream
from funlora_lab.studies import plots, rank
from funlora_lab.systems import meta_unet
from funlora_lab.unet import conv_layers, part_of
from funlora_lab.unet.layers import DoublingConv2d
from funlora_lab.workbench import markup
from funlora_lab.workbench.markup import BLUE, GREY, ORANGE, Markup, element, svg_box, svg_image, svg_text

# A (O,), B (I,), F (O, I), its singular values, how many of them count (numerical_rank), and the bound of its formula
FunctionView = namedtuple("FunctionView", "method A B F singular rank bound")


def settings_of(method: str, p: int = 10, ratio: int = 1, start: str = "identity") -> Settings:
    """What a method with an F is handed; beside these as in the preset digits."""
    return METHODS[method].settings_of(preset("digits").but(method=method, functions=p, ratio=ratio, start=start))


def first_numbers(method: str, outputs: int, inputs: int, p: int = 10, ratio: int = 1, start: str = "identity") -> Row:
    """One layer's numbers as training starts them: A (O/r,), B (I/r,), those of the functions (p,)."""
    settings = settings_of(method, p, ratio, start)
    return METHODS[method].start(nn.Conv2d(inputs, outputs, 1, device="meta"), settings, None)


def spread(numbers: Row, amount: float, seed: int = 0) -> Row:
    """The same numbers with A and B moved from where they are by normal noise of standard deviation ``amount``."""
    noise = {name: torch.randn(numbers[name].shape, generator=stream(seed, "workbench", name)) for name in "AB"}
    return numbers | {name: numbers[name] + amount * noise[name] for name in "AB"}


def function_numbers(numbers: Row) -> Row:
    """The numbers of the functions of F: ponderation, frequency, exponent or those of a function of the user's own."""
    return {name: value for name, value in numbers.items() if name[0] not in "AB" and not name.startswith("G.")}


def function_view(method: str, numbers: Row, settings: Settings | None = None) -> FunctionView:
    """F of Eq. 8 for one layer's numbers, with its spectrum, in float64; LabError for a method without an F."""
    if METHODS[method].matrix is None:
        raise LabError(f"The method {method} has no F: choose another measure.")
    settings = settings or settings_of(method, len(numbers.get("ponderation", [1])))
    F = METHODS[method].matrix({name: value[None].double() for name, value in numbers.items()}, settings)[0]
    A, B = (numbers[side].repeat_interleave(settings.ratio) for side in "AB")
    bound, count = METHODS[method].bound(settings, *F.shape), int(rank.numerical_rank(F))
    return FunctionView(method, A, B, F, rank.singular_values(F), count, bound)


def around_one(values: Tensor) -> np.ndarray:
    """Colours of numbers (H, W) on a scale that is white at 1 and as wide as the furthest of them."""
    reach = max(float((values - 1).abs().max()), 1e-6)
    return markup.coloured(values.numpy(), 1 - reach, 1 + reach)


def function_picture(view: FunctionView) -> Markup:
    """A beside B above F = f(A, B), each white where it is 1, and F's singular values on a logarithmic scale."""
    (O, I), side, left, top, bar, chart = view.F.shape, 230, 34, 44, 14, 330
    height, width, x = side * O / max(O, I), side * I / max(O, I), left + bar + 6
    right, floor, step, bars = x + side + 74, 9.0, chart / len(view.singular), []  # down to 1e-9 of the largest value
    for i, value in enumerate(view.singular.tolist()):
        share = 1 + np.log10(max(value / max(float(view.singular[0]), 1e-300), 10**-floor)) / floor
        colour, words = BLUE if i < view.rank else GREY, f"singular value {i + 1}: {value:.3g}"
        y, tall = top + side * (1 - share), max(side * share, 1)
        bars.append(svg_box(right + i * step, y, max(step - 1, 1), tall, colour, words))
    line = top - side * np.log10(rank.TOLERANCE) / floor
    span = f"F, {O} × {I}: {view.F.min():.2f} to {view.F.max():.2f}, mean {view.F.mean():.2f}"
    parts = [
        svg_text(left - 10, top + height / 2 + 4, "A", "end", 14, "bold"),
        svg_image(left, top, bar, height, around_one(view.A[:, None])),
        svg_text(x + width / 2, top - bar - 12, "B", "middle", 14, "bold"),
        svg_image(x, top - bar - 6, width, bar, around_one(view.B[None])),
        svg_image(x, top, width, height, around_one(view.F)),
        svg_text(x + width / 2, top + height + 18, span, "middle"),
        *bars,
        element("line", x1=right, x2=right + chart, y1=line, y2=line, stroke=ORANGE, stroke_dasharray="5 4"),
        svg_text(right + chart, line - 5, f"counted above this line: {rank.TOLERANCE:.0e} of the largest", "end", 11),
        svg_text(right - 6, top + 10, "1", "end", 11),
        svg_text(right - 6, top + side, "1e-9", "end", 11),
        svg_text(right, top + side + 18, f"the {len(view.singular)} singular values of F, relative to the largest"),
        svg_text(right, 22, f"rank {view.rank}", size=20, weight="bold"),
        svg_text(right + 90, 22, f"of at most {view.bound} by its formula ({view.method})"),
    ]
    return markup.svg(right + chart + 10, top + side + 28, parts, f"{view.method}: rank {view.rank}")


class AdaptedLayers:
    """The convolutions that a run adapts, ``names`` by index, and what classes learned there; LabError without any."""

    def __init__(self, run: OpenRun):
        self.run, self.method, self.names = run, run.adapters.method if run.generator.frozen else None, {}
        if run.generator.frozen and run.generator.rows:
            self.names = {i: name for i, name in enumerate(conv_layers(run.network)) if name in run.adapters.layers}
        if not self.names:
            raise LabError(f"The method {run.experiment.method} adapts no convolutions in this run: choose another.")

    def name_of(self, layer: int) -> str:
        if layer not in self.names:
            raise LabError(f"Layer {layer} is not adapted: accepted is one of {', '.join(map(str, self.names))}.")
        return self.names[layer]

    def numbers(self, cls: int, layer: int) -> Row:
        """What class ``cls`` learned for a layer, in float64 on the CPU."""
        numbers = numbers_by_layer(self.run.row(cls))[self.name_of(layer)]
        return {name: value.double() for name, value in numbers.items()}

    def view(self, cls: int, layer: int) -> FunctionView:
        return function_view(self.method.name, self.numbers(cls, layer), self.run.adapters.settings[self.names[layer]])

    def importance(self, cls: int, layer: int) -> float:
        """Eq. 20."""
        numbers = self.numbers(cls, layer)
        if not {"A", "B"} <= numbers.keys():
            raise LabError(f"The method {self.method.name} has no A and B: choose another measure.")
        return rank.importance(numbers["A"], numbers["B"])

    def change(self, cls: int, layer: int) -> float:
        """mean |W - W0| / mean |W0| of the weights W of a class."""
        if self.method.weight is None:
            raise LabError(f"The method {self.method.name} changes no weights but inputs: choose another measure.")
        name = self.name_of(layer)
        W0, settings = self.run.adapters.layers[name].weight, self.run.adapters.settings[name]
        W = self.method.weight(W0, {key: v.to(W0)[None] for key, v in self.numbers(cls, layer).items()}, settings)[0]
        return ((W - W0).abs().mean() / W0.abs().mean()).item()

    @torch.no_grad()
    def values(self, measure: str) -> pd.DataFrame:
        """One line a class that learned a row, one column an adapted layer (its index), of one of ``MEASURES``."""
        if measure not in MEASURES:
            raise LabError(f"measure={measure}: accepted is {', '.join(MEASURES)}.")
        known, value = self.run.known, MEASURES[measure]
        values = {known[cls]: [value(self, cls, layer) for layer in self.names] for cls in self.run.generator.rows}
        return pd.DataFrame.from_dict(values, orient="index", columns=list(self.names)).rename_axis("class")

    def table(self, layer: int) -> pd.DataFrame:
        """One line a class: rank of F, share of the largest singular value, means of what it learned for a layer."""
        lines, known = {}, self.run.known
        for cls in self.run.generator.rows:
            numbers = self.numbers(cls, layer)
            line = lines[known[cls]] = {"numbers": sum(value.numel() for value in numbers.values())}
            if {"A", "B"} <= numbers.keys():
                line["importance"] = self.importance(cls, layer)
            if self.method.matrix:
                view = self.view(cls, layer)
                share, mean = (view.singular[0] / view.singular.sum()).item(), view.F.mean().item()
                line |= {"rank": view.rank, "bound": view.bound, "first singular value, share": share, "mean F": mean}
            line |= {f"mean |{name}|": value.abs().mean().item() for name, value in function_numbers(numbers).items()}
        return pd.DataFrame.from_dict(lines, orient="index").rename_axis("class")

    def spectra(self, layer: int, classes: Sequence[int]) -> plots.Drawing:
        """What classes learned for a layer: ponderations, frequencies or exponents, and the singular values of F."""
        figure, axes = plots.drawing(9.6, 2.9, 1, 3)
        ponderation, frequency, spectrum = axes[0]
        for i, cls in enumerate(classes if self.method.matrix else ()):
            style = {
                "color": plots.COLOURS[i % len(plots.COLOURS)],
                "label": plots.short(self.run.known[cls]),
                "markersize": 3,
            }
            singular = self.view(cls, layer).singular
            spectrum.semilogy(range(1, len(singular) + 1), singular.clamp_min(1e-12), "-", **style)
            for name, values in function_numbers(self.numbers(cls, layer)).items():
                axis = ponderation if name == "ponderation" else frequency
                axis.plot(range(1, len(values) + 1), values, "o-", **style)
        ponderation.set(title="ponderations", xlabel="function")
        frequency.set(title="frequencies or exponents", xlabel="function")
        spectrum.set(title="singular values of F", xlabel="number")
        if spectrum.lines:
            spectrum.legend(frameon=False, fontsize=7, ncols=2, title="class", title_fontsize=7)
        return figure

    def heatmap(self, measure: str, cls: str = "", chosen: int | None = None) -> Markup:
        """``unet_picture`` of the run: the mean over classes of a measure, or one class (by name)."""
        frame = self.values(measure)
        values = (frame.loc[cls] if cls else frame.mean()).to_dict()
        title = f"{measure}, {f'class {cls}' if cls else 'mean over the classes after task 1'}"
        return unet_picture(unet_layers(self.run.experiment), values, title, chosen)


# name -> function of adapted layers, class and layer
MEASURES = {"change of the weights": AdaptedLayers.change, "importance (Eq. 20)": AdaptedLayers.importance}
MEASURES["rank of F"] = lambda adapted, cls, layer: adapted.view(cls, layer).rank


def unet_layers(experiment: Experiment) -> pd.DataFrame:
    """One line a convolution, in module order; ``size`` is the pixels a side of its output."""
    size, lines = experiment.image_size, []
    for name, layer in conv_layers(meta_unet(experiment)).items():
        size = 2 * size if isinstance(layer, DoublingConv2d) else size // layer.stride[0]
        lines.append((name, part_of(name), layer.in_channels, layer.out_channels, layer.kernel_size[0], size))
    return pd.DataFrame(lines, columns=["name", "part", "inputs", "outputs", "kernel", "size"])


def unet_picture(layers: pd.DataFrame, values: dict[int, float], title: str, chosen: int | None = None) -> Markup:
    """Convolutions from left to right as they run, lower the coarser they work, coloured by a value or not adapted."""
    sizes = sorted(set(layers["size"]), reverse=True)
    wide, drop, top, left = max(16.0, min(30.0, 900 / len(layers))), 62, 46, 40
    low, high = min(values.values()), max(values.values())
    parts = [svg_text(left, 18, title, size=13, weight="bold")]
    for part in ("encoder", "middle", "decoder"):
        inside = layers.index[layers["part"] == part]
        parts.append(svg_text(left + (inside[0] + inside[-1] + 1) / 2 * wide, 36, part, "middle", 11))
    for level, size in enumerate(sizes):
        xs, y = left + (layers.index[layers["size"] == size] + 0.5) * wide, top + level * drop + 16
        parts.append(svg_text(left - 8, y + 4, f"{size}²", "end", 11))
        parts.append(element("line", x1=xs[0], x2=xs[-1], y1=y, y2=y, stroke=GREY, stroke_dasharray="2 4"))
    for i, name, _, inputs, outputs, kernel, size in layers.itertuples():
        x, y, small = left + i * wide, top + sizes.index(size) * drop, 6 if kernel == 1 else 0
        colour, shown, edge = "#9a9a9a", "not adapted", ORANGE if i == chosen else "none"
        if i in values:
            colour = "#" + markup.coloured(np.array([[values[i]]]), low, high, "viridis").tobytes().hex()
            shown = f"{values[i]:.3g}"
        words = f"{i}: {name}, {inputs} → {outputs} channels, {kernel} × {kernel}, {shown}"
        parts.append(svg_box(x + 1, y + small, wide - 3, 32 - 2 * small, colour, words, edge))
        if wide >= 20 or i % 5 == 0 or i == chosen:
            parts.append(svg_text(x + wide / 2 - 0.5, y + 46, str(i), "middle", 10))
    bottom, ramp = top + len(sizes) * drop + 8, markup.coloured(np.linspace(low, high, 64)[None], low, high, "viridis")
    parts.append(svg_image(left, bottom, 160, 10, ramp))
    parts.append(svg_text(left + 168, bottom + 10, f"{low:.3g} to {high:.3g}; grey: not adapted", size=11))
    return markup.svg(left + len(layers) * wide + 10, bottom + 18, parts, title)
