"""What one class learns over a frozen network: a row of numbers, and how rows become the weights of its layers.

Letters: K classes side by side, N images a class, E embedding width, O = Cout, I = Cin, r ratio, p functions.

A *row* is a flat dictionary of tensors, ``"<layer>/<parameter>"`` -> one class's numbers; ``stack`` joins the rows of
K classes into tensors with a leading class axis. A ``Method`` is a handful of functions, so every method of a table
runs through the same loop: the effective weights are computed once a class (never once an image) and handed to the
U-Net by ``functional_call``; the network itself is never modified.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from funlora_lab import functions
from funlora_lab.config import FUNCTIONAL_METHODS, Experiment
from funlora_lab.errors import LabError
from funlora_lab.streams import stream
from funlora_lab.unet import UNet, conv_layers

Row = dict[str, Tensor]
LABEL = "label_emb"  # the name, in a row, of a learned label embedding


@dataclass(frozen=True)
class Method:
    """How a class changes layers: which, from what start, and what becomes of a layer's weight.

    layers(net, experiment) -> the adapted layers by name
    start(layer, experiment, generator) -> one class's first numbers for a layer
    neutral(layer, experiment) -> numbers that leave the layer as it is: the row shared by the classes of task 1
    weight(W0, numbers, experiment) -> (K, O, I, ...) from W0 (O, I, ...) and numbers with a leading class axis
    """

    layers: Callable[[UNet, Experiment], dict[str, nn.Module]]
    start: Callable[[nn.Module, Experiment, torch.Generator], Row]
    neutral: Callable[[nn.Module, Experiment], Row]
    weight: Callable[[Tensor, Row, Experiment], Tensor]


def window(net: UNet, experiment: Experiment) -> dict[str, nn.Module]:
    """The convolutions whose index lies in ``experiment.window``; raises LabError when it leaves the network."""
    layers = conv_layers(net)
    first, last = experiment.window_range
    if last >= len(layers):
        raise LabError(
            f"window={experiment.window}: accepted are layer indices 0-{len(layers) - 1}, "
            f"the {len(layers)} convolutions of this network."
        )
    return dict(list(layers.items())[first : last + 1])


def _sizes(layer: nn.Module, experiment: Experiment) -> tuple[int, int]:
    """Entries of A and B: Cout/r and Cin/r."""
    O, I = layer.weight.shape[:2]
    r = experiment.ratio
    if O % r or I % r:
        raise LabError(
            f"ratio={r}: accepted is a divisor of both channel counts of every adapted layer, here {O} and {I}."
        )
    return O // r, I // r


def _broadcast(F: Tensor, W: Tensor) -> Tensor:
    """F (K, O, I) -> (K, O, I, 1, ...), to act on every kernel position of W (O, I, ...)."""
    return F.reshape(*F.shape, *[1] * (W.dim() - 2))


def functional_matrix(experiment: Experiment, numbers: Row, part: str = "") -> Tensor:
    """F (K, O, I) of Eq. 8 from the numbers of one layer; ``part`` is the prefix of G's numbers in mul-add."""
    function, learned, _ = FUNCTIONAL_METHODS[experiment.method]
    A = numbers[part + "A"].repeat_interleave(experiment.ratio, -1)
    B = numbers[part + "B"].repeat_interleave(experiment.ratio, -1)
    if function == "product":
        return functions.product(A, B)
    ponderation = numbers[part + "ponderation"]
    if function == "shift":
        return functions.shift(A, B, ponderation)
    if function == "power" and not learned:
        return functions.power_frozen(A, B, ponderation)
    if function == "power":
        return functions.power(A, B, ponderation, numbers[part + "exponent"])
    steps = torch.arange(1, experiment.functions + 1, device=A.device, dtype=A.dtype)
    frequency = numbers[part + "frequency"] if learned else steps.expand_as(ponderation)
    return functions.cosine(A, B, ponderation, frequency)


def _functional() -> Method:
    """W0*F, W0+F or W0*F+G with F of any function (Eq. 4-19, operations of Table IV).

    The additive forms subtract F's first value, 1, so that they too start at the identity; ``start=literal`` leaves
    it in, as the paper's formula stands.
    """

    def start(layer, experiment, generator=None, start=None):
        function, learned, _ = FUNCTIONAL_METHODS[experiment.method]
        outputs, inputs = _sizes(layer, experiment)
        one = {"A": torch.ones(outputs), "B": torch.ones(inputs)}
        if function != "product":
            one["ponderation"] = functions.first_ponderation(function, start or experiment.start, experiment.functions)
        if learned:
            name = "frequency" if function == "cosine" else "exponent"
            one[name] = torch.arange(1.0, experiment.functions + 1)
        if experiment.operation == "mul-add":
            one |= {"G." + name: value.clone() for name, value in one.items()}
        return one

    def neutral(layer, experiment):
        numbers = start(layer, experiment, start="identity")
        if experiment.start == "literal" and experiment.operation != "mul":  # nothing is subtracted: F or G must vanish
            part = "G." if experiment.operation == "mul-add" else ""
            vanishing = ("A", "B") if part + "ponderation" not in numbers else ("ponderation",)
            numbers |= {part + name: torch.zeros_like(numbers[part + name]) for name in vanishing}
        return numbers

    def weight(W0, numbers, experiment):
        first = 0.0 if experiment.start == "literal" else 1.0
        F = functional_matrix(experiment, numbers)
        if experiment.operation == "mul":
            return functions.scaled(W0, F)
        F = _broadcast(F, W0)
        if experiment.operation == "add":
            return W0 + (F - first)
        G = _broadcast(functional_matrix(experiment, numbers, "G."), W0)
        return W0 * F + (G - first)

    return Method(window, start, neutral, weight)


