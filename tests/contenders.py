"""What the benchmark lets take turns: our own trainings and sampling, torchcfm's U-Net, the naive forms.

Ours are the trainings that a run goes through (random batches, clipping, Adam, moving average, log), on random images
and without saving progress, which takes at most a twentieth of a run. A *turn* is a function that takes some steps and
waits for the device.

Letters: B images a step, K classes side by side, N images a class.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from funlora_lab.adapters import Adapters, Row
from funlora_lab.adapters.functions import scaled
from funlora_lab.data import Dataset, Images, to_floats
from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment
from funlora_lab.flow import flow_loss
from funlora_lab.store import Artefact, Store
from funlora_lab.systems import AdaptedBase, Context, build_unet, draw_chunk, solver_of
from funlora_lab.training import Runtime, Trainer, autocast, replays
from funlora_lab.unet.layers import FORMS

Turn = Callable[[], None]
BASE = [0, 1]  # the classes of task 1; adapters get the classes after them
MANY_IMAGES = 2**40  # no benchmark reaches the end of a training


class PerImage(Adapters):
    """The naive way: every image of the batch has numbers, F and kernels of its own."""

    def velocity(self, rows: Row, K: int, others: dict[str, Tensor] | None = None):
        N = self.experiment.adapter.batch
        rows = {name: value.repeat(N, *[1] * (value.dim() - 1)) for name, value in rows.items()}
        return super().velocity(rows, N * K, others)


class Contenders:
    """One experiment on one device, with random images of ``classes`` classes; everything it writes is temporary.

    ``steps`` are taken in a turn before the clock is read, so that a GPU is not waited for after every one. The moving
    average runs from the first step, which the paper's presets start later.
    """

    def __init__(self, experiment: Experiment, runtime: Runtime, folder: Path, classes: int, steps: int):
        changes = {"base_images": MANY_IMAGES, "adapter_images": MANY_IMAGES, "lanes": 0, "log_every": steps}
        self.experiment = e = experiment.but(method="funlora", base_ema_start=0, adapter_ema_start=0, **changes)
        self.runtime, self.folder, self.steps = replace(runtime, save_seconds=math.inf), folder, steps
        pixels = torch.randint(0, 256, (64 * classes, e.channels, e.image_size, e.image_size), dtype=torch.uint8)
        images = Images(pixels, torch.arange(len(pixels)) % classes)
        self.dataset = Dataset("random", tuple(map(str, range(classes))), images, images, images)
        self.count = 0

    def generator(self, **settings) -> AdaptedBase:
        """A generator in a folder of its own, over a base that has learned nothing."""
        self.count += 1
        e, store = self.experiment.but(**settings), Store(self.folder / str(self.count))
        tasks = [BASE, list(range(len(BASE), len(self.dataset.classes)))]
        generator = AdaptedBase(Context(e, self.dataset, tasks, store, self.runtime))
        generator.adopt(build_unet(e, len(BASE)), "untrained", BASE)
        return generator

    def base_steps(self, batch: int, precision: str) -> Turn:
        """Our training of the base."""
        generator = self.generator(precision=precision, base_batch=batch)
        e = generator.context.experiment
        artefact, images = generator.artefact("base", BASE, e.base.steps), self.dataset.train.of(BASE)
        net = generator.net.requires_grad_(True)
        return self.turn_of(artefact, lambda: generator.trainer(artefact, net, BASE, images, e.base.steps, "base"))

    def adapter_steps(self, K: int, N: int, kind: type[Adapters] = Adapters) -> Turn:
        """Our training of K adapters side by side, N images each."""
        generator, classes = self.generator(adapter_batch=N), list(range(len(BASE), len(BASE) + K))
        generator.adapters = kind(generator.net, generator.context.experiment)
        artefact = generator.context.store.artefact("adapters", members=classes)
        return self.turn_of(artefact, lambda: generator.adapter_trainer(artefact, classes))

    def turn_of(self, artefact: Artefact, make: Callable[[], Trainer]) -> Turn:
        """The next steps of a training; their line in the log waits for the device."""
        artefact.open()
        trainer = make()

        def turn() -> None:
            for _ in range(self.steps):
                trainer.step()

        return turn

    def torchcfm_steps(self, batch: int, precision: str) -> Turn:
        """torchcfm's U-Net of the same configuration in an ordinary loop: Adam, clipping, average, as its examples."""
        e, device = self.experiment, self.runtime.device
        net = torchcfm_unet(e, len(BASE), device)
        average = [value.detach().clone() for value in net.parameters()]
        optimizer = torch.optim.Adam(net.parameters(), lr=e.base.lr)
        images = self.dataset.train.of(BASE)

        def step() -> Tensor:
            order = torch.randint(0, len(images), (batch,))
            x1, y = to_floats(images.pixels[order].to(device)), images.labels[order].to(device)
            x0, t = torch.randn_like(x1), torch.rand(batch, device=device)
            optimizer.zero_grad()
            with autocast(precision, device):
                loss = flow_loss(lambda t, x: net(t, x, y), x1, x0, t).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), e.grad_clip)
            optimizer.step()
            with torch.no_grad():
                for mean, value in zip(average, net.parameters(), strict=True):
                    mean.mul_(e.base.ema).add_(value, alpha=1 - e.base.ema)
            return loss

        def turn() -> None:
            for _ in range(self.steps):
                loss = step()
            loss.item()

        return turn

    def sampling(self, batch: int) -> dict[str, Turn]:
        """Drawing a chunk by two Euler steps: a class with merged weights, and a class of the plain network."""
        generator, new = self.generator(solver="euler", steps=2, chunk=batch), len(BASE)
        e, device = generator.context.experiment, self.runtime.device
        generator.rows[new], generator.keys[new] = generator.adapters.start(new), "untrained"

        def turn_of(velocity) -> Turn:
            solver = replace(solver_of(e), repeated=replays(device))

            def turn() -> None:
                for chunk in range(self.steps):
                    drawn, _ = draw_chunk(velocity, e, new, chunk, device, solver)
                drawn.sum().item()

            return turn

        drawn = {"merged": generator.source(new), "plain": generator.source(0)}
        return {name: turn_of(source.velocity()) for name, source in drawn.items()}

    def forms(self, K: int, N: int) -> dict[str, Turn]:
        """The largest adapted layer's convolution of K classes, forward and backward, in every form."""
        e, device = self.experiment, self.runtime.device
        net, sides = self.generator().net, []
        layer = max(Adapters(net, e).layers.values(), key=lambda layer: layer.weight.numel())
        layer.register_forward_pre_hook(lambda layer, given: sides.append(given[0].shape[-1]))
        x = torch.zeros(1, e.channels, e.image_size, e.image_size, device=device)
        net(x[:, 0, 0, 0], x, torch.zeros(1, dtype=torch.long, device=device))
        dtype, like = torch.bfloat16 if e.precision == "bf16" else torch.float32, {}
        if device.type == "cuda":
            like["memory_format"] = torch.channels_last
        O, I, k, _ = layer.weight.shape
        x = torch.randn(N * K, I, *sides[:1] * 2, device=device, dtype=dtype).contiguous(**like).requires_grad_()
        W0 = torch.randn(O, I, k, k, device=device, dtype=dtype).contiguous(**like) / I
        weight = scaled(W0, torch.ones(K, O, I, 1, 1, device=device, dtype=dtype)).requires_grad_()
        bias = torch.zeros(O, device=device, dtype=dtype)

        def turn_of(form) -> Turn:
            def turn() -> None:
                for _ in range(self.steps):
                    y = form(x, weight, bias, 1, k // 2)
                    grads = torch.autograd.grad(y.sum(), (x, weight))
                grads[1].sum().item()

            return turn

        return {name: turn_of(form) for name, form in FORMS.items()}


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
    e, network = experiment, experiment.network
    if network.base_channels % 32:
        raise LabError(f"base_channels={network.base_channels}: torchcfm's U-Net takes multiples of 32 alone.")
    with device:
        net = UNetModel(
            image_size=e.image_size,
            in_channels=e.channels,
            model_channels=network.base_channels,
            out_channels=e.channels,
            num_res_blocks=network.res_blocks,
            attention_resolutions=tuple(e.image_size // size for size in network.attention),
            dropout=network.dropout,
            channel_mult=network.multipliers,
            num_classes=classes,
            num_head_channels=min(network.head_channels, network.base_channels),
        )
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):  # it always has 32 groups
            module.num_groups = math.gcd(network.norm_groups, module.num_channels)
    return net
