"""What an adapter does to a layer: F and its rank, and what classes learned, as tables and as colours over the U-Net.

Letters: O = Cout, I = Cin, p functions, r ratio. A layer is given by its index among all convolutions, as in Fig. 3.
"""

import threading
from collections import namedtuple
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from funlora_lab.adapters import METHODS, Row, Settings, numbers_by_layer
from funlora_lab.continual import OpenRun
from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment
from funlora_lab.seeds import stream
from funlora_lab.studies import plots, rank
from funlora_lab.systems import meta_unet
from funlora_lab.unet import conv_layers, part_of
from funlora_lab.unet.layers import DoublingConv2d
from funlora_lab.workbench import markup
from funlora_lab.workbench.markup import BLUE, GREY, ORANGE, Markup, element, svg_box, svg_image, svg_text

# held while a run's network draws, is read or copied: ``functional_call`` swaps its weights before every thread's eyes
ALONE = threading.RLock()

# A (O,), B (I,), F (O, I), its singular values, how many of them count (numerical_rank), and the bound of its formula
FunctionView = namedtuple("FunctionView", "method A B F singular rank bound")


def spread(numbers: Row, amount: float, seed: int = 0) -> Row:
    """The same numbers with A and B moved from where they are by normal noise of standard deviation ``amount``."""
    noise = {name: torch.randn(numbers[name].shape, generator=stream(seed, "workbench", name)) for name in "AB"}
    return numbers | {name: numbers[name] + amount * noise[name] for name in "AB"}


def function_numbers(numbers: Row) -> Row:
    """The numbers of the functions of F: ponderation, frequency, exponent or those of a function of the user's own."""
    return {name: value for name, value in numbers.items() if name[0] not in "AB" and not name.startswith("G.")}


def function_view(method: str, numbers: Row, settings: Settings) -> FunctionView:
    """F of Eq. 8 for one layer's numbers, with its spectrum, in float64; LabError for a method without an F."""
    if METHODS[method].matrix is None:
        raise LabError(f"The method {method} has no F: choose another measure.")
    F = METHODS[method].matrix({name: value[None].double() for name, value in numbers.items()}, settings)[0]
    A, B = (numbers[side].repeat_interleave(settings.ratio) for side in "AB")
    bound, count = METHODS[method].bound(settings, *F.shape), int(rank.numerical_rank(F))
    return FunctionView(method, A, B, F, rank.singular_values(F), count, bound)


def reach_of(values: Tensor) -> float:
    """How far a colour scale about 1 has to reach: past 98 of 100 values, so that a few huge ones blank nothing."""
    return max(float((values - 1).abs().flatten().quantile(0.98)), 1e-6)


def around_one(values: Tensor, reach: float | None = None) -> np.ndarray:
    """Colours of numbers (H, W) on a scale that is white at 1; what lies beyond its ends has the colour of the end."""
    reach = reach or reach_of(values)
    return markup.coloured(values.numpy(), 1 - reach, 1 + reach)