def _vanilla_add() -> Method:
    """W0 + A B with A Kaiming normal and B zero (Sec. 5.2)."""

    def start(layer, experiment, generator):
        outputs, inputs = _sizes(layer, experiment)
        A = torch.empty(outputs, 1)
        nn.init.kaiming_normal_(A, generator=generator)
        return {"A": A[:, 0], "B": torch.zeros(inputs)}

    def neutral(layer, experiment):
        outputs, inputs = _sizes(layer, experiment)
        return {"A": torch.zeros(outputs), "B": torch.zeros(inputs)}

    def weight(W0, numbers, experiment):
        r = experiment.ratio
        AB = functions.product(numbers["A"].repeat_interleave(r, -1), numbers["B"].repeat_interleave(r, -1))
        return W0 + _broadcast(AB, W0)

    return Method(window, start, neutral, weight)


def _label_embedding() -> Method:
    """Vanilla conditioning only: no layer changes, the new class's label embedding alone is learned."""
    return Method(lambda net, experiment: {}, lambda *_: {}, lambda *_: {}, lambda W0, *_: W0)


METHODS: dict[str, Method] = {
    **dict.fromkeys(FUNCTIONAL_METHODS, _functional()),
    "vanilla-add": _vanilla_add(),
    "label-embedding": _label_embedding(),
}


def stack(rows: list[Row]) -> Row:
    """The rows of K classes -> one row of tensors with a leading class axis (K, ...)."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def unstack(rows: Row, K: int) -> list[Row]:
    """The inverse of ``stack``; each class's tensors are copies of their own."""
    return [{name: tensor[k].clone() for name, tensor in rows.items()} for k in range(K)]


class Adapters:
    """One method over one frozen network: makes, counts and applies rows."""

    def __init__(self, net: UNet, experiment: Experiment):
        self.net, self.experiment = net, experiment
        self.method = METHODS[experiment.method]
        self.layers = self.method.layers(net, experiment)

    def start(self, cls: int) -> Row:
        """The numbers at which class ``cls`` starts, on the CPU; they depend on the seed and the class alone."""
        generator = stream(self.experiment.seed, "adapter start", cls)
        row = {
            f"{name}/{key}": value
            for name, layer in self.layers.items()
            for key, value in self.method.start(layer, self.experiment, generator).items()
        }
        if self.experiment.label_embedding == "learned" or self.experiment.method == "label-embedding":
            row[LABEL] = self.mean_embedding().cpu().clone()
        return row

    def neutral(self) -> Row:
        """The row that leaves the network as it is, shared by all classes of task 1."""
        return {
            f"{name}/{key}": value
            for name, layer in self.layers.items()
            for key, value in self.method.neutral(layer, self.experiment).items()
        }

    @property
    def parameters_per_class(self) -> int:
        """PPC: the numbers learned for one class (a frozen label embedding is not learned and not counted)."""
        return sum(value.numel() for value in self.start(0).values())

    def mean_embedding(self) -> Tensor:
        """The mean label embedding (E,) of the classes of task 1: the frozen embedding of every new class."""
        return self.net.label_emb.weight.detach().mean(0)

    def weights(self, rows: Row) -> dict[str, Tensor]:
        """Effective weights (K, O, I, ...) of every adapted layer, by the name ``functional_call`` takes."""
        by_layer: dict[str, Row] = {}
        for name, value in rows.items():
            layer, slash, key = name.rpartition("/")
            if slash:
                by_layer.setdefault(layer, {})[key] = value
        return {
            name + ".weight": self.method.weight(layer.weight.detach(), by_layer[name], self.experiment)
            for name, layer in self.layers.items()
        }

    def velocity(self, rows: Row, K: int) -> Callable[[Tensor, Tensor], Tensor]:
        """v(t, x) of K classes side by side; image i of the batch belongs to class i % K.

        The effective weights are computed here, once; call it inside a training step, or once before sampling.
        """
        weights = self.weights(rows)
        embedding = rows[LABEL] if LABEL in rows else self.mean_embedding().expand(K, -1)

        def v(t: Tensor, x: Tensor) -> Tensor:
            y = embedding.repeat(x.shape[0] // K, 1)
            return functional_call(self.net, weights, (t, x, y))

        return v

    def merged(self, row: Row) -> dict[str, Tensor]:
        """One class's plain weights (O, I, ...): loading them over the network makes it that class's network."""
        one = {name: value[None] for name, value in row.items()}
        return {name: value[0].detach() for name, value in self.weights(one).items()}
