"""Panel 1: a rank-1 product goes through a function and gains rank, live."""

import time

import ipywidgets as widgets
import torch

from funlora_lab.config import FUNCTIONAL_METHODS, STARTS
from funlora_lab.errors import LabError
from funlora_lab.opened import OpenRun
from funlora_lab.workbench import explore, panels
from funlora_lab.workbench.markup import Markup, problem
from funlora_lab.workbench.parts import Panel, control, row

MOST = 12  # functions that have sliders
PONDERATIONS, FREQUENCIES = (-8.0, 8.0), (0.0, 20.0)  # where sliders end, farther when a number lies farther
START = -1  # in place of a class: the numbers that training starts from
SIZES = (8, 16, 32, 64, 128)
LABELS = {
    "funlora": "cosine, frequencies learned (FunLoRA)",
    "cosine-frozen": "cosine",
    "power": "power, exponents learned",
    "power-frozen": "power",
    "shift": "right shift",
    "vanilla-mul": "none: the product A B",
}


def _slider(number: int, low: float, high: float) -> widgets.FloatSlider:
    layout = widgets.Layout(width="46px", height="170px")
    settings = {"orientation": "vertical", "readout_format": ".1f", "layout": layout}
    return widgets.FloatSlider(value=0.0, min=low, max=high, step=0.1, description=str(number), **settings)


def _sliders(low: float, high: float) -> list[widgets.FloatSlider]:
    return [_slider(number, low, high) for number in range(1, MOST + 1)]


class FunctionsPanel(Panel):
    """A, B, F = f(A, B), its singular values and rank, for any function, ponderations and frequencies."""

    def __init__(self, opened: OpenRun):
        super().__init__()
        self.opened = opened
        choices = [(LABELS.get(name, name), name) for name in FUNCTIONAL_METHODS]
        self.method = control(widgets.Dropdown, "function", "funlora", "340px", options=choices)
        self.functions = control(widgets.IntSlider, "p", 10, min=1, max=MOST)
        self.ratio = control(widgets.Dropdown, "ratio r", 1, "120px", options=[1, 2, 4, 8])
        self.start = control(widgets.Dropdown, "start", "identity", "160px", options=STARTS)
        self.outputs = control(widgets.Dropdown, "rows of F", 32, "150px", options=SIZES)
        self.inputs = control(widgets.Dropdown, "columns", 32, "150px", options=SIZES)
        self.spread = control(
            widgets.FloatSlider, "spread of A and B about 1", 0.3, "340px", min=0.0, max=1.0, step=0.01
        )
        self.seed = control(widgets.BoundedIntText, "seed", 0, "120px", min=0, max=10**6)
        self.source = control(widgets.Dropdown, "numbers", START, "240px", options=[("as training starts", START)])
        self.layer = control(widgets.Dropdown, "layer", START, "120px", options=[("–", START)])
        self._offer_learned()
        self.ponderations, self.frequencies = _sliders(*PONDERATIONS), _sliders(*FREQUENCIES)
        self.exponents_name = widgets.HTML()
        self.note = widgets.HTML()
        self.milliseconds = 0.0
        self._row = {}
        self.children = [
            row(self.method, self.functions, self.ratio, self.start),
            row(self.source, self.layer, self.outputs, self.inputs, self.spread, self.seed),
            self.picture,
            widgets.HTML("ponderations"),
            widgets.HBox(self.ponderations),
            self.exponents_name,
            widgets.HBox(self.frequencies),
            self.note,
        ]
        settings = (self.functions, self.ratio, self.start, self.outputs, self.inputs, self.spread, self.seed)
        self.on_change(self.reset, self.method, self.source, self.layer, *settings)
        self.on_change(self.redraw, *self.ponderations, *self.frequencies)
        self.reset()

    def _offer_learned(self) -> None:
        """Offer the numbers that the run's classes learned, where its method has functions."""
        if self.opened.experiment.method not in FUNCTIONAL_METHODS:
            return
        classes = [(f"learned by class {self.opened.known[c]}", c) for c in explore.new_classes(self.opened)]
        self.source.options = [("as training starts", START), *classes]
        layers = list(explore.adapted_layers(self.opened))
        self.layer.options = layers
        self.layer.value = layers[0]

    def _numbers(self) -> dict:
        """One layer's numbers as the settings say, before the sliders are touched."""
        if self.source.value != START:
            if self.method.value != self.opened.experiment.method:
                raise LabError(
                    f"The run learned its numbers with {LABELS[self.opened.experiment.method]}: choose that."
                )
            return explore.layer_numbers(self.opened, self.source.value, self.layer.value)
        if self.outputs.value % self.ratio.value or self.inputs.value % self.ratio.value:
            raise LabError(f"ratio={self.ratio.value}: accepted is a divisor of the rows and columns of F.")
        numbers = explore.first_numbers(
            self.method.value,
            self.outputs.value,
            self.inputs.value,
            self.functions.value,
            self.ratio.value,
            self.start.value,
        )
        return explore.spread(numbers, self.spread.value, self.seed.value)

    def reset(self) -> None:
        """Take the numbers that the settings say, set the sliders to them, and draw."""
        learned = self.source.value != START
        if learned:
            with self.quietly():
                self.method.value = self.opened.experiment.method
                self.ratio.value = self.opened.experiment.ratio
        for one in (self.method, self.functions, self.ratio, self.start, self.outputs, self.inputs, self.spread):
            one.disabled = learned
        try:
            self._row = self._numbers()
        except LabError as reason:
            self._row, self.picture.value = {}, str(problem(reason))
            return
        exponent = self._exponent()
        with self.quietly():
            self._set(self.ponderations, self._row.get("ponderation"))
            self._set(self.frequencies, self._row.get(exponent))
        learns = {"frequency": "frequencies", "exponent": "exponents"}.get(exponent)
        self.exponents_name.value = learns or "<i>this function has no frequencies or exponents to learn</i>"
        self.redraw()

    def _exponent(self) -> str:
        return next((name for name in ("frequency", "exponent") if name in self._row), "")

    def _set(self, sliders: list[widgets.FloatSlider], values: torch.Tensor | None) -> None:
        for i, slider in enumerate(sliders):
            there = values is not None and i < len(values)
            slider.layout.display = "" if there else "none"
            if there:
                value = float(values[i])
                slider.min, slider.max = min(slider.min, value), max(slider.max, value)
                slider.value = value

    def numbers(self) -> dict:
        """One layer's numbers as the sliders say; one that was not moved keeps its every digit."""
        numbers = dict(self._row)
        for name, sliders in (("ponderation", self.ponderations), (self._exponent(), self.frequencies)):
            if name in numbers:
                values = numbers[name].clone()
                for i, slider in enumerate(sliders[: len(values)]):
                    if abs(slider.value - float(values[i])) > slider.step / 2:
                        values[i] = slider.value
                numbers[name] = values
        return numbers

    def view(self) -> explore.FunctionView:
        """What is shown, as a plain value."""
        return explore.function_view(self.method.value, self.numbers(), self.ratio.value)

    def redraw(self) -> None:
        if not self._row:
            return
        begun = time.perf_counter()
        self.show(self._draw)
        self.milliseconds = 1000 * (time.perf_counter() - begun)
        self.note.value = f'<span style="opacity:.7">computed and drawn in {self.milliseconds:.0f} ms</span>'

    def _draw(self) -> Markup:
        return panels.function_picture(self.view())
