"""The network trained as a whole: on task 1, and by every method that has no adapters."""

from collections.abc import Iterator

import torch
from torch import Tensor

from funlora_lab.config import Experiment
from funlora_lab.data import Images, to_floats
from funlora_lab.disk import fingerprint
from funlora_lab.flow import Velocity, flow_loss
from funlora_lab.speed import autocast, sent
from funlora_lab.store import Stage
from funlora_lab.streams import Shuffle, seeded, stream
from funlora_lab.training import Event, Plan, fit
from funlora_lab.unet import UNet
from funlora_lab.work import Source, Work

NULL = -1  # the label of pictures without one
UNET_FIELDS = (
    "image_size",
    "channels",
    "base_channels",
    "multipliers",
    "res_blocks",
    "attention",
    "head_channels",
    "norm_groups",
    "dropout",
)


def unet_settings(experiment: Experiment) -> dict:
    """The experiment's settings that the U-Net is built from, by their names there."""
    return {name: getattr(experiment, name) for name in UNET_FIELDS}


def build_unet(experiment: Experiment, classes: int) -> UNet:
    """A fresh U-Net of the experiment's configuration; its first weights depend on the seed alone."""
    with seeded(experiment.seed, "network weights", classes):
        return UNet(classes=classes, **unet_settings(experiment))


def noised(images: Images, order: Tensor, flip: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x1, x0, t) of one batch: images in [-1, 1], noise and times, all from one stream."""
    device = images.pixels.device
    x1 = to_floats(images.pixels[sent(order, device)])
    if flip:
        mirrored = torch.rand(len(x1), generator=generator, device=device) < 0.5
        x1 = torch.where(mirrored[:, None, None, None], x1.flip(3), x1)
    x0 = torch.randn(x1.shape, generator=generator, device=device)
    t = torch.rand(len(x1), generator=generator, device=device)
    return x1, x0, t


def train_network(work: Work, stage: Stage, net: UNet, images: Images, steps: int, name: str) -> Iterator[Event]:
    """Train the whole network on images whose labels are positions in its embedding, and finish the stage.

    Of several processes each computes its part of every batch.
    """
    e, device, team = work.experiment, work.runtime.device, work.runtime.team
    team.check(stage.state_file, e.base_batch)
    model = team.wrap(work.runtime.prepared(net).train())
    images = Images(images.pixels.to(device), images.labels.to(device))
    shuffle = Shuffle(len(images), e.seed, name, "order")
    parameters = dict(net.named_parameters())

    def loss_at(step: int) -> Tensor:
        order = shuffle.batch(step, e.base_batch)
        x1, x0, t = noised(images, order, e.flip, stream(e.seed, name, step, device=device))
        x1, x0, t, y = team.part(x1, x0, t, images.labels[sent(order, device)])
        with seeded(e.seed, name, "dropout", step, *team.key, device=device), autocast(e.precision, device):
            return team.mean(flow_loss(lambda t, x: model(t, x, y), x1, x0, t), e.base_batch)[None]

    plan = Plan(
        steps,
        e.base_batch,
        e.base_lr,
        e.base_schedule,
        e.base_warmup // e.base_batch,
        e.base_ema,
        e.base_ema_start // e.base_batch,
        e.log_every,
    )
    optimizer = torch.optim.Adam(parameters.values(), lr=e.base_lr, fused=True)
    result, facts = yield from fit(
        stage, plan, optimizer, parameters, loss_at, work.runtime, [{"stage": name}], clip=e.grad_clip
    )
    stage.finish(result, **facts, batch=e.base_batch, processes=team.size)
    team.wait()


class WholeNetwork:
    """Shared by every method whose generator is a single network trained as a whole."""

    def __init__(self, work: Work):
        self.work = work
        self.net: UNet | None = None
        self.key = ""
        self.labels: list[int] = []  # class of each row of the network's embedding

    def check(self) -> None:
        """Raise LabError when the experiment does not fit the network; costs no memory and no time."""
        with torch.device("meta"):
            build_unet(self.work.experiment, 1)

    def train(self, name: str, labels: list[int], images: Images, steps: int, **inputs) -> Iterator[Event]:
        """Train (or load) the network on ``images``, from the current one if there is one, else from scratch.

        With ``pretrain_root`` "from scratch" means: from a network trained on the unlabelled pictures there.
        """
        work, e = self.work, self.work.experiment
        if self.net is None and e.pretrain_root and labels != [NULL]:
            yield from self._pretrain()
        stage = work.store.stage(
            "network",
            name=name,
            labels=labels,
            steps=steps,
            after=self.key,
            seed=e.seed,
            flip=e.flip,
            precision=e.precision,
            unet=unet_settings(e),
            training=e.select("base_batch", "base_lr", "base_schedule", "base_warmup", "base_ema", "grad_clip"),
            **({"data": work.dataset.fingerprint} | inputs),
        )
        net = build_unet(e, len(labels))
        if self.net is not None:
            old = self.net.state_dict()
            embedding = net.label_emb.weight.detach().clone()
            embedding[: len(self.labels)] = old["label_emb.weight"].cpu()
            if self.labels == [NULL]:  # every class starts where the unlabelled pictures left off
                embedding[:] = old["label_emb.weight"].cpu()
            net.load_state_dict(old | {"label_emb.weight": embedding})

        def make() -> Iterator[Event]:
            position = {cls: i for i, cls in enumerate(labels)}
            local = torch.tensor([position[c] for c in images.labels.tolist()])
            return train_network(work, stage, net, Images(images.pixels, local), steps, name)

        yield from work.ready(stage, make)
        weights, facts = stage.result()
        net.load_state_dict(weights)
        work.seconds[stage.key] = facts["seconds"]
        self.adopt(net, stage.key, labels)

    def adopt(self, net: UNet, key: str, labels: list[int]) -> None:
        """Take a trained network as the current one; nothing trains it until the next task does."""
        self.net = self.work.runtime.prepared(net).eval().requires_grad_(False)
        self.key, self.labels = key, labels

    def _pretrain(self) -> Iterator[Event]:
        """Unsupervised pre-training of the base (the paper's supplement 6.4), conditioned on one learned null label.

        The paper does not say what stands in for the label; one embedding shared by all pictures does here, and the
        embedding of every class of task 1 starts as a copy of it.
        """
        pixels = self.work.dataset.unlabelled
        images = Images(pixels, torch.full((len(pixels),), NULL))
        steps = self.work.experiment.pretrain_steps
        yield from self.train("pretrain", [NULL], images, steps, data=fingerprint({"pixels": pixels})[:16])

    def source(self, cls: int) -> Source:
        position, net, device = self.labels.index(cls), self.net, self.work.runtime.device

        def velocity() -> Velocity:
            y = torch.tensor([position], device=device)
            return lambda t, x: net(t, x, y.expand(len(x)))

        return Source(f"{self.key}:{cls}", velocity)

    @property
    def parameters_per_class(self) -> int:
        """A class adds nothing but its label embedding, since the whole network is trained again."""
        return self.net.embedding
