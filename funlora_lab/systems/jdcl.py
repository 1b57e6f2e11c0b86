"""JDCL (Skiers & Deja 2025): one unconditional diffusion model whose encoder also classifies, merged task by task.

A task trains a network on its real images alone (local), draws images of old classes from the previous network and of
new ones from the local one, by what their heads take them for, and distils both networks into a new one (global).

Deviations from its public code: this backbone, with a head on fewer features; averaged teachers in eval mode; the local
network goes on from the previous one, as theirs on ImageNet100 (``local_start=scratch``: as on CIFAR); what the head
sees is augmented as the preset's classifier is; and no weights are chosen by test images.

Letters: B images, C channels, H x W pixels, K classes (outputs of the head, also those not yet seen).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funlora_lab.data import Images, to_bytes, to_floats
from funlora_lab.diffusion import Noise
from funlora_lab.errors import LabError
from funlora_lab.seeds import seeded, stream
from funlora_lab.systems.baselines import SelfReplay, evened
from funlora_lab.systems.classifier import augment
from funlora_lab.systems.denoiser import Denoiser
from funlora_lab.systems.generator import Batch, Source, system
from funlora_lab.systems.network import build_unet
from funlora_lab.systems.sampling import stored_chunk
from funlora_lab.training import autocast, computing, prepared, replays


class Joint(nn.Module):
    """A U-Net of one label, and a head on the means over pixels of all its encoder's outputs."""

    def __init__(self, unet: nn.Module, example: Tensor, hidden: int, classes: int, dropout: float):
        super().__init__()
        self.unet = unet
        width = self.features(example).shape[1]
        last = nn.Linear(hidden, classes)
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(0.2), nn.Dropout(dropout), last)

    def features(self, x: Tensor) -> Tensor:
        """Of clean images (B, C, H, W) at time 0."""
        _, skips, middle = self.unet.encode(x.new_zeros(()), x, x.new_zeros(len(x), dtype=torch.long))
        return torch.cat([h.mean((2, 3)) for h in (*skips, middle)], 1)

    def logits(self, x: Tensor) -> Tensor:
        """(B, K) of clean images (B, C, H, W)."""
        return self.head(self.features(x))

    def forward(self, t: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The noise predicted in x (B, C, H, W) at times t (B,); of the classes y (B,) it sees nothing."""
        return self.unet(t, x, x.new_zeros(len(x), dtype=torch.long))


def squared(a: Tensor, b: Tensor) -> Tensor:
    """The mean squared difference of every image (B,)."""
    return (a.float() - b.float()).square().mean((1, 2, 3))


def local_loss(predicted: Tensor, noise: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Of every image (B,): predicted and true noise (B, C, H, W), logits (B, K) and classes y (B,)."""
    return squared(predicted, noise) + 1e-3 * F.cross_entropy(logits.float(), y, reduction="none")


def global_loss(
    predicted: Tensor, noise: Tensor, logits: Tensor, y: Tensor, taught: Tensor, shares: Tensor, late: bool
) -> Tensor:
    """Of every image (B,), with the noise ``taught`` (B, C, H, W) and ``shares`` (B, K) of the classes by its teacher.

    The mean over the batch is the published sum: 0.01 of the noise loss, 2 n_i / n of either teacher's mean squared
    difference over its own n_i of n images, 0.001 of the same sum of cross-entropies, and 1e-5 of the labels' own where
    the training is ``late``, in its last two thirds.
    """
    distilled = -(shares * torch.log_softmax(logits.float(), 1)).sum(1)
    loss = 0.01 * squared(predicted, noise) + 2 * squared(predicted, taught) + 2e-3 * distilled
    return loss + (1e-5 * F.cross_entropy(logits.float(), y, reduction="none") if late else 0)


def chosen(shares: Tensor, k: int, quota: int) -> Tensor:
    """Indices of ``quota`` of N images for class k, by their shares (N, K): those taken for it, then the likeliest."""
    mine = shares.argmax(1) == k
    others = shares[:, k].masked_fill(mine, -1).argsort(descending=True, stable=True)  # of a class never predicted all
    return torch.cat([mine.nonzero()[:, 0], others])[:quota]


@system("jdcl", "one diffusion model with a classifying head, distilled from the previous one and that of the new task")
class Jdcl(Denoiser, SelfReplay):
    clip, pooled = False, True
    teachers: tuple[Joint, Joint] | None = None  # of old and of new classes, in a global stage

    def check(self) -> None:
        for name in ("base_weights", "pretrain_root"):
            if value := getattr(self.context.experiment, name):
                raise LabError(f"{name}={value}: accepted is nothing for the method jdcl.")
        super().check()

    def learn(self, task: int) -> None:
        context, e, new = self.context, self.context.experiment, self.context.tasks[task]
        real, seen = context.dataset.train.of(new), self.labels + new
        if task == 0:
            net, key = self.stage("base", seen, real, e.base.steps)
        else:
            start, given = (None, {"start": "scratch"}) if e.prior.local_start == "scratch" else (self.net, {})
            steps = -(-e.adapter.images * len(new) // e.base.batch)
            local, key = self.stage(f"local-{task + 1}", seen, real, steps, start, **given)
            parts, given = self.draw(self.drawn | self.sources(local, key, new, seen))
            images, self.teachers = evened(parts, e.seed, task), (self.net, local)
            net, key = self.stage(f"global-{task + 1}", seen, images, self.steps(task), self.net, **given, local=key)
            self.teachers = None
        self.adopt(net, key, seen)

    def adopt(self, net: Joint, key: str, labels: list[int]) -> None:
        super().adopt(net, key, labels)
        self.drawn = self.sources(self.net, key, labels, labels)

    def stage(self, name: str, labels: list[int], images: Images, steps: int, start: Joint | None = None, **inputs):
        """(a network trained on ``images`` from the weights of ``start`` or from scratch, its artefact's key)."""
        e, classes = self.context.experiment, len(self.context.classes)
        unet, example = build_unet(e, 1), torch.zeros(1, e.channels, e.image_size, e.image_size)
        hidden = e.prior.head_hidden or (1024 if e.image_size > 16 else 128)
        with seeded(e.seed, "head weights"), torch.no_grad():
            net = Joint(unet, example, hidden, classes, e.network.dropout)
        if start:
            net.load_state_dict(start.state_dict())
        head = {"hidden": hidden, "classes": classes, "crop": e.classifier.crop}
        artefact = self.artefact(name, labels, steps, head=head, **inputs)
        self.student, self.late = net, steps / 3
        self.fit(artefact, net, labels, images, steps, name)
        return prepared(net, self.context.runtime.device).eval().requires_grad_(False), artefact.key

    def loss(self, network: Noise, batch: Batch) -> Tensor:
        schedule, shown = self.sampler.schedule, augment(batch.x1, self.context.experiment, batch.seed)
        t = (batch.t * schedule.T).long()
        noisy = schedule.noised(batch.x1, batch.x0, t)
        predicted, logits = network(t.float(), noisy), self.student.logits(shown)
        if not self.teachers:
            return local_loss(predicted, batch.x0, logits, batch.y)
        taught, shares = torch.zeros_like(batch.x0), torch.zeros_like(logits, dtype=torch.float)
        old = batch.y < len(self.labels)
        for teacher, mine in zip(self.teachers, (old, ~old), strict=True):
            with torch.no_grad():
                taught[mine] = teacher(t[mine].float(), noisy[mine]).float()
                shares[mine] = teacher.logits(shown[mine]).float().softmax(1)
        return global_loss(predicted, batch.x0, logits, batch.y, taught, shares, batch.step >= self.late)

    def source(self, cls: int) -> Source:
        return self.drawn[cls]

    def sources(self, net: Joint, key: str, classes: list[int], seen: list[int]) -> dict[int, Source]:
        """Where images of ``classes`` come from when ``net`` draws them, its head having learned ``seen`` in order.

        All share one pool of images drawn without a class. It grows until the head takes enough of them for every
        class, at most to twice as many as are asked for.
        """
        context, e, device = self.context, self.context.experiment, self.context.runtime.device
        sampler, places = replace(self.sampler, repeated=replays(device)), [seen.index(cls) for cls in classes]
        given = {"seed": e.seed, "chunk": e.chunk, "precision": e.precision} | sampler.identity
        artefact = context.store.artefact("pool", weights=key, classes=places, **given)

        @cache
        def pool(n: int) -> dict[str, Tensor]:
            """Its chunk n: images (chunk, C, H, W), and their shares (chunk, classes) by the head."""

            def make() -> tuple[dict[str, Tensor], dict]:
                x0 = torch.randn(e.chunk, e.channels, e.image_size, e.image_size, generator=stream(e.seed, "pool", n))
                with computing(device), autocast(e.precision, device), torch.no_grad():
                    images = to_bytes(sampler.integrate(net, x0.to(device))[0])
                    shares = net.logits(to_floats(images)).float().softmax(1)[:, places]
                return {"images": images.cpu(), "shares": shares.cpu()}, {}

            return stored_chunk(context, artefact, n, make)[0]

        def chunk(position: int, i: int) -> tuple[Tensor, int]:
            quota, found = (i + 1) * e.chunk, torch.zeros(len(classes))
            for n in range(2 * (i + 1) * len(classes)):
                found += pool(n)["shares"].argmax(1).bincount(minlength=len(classes))
                if found.min() >= quota:
                    break
            images, shares = (torch.cat([pool(k)[name] for k in range(n + 1)]) for name in ("images", "shares"))
            mine = chosen(shares, position, quota)[i * e.chunk :]
            return to_floats(images[mine]), round(sampler.evaluations * len(images) / (len(classes) * quota))

        return {cls: Source(f"{key}:{cls}", lambda: net, sampler, partial(chunk, k)) for k, cls in enumerate(classes)}

    def classifier(self, seen: list[int]) -> Callable[[Tensor], Tensor]:
        return lambda x: self.net.logits(x)[:, : len(seen)]

    parameters_per_class = property(lambda self: self.net.head[-1].in_features + 1)  # the rest is trained again
