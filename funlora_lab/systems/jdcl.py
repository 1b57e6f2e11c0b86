"""JDCL (Skiers & Deja 2025): one unconditional diffusion model whose encoder also classifies, merged task by task.

A task trains a network on its real images alone (local), draws images of old classes from the previous network and of
new ones from the local one, by what their heads take them for, and distils both networks into a new one (global).

Deviations from its public code: this backbone, with a head on fewer features; averaged teachers in eval mode; the local
network goes on from the previous one, as theirs on ImageNet100 (``local_start=scratch``: as on CIFAR); what the head
sees is augmented as the preset's classifier is; and no weights are chosen by test images.

Letters: B images, C channels, H x W pixels, K classes (outputs of the head, also those not yet seen).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funlora_lab.data import Images, to_bytes, to_floats
from funlora_lab.diffusion import Noise
from funlora_lab.errors import LabError
from funlora_lab.seeds import seeded, stream
from funlora_lab.store import Artefact
from funlora_lab.systems.baselines import SelfReplay, evened
from funlora_lab.systems.classifier import Answers, augment
from funlora_lab.systems.denoiser import Denoiser
from funlora_lab.systems.generator import Batch, Source, system
from funlora_lab.systems.network import build_unet
from funlora_lab.training import autocast, prepared
from funlora_lab.unet import UNet


class Joint(nn.Module):
    """A U-Net of one label, and a head on the means over pixels of all its encoder's outputs."""

    def __init__(self, unet: UNet, example: Tensor, hidden: int, classes: int, dropout: float):
        super().__init__()
        self.unet = unet
        width = self.features(example).shape[1]
        last = nn.Linear(hidden, classes)
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(0.2), nn.Dropout(dropout), last)

    def features(self, x: Tensor) -> Tensor:
        """Of clean images (B, C, H, W) at time 0."""
        _, skips, middle = self.unet.encode(x.new_zeros(()), x, torch.zeros(len(x), dtype=torch.long, device=x.device))
        return torch.cat([h.mean((2, 3)) for h in (*skips, middle)], 1)

    def logits(self, x: Tensor) -> Tensor:
        """(B, K) of clean images (B, C, H, W)."""
        return self.head(self.features(x))

    def forward(self, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The noise predicted in x (B, C, H, W) at times t (B,); of the classes y (B,) it sees nothing."""
        return self.unet(t, x, torch.zeros_like(y))


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
    difference over its own n_i of n images, 0.001 of the same sum of cross-entropies, and 1e-5 of the labels' own when
    the training is ``late``, in its last two thirds.
    """
    distilled = -(shares * torch.log_softmax(logits.float(), 1)).sum(1)
    loss = 0.01 * squared(predicted, noise) + 2 * squared(predicted, taught) + 2e-3 * distilled
    return loss + (1e-5 * F.cross_entropy(logits.float(), y, reduction="none") if late else 0)


def chosen(shares: Tensor, quota: int) -> list[Tensor]:
    """For each class the indices of ``quota`` of N images, by their shares (N, K): the first that are taken for it.

    Where those are too few, the likeliest of all others stand in, so that a class never predicted ends no training.
    """
    found = []
    for k, best in enumerate(shares.argmax(1) == torch.arange(shares.shape[1])[:, None]):
        others = shares[:, k].masked_fill(best, -1).argsort(descending=True, stable=True)
        found.append(torch.cat([best.nonzero()[:, 0], others])[:quota])
    return found


@system("jdcl", "one diffusion model with a classifying head, distilled from the previous one and that of the new task")
class Jdcl(Denoiser, SelfReplay):
    clip = False
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
            net, key = self.stage("base", seen, real, e.base.steps, None)
            return self.adopt(net, key, seen)
        start, given = (self.net, {}) if e.prior.local_start == "previous" else (None, {"start": "scratch"})
        steps = -(-e.adapter.images * len(new) // e.base.batch)
        local, key = self.stage(f"local-{task + 1}", seen, real, steps, start, **given)
        sources = {cls: self.source(cls) for cls in self.labels} | self.sources(local, key, new, seen)
        parts, replayed = self.draw(sources)
        self.teachers = self.net, local
        images, given = evened(parts, e.seed, task), replayed | {"local": key}
        net, key = self.stage(f"global-{task + 1}", seen, images, self.steps(task), self.net, **given)
        self.teachers = None
        self.adopt(net, key, seen)

    def stage(self, name: str, labels: list[int], images: Images, steps: int, start: Joint | None, **inputs):
        """(a network trained on ``images`` from the weights of ``start`` or from scratch, its artefact's key)."""
        e, classes = self.context.experiment, len(self.context.classes)
        unet, example = build_unet(e, 1), torch.zeros(1, e.channels, e.image_size, e.image_size)
        hidden = e.prior.head_hidden or (1024 if e.image_size > 16 else 128)
        with seeded(e.seed, "head weights"), torch.no_grad():
            net = Joint(unet, example, hidden, classes, e.network.dropout)
        if start:
            net.load_state_dict(start.state_dict())
        settings = {"hidden": hidden, "classes": classes, "crop": e.classifier.crop}
        artefact = self.artefact(name, labels, steps, head=settings, **inputs)
        self.student, self.late = net, steps / 3
        self.fit(artefact, net, labels, images, steps, name)
        return prepared(net, self.context.runtime.device).eval().requires_grad_(False), artefact.key

    def loss(self, network: Noise, batch: Batch) -> Tensor:
        e, schedule, device = self.context.experiment, self.sampler.schedule, batch.x1.device
        t = (batch.t * schedule.T).long()
        noisy = schedule.noised(batch.x1, batch.x0, t)
        shown = augment(batch.x1, e, batch.seed)
        predicted, logits = network(t.float(), noisy), self.student.logits(shown)
        if not self.teachers:
            return local_loss(predicted, batch.x0, logits, batch.y)
        taught, shares = torch.zeros_like(batch.x0), torch.zeros(logits.shape, device=device)
        old = batch.y < len(self.labels)
        for teacher, mine in zip(self.teachers, (old, ~old), strict=True):
            with torch.no_grad():
                taught[mine] = teacher(t[mine].float(), noisy[mine], batch.y[mine]).float()
                shares[mine] = teacher.logits(shown[mine]).float().softmax(1)
        return global_loss(predicted, batch.x0, logits, batch.y, taught, shares, batch.step >= self.late)

    def adopt(self, net: Joint, key: str, labels: list[int]) -> None:
        self.net, self.key, self.labels = net, key, labels
        self.drawn = self.sources(net, key, labels, labels)

    def source(self, cls: int) -> Source:
        return self.drawn[cls]

    def sources(self, net: Joint, key: str, classes: list[int], seen: list[int]) -> dict[int, Source]:
        """Where images of ``classes`` come from when ``net`` draws them, its head having learned ``seen`` in order."""
        e, device, sampler = self.context.experiment, self.context.runtime.device, self.sampler
        places = torch.tensor([seen.index(cls) for cls in classes])
        given = {"weights": key, "seed": e.seed, "chunk": e.chunk, "precision": e.precision, "classes": places.tolist()}
        artefact = self.context.store.artefact("pool", **given, **sampler.identity)
        pool: list[dict[str, Tensor]] = []  # the chunks read so far

        def velocity() -> Noise:
            return lambda t, x: net(t, x, torch.zeros(len(x), dtype=torch.long, device=device))

        def chunk(position: int, i: int) -> tuple[Tensor, int]:
            quota = (i + 1) * e.chunk
            for n in range(2 * (i + 1) * len(classes)):  # at most twice as many images as are asked for
                if n == len(pool):
                    pool.append(self._pool_chunk(artefact, net, velocity(), places.to(device), n))
                shares = torch.cat([part["shares"] for part in pool[: n + 1]])
                if shares.argmax(1).bincount(minlength=len(classes)).min() >= quota:
                    break
            images = torch.cat([part["images"] for part in pool[: n + 1]])
            mine = chosen(shares, quota)[position][i * e.chunk :]
            return to_floats(images[mine]), round(sampler.evaluations * len(images) / (len(classes) * quota))

        given = [(cls, partial(chunk, position)) for position, cls in enumerate(classes)]
        return {cls: Source(f"{key}:{cls}", velocity, sampler, chunk) for cls, chunk in given}

    def _pool_chunk(self, artefact: Artefact, net: Joint, network: Noise, places: Tensor, n: int) -> dict[str, Tensor]:
        """One chunk of images drawn without a class, and what the head makes of them (chunk, classes)."""
        e, runtime = self.context.experiment, self.context.runtime
        path = artefact.folder / f"chunk-{n:05d}.safetensors"
        if not path.exists():
            self.context.may_make(artefact)
            with artefact.held(runtime.check, runtime.tell):
                x0 = torch.randn(e.chunk, e.channels, e.image_size, e.image_size, generator=stream(e.seed, "pool", n))
                with autocast(e.precision, runtime.device), torch.no_grad():
                    images = to_bytes(self.sampler.integrate(network, x0.to(runtime.device))[0])
                    shares = net.logits(to_floats(images)).float().softmax(1)[:, places]
                artefact.write(path, {"images": images.cpu(), "shares": shares.cpu()}, {"chunk": n})
            runtime.check()
        return artefact.read(path)[0]

    def classifier(self, seen: list[int]) -> nn.Module:
        net, count = self.net, len(seen)
        return Answers(net, lambda x: net.logits(x)[:, :count])

    @property
    def parameters_per_class(self) -> int:
        return self.net.head[-1].in_features + 1  # of the head; all others are trained again
