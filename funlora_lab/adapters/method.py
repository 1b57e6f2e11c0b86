"""What a method is: a handful of functions that say how one class changes a frozen layer, and the registry of methods.

Letters: K classes side by side, O = Cout, I = Cin, r ratio.

A *row* is a dictionary, ``"<layer>/<number>"`` -> the tensor a class learned; a method sees ``"<number>"`` alone.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from funlora_lab.errors import LabError
from funlora_lab.experiment import FLAT, REGISTERED_TEXTS, Experiment, shown
from funlora_lab.unet import conv_layers

Row = dict[str, Tensor]
METHODS: dict[str, "Method"] = {}
BUILT_IN: set[str] = set()  # the names that this package registered
ONLY_WHERE_READ = ("operation", "ratio", "rank", "extra_rank")  # refused where a method does not read them


class Settings(SimpleNamespace):
    """The settings that a method declared, and no others."""

    def __getattr__(self, name: str):
        raise AttributeError(f"the method does not name '{name}' among its settings")


@dataclass(frozen=True)
class Method:
    """How a class changes layers: which, from what start, and what becomes of a layer's weight or input."""

    name: str
    about: str  # what is adapted, in a few words
    rate: float  # Adam's learning rate for its numbers where the experiment's is 0
    # flat names of the settings on which a row's numbers, or their meaning, depend: it is handed these alone (``rank``
    # with the layer's ``extra_rank`` counted in), and they are part of every artefact's key
    settings: tuple[str, ...]
    layers: Callable  # (net, settings) -> the adapted layers by name
    start: Callable  # (layer, settings, generator) -> one class's first numbers for a layer
    neutral: Callable  # (layer, settings) -> numbers that leave a layer as it is: the row of the classes of task 1
    weight: Callable | None = None  # (W0 (O, I, ...), numbers (K, ...), settings) -> (K, O, I, ...)
    affine: Callable | None = None  # (numbers) -> (K, 2, I), scale and shift of the input before its padding
    matrix: Callable | None = None  # (numbers, settings) -> F (K, O, I) of Eq. 8
    bound: Callable = lambda settings, O, I: min(O, I)  # the largest rank that F can have by its formula
    learns_label: bool = False  # the label embedding, whatever ``label_embedding`` says
    text: str = ""  # the source of a method from outside the package, part of every key; ``register`` fills it in

    def settings_of(self, experiment: Experiment) -> Settings:
        """What it is handed; raises LabError for a setting that means nothing to it and is not at its default."""
        values = experiment.flat
        for name in ONLY_WHERE_READ:
            accepted = FLAT[name][1].default
            if name not in self.settings and values[name] != accepted:
                words = shown(accepted) or "nothing"
                raise LabError(f"{name}={shown(values[name])}: accepted is {words} for the method {self.name}.")
        return Settings(**{name: values[name] for name in self.settings})

    def identity(self, experiment: Experiment) -> dict:
        """What the numbers of a row, and their meaning, depend on beside the base, as an artefact's key holds it."""
        known = {"method": self.name, "label_embedding": experiment.label_embedding}
        return known | vars(self.settings_of(experiment)) | ({"text": self.text} if self.text else {})

    def rate_of(self, experiment: Experiment) -> float:
        return experiment.adapter.lr or self.rate


def source_text(*callables: Callable) -> str:
    """The source of functions or classes from outside this package; "" when there are none. Raises LabError."""
    texts = []
    for one in callables:
        if (one.__module__ or "").split(".")[0] != __name__.split(".")[0]:
            try:
                texts.append(inspect.getsource(one))
            except (OSError, TypeError):
                why = "cannot be read, and it is part of what a run is: define it in a file or a notebook cell"
                raise LabError(f"The source of {one.__qualname__} {why}.") from None
    return "\n".join(dict.fromkeys(texts))


def register(method: Method) -> Method:
    """Make a method known by its name; one from outside the package may be registered anew, a built-in one may not."""
    if method.name in BUILT_IN:
        raise LabError(f"The method {method.name} is built in: register yours under another name.")
    text = method.text or source_text(*filter(inspect.isfunction, vars(method).values()))
    if text:
        REGISTERED_TEXTS[method.name] = text
    METHODS[method.name] = replace(method, text=text)
    return METHODS[method.name]


def window(name: str = "window") -> Callable:
    """``layers`` of a method that adapts the convolutions whose index lies in the window of a setting."""

    def layers(net: nn.Module, settings: Settings) -> dict[str, nn.Module]:
        found = list(conv_layers(net).items())
        first, last = map(int, getattr(settings, name).split("-"))
        if last >= len(found):
            accepted = f"layer indices 0-{len(found) - 1}, the {len(found)} convolutions of this network"
            raise LabError(f"{name}={first}-{last}: accepted are {accepted}.")
        return dict(found[first : last + 1])

    return layers


def sizes(layer: nn.Module, settings: Settings) -> tuple[int, int]:
    """Entries of A and B: Cout/r and Cin/r."""
    (O, I), r = layer.weight.shape[:2], settings.ratio
    if O % r or I % r:
        accepted = f"a divisor of both channel counts of every adapted layer, here {O} and {I}"
        raise LabError(f"ratio={r}: accepted is {accepted}.")
    return O // r, I // r


def broadcast(F: Tensor, W: Tensor) -> Tensor:
    """F (K, O, I) -> (K, O, I, 1, ...), to act on every kernel position of W (O, I, ...)."""
    return F.reshape(*F.shape, *[1] * (W.dim() - 2))


def kaiming(generator: torch.Generator | None, *shape: int) -> Tensor:
    """Kaiming normal numbers, the last axis of ``shape`` the fan-in; zeros, the neutral ones, without a generator."""
    zeros = torch.zeros(*shape)
    return zeros if generator is None else nn.init.kaiming_normal_(zeros, generator=generator)


def vectors(numbers: Row, settings: Settings, end: str = "") -> list[Tensor]:
    """A (K, O) and B (K, I) of a pair, each number repeated for ``ratio`` channels."""
    return [numbers[side + end].repeat_interleave(settings.ratio, -1) for side in "AB"]
