"""What one class learns over a frozen network: a row of numbers, and how rows become the weights of its layers.

Letters: K classes side by side, N images a class, E embedding width, O = Cout, I = Cin, r ratio, p functions.

A *row* is a flat dictionary of tensors, ``"<layer>/<parameter>"`` -> one class's numbers; ``stack`` joins the rows of
K classes into tensors with a leading class axis. A ``Method`` is a handful of functions, so every method of a table
runs through the same loop: the effective weights are computed once a class (never once an image) and handed to the
U-Net by ``functional_call``; the network itself is never modified.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from funlora_lab import functions
from funlora_lab.config import FUNCTIONAL_METHODS, Experiment
from funlora_lab.errors import LabError
from funlora_lab.methods import Method, Row, broadcast, products, sizes, vanishing_pair, window
from funlora_lab.rivals import RIVALS
from funlora_lab.streams import stream
from funlora_lab.unet import UNet, conv_layers

LABEL = "label_emb"  # the name, in a row, of a learned label embedding


def functional_matrix(experiment: Experiment, numbers: Row, part: str = "") -> Tensor:
    """F (K, O, I) of Eq. 8 from the numbers of one layer; ``part`` is the prefix of G's numbers in mul-add."""
    function, learned, _ = FUNCTIONAL_METHODS[experiment.method]
    if function == "product":
        return products(numbers, experiment.ratio, part)
    A = numbers[part + "A"].repeat_interleave(experiment.ratio, -1)
    B = numbers[part + "B"].repeat_interleave(experiment.ratio, -1)
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


def _functional(about: str, *more_settings: str) -> Method:
    """W0*F, W0+F or W0*F+G with F of any function (Eq. 4-19, operations of Table IV).

    The additive forms subtract F's first value, 1, so that they too start at the identity; ``start=literal`` leaves
    it in, as the paper's formula stands. Vanilla mul of a rank above 1 adds pairs whose product is zero at first.
    """

    def start(layer, experiment, generator=None, start=None):
        function, learned, _ = FUNCTIONAL_METHODS[experiment.method]
        outputs, inputs = sizes(layer, experiment)

        def part() -> Row:
            one = {"A": torch.ones(outputs), "B": torch.ones(inputs)}
            for i in range(2, experiment.rank + 1):
                one |= vanishing_pair(layer, experiment, generator, str(i))
            if function != "product":
                p, how = experiment.functions, start or experiment.start
                one["ponderation"] = functions.first_ponderation(function, how, p)
            if learned:
                one["frequency" if function == "cosine" else "exponent"] = torch.arange(1.0, experiment.functions + 1)
            return one

        if experiment.operation != "mul-add":
            return part()
        return part() | {"G." + name: value for name, value in part().items()}

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
        F = broadcast(F, W0)
        if experiment.operation == "add":
            return W0 + (F - first)
        G = broadcast(functional_matrix(experiment, numbers, "G."), W0)
        return W0 * F + (G - first)

    return Method(
        about=about,
        settings=("method", "operation", "start", "functions", "ratio", "window", *more_settings, "label_embedding"),
        layers=window,
        start=start,
        neutral=neutral,
        weight=weight,
    )


METHODS: dict[str, Method] = {
    **{
        name: _functional(f"W * F in the window's convolutions, F of the {function} functions" + ", learned" * learned)
        for name, (function, learned, _) in FUNCTIONAL_METHODS.items()
    },
    "vanilla-mul": _functional("W * AB in the window's convolutions", "rank", "extra_rank"),
    **RIVALS,
}


def stack(rows: list[Row]) -> Row:
    """The rows of K classes -> one row of tensors with a leading class axis (K, ...)."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def unstack(rows: Row, K: int) -> list[Row]:
    """The inverse of ``stack``; each class's tensors are copies of their own."""
    return [{name: tensor[k].clone() for name, tensor in rows.items()} for k in range(K)]


def by_layer(rows: Row) -> dict[str, Row]:
    """``"<layer>/<parameter>"`` -> layer -> parameter; a label embedding belongs to no layer."""
    layers: dict[str, Row] = {}
    for name, value in rows.items():
        layer, slash, key = name.rpartition("/")
        if slash:
            layers.setdefault(layer, {})[key] = value
    return layers


