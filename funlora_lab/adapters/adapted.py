"""One method over one frozen network: makes, counts and applies the rows of classes.

Letters: K classes side by side, N images a class, E embedding width, O = Cout, I = Cin.

The effective weights are computed once a class (never once an image) and handed to the U-Net by ``functional_call``;
the network itself is never modified.
"""

import torch
from torch import Tensor
from torch.func import functional_call

from funlora_lab.adapters.method import METHODS, Method, Row
from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment
from funlora_lab.flow import Velocity
from funlora_lab.seeds import stream
from funlora_lab.unet import UNet, conv_layers

LABEL = "label_emb"  # the name, in a row, of a learned label embedding


def stack(rows: list[Row]) -> Row:
    """The rows of K classes -> one row of tensors with a leading class axis (K, ...)."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def unstack(rows: Row, K: int) -> list[Row]:
    """The inverse of ``stack``; each class's tensors are copies of their own."""
    return [{name: tensor[k].clone() for name, tensor in rows.items()} for k in range(K)]


def numbers_by_layer(rows: Row) -> dict[str, Row]:
    """``"<layer>/<number>"`` -> layer -> number; a label embedding belongs to no layer."""
    layers: dict[str, Row] = {}
    for name, value in rows.items():
        if name != LABEL:
            layer, key = name.split("/")
            layers.setdefault(layer, {})[key] = value
    return layers


class Adapters:
    """One method over one frozen network. Raises LabError when the experiment's settings do not fit either."""

    def __init__(self, net: UNet, experiment: Experiment, method: Method | None = None):
        self.net, self.experiment, self.method = net, experiment, method or METHODS[experiment.method]
        given = self.method.settings_of(experiment)
        self.layers = self.method.layers(net, given)  # the adapted layers by name
        self.settings = dict.fromkeys(self.layers, given)  # what the method is handed for each of them
        # whether a class learns its label embedding; else it has the mean of task 1's
        self.learns_label = self.method.learns_label or experiment.label_embedding == "learned"
        adapted = {i: name for i, name in enumerate(conv_layers(net)) if name in self.layers}
        for index in experiment.extra_rank:
            if index not in adapted:
                accepted = f"indices of adapted layers, here {', '.join(map(str, adapted))}"
                raise LabError(f"extra_rank={index}: accepted are {accepted}.")
            own = vars(self.settings[adapted[index]])
            self.settings[adapted[index]] = type(given)(**own | {"rank": own["rank"] + 1})

    def _row(self, numbers, *more) -> Row:
        made = {name: numbers(layer, self.settings[name], *more) for name, layer in self.layers.items()}
        return {f"{name}/{key}": value for name, row in made.items() for key, value in row.items()}

    def start(self, cls: int) -> Row:
        """The numbers at which a class starts, on the CPU; they depend on the seed and the class alone."""
        row = self._row(self.method.start, stream(self.experiment.seed, "adapter start", cls))
        return row | ({LABEL: self.mean_embedding().cpu().clone()} if self.learns_label else {})

    def check(self) -> None:
        """Raise LabError when a method of the user's own makes weights of another shape than its layers have."""
        neutral, K = self.neutral(), 2
        if self.method.text and self.method.weight:
            name, layer = next(iter(self.layers.items()))
            W0, numbers = torch.ones(layer.weight.shape), numbers_by_layer(stack([neutral] * K))[name]
            made = tuple(self.method.weight(W0, numbers, self.settings[name]).shape)
            if made != (K, *W0.shape):
                about = f"makes weights {made} of {K} classes for weights {tuple(W0.shape)}"
                raise LabError(f"The method {self.method.name} {about}: accepted are {(K, *W0.shape)}.")

    def neutral(self) -> Row:
        """The row that leaves the network as it is, shared by all classes of task 1."""
        return self._row(self.method.neutral)

    @property
    def parameters_per_class(self) -> int:
        """PPC: the numbers learned for one class (a frozen label embedding is not learned and not counted)."""
        label = self.net.embedding if self.learns_label else 0
        return label + sum(value.numel() for value in self.neutral().values())

    def mean_embedding(self) -> Tensor:
        """The mean label embedding (E,) of the classes of task 1: the frozen embedding of every new class."""
        return self.net.label_emb.weight.detach().mean(0)

    def matrix(self, layer: str, numbers: Row) -> Tensor:
        """F (K, O, I) of a layer from its numbers with a leading class axis; LabError for a method without an F."""
        if self.method.matrix is None:
            raise LabError(f"The method {self.method.name} has no F.")
        return self.method.matrix(numbers, self.settings[layer])

    def bound(self, layer: str) -> int:
        """The largest rank that F of a layer can have by its formula."""
        return self.method.bound(self.settings[layer], *self.layers[layer].weight.shape[:2])

    def weights(self, rows: Row) -> dict[str, Tensor]:
        """Effective weights (K, O, I, ...) of every layer whose weights the method changes, by ``<layer>.weight``."""
        weight, numbers = self.method.weight, numbers_by_layer(rows)
        return {
            f"{name}.weight": weight(layer.weight.detach(), numbers[name], self.settings[name])
            for name, layer in self.layers.items()
            if weight
        }

    def affines(self, rows: Row) -> dict[str, Tensor]:
        """Scale and shift (K, 2, I) of the input of every layer whose input is changed, by ``<layer>.affine``."""
        affine = self.method.affine
        return {f"{name}.affine": affine(numbers) for name, numbers in numbers_by_layer(rows).items() if affine}

    def velocity(self, rows: Row, K: int, others: dict[str, Tensor] | None = None) -> Velocity:
        """v(t, x) of K classes side by side, image i of class i % K; ``others`` stand in for the network's weights."""
        weights = self.weights(rows)
        if K == 1:  # an ordinary network
            weights = {name: weight[0] for name, weight in weights.items()}
        changes = (others or {}) | weights | self.affines(rows)
        embedding = rows[LABEL] if LABEL in rows else self.mean_embedding().expand(K, -1)
        return lambda t, x: functional_call(self.net, changes, (t, x, embedding.repeat(x.shape[0] // K, 1)))

    def merged(self, row: Row) -> dict[str, Tensor]:
        """One class's plain weights (O, I, ...), to load over the network; LabError where inputs change instead."""
        if self.method.affine:
            raise LabError(f"{self.method.name} shifts inputs before the padding, which no weights can hold.")
        return {name: value[0].detach() for name, value in self.weights(stack([row])).items()}
