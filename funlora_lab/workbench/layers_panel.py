"""Panels 1 and 3: a product of rank 1 gains rank in a function, live; which layers change, drawn over the U-Net."""

import time

import ipywidgets as widgets

from funlora_lab.adapters import METHODS
from funlora_lab.continual import OpenRun
from funlora_lab.errors import LabError
from funlora_lab.experiment import STARTS
from funlora_lab.workbench import layers, markup
from funlora_lab.workbench.panel import Panel, button, control, errors_shown_in, picture_card, row

MOST = 12  # functions that have sliders
START = -1  # in place of a class: the numbers that training starts from
SIZES = (8, 16, 32, 64, 128)
PLURALS = {"frequency": "frequencies", "": "<i>this function has no frequencies or exponents to learn</i>"}


def _sliders(low: float, high: float) -> list[widgets.FloatSlider]:
    settings = {"min": low, "max": high, "orientation": "vertical", "readout_format": ".1f", "style": {}}
    return [control(widgets.FloatSlider, str(i), 0.0, "46px", "170px", **settings) for i in range(1, MOST + 1)]


class FunctionsPanel(Panel):
    def __init__(self, run: OpenRun):
        super().__init__(run)
        own, ratios = run.experiment.method, sorted({1, 2, 4, 8, run.experiment.ratio})
        functions = {name: method.about.rpartition(", F of ")[2] for name, method in METHODS.items() if method.matrix}
        choices = [(f"{name} ({about})", name) for name, about in functions.items()]
        self.method = control(widgets.Dropdown, "function", "funlora", "340px", options=choices)
        self.functions = control(widgets.IntSlider, "p", 10, min=1, max=MOST)
        self.ratio = control(widgets.Dropdown, "ratio r", 1, "120px", options=ratios)
        self.start = control(widgets.Dropdown, "start", "identity", "160px", options=STARTS[:3])
        self.outputs = control(widgets.Dropdown, "rows of F", 32, "150px", options=SIZES)
        self.inputs = control(widgets.Dropdown, "columns", 32, "150px", options=SIZES)
        self.spread = control(widgets.FloatSlider, "spread of A and B about 1", 0.3, "340px", max=1.0, step=0.01)
        self.seed = control(widgets.BoundedIntText, "seed", 0, "120px", max=10**6)
        learned = [(f"learned by class {run.known[cls]}", cls) for cls in run.generator.rows if own in functions]
        self.adapted = layers.AdaptedLayers(run) if learned else None
        known, sources = list(self.adapted.names) if learned else ["–"], [("as training starts", START), *learned]
        self.source = control(widgets.Dropdown, "numbers", START, "240px", options=sources)
        self.layer = control(widgets.Dropdown, "layer", known[0], "120px", options=known)
        self.ponderations, self.frequencies = _sliders(-8.0, 8.0), _sliders(0.0, 20.0)
        self.exponents_name, self.note, self.milliseconds = widgets.HTML(), widgets.HTML(), 0.0
        sizes = (self.outputs, self.inputs, self.spread)
        self._of_training = (self.method, self.functions, self.ratio, self.start, *sizes)
        top = row(self.method, self.functions, self.ratio, self.start), row(self.source, self.layer, *sizes, self.seed)
        ponderations, frequencies = widgets.HBox(self.ponderations), widgets.HBox(self.frequencies)
        sliders = widgets.HTML("ponderations"), ponderations, self.exponents_name, frequencies
        self.children = [*top, self.picture, *sliders, self.note]
        self.on_change(self.reset, self.source, self.layer, self.seed, *self._of_training)
        self.on_change(self.redraw, *self.ponderations, *self.frequencies)
        self.reset()

    def reset(self) -> None:
        """Take the numbers that the settings say, set the sliders to them, and draw."""
        self._numbers, self._other, learned = {}, "", self.source.value != START
        for one in self._of_training:
            one.disabled = learned
        with errors_shown_in(self.picture), self.quietly():
            if learned:
                self.method.value, self.ratio.value = self.run.experiment.method, self.run.experiment.ratio
                self._settings = self.run.adapters.settings[self.adapted.name_of(self.layer.value)]
                self._numbers = self.adapted.numbers(self.source.value, self.layer.value)
            else:
                method, p, ratio, start, outputs, inputs, amount = (one.value for one in self._of_training)
                self._settings = layers.settings_of(method, p, ratio, start)
                numbers = layers.first_numbers(method, outputs, inputs, p, ratio, start)
                self._numbers = layers.spread(numbers, amount, self.seed.value)
            self._other = next((n for n in layers.function_numbers(self._numbers) if n != "ponderation"), "")
            self._set(self.ponderations, self._numbers.get("ponderation", ()))
            self._set(self.frequencies, self._numbers.get(self._other, ()))
            self.exponents_name.value = PLURALS.get(self._other, f"{self._other}s")
        self.redraw()

    def _set(self, sliders: list[widgets.FloatSlider], values) -> None:
        for i, slider in enumerate(sliders):
            slider.layout.display = "" if i < len(values) else "none"
        for slider, value in zip(sliders, map(float, values), strict=False):
            slider.min, slider.max, slider.value = min(slider.min, value), max(slider.max, value), value

    def numbers(self) -> layers.Row:
        """One layer's numbers as the sliders say; one that was not moved keeps its every digit."""
        numbers = {name: value.clone() for name, value in self._numbers.items()}
        for name, sliders in (("ponderation", self.ponderations), (self._other, self.frequencies)):
            for i, slider in enumerate(sliders[: len(numbers.get(name, ()))]):
                if abs(slider.value - float(numbers[name][i])) > slider.step / 2:
                    numbers[name][i] = slider.value
        return numbers

    def view(self) -> layers.FunctionView:
        return layers.function_view(self.method.value, self.numbers(), self._settings)

    def redraw(self) -> None:
        if self._numbers:
            begun = time.perf_counter()
            self.show(lambda: layers.function_picture(self.view()))
            self.milliseconds = 1000 * (time.perf_counter() - begun)
            self.note.value = f'<span style="opacity:.7">computed and drawn in {self.milliseconds:.0f} ms</span>'


