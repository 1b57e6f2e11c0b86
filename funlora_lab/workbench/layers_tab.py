"""Panel 3: which layers change, drawn over the U-Net, and what each class learned in a chosen one."""

import ipywidgets as widgets

from funlora_lab.errors import LabError
from funlora_lab.opened import OpenRun
from funlora_lab.workbench import explore, markup, panels
from funlora_lab.workbench.explore import MEASURES
from funlora_lab.workbench.markup import Markup
from funlora_lab.workbench.parts import Panel, card, control, row

MEAN = "mean of all"


class LayersPanel(Panel):
    """The heatmap of a measure over the U-Net; a layer's ponderations, frequencies and ranks for every class."""

    def __init__(self, opened: OpenRun):
        super().__init__()
        self.opened = opened
        self.spectra = card()
        self.table = widgets.HTML()
        try:
            layers = list(explore.adapted_layers(opened))
        except LabError as reason:
            self.picture.value = str(markup.problem(reason))
            self.children = [self.picture]
            return
        new = explore.new_classes(opened)
        names = [opened.known[cls] for cls in new]
        self.measure = control(widgets.Dropdown, "colour", MEASURES[0], "280px", options=MEASURES)
        self.of_class = control(widgets.Dropdown, "class", MEAN, "200px", options=[MEAN, *names])
        self.layer = control(widgets.SelectionSlider, "layer", layers[0], "420px", options=layers)
        self.compared = control(
            widgets.SelectMultiple, "classes", tuple(new), "170px", options=list(zip(names, new, strict=True)), rows=6
        )
        self.buttons = {index: self._button(index) for index in layers}
        self.children = [
            row(self.measure, self.of_class, self.layer),
            self.picture,
            widgets.Box(tuple(self.buttons.values()), layout=widgets.Layout(flex_flow="row wrap")),
            self.compared,
            self.spectra,
            self.table,
        ]
        self.on_change(self.redraw, self.measure, self.of_class, self.layer)
        self.on_change(self._show_layer, self.compared)
        self.redraw()

    def _button(self, index: int) -> widgets.Button:
        made = widgets.Button(
            description=str(index),
            tooltip=f"layer {index}: {explore.adapted_layers(self.opened)[index]}",
            layout=widgets.Layout(width="38px"),
        )
        made.on_click(lambda _: setattr(self.layer, "value", index))
        return made

    def redraw(self) -> None:
        self.show(self._heatmap)
        for index, one in self.buttons.items():
            one.button_style = "primary" if index == self.layer.value else ""
        self._show_layer()

    def _heatmap(self) -> Markup:
        cls = "" if self.of_class.value == MEAN else self.of_class.value
        return panels.layer_heatmap(self.opened, self.measure.value, cls, self.layer.value)

    def _show_layer(self) -> None:
        layer = self.layer.value
        classes = list(self.compared.value) or explore.new_classes(self.opened)
        self.spectra.value = panels.layer_spectra(self.opened, layer, classes).png()
        self.show(lambda: Markup(markup.table(explore.layer_table(self.opened, layer))), self.table)
