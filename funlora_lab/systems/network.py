"""The network trained as a whole: on task 1, and by every system that has no adapters."""

from dataclasses import asdict
from functools import cache

import torch
from torch import Tensor

from funlora_lab.data import Images, to_floats
from funlora_lab.experiment import REGISTERED_TEXTS, Experiment
from funlora_lab.seeds import Shuffle, seeded, stream
from funlora_lab.store import Artefact, fingerprint
from funlora_lab.systems.generator import Batch, Generator, Source
from funlora_lab.training import Plan, Trainer, autocast, prepared, send
from funlora_lab.unet import UNet, load_base, read_checkpoint

NULL = -1  # the label of pictures without one, as ``Dataset.unlabelled`` holds it


def unet_settings(experiment: Experiment) -> dict:
    """The settings that the U-Net is built from, by their names there."""
    return {"image_size": experiment.image_size, "channels": experiment.channels, **asdict(experiment.network)}


def build_unet(experiment: Experiment, classes: int) -> UNet:
    """A fresh U-Net of the experiment's configuration; its first weights depend on the seed alone."""
    with seeded(experiment.seed, "network weights", classes):
        return UNet(classes=classes, **unet_settings(experiment))


def meta_unet(experiment: Experiment, classes: int = 1) -> UNet:
    """The same network without memory, on PyTorch's meta device: names, shapes and numbers of parameters."""
    return _meta_unet(classes, **unet_settings(experiment))


@cache
def _meta_unet(classes: int, **settings) -> UNet:
    with torch.device("meta"):
        return UNet(classes=classes, **settings)


def noisy_batch(pixels: Tensor, order: Tensor, flip: bool, generator: torch.Generator) -> Batch:
    """The images ``order`` of pixels (N, C, H, W) as a batch without labels, everything random from one stream."""
    device = pixels.device
    x1 = to_floats(pixels[send(order, device)])
    if flip:
        mirrored = torch.rand(len(x1), generator=generator, device=device) < 0.5
        x1 = torch.where(mirrored[:, None, None, None], x1.flip(3), x1)
    x0 = torch.randn(x1.shape, generator=generator, device=device)
    return Batch(x1, x0, torch.rand(len(x1), generator=generator, device=device))


class WholeNetwork(Generator):
    """One network whose weights are all trained, at task 1 or at every task."""

    def first_classes(self) -> list[int]:
        """The classes of the first training."""
        return self.context.tasks[0]

    def check(self) -> None:
        e = self.context.experiment
        meta_unet(e)
        if e.base_weights:
            weights = read_checkpoint(e.base_weights)
            load_base(build_unet(e, len(self.first_classes())), weights, e.base_weights)

    def artefact(self, name: str, labels: list[int], steps: int, **inputs) -> Artefact:
        """The network after a training called ``name``; ``inputs`` are what it depends on beyond the usual."""
        e, text = self.context.experiment, REGISTERED_TEXTS.get(self.name)
        training = asdict(e.base) | {"images": None, "grad_clip": e.grad_clip}
        inputs = self.context.inputs | {"unet": unet_settings(e), "training": training, "after": self.key} | inputs
        inputs |= {"text": text} if text else {}
        return self.context.store.artefact("network", name=name, labels=labels, steps=steps, **inputs)

    def train(self, name: str, labels: list[int], images: Images, steps: int, **inputs) -> None:
        """Train (or load) the network on ``images``, from the current one, ``base_weights`` or from scratch.

        With ``pretrain_root`` the pictures there come first (the paper's supplement 6.4). What stands in for their
        label the paper does not say; here they share one embedding, with which every class of task 1 starts.
        """
        context, e = self.context, self.context.experiment
        if self.net is None and e.pretrain_root and labels != [NULL]:
            first = -(-(e.pretrain_images or e.base.images) // e.base.batch)
            pictures, data = context.dataset.unlabelled, context.dataset.unlabelled_fingerprint
            self.train("pretrain", [NULL], pictures, first, data=data)
        net = build_unet(e, len(labels))
        if self.net is not None:
            old, embedding = self.net.state_dict(), net.label_emb.weight.detach().clone()
            known = len(labels) if self.labels == [NULL] else len(self.labels)
            embedding[:known] = old["label_emb.weight"].cpu()
            net.load_state_dict(old | {"label_emb.weight": embedding})
        elif e.base_weights:
            inputs |= {"weights": context.base_weights or fingerprint(read_checkpoint(e.base_weights))[:16]}
        artefact = self.artefact(name, labels, steps, **inputs)

        def make() -> None:
            if "weights" in inputs:
                load_base(net, read_checkpoint(e.base_weights), e.base_weights)
            weights, facts = self.trainer(artefact, net, labels, images, steps, name).fit()
            artefact.finish(weights, **facts, batch=e.base.batch, processes=context.runtime.team.size)
            context.runtime.team.wait()

        context.ready(artefact, make)
        weights, facts = artefact.result()
        net.load_state_dict(weights)
        context.seconds[artefact.key] = facts["seconds"]
        self.adopt(net, artefact.key, labels)

    def trainer(self, artefact: Artefact, net: UNet, labels: list[int], images: Images, steps: int, name: str):
        """The training of the whole network; of several processes each computes its part of every batch."""
        e, runtime = self.context.experiment, self.context.runtime
        device, team, B = runtime.device, runtime.team, e.base.batch
        team.check(artefact.state_file, B)
        model = team.wrap(prepared(net, device, runtime.compile).train())
        pixels = images.pixels.to(device)
        positions = torch.tensor([labels.index(cls) for cls in images.labels.tolist()]).to(device)
        shuffle = Shuffle(len(images), e.seed, name, "order")

        def loss_at(step: int) -> Tensor:
            order = shuffle.batch(step, B)
            x1, x0, t, _ = noisy_batch(pixels, order, e.flip, stream(e.seed, name, step, device=device))
            batch = Batch(*team.part(x1, x0, t, positions[send(order, device)]))
            with seeded(e.seed, name, "dropout", step, *team.key, device=device), autocast(e.precision, device):
                return team.mean(self.loss(lambda t, x: model(t, x, batch.y), batch), B)[None]

        parameters, stage = dict(net.named_parameters()), [{"stage": name}]
        optimizer = torch.optim.Adam(parameters.values(), lr=e.base.lr, fused=True)
        plan = Plan.of(e.base, e.base.lr, steps, e.log_every)
        return Trainer(artefact, plan, optimizer, parameters, loss_at, runtime, stage, clip=e.grad_clip)

    def adopt(self, net: UNet, key: str, labels: list[int]) -> None:
        """Take a trained network as the current one; nothing trains it until the next task does."""
        runtime = self.context.runtime
        self.net = prepared(net, runtime.device, runtime.compile).eval().requires_grad_(False)
        self.key, self.labels = key, labels

    def source(self, cls: int) -> Source:
        position, net, device = self.labels.index(cls), self.net, self.context.runtime.device

        def velocity():
            y = torch.tensor([position], device=device)
            return lambda t, x: net(t, x, y.expand(len(x)))

        return Source(f"{self.key}:{cls}", velocity)

    @property
    def parameters_per_class(self) -> int:
        return self.net.embedding  # the network itself is trained again