def function_picture(view: FunctionView, side: int = 200) -> Markup:
    """A beside B above F = f(A, B), each white where it is 1, a colour bar, and F's singular values, logarithmic."""
    (O, I), left, top, bar = view.F.shape, 20, 36, 10
    height, width, x, reach = side * O / max(O, I), side * I / max(O, I), 20 + bar + 4, reach_of(view.F)
    right, chart, floor = x + width + 98, 1.25 * side, 9.0  # down to 1e-9 of the largest value
    shares = (view.singular / view.singular[0].clamp_min(1e-300)).clamp_min(10**-floor)
    step, bars = chart / len(shares), []
    for i, tall in enumerate((side * (1 + shares.log10() / floor)).clamp_min(1).tolist()):
        colour, words = BLUE if i < view.rank else GREY, f"singular value {i + 1}: {view.singular[i]:.3g}"
        bars.append(svg_box(right + i * step, top + side - tall, max(step - 1, 1), tall, colour, words))
    line = top - side * np.log10(rank.TOLERANCE) / floor
    ramp = around_one(torch.linspace(1 + reach, 1 - reach, 64)[:, None], reach)
    ends = [(top + 10 + (side - 10) * k / 2, f"{1 + (1 - k) * reach:.3g}") for k in range(3)]
    parts = [
        svg_text(left - 4, top + height / 2 + 4, "A", "end", 13, "bold"),
        svg_image(left, top, bar, height, around_one(view.A[:, None])),
        svg_text(x + width / 2, top - bar - 8, "B", "middle", 13, "bold"),
        svg_image(x, top - bar - 4, width, bar, around_one(view.B[None])),
        svg_image(x, top, width, height, around_one(view.F, reach)),
        svg_text(left, top + side + 16, f"F {O} × {I}: {view.F.min():.3g} to {view.F.max():.3g}", size=12),
        svg_image(x + width + 6, top, bar, side, ramp),
        *(svg_text(x + width + bar + 9, y, words, size=11) for y, words in ends),
        *bars,
        element("line", x1=right, x2=right + chart, y1=line, y2=line, stroke="currentColor", stroke_dasharray="5 4"),
        *(svg_text(right - 5, y, words, "end", 11) for y, words in ((top + 9, "1"), (top + side, f"1e-{floor:.0f}"))),
        svg_text(right + chart, line - 4, f"counted above {rank.TOLERANCE:.0e}", "end", 11),
        svg_text(right, top + side + 16, "singular values / largest", size=12),
        svg_text(right - 16, 18, f"rank {view.rank}", size=18, weight="bold"),
        svg_text(right + 66, 18, f"of at most {view.bound}", size=12),
    ]
    words = f"{view.method}: rank {view.rank} of at most {view.bound}, F from {view.F.min():.3g} to {view.F.max():.3g}"
    return markup.svg(right + chart + 4, top + side + 22, parts, words)


class AdaptedLayers:
    """The convolutions that a run adapts, ``names`` by index, and what classes learned there; LabError without any."""

    def __init__(self, run: OpenRun):
        self.run, self.names, self.values = run, {}, cache(self._values)
        self.method = run.adapters.method if run.generator.frozen else None
        if run.generator.frozen and run.generator.rows:
            self.names = {i: name for i, name in enumerate(conv_layers(run.network)) if name in run.adapters.layers}
        if not self.names:
            raise LabError(f"The method {run.experiment.method} adapts no convolutions in this run: choose another.")

    def name_of(self, layer: int) -> str:
        if layer not in self.names:
            raise LabError(f"Layer {layer} is not adapted: accepted is one of {', '.join(map(str, self.names))}.")
        return self.names[layer]

    def numbers(self, cls: int, layer: int) -> Row:
        """What class ``cls`` learned for a layer, in float64 on the CPU; a class of task 1 has the neutral numbers."""
        numbers = numbers_by_layer(self.run.full_row(cls))[self.name_of(layer)]
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
        settings = self.run.adapters.settings[name]
        with ALONE:
            W0 = self.run.adapters.layers[name].weight
            numbers = {key: value.to(W0)[None] for key, value in self.numbers(cls, layer).items()}
            W = self.method.weight(W0, numbers, settings)[0]
            return ((W - W0).abs().mean() / W0.abs().mean()).item()

    @torch.no_grad()
    def _values(self, measure: str) -> pd.DataFrame:
        """One line a class that learned a row, one column an adapted layer (its index), of one of ``MEASURES``."""
        if measure not in MEASURES:
            raise LabError(f"measure={measure}: accepted is {', '.join(MEASURES)}.")
        known, value = self.run.known, MEASURES[measure]
        values = {known[cls]: [value(self, cls, layer) for layer in self.names] for cls in self.run.generator.rows}
        return pd.DataFrame.from_dict(values, orient="index", columns=list(self.names)).rename_axis("class")

    @property
    def measures(self) -> list[str]:
        """Those of ``MEASURES`` that mean something for the run's method."""
        cls, layer, found = next(iter(self.run.generator.rows)), next(iter(self.names)), []
        for name, value in MEASURES.items():
            with suppress(LabError):
                value(self, cls, layer)
                found.append(name)
        return found

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
        figure, axes = plots.drawing(7.8, 2.7, 1, 3)
        ponderation, frequency, spectrum = axes[0]
        for i, cls in enumerate(classes if self.method.matrix else ()):
            style = {"color": plots.COLOURS[i % len(plots.COLOURS)], "label": plots.short(self.run.known[cls])}
            style["markersize"] = 3
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

    def heatmap(
        self, measure: str, cls: str = "", chosen: int | None = None, off: Sequence[int] | None = None
    ) -> Markup:
        """``unet_picture`` of the run: the mean over classes of a measure, or one class (by name)."""
        frame = self.values(measure)
        values = (frame.loc[cls] if cls in frame.index else frame.mean()).to_dict()
        title = f"{measure}, {f'class {cls}' if cls in frame.index else 'mean of the later classes'}"
        return unet_picture(unet_layers(self.run.experiment), values, title, chosen, off)


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


