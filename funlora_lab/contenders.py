"""What the benchmark lets take turns: our own training loops and sampling, torchcfm's U-Net, the naive forms.

Ours are the very loops that a run goes through (random batches, clipping, Adam, moving average, log), on random
images and without saving progress, which takes at most a twentieth of a run. A *turn* is a function that takes some
steps and waits for the device.

Letters: B images a step, K classes side by side, N images a class.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from funlora_lab.adapters import Adapters, Row
from funlora_lab.config import Experiment
from funlora_lab.data import Dataset, Images, to_floats
from funlora_lab.errors import LabError
from funlora_lab.flow import flow_loss
from funlora_lab.frozen import FrozenBase
from funlora_lab.layers import FORMS
from funlora_lab.network import build_unet
from funlora_lab.sampling import draw_chunk
from funlora_lab.speed import autocast
from funlora_lab.store import Store
from funlora_lab.training import Runtime
from funlora_lab.work import Work

Turn = Callable[[], None]
FOREVER = 2**40  # images: no benchmark reaches the end of a training
BASE = (0, 1)  # the classes of task 1; adapters get the classes after them


class Contenders:
    """One configuration on one device, with random images of ``classes`` classes; everything it writes is temporary.

    ``steps`` are taken in a turn before the clock is read, so that a GPU is not waited for after every one.
    """

    def __init__(self, experiment: Experiment, runtime: Runtime, folder: Path, classes: int, steps: int):
        self.experiment = experiment.but(
            method="funlora",
            base_images=FOREVER,
            adapter_images=FOREVER,
            lanes=0,
            base_ema_start=0,
            adapter_ema_start=0,
        )  # with the moving average from the first step, which the paper's presets start later
        self.runtime, self.folder, self.steps = replace(runtime, save_seconds=math.inf), folder, steps
        e = experiment
        pixels = torch.randint(0, 256, (64 * classes, e.channels, e.image_size, e.image_size), dtype=torch.uint8)
        images = Images(pixels, torch.arange(len(pixels)) % classes)
        self.dataset = Dataset("random", tuple(map(str, range(classes))), images, images, images)
        self.learners, self.open = 0, []

    def learner(self, **settings) -> FrozenBase:
        e = self.experiment.but(log_every=self.steps, **settings)
        self.learners += 1
        folder = self.folder / str(self.learners)
        classes = len(self.dataset.classes)
        tasks = [list(BASE), list(range(len(BASE), classes))]
        return FrozenBase(Work(e, self.dataset, tasks, Store(folder), self.runtime))

    def with_base(self, **settings) -> FrozenBase:
        """A learner after task 1, with a base that has learned nothing."""
        learner = self.learner(**settings)
        learner.adopt(build_unet(learner.work.experiment, len(BASE)), "untrained", list(BASE))
        return learner

    def base_step(self, batch: int, precision: str) -> Turn:
        """Our base training: each turn runs the loop up to its next line of the log."""
        learner = self.learner(precision=precision, base_batch=batch)
        train = self.dataset.train.of(list(BASE))
        events = learner.train("base", list(BASE), train, learner.work.experiment.base_steps)
        return self.advance(events, 1)

    def adapter_step(self, K: int, N: int, kind: type[Adapters] = Adapters) -> Turn:
        """Our training of K adapters side by side, N images each."""
        learner = self.with_base(adapter_batch=N)
        learner.adapters = kind(learner.net, learner.work.experiment)
        return self.advance(learner.learn_side_by_side(list(range(len(BASE), len(BASE) + K))), K)

    def advance(self, events: Iterator, lines: int) -> Turn:
        self.open.append(events)

        def turn() -> None:
            for _ in range(lines):
                next(events)

        return turn

    def close(self) -> None:
        """Stop the open trainings and free what they hold."""
        for events in self.open:
            events.close()
        self.open = []

    def torchcfm_step(self, batch: int, precision: str) -> Turn:
        """torchcfm's U-Net of the same configuration in an ordinary loop: Adam, clipping, average, as its examples."""
        e, device = self.experiment, self.runtime.device
        net = torchcfm_unet(e, len(BASE), device)
        average = [value.detach().clone() for value in net.parameters()]
        optimizer = torch.optim.Adam(net.parameters(), lr=e.base_lr)
        images = self.dataset.train.of(list(BASE))

        def step() -> Tensor:
            order = torch.randint(0, len(images), (batch,))
            x1 = to_floats(images.pixels[order].to(device))
            y = images.labels[order].to(device)
            x0, t = torch.randn_like(x1), torch.rand(batch, device=device)
            optimizer.zero_grad()
            with autocast(precision, device):
                loss = flow_loss(lambda t, x: net(t, x, y), x1, x0, t).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), e.grad_clip)
            optimizer.step()
            with torch.no_grad():
                for mean, value in zip(average, net.parameters(), strict=True):
                    mean.mul_(e.base_ema).add_(value, alpha=1 - e.base_ema)
            return loss

        def turn() -> None:
            for _ in range(self.steps):
                loss = step()
            loss.item()

        return turn

    def sampling(self, batch: int) -> dict[str, Turn]:
        """Drawing a chunk by two Euler steps: a class with merged weights, and a class of the plain network."""
        learner = self.with_base(solver="euler", steps=2, chunk=batch)
        e, device, new = learner.work.experiment, self.runtime.device, len(BASE)
        learner.rows[new], learner.keys[new] = learner.adapters.start(new), "untrained"
        fields = {"merged": learner.source(new).velocity(), "plain": learner.source(0).velocity()}

        def turn_of(velocity) -> Turn:
            def turn() -> None:
                for chunk in range(self.steps):
                    drawn, _ = draw_chunk(velocity, e, new, chunk, device)
                drawn.sum().item()

            return turn

        return {name: turn_of(velocity) for name, velocity in fields.items()}

    def forms(self, K: int, N: int) -> dict[str, Turn]:
        """The largest adapted layer's convolution of K classes, forward and backward, in every form."""
        e, device = self.experiment, self.runtime.device
        with torch.device("meta"):
            net = build_unet(e, 1)
        layers = Adapters(net, e).layers
        layer = max(layers.values(), key=lambda layer: layer.weight.numel())
        size = e.image_size // 2 ** (len(e.multipliers) - 1)
        dtype = torch.bfloat16 if e.precision == "bf16" else torch.float32
        O, I, k, _ = layer.weight.shape
        x = torch.randn(N * K, I, size, size, device=device, dtype=dtype, requires_grad=True)
        weight = (torch.randn(K, O, I, k, k, device=device, dtype=dtype) / I).requires_grad_()
        bias = torch.zeros(O, device=device, dtype=dtype)

        def turn_of(form) -> Turn:
            def turn() -> None:
                for _ in range(self.steps):
                    y = form(x, weight, bias, 1, k // 2)
                    grads = torch.autograd.grad(y.sum(), (x, weight))
                grads[1].sum().item()

            return turn

        return {name: turn_of(form) for name, form in FORMS.items()}


class PerImage(Adapters):
    """The naive way: every image of the batch has numbers, F and kernels of its own."""

    def velocity(self, rows: Row, K: int):
        N = self.experiment.adapter_batch
        return super().velocity(
            {name: value.repeat(N, *[1] * (value.dim() - 1)) for name, value in rows.items()}, N * K
        )


def torchcfm_unet(experiment: Experiment, classes: int, device: torch.device) -> nn.Module:
    """torchcfm's ``UNetModel`` of the experiment's configuration, first weights its own.

    Raises LabError when torchcfm is missing or cannot build it.
    """
    try:
        from torchcfm.models.unet.unet import UNetModel
    except ImportError:
        raise LabError(
            "The benchmark compares with torchcfm, which is not installed: `pip install 'funlora-lab[bench]'` adds it."
        ) from None
    e = experiment
    if e.base_channels % 32:
        raise LabError(f"base_channels={e.base_channels}: torchcfm's U-Net, to compare with, takes multiples of 32.")
    with device:
        net = UNetModel(
            image_size=e.image_size,
            in_channels=e.channels,
            model_channels=e.base_channels,
            out_channels=e.channels,
            num_res_blocks=e.res_blocks,
            attention_resolutions=tuple(e.image_size // size for size in e.attention),
            dropout=e.dropout,
            channel_mult=e.multipliers,
            num_classes=classes,
            num_head_channels=min(e.head_channels, e.base_channels),
        )
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):  # it always has 32 groups
            module.num_groups = math.gcd(e.norm_groups, module.num_channels)
    return net
