"""A class bent: its numbers of some layers changed, its adapters of some turned off, and what that does to its images.

A state is a ``Bend``; its text reproduces it, here as in the panel:

    lens = Lens(run)
    seen = lens.draw(Bend.read("class=7 layer=13 off=14 13.frequency.2=4.5"), solver_of(run.experiment))
"""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from funlora_lab.adapters import METHODS, Row, Settings, stack
from funlora_lab.continual import OpenRun, held_out_loss
from funlora_lab.data import to_bytes
from funlora_lab.errors import LabError
from funlora_lab.flow import Solver
from funlora_lab.systems import Source
from funlora_lab.workbench import layers
from funlora_lab.workbench.images import SameNoise
from funlora_lab.workbench.layers import ALONE, AdaptedLayers, FunctionView

IMAGES = 8


@dataclass(frozen=True)
class Bend:
    """Which class and layer are looked at, through which function, and all that differs from what was learned."""

    cls: int
    layer: int
    function: str = ""  # of METHODS; empty: the run's own
    off: tuple[int, ...] = ()  # layers whose adapters are turned off
    # (layer, number, its index) -> value, and (layer, "spread") -> deviation of noise on its A and B
    changed: dict[tuple, float] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"class={self.cls}", f"layer={self.layer}"]
        words += [f"function={self.function}"] if self.function else []
        words += [f"off={','.join(map(str, self.off))}"] if self.off else []
        return " ".join(words + [f"{'.'.join(map(str, key))}={value:.6g}" for key, value in self.changed.items()])

    @classmethod
    def read(cls, text: str) -> "Bend":
        """The state that ``str`` wrote down; raises LabError naming the first word that is none."""
        bend = {"cls": 0, "layer": 0, "changed": {}}
        for word in text.split():
            name, _, value = word.partition("=")
            try:
                if name in ("class", "layer"):
                    bend["cls" if name == "class" else name] = int(value)
                elif name == "off":
                    bend["off"] = tuple(int(layer) for layer in value.split(","))
                elif name == "function":
                    bend["function"] = value
                else:
                    layer, number, *index = name.split(".")
                    bend["changed"][int(layer), number, *map(int, index)] = float(value)
            except ValueError:
                accepted = "class=7 layer=13 off=14,15 13.spread=0.1 13.frequency.2=4.5"
                raise LabError(f"'{word}' says nothing of a bent class: accepted are words as in {accepted}.") from None
        return cls(**bend)


class Seen(NamedTuple):
    """What came of it: states (frames, N, C, H, W) from noise to image, ``SameNoise.verdict`` on them, flow loss."""

    states: Tensor
    taken: list[str]
    wrong: list[bool]
    words: str
    loss: float | None


class Lens:
    """Bends of the classes of a run; raises LabError for one that adapts no convolutions."""

    def __init__(self, run: OpenRun):
        self.run, self.adapted, self.method = run, AdaptedLayers(run), run.experiment.method
        # ``draw`` of a class as it was learned, which every bend is set beside
        self.learned = cache(lambda cls, *how: self.draw(Bend(cls, next(iter(self.adapted.names))), *how))

    def check(self, bend: Bend) -> None:
        """Raise LabError for a class, layer, function or number that this run does not have."""
        self.run.class_of(bend.cls)
        for layer in (bend.layer, *bend.off, *(layer for layer, *_ in bend.changed)):
            self.adapted.name_of(layer)
        if bend.function and (bend.function not in METHODS or METHODS[bend.function].matrix is None):
            names = ", ".join(name for name, method in METHODS.items() if method.matrix)
            raise LabError(f"function={bend.function}: accepted is one of {names}.")
        for layer, number, *index in bend.changed:
            known = layers.function_numbers(self.numbers(replace(bend, changed={}), layer))
            if [number, *index] != ["spread"] and index not in [[i] for i in range(len(known.get(number, ())))]:
                word = ".".join(map(str, [layer, number, *index]))
                raise LabError(f"{word}: accepted are spread{''.join(f', {n}.INDEX' for n in known)} of this layer.")

    def settings(self, bend: Bend) -> Settings:
        if bend.function in ("", self.method):
            return self.run.adapters.settings[self.adapted.name_of(bend.layer)]
        return METHODS[bend.function].settings_of(self.run.experiment.but(method=bend.function))

    def numbers(self, bend: Bend, layer: int) -> Row:
        """One layer's numbers, float64: A and B as the class learned them, those of another function as it starts."""
        numbers = self.adapted.numbers(bend.cls, layer)
        if bend.function not in ("", self.method):
            if not {"A", "B"} <= numbers.keys() or numbers["A"].dim() != 1:
                raise LabError(f"The method {self.method} learned no two vectors A and B for another function.")
            O, I = self.run.adapters.layers[self.adapted.name_of(layer)].weight.shape[:2]
            first = METHODS[bend.function].start(nn.Conv2d(I, O, 1, device="meta"), self.settings(bend), None)
            numbers = {key: value.double() for key, value in first.items()} | {side: numbers[side] for side in "AB"}
        if (layer, "spread") in bend.changed and {"A", "B"} <= numbers.keys():
            numbers = layers.spread(numbers, bend.changed[layer, "spread"])
        numbers = {name: value.clone() for name, value in numbers.items()}
        for (where, name, *index), value in bend.changed.items():
            if where == layer and name in numbers:
                numbers[name][index] = value
        return numbers

    def view(self, bend: Bend) -> FunctionView:
        """F of the layer that is looked at; turned off, that of the neutral numbers."""
        method, numbers = bend.function or self.method, self.numbers(bend, bend.layer)
        if bend.layer in bend.off:
            layer = self.run.adapters.layers[self.adapted.name_of(bend.layer)]
            neutral = METHODS[method].neutral(layer, self.settings(bend))
            numbers = {name: value.double().cpu() for name, value in neutral.items()}
        return layers.function_view(method, numbers, self.settings(bend))

    def row(self, bend: Bend) -> Row:
        """All numbers of the bent class, float32; those of another function than the run's change nothing here."""
        row, neutral = self.run.full_row(bend.cls), self.run.adapters.neutral()
        own = replace(bend, function="", changed=bend.changed if bend.function in ("", self.method) else {})
        for layer, name in self.adapted.names.items():
            if layer in own.off:
                row |= {key: value for key, value in neutral.items() if key.startswith(f"{name}/")}
            elif any(where == layer for where, *_ in own.changed):
                row |= {f"{name}/{key}": value.float() for key, value in self.numbers(own, layer).items()}
        return row

    @torch.no_grad()
    def draw(self, bend: Bend, solver: Solver, frames: int = 0, loss: bool = True) -> Seen:
        """Images of the bent class from the noise of ``SameNoise``, and its flow loss on held-out images."""
        cls, noise = bend.cls, SameNoise(self.run, IMAGES, solver)
        with ALONE:
            row = {key: value.to(self.run.runtime.device) for key, value in stack([self.row(bend)]).items()}
            velocity = self.run.adapters.velocity(row, 1)
            states = to_bytes(solver.path(velocity, noise.noise(cls), frames)[0]).cpu()
            held = held_out_loss(self.run.context, Source("", lambda: velocity), cls, 2) if loss else None
        return Seen(states, *noise.verdict(states[-1], cls), held)