def unet_picture(
    layers: pd.DataFrame, values: dict[int, float], title: str, chosen: int | None = None, off: Sequence | None = None
) -> Markup:
    """Convolutions from left to right as they run, lower the coarser they work, coloured by a value or not adapted.

    With ``off``, the layers whose adapters are turned off, it is a control: an adapted layer is chosen by a click and
    the square below it turns its adapter off and on.
    """
    sizes, wide, drop, tall = sorted(set(layers["size"]), reverse=True), max(14.0, min(28.0, 900 / len(layers))), 30, 26
    top, left, low, high = 40, 36, min(values.values()), max(values.values())
    right, bottom = left + len(layers) * wide, top + (len(sizes) - 1) * drop + tall
    ramp = markup.coloured(np.linspace(low, high, 64)[None], low, high, "viridis")
    parts = [svg_text(left, 16, title, size=13, weight="bold"), svg_image(right - 298, 8, 80, 9, ramp)]
    parts.append(svg_text(right - 212, 16, f"{low:.3g} to {high:.3g}; grey: not adapted", size=12))
    for part in ("encoder", "middle", "decoder"):
        inside = layers.index[layers["part"] == part]
        parts.append(svg_text(left + (inside[0] + inside[-1] + 1) / 2 * wide, 33, part, "middle", 12))
    for level, size in enumerate(sizes):
        xs, y = left + (layers.index[layers["size"] == size] + 0.5) * wide, top + level * drop + tall / 2
        parts.append(svg_text(left - 8, y + 4, f"{size}²", "end", 12))
        parts.append(element("line", x1=xs[0], x2=xs[-1], y1=y, y2=y, stroke=GREY, stroke_dasharray="2 4"))
    for i, name, _, inputs, outputs, kernel, size in layers.itertuples():
        x, y, small = left + i * wide, top + sizes.index(size) * drop, 5 if kernel == 1 else 0
        colour, shown, edge = GREY, "not adapted", {"edge": ORANGE, "thick": 2.5} if i == chosen else {"edge": GREY}
        if i in values:
            colour = "#" + markup.coloured(np.array([[values[i]]]), low, high, "viridis").tobytes().hex()
            shown = f"{values[i]:.3g}"
        words = f"{i}: {name}, {inputs} → {outputs} channels, {kernel} × {kernel}, {shown}"
        box = svg_box(x + 1, y + small, wide - 3, tall - 2 * small, colour, words, **edge)
        if off is not None and i in values:
            how, lit = {"tabindex": "0", "data_value": str(i)}, i not in off
            about = {"aria_label": f"layer {words}", "aria_pressed": str(i == chosen).lower()}
            box = element("g", box, role="button", data_press="layer", **how, **about)
            about = {"aria_label": f"adapter of layer {i}", "aria_checked": str(lit).lower()}
            switch = svg_box(x + 2, bottom + 17, wide - 5, 9, BLUE if lit else "none", f"adapter {i}", GREY)
            parts.append(element("g", switch, role="switch", data_press="switch", **how, **about))
        parts.append(box)
        if wide >= 20 or i % 5 == 0 or i == chosen:
            parts.append(svg_text(x + wide / 2 - 0.5, bottom + 13, str(i), "middle", 11))
    if off is not None:
        first = left + min(values) * wide
        parts.append(svg_text(first - 8, bottom + 26, "adapters on" if first > 120 else "on", "end", 12))
    return markup.svg(right + 10, bottom + 30, parts, title, "img" if off is None else "group")
