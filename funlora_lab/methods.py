"""What a method is: a handful of functions that say how one class changes a frozen layer.

Letters: K classes side by side, O = Cout, I = Cin, r ratio.

A *row* is a flat dictionary of tensors, ``"<layer>/<parameter>"`` -> one class's numbers; inside a method the numbers
of one layer go by ``"<parameter>"`` alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from funlora_lab import functions
from funlora_lab.config import Experiment
from funlora_lab.errors import LabError
from funlora_lab.unet import UNet, conv_layers

Row = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """How a class changes layers: which, from what start, and what becomes of a layer's weight and input.

    about: what is adapted, in a few words
    settings: the experiment's fields on which a row's numbers, or their meaning, depend
    layers(net, experiment) -> the adapted layers by name
    start(layer, experiment, generator) -> one class's first numbers for a layer
    neutral(layer, experiment) -> numbers that leave the layer as it is: the row shared by the classes of task 1
    weight(W0, numbers, experiment) -> (K, O, I, ...) from W0 (O, I, ...) and numbers with a leading class axis
    affine(numbers) -> (K, 2, I), scale and shift of the layer's input before its padding, in place of ``weight``

    The experiment handed to start, neutral and weight carries the layer's own rank (``extra_rank`` already counted in).
    """

    about: str
    settings: tuple[str, ...]
    layers: Callable[[UNet, Experiment], dict[str, nn.Module]]
    start: Callable[[nn.Module, Experiment, torch.Generator], Row]
    neutral: Callable[[nn.Module, Experiment], Row]
    weight: Callable[[Tensor, Row, Experiment], Tensor] | None = None
    affine: Callable[[Row], Tensor] | None = None


def window(net: UNet, experiment: Experiment) -> dict[str, nn.Module]:
    """The convolutions whose index lies in the method's window; raises LabError when it leaves the network."""
    layers = conv_layers(net)
    first, last = experiment.window_range
    if last >= len(layers):
        raise LabError(
            f"{experiment.window_field}={first}-{last}: accepted are layer indices 0-{len(layers) - 1}, "
            f"the {len(layers)} convolutions of this network."
        )
    return dict(list(layers.items())[first : last + 1])


def sizes(layer: nn.Module, experiment: Experiment) -> tuple[int, int]:
    """Entries of A and B: Cout/r and Cin/r."""
    O, I = layer.weight.shape[:2]
    r = experiment.ratio
    if O % r or I % r:
        raise LabError(
            f"ratio={r}: accepted is a divisor of both channel counts of every adapted layer, here {O} and {I}."
        )
    return O // r, I // r


def broadcast(F: Tensor, W: Tensor) -> Tensor:
    """F (K, O, I) -> (K, O, I, 1, ...), to act on every kernel position of W (O, I, ...)."""
    return F.reshape(*F.shape, *[1] * (W.dim() - 2))


def kaiming(*shape: int, generator: torch.Generator) -> Tensor:
    """Kaiming normal numbers; the last axis of ``shape`` is the fan-in."""
    return nn.init.kaiming_normal_(torch.empty(*shape), generator=generator)


def products(numbers: Row, ratio: int, part: str = "") -> Tensor:
    """A B + A2 B2 + ... (K, O, I), as many pairs as the numbers hold, each entry repeated ``ratio`` times."""
    ends = [name.removeprefix(part + "A") for name in numbers if name.startswith(part + "A")]
    first, *others = [
        functions.product(*(numbers[part + side + end].repeat_interleave(ratio, -1) for side in "AB"))
        for end in sorted(ends, key=lambda end: int(end or 1))
    ]
    return sum(others, first)


def vanishing_pair(layer: nn.Module, experiment: Experiment, generator, end: str = "") -> Row:
    """A pair whose product is zero at first: A Kaiming normal, B zero, so that B's gradient lives (Sec. 3.1.1).

    Without a generator both are zero: the neutral pair.
    """
    outputs, inputs = sizes(layer, experiment)
    A = torch.zeros(outputs) if generator is None else kaiming(outputs, 1, generator=generator)[:, 0]
    return {"A" + end: A, "B" + end: torch.zeros(inputs)}
