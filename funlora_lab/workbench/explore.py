"""What the workbench asks of functions, classes and layers: settings in, numbers and images out; no widget, no picture.

Letters: N images, C channels, H x W pixels, O = Cout, I = Cin, p functions, r ratio, k tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from funlora_lab import adapters, flow, functions, metrics
from funlora_lab import classifier as classifiers
from funlora_lab.adapters import LABEL, Row
from funlora_lab.config import FUNCTIONAL_METHODS, Experiment
from funlora_lab.data import to_bytes
from funlora_lab.errors import LabError
from funlora_lab.flow import Solver, Velocity
from funlora_lab.frozen import FrozenBase
from funlora_lab.network import WholeNetwork, build_unet
from funlora_lab.opened import OpenRun
from funlora_lab.presets import preset
from funlora_lab.streams import stream
from funlora_lab.studies import analysis
from funlora_lab.unet import conv_layers

MEASURES = ("change of the weights", "importance (Eq. 20)", "rank of F")


@dataclass(frozen=True)
class FunctionView:
    """A (O,), B (I,), F (O, I), its singular values, how many of them count (numerical_rank), the formula's bound."""

    method: str
    A: Tensor
    B: Tensor
    F: Tensor
    singular: Tensor
    rank: int
    bound: int


def first_numbers(method: str, outputs: int, inputs: int, p: int = 10, ratio: int = 1, start: str = "identity") -> Row:
    """One layer's numbers as training starts them: A (O/r,), B (I/r,), ponderation and frequency or exponent (p,)."""
    e = preset("digits").but(method=method, functions=p, ratio=ratio, start=start)
    layer = nn.Conv2d(inputs, outputs, 1, device="meta")
    return adapters.METHODS[method].start(layer, e, None)


def spread(numbers: Row, amount: float, seed: int = 0) -> Row:
    """The same numbers with A and B moved from where they are by normal noise of standard deviation ``amount``."""
    moved = {
        name: numbers[name] + amount * torch.randn(numbers[name].shape, generator=stream(seed, "workbench", name))
        for name in ("A", "B")
    }
    return numbers | moved


