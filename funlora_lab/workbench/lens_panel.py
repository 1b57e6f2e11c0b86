"""The lens: bend what a class learned and see F, its spectrum and the class's images change together."""

import time
from dataclasses import replace
from html import escape

from traitlets import Float, Int, List, Unicode, link

from funlora_lab.adapters import METHODS
from funlora_lab.errors import LabError
from funlora_lab.flow import Solver
from funlora_lab.systems import solver_of
from funlora_lab.workbench import layers, markup
from funlora_lab.workbench.controls import button, field, film_controls, picks, place, row, select, slider
from funlora_lab.workbench.lens import Bend, Lens, Seen
from funlora_lab.workbench.panel import Drawer, Panel, Working, held

QUICK, FRAMES = 2, 9  # steps of the picture that follows a slider; states of the one that is drawn when it rests
REST = 0.35  # seconds without a move until then
SIDE = 128  # pixels of F
OLD = "These are still the images before; drawing."


class LensPanel(Working):
    """``bend`` is the state; every control says how it differs from the one before."""

    title = "which bends what a class learned"
    cls, layer, spread, function, text = held(Int), held(Int), held(Float), held(Unicode), held(Unicode)
    measure, ponderation, frequency = held(Unicode), held(List), held(List)
    unet, sliders, picture, samples = (held(Unicode) for _ in range(4))

    def __init__(self, bench):
        self.drawer, self.bend, self.past, self._last = Drawer(self._follow), None, [], ("", 0.0)
        super().__init__(bench)
        self.on_change(self._turn, "cls", "layer", "function")
        self.on_change(self._slide, "ponderation", "frequency", "spread")
        self.on_change(self._draw_unet, "measure")
        self.on_change(lambda: self._become(Bend.read(self.text)), "text")

    def renew(self) -> None:
        try:
            self.lens = Lens(self.run)
        except LabError as reason:
            self.lens, self.body = None, markup.problem(reason)
            return
        own, fits = self.lens.method, self.lens.adapted.measures
        start = Bend([*self.run.generator.rows, *self.run.known][0], next(iter(self.lens.adapted.names)))
        functions = [(f"{own} (learned)" if METHODS[own].matrix else own, "")]
        functions += [(name, name) for name, method in METHODS.items() if method.matrix and name != own]
        head = row(
            select("cls", "class", self.classes),
            select("function", "function", functions),
            select("measure", "colour", [(name, name) for name in fits]),
        )
        films = row(film_controls(FRAMES), field("text", "state"))
        below = [place("samples"), films, self.work_places, place("note", "note"), place("seen")]
        with self.quietly():
            self.measure = self.measure if self.measure in fits else fits[0]
            self.body = (
                f'<div class="funlora-lens"><div class="whole">{head}</div>'
                f"{place('unet', 'whole')}{place('sliders')}{place('picture')}"
                f'<div class="whole">{"".join(below)}</div></div>'
            )
        bend = self.bend or start
        try:
            self._become(replace(bend, function="" if bend.function == own else bend.function), remember=False)
        except LabError:  # the state of a run before, which this one does not have
            self._become(start, remember=False)

    def press_reset(self) -> None:
        """Back to what was learned; the class and the layer stay."""
        self._become(Bend(self.bend.cls, self.bend.layer, self.bend.function))

    def press_undo(self) -> None:
        if not self.past:
            raise LabError("There is nothing to undo.")
        self._become(self.past.pop(), remember=False)

    def press_layer(self, layer: str) -> None:
        self.layer = int(layer)

    def press_switch(self, layer: str) -> None:
        """Turn the adapter of a layer off or on."""
        off = {*self.bend.off} ^ {int(layer)}
        self._become(replace(self.bend, off=tuple(sorted(off))))

    def press_train(self) -> None:
        """Train a run with the function that is looked at; it joins the others."""
        experiment = self.run.experiment.but(method=self.bend.function)
        self.begin(lambda: self.bench.train(experiment, self.runtime))

    def _turn(self) -> None:
        changed = self.bend.changed
        if self.function != self.bend.function:  # which has numbers of its own
            changed = {key: amount for key, amount in changed.items() if key[1] == "spread"}
        self._become(replace(self.bend, cls=self.cls, layer=self.layer, function=self.function, changed=changed))

    def _slide(self) -> None:
        """The numbers of the layer as the sliders say; one that stands where it was learned is not changed."""
        bend, layer, method = self.bend, self.layer, self.bend.function
        changed = {where: value for where, value in bend.changed.items() if where[0] != layer}
        plain = Bend(bend.cls, layer, method)
        for name, values in zip(self._names(plain), (self.ponderation, self.frequency), strict=True):
            for i, value in enumerate(self.lens.numbers(plain, layer).get(name, ())):
                if abs(values[i] - value) > 1e-9:
                    changed[layer, name, i] = float(values[i])
        changed |= {(layer, "spread"): self.spread} if self.spread else {}
        self._become(replace(bend, changed=changed), slid=True)

    def _names(self, bend: Bend) -> tuple[str, str]:
        """What the two columns of sliders hold: the ponderations and the function's other number, where it has them."""
        names = list(layers.function_numbers(self.lens.numbers(bend, bend.layer)))
        return "ponderation", next((name for name in names if name != "ponderation"), "")

    def _become(self, bend: Bend, remember: bool = True, slid: bool = False) -> None:
        """Take a state, set every control to it, and show it: F at once, images as soon as they are drawn."""
        before = self.bend
        self.lens.check(bend)
        kind, now = (bend.cls, bend.layer, slid), time.monotonic()
        if remember and before and bend != before and not (slid and kind == self._last[0] and now - self._last[1] < 1):
            self.past.append(before)
        self._last, self.bend, self.note = (kind, now), bend, ""
        with self.quietly():
            self.cls, self.layer, self.function, self.text = bend.cls, bend.layer, bend.function, str(bend)
            if not slid:
                self._set_sliders(bend)
            try:
                self.picture = layers.function_picture(self.lens.view(bend), SIDE).html
            except LabError as reason:
                self.picture = markup.problem(reason)
        if not before or not self.unet or (bend.off, bend.cls, bend.layer) != (before.off, before.cls, before.layer):
            self._draw_unet()
        if self.samples:
            self.note = OLD
            self.drawer.wake()
        else:  # the first time, which a page waits for
            self._draw_samples(bend, solver_of(self.run.experiment))

    def _set_sliders(self, bend: Bend) -> None:
        numbers, names, columns = self.lens.numbers(bend, bend.layer), self._names(bend), []
        self.spread = bend.changed.get((bend.layer, "spread"), 0.0)
        for trait, name, low, high in (("ponderation", names[0], -8.0, 8.0), ("frequency", names[1], 0.0, 20.0)):
            values = [float(value) for value in numbers.get(name, ())]
            setattr(self, trait, values)
            low, high = min([low, *values]), max([high, *values])
            numbered = range(1, len(values) + 1)
            column = [slider(f"{trait}.{i - 1}", str(i), low, high, 0.01, f"{name} {i}") for i in numbered]
            columns += [[f"<b>{escape(name)}</b>", *column]] if values else []
        rows = max(map(len, columns), default=1)
        both = "".join("".join(column) for column in columns) or "<i>This function has no numbers of its own.</i>"
        below = [slider("spread", "noise on A, B", 0, 1, 0.01)] if "A" in numbers else []
        below += [button("undo", "Undo"), button("reset", "Reset")]
        rows = f"grid-template-rows:repeat({rows},19px)"
        self.sliders = f'<div class="sliders" style="{rows}">{both}</div>{row(*below)}'

    def _draw_unet(self) -> None:
        name = self.run.known[self.bend.cls]
        self.unet = self.lens.adapted.heatmap(self.measure, name, self.bend.layer, self.bend.off).html

    def _follow(self) -> None:
        self._draw_samples(self.bend, Solver("midpoint", QUICK), coarse=True)
        if not self.drawer.moved.wait(REST):
            self._draw_samples(self.bend, solver_of(self.run.experiment))

    def _draw_samples(self, bend: Bend, solver: Solver, coarse: bool = False) -> None:
        try:
            frames, lens = 3 if coarse else FRAMES, self.lens
            learned, bent = lens.learned(bend.cls, solver, frames), lens.draw(bend, solver, frames, not coarse)
        except LabError as reason:
            self.samples = markup.problem(reason)
            return
        name = self.run.known[bend.cls]
        words = "coarse" if coarse else f"{solver.name}, {solver.steps} steps"
        rows = [self._strip("learned", learned, name), self._strip("bent", bent, name)]
        train = ""
        if bend.function not in ("", lens.method):
            why = f"The samples are of what {lens.method} learned; F is of {bend.function} on its A and B."
            train = f"<div class='row'>{why} {button('train', f'Train with {bend.function}', 'main')}</div>"
        about = f"<span class='soft'>same noise; {words}; outlined: not recognised at time 1</span>"
        self.samples = f"{train}{markup.sheet(rows)}{about}"
        if self.note == OLD and bend is self.bend:
            self.note = ""

    def _strip(self, title: str, seen: Seen, name: str) -> list[str]:
        words = f"{len(seen.taken)} samples of class {name}, {title}; taken for {', '.join(seen.taken)}"
        loss = "" if seen.loss is None else f"<br>flow loss {seen.loss:.3f}"
        return [f"<b>{title}</b>", markup.film(seen.states, words, seen.wrong), seen.words + loss]