class Adapters:
    """One method over one frozen network: makes, counts and applies rows."""

    def __init__(self, net: UNet, experiment: Experiment):
        self.net, self.experiment = net, experiment
        self.method = METHODS[experiment.method]
        self.layers = self.method.layers(net, experiment)
        self.settings = {name: experiment for name in self.layers}  # the experiment as each layer sees it
        names = list(conv_layers(net))
        for index in experiment.extra_rank:
            if index >= len(names) or names[index] not in self.layers:
                first, last = experiment.window_range
                raise LabError(f"extra_rank={index}: accepted are indices of adapted layers, here {first}-{last}.")
            own = self.settings[names[index]]
            self.settings[names[index]] = own.but(rank=own.rank + 1)

    def start(self, cls: int) -> Row:
        """The numbers at which class ``cls`` starts, on the CPU; they depend on the seed and the class alone."""
        generator = stream(self.experiment.seed, "adapter start", cls)
        row = {
            f"{name}/{key}": value
            for name, layer in self.layers.items()
            for key, value in self.method.start(layer, self.settings[name], generator).items()
        }
        if self.learns_label:
            row[LABEL] = self.mean_embedding().cpu().clone()
        return row

    @property
    def learns_label(self) -> bool:
        """Whether a class learns its label embedding; else it has the mean of task 1's."""
        return self.experiment.label_embedding == "learned" or self.experiment.method == "label-embedding"

    def neutral(self) -> Row:
        """The row that leaves the network as it is, shared by all classes of task 1."""
        return {
            f"{name}/{key}": value
            for name, layer in self.layers.items()
            for key, value in self.method.neutral(layer, self.settings[name]).items()
        }

    @property
    def parameters_per_class(self) -> int:
        """PPC: the numbers learned for one class (a frozen label embedding is not learned and not counted)."""
        in_layers = sum(value.numel() for value in self.neutral().values())
        return in_layers + (self.net.embedding if self.learns_label else 0)

    def mean_embedding(self) -> Tensor:
        """The mean label embedding (E,) of the classes of task 1: the frozen embedding of every new class."""
        return self.net.label_emb.weight.detach().mean(0)

    def weights(self, rows: Row) -> dict[str, Tensor]:
        """Effective weights (K, O, I, ...) of every layer whose weights the method changes, by ``<layer>.weight``."""
        if self.method.weight is None:
            return {}
        numbers = by_layer(rows)
        return {
            name + ".weight": self.method.weight(layer.weight.detach(), numbers[name], self.settings[name])
            for name, layer in self.layers.items()
        }

    def affines(self, rows: Row) -> dict[str, Tensor]:
        """Scale and shift (K, 2, I) of the input of every layer whose input is changed, by ``<layer>.affine``."""
        if self.method.affine is None:
            return {}
        numbers = by_layer(rows)
        return {name + ".affine": self.method.affine(numbers[name]) for name in self.layers}

    def velocity(self, rows: Row, K: int) -> Callable[[Tensor, Tensor], Tensor]:
        """v(t, x) of K classes side by side; image i of the batch belongs to class i % K.

        The effective weights are computed here, once; call it inside a training step, or once before sampling.
        """
        weights = self.weights(rows)
        if K == 1:  # an ordinary network
            weights = {name: weight[0] for name, weight in weights.items()}
        changes = weights | self.affines(rows)
        embedding = rows[LABEL] if LABEL in rows else self.mean_embedding().expand(K, -1)

        def v(t: Tensor, x: Tensor) -> Tensor:
            y = embedding.repeat(x.shape[0] // K, 1)
            return functional_call(self.net, changes, (t, x, y))

        return v

    def merged(self, row: Row) -> dict[str, Tensor]:
        """One class's plain weights (O, I, ...): loading them over the network makes it that class's network.

        Raises LabError for a method that changes a layer's input instead.
        """
        if self.method.affine:
            raise LabError(f"{self.experiment.method} shifts inputs before the padding, which no weights can hold.")
        one = {name: value[None] for name, value in row.items()}
        return {name: value[0].detach() for name, value in self.weights(one).items()}