def function_view(method: str, numbers: Row, ratio: int = 1) -> FunctionView:
    """F of Eq. 8 for one layer's numbers, with its spectrum."""
    function, _, _ = FUNCTIONAL_METHODS[method]
    p = len(numbers["ponderation"]) if "ponderation" in numbers else 1
    e = preset("digits").but(method=method, functions=p, ratio=ratio)
    F = adapters.functional_matrix(e, {name: value[None].double() for name, value in numbers.items()})[0]
    singular = metrics.singular_values(F)
    free = 1 if function == "shift" else ratio  # a shift by less than r tears repeated entries apart
    bound = functions.rank_bound(function, p, F.shape[0] // free, F.shape[1] // free)
    A, B = (numbers[name].repeat_interleave(ratio) for name in "AB")
    return FunctionView(method, A, B, F, singular, int(metrics.numerical_rank(F)), bound)


def layer_numbers(opened: OpenRun, cls: int, layer: int) -> Row:
    """What class ``cls`` learned for convolution ``layer`` (its index among all), in float64 on the CPU."""
    name = adapted_layers(opened).get(layer)
    if name is None:
        raise LabError(f"Layer {layer} is not adapted: accepted is one of {_listed(adapted_layers(opened))}.")
    return analysis.in_float64(adapters.by_layer(opened.row(cls))[name])


def _listed(values) -> str:
    return ", ".join(map(str, values))


def adapted_layers(opened: OpenRun) -> dict[int, str]:
    """Index among all convolutions -> name, of the layers that the run's method adapts."""
    if not isinstance(opened.learner, FrozenBase):
        raise LabError(f"The method {opened.experiment.method} adapts no layers: choose a run of an adapter method.")
    layers = {i: name for i, name in enumerate(conv_layers(opened.network)) if name in opened.adapters.layers}
    if not layers:
        raise LabError(f"The method {opened.experiment.method} adapts no convolutions: choose a run of another method.")
    return layers


def new_classes(opened: OpenRun) -> list[int]:
    """The classes with a row of their own: those learned after task 1, then those imported."""
    return list(opened.learner.rows)


# --- images -------------------------------------------------------------------------------------------------------


def generator_after(opened: OpenRun, task: int) -> WholeNetwork:
    """The run's generator as it stood after ``task`` (counted from 1); raises LabError when its method has none."""
    learner = opened.learner_after(task)
    if learner is None:
        raise LabError(f"The method {opened.experiment.method} draws no images: choose a run of another method.")
    return learner


def starting_noise(experiment: Experiment, cls: int, count: int, seed: int) -> Tensor:
    """The noise (count, C, H, W) that class ``cls`` starts from: the same for every task, method and run."""
    size = experiment.image_size
    return flow.noise(seed, cls, 0, (count, experiment.channels, size, size))


@torch.no_grad()
def images_of(velocity: Velocity, x0: Tensor, solver: Solver, device: torch.device) -> Tensor:
    """uint8 images (N, C, H, W) from noise x0."""
    return to_bytes(solver.integrate(velocity, x0.to(device))[0]).cpu()


def across_tasks(opened: OpenRun, cls: int, count: int, solver: Solver, seed: int) -> dict[str, Tensor]:
    """Images of a class from the same noise after every task that knows it; each task's generator is loaded afresh."""
    first = next((k for k, classes in enumerate(opened.tasks, 1) if cls in classes), None)
    if first is None:
        raise LabError(f"Class {opened.known[cls]} was imported: it belongs to no task of this run.")
    x0 = starting_noise(opened.experiment, cls, count, seed)
    device = opened.runtime.device
    return {
        f"after task {k}": images_of(generator_after(opened, k).source(cls).velocity(), x0, solver, device)
        for k in range(first, len(opened.tasks) + 1)
    }


def across_runs(runs: Sequence[OpenRun], cls: int, count: int, solver: Solver, seed: int) -> dict[str, Tensor]:
    """Images of a class from the same noise in several runs; raises LabError when their classes or sizes differ."""
    result = {}
    for opened in runs:
        if opened.learner is None:
            raise LabError(f"The run {opened.run.folder.name} draws no images: its method trains no generator.")
        if opened.classes != runs[0].classes or opened.experiment.image_size != runs[0].experiment.image_size:
            raise LabError(f"The run {opened.run.folder.name} has other classes or another image size than the first.")
        x0 = starting_noise(opened.experiment, cls, count, seed)
        images = images_of(opened.source(cls).velocity(), x0, solver, opened.runtime.device)
        result[opened.run.folder.name] = images
    return result


def identical(images: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return all(torch.equal(images[0], other) for other in images[1:])


@torch.no_grad()
def path_of(opened: OpenRun, cls: int, count: int, solver: Solver, seed: int, frames: int | None = None) -> Tensor:
    """uint8 states (frames, count, C, H, W) from noise to image, the last equal to the drawn images."""
    x0 = starting_noise(opened.experiment, cls, count, seed)
    states, _ = solver.path(opened.source(cls).velocity(), x0.to(opened.runtime.device), frames)
    return to_bytes(states).cpu()


def row_of(opened: OpenRun, cls: int) -> Row:
    """All of a class's numbers, its label embedding included; a class of task 1 has the neutral row."""
    adapted_layers(opened)
    learner = opened.learner
    if cls in learner.labels:
        label = opened.network.label_emb.weight.detach()[learner.labels.index(cls)]
        return opened.adapters.neutral() | {LABEL: label.cpu().clone()}
    return {LABEL: opened.adapters.mean_embedding().cpu()} | opened.row(cls)


def scaled(row: Row, layer: str, number: str, which: int | None, factor: float) -> Row:
    """The row with one ponderation, frequency or exponent of a layer multiplied (``which`` None: all of them)."""
    key = f"{layer}/{number}"
    if key not in row:
        names = sorted({name.rpartition("/")[2] for name in row if name.startswith(layer + "/")})
        raise LabError(f"{number}: accepted for this run's method is {_listed(names) or 'nothing'}.")
    changed = row[key].clone()
    if which is None:
        changed *= factor
    elif which < len(changed):
        changed[which] *= factor
    else:
        raise LabError(f"Number {which + 1} of {number}: accepted is 1 to {len(changed)}.")
    return row | {key: changed}


def mixed(first: Row, second: Row, share: float) -> Row:
    """(1 - share) of one class's numbers plus ``share`` of another's."""
    return {name: torch.lerp(value, second[name], share) for name, value in first.items()}


@torch.no_grad()
def images_of_rows(opened: OpenRun, rows: Sequence[Row], x0: Tensor, solver: Solver) -> list[Tensor]:
    """uint8 images (N, C, H, W) for every row, all from the same noise, in one batch of K x N images."""
    device, K = opened.runtime.device, len(rows)
    stacked = {name: value.to(device) for name, value in adapters.stack(list(rows)).items()}
    images = images_of(opened.adapters.velocity(stacked, K), x0.repeat_interleave(K, 0), solver, device)
    return [images[k::K] for k in range(K)]


def judged(opened: OpenRun, images: Tensor) -> list[str]:
    """What the run's classifier trained on the real images of all classes takes uint8 images for: class names."""
    everything = [cls for classes in opened.tasks for cls in classes]
    return [opened.classes[everything[i]] for i in classifiers.predict(opened.judge, images).tolist()]


def drift(before: Tensor, after: Tensor) -> float:
    """Mean absolute difference of uint8 images, in grey levels from 0 to 255."""
    return (before.float() - after.float()).abs().mean().item()


# --- layers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One convolution: its place in the U-Net and its sizes."""

    index: int
    name: str
    part: str  # encoder, middle, decoder
    inputs: int
    outputs: int
    kernel: int
    size: int  # pixels a side of its output


def unet_layers(experiment: Experiment) -> list[Layer]:
    """All convolutions in module order with the resolution each works at, found without computing anything."""
    with torch.device("meta"):
        net = build_unet(experiment, 1).eval()
        x = torch.zeros(1, experiment.channels, experiment.image_size, experiment.image_size)
        t, y = torch.zeros(()), torch.zeros(1, dtype=torch.long)
    sizes = {}
    for name, module in conv_layers(net).items():
        module.register_forward_hook(lambda _m, _i, out, name=name: sizes.update({name: out.shape[-1]}))
    net(t, x, y)
    parts = {"input_blocks": "encoder", "middle_block": "middle"}
    return [
        Layer(i, name, parts.get(name.split(".")[0], "decoder"), m.in_channels, m.out_channels, m.kernel_size[0], size)
        for (i, (name, m)), size in zip(
            enumerate(conv_layers(net).items()), (sizes[name] for name in conv_layers(net)), strict=True
        )
    ]


@torch.no_grad()
def layer_values(opened: OpenRun, measure: str) -> pd.DataFrame:
    """One line a class after task 1, one column an adapted layer (its index), of one of ``MEASURES``.

    change of the weights: mean |W - W0| / mean |W0|; importance: Eq. 20 of A and B; rank of F: numerical_rank.
    """
    layers, e = adapted_layers(opened), opened.experiment
    if measure not in MEASURES:
        raise LabError(f"measure={measure}: accepted is {_listed(MEASURES)}.")
    if measure == "rank of F" and e.method not in FUNCTIONAL_METHODS:
        raise LabError(f"The method {e.method} has no F: choose another measure.")
    result = {}
    for cls in new_classes(opened):
        row = opened.row(cls)
        one = {name: value.to(opened.runtime.device)[None] for name, value in row.items()}
        weights = opened.adapters.weights(one) if measure == MEASURES[0] else {}
        values = []
        for index, name in layers.items():
            if measure == MEASURES[0]:
                W0 = opened.adapters.layers[name].weight
                values.append(((weights[name + ".weight"][0] - W0).abs().mean() / W0.abs().mean()).item())
                continue
            numbers = layer_numbers(opened, cls, index)
            if measure == MEASURES[1]:
                if not {"A", "B"} <= numbers.keys():
                    raise LabError(f"The method {e.method} has no A and B: choose another measure.")
                values.append(metrics.importance(numbers["A"], numbers["B"]))
            else:
                values.append(int(metrics.numerical_rank(analysis.matrix(opened, numbers))))
        result[opened.known[cls]] = values
    return pd.DataFrame.from_dict(result, orient="index", columns=list(layers)).rename_axis("class")


@torch.no_grad()
def layer_table(opened: OpenRun, layer: int) -> pd.DataFrame:
    """One line a class: rank of F, share of the largest singular value, means of what it learned for a layer."""
    lines = {}
    for cls in new_classes(opened):
        numbers = layer_numbers(opened, cls, layer)
        line = {"numbers": sum(value.numel() for value in numbers.values())}
        if {"A", "B"} <= numbers.keys():
            line["importance"] = metrics.importance(numbers["A"], numbers["B"])
        if opened.experiment.method in FUNCTIONAL_METHODS:
            view = function_view(opened.experiment.method, numbers, opened.experiment.ratio)
            line |= {
                "rank": view.rank,
                "bound": view.bound,
                "first singular value, share": (view.singular[0] / view.singular.sum()).item(),
                "mean F": view.F.mean().item(),
            }
        for name in ("ponderation", "frequency", "exponent"):
            if name in numbers:
                line[f"mean |{name}|"] = numbers[name].abs().mean().item()
        lines[opened.known[cls]] = line
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("class")