class LayerPanel(Panel):
    """All classes at the layer of the lens."""

    title = "which sets what all classes learned at a layer side by side"
    layer, compared = held(Int), held(List)
    shown = held(Unicode)

    def __init__(self, bench):
        super().__init__(bench)
        self.on_change(self.draw, "layer", "compared")
        link((bench.lens, "layer"), (self, "layer"))

    def renew(self) -> None:
        try:
            self.adapted = layers.AdaptedLayers(self.run)
        except LabError as reason:
            self.body = markup.problem(reason)
            return
        new, names = list(self.run.generator.rows), [(f"{i}: {name}", i) for i, name in self.adapted.names.items()]
        with self.quietly():
            self.layer = self.layer if self.layer in self.adapted.names else names[0][1]
            self.compared = [cls for cls in self.compared if cls in new] or new
            choice = picks("compared", "classes", [(self.run.known[cls], cls) for cls in new])
            self.body = row(select("layer", "layer", names), choice) + place("note") + place("shown")
        self.draw()

    def draw(self) -> None:
        classes = self.compared or list(self.run.generator.rows)
        words = f"ponderations, frequencies and singular values of F at layer {self.layer}"
        spectra = markup.figure(self.adapted.spectra(self.layer, classes), words)
        self.shown = spectra + markup.table(self.adapted.table(self.layer))