class LayersPanel(Panel):
    def __init__(self, run: OpenRun):
        super().__init__(run)
        self.spectra, self.table, self.children = picture_card(), widgets.HTML(), [self.picture]
        try:
            self.adapted = layers.AdaptedLayers(run)
        except LabError as reason:
            self.picture.value = markup.problem(reason)
            return
        indices, measures, new = list(self.adapted.names), list(layers.MEASURES), list(run.generator.rows)
        compared = [(run.known[cls], cls) for cls in new]
        classes = [("mean of all", ""), *((name, name) for name, _ in compared)]
        self.measure = control(widgets.Dropdown, "colour", measures[0], "280px", options=measures)
        self.of_class = control(widgets.Dropdown, "class", "", "200px", options=classes)
        self.layer = control(widgets.SelectionSlider, "layer", indices[0], "420px", options=indices)
        self.compared = control(widgets.SelectMultiple, "classes", new, "170px", options=compared, rows=6)
        self.buttons = {i: self._button(i, f"layer {i}: {name}") for i, name in self.adapted.names.items()}
        numbers = widgets.Box(tuple(self.buttons.values()), layout=widgets.Layout(flex_flow="row wrap"))
        shown = row(self.measure, self.of_class, self.layer)
        self.children = [shown, self.picture, numbers, self.compared, self.spectra, self.table]
        self.on_change(self._draw_unet, self.measure, self.of_class, self.layer)
        self.on_change(self._draw_layer, self.layer, self.compared)
        self._draw_unet()
        self._draw_layer()

    def _button(self, layer: int, words: str) -> widgets.Button:
        return button(str(layer), lambda: setattr(self.layer, "value", layer), width="38px", tooltip=words)

    def _draw_unet(self) -> None:
        self.show(lambda: self.adapted.heatmap(self.measure.value, self.of_class.value, self.layer.value))
        for index, one in self.buttons.items():
            one.button_style = "primary" if index == self.layer.value else ""

    def _draw_layer(self) -> None:
        layer, classes = self.layer.value, self.compared.value or tuple(self.run.generator.rows)
        self.spectra.value = self.adapted.spectra(layer, classes).png()
        self.table.value = str(markup.Markup(markup.table(self.adapted.table(layer))))
