"""The network trained as a whole: on task 1, and by every system that has no adapters."""

from copy import copy, deepcopy
from dataclasses import asdict
from functools import cache

import torch
from torch import Tensor, nn
from torch.func import functional_call

from funlora_lab.data import Images, to_floats
from funlora_lab.experiment import REGISTERED_TEXTS, Experiment
from funlora_lab.seeds import Shuffle, Streams, seed_of, seeded
from funlora_lab.store import Artefact, fingerprint
from funlora_lab.systems.generator import Batch, Generator, Source
from funlora_lab.systems.sampling import glimpse
from funlora_lab.training import Inputs, Plan, Trainer, autocast, dropout_from, prepared, rounded
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


def noisy_batch(pixels: Tensor, order: Tensor, flip: bool, seeds: Tensor) -> Batch:
    """The images ``order`` (K, N) of pixels (..., C, H, W) as a batch (N*K, ...) without labels.

    Image i is of class i % K; all that is random of a class comes from a stream of its own, by its seed (K,).
    """
    streams, N = Streams(seeds), order.shape[1]
    x1 = to_floats(pixels[order.T.flatten()])
    if flip:
        mirrored = (streams.uniform(N) < 0.5).T.flatten()
        x1 = torch.where(mirrored[:, None, None, None], x1.flip(3), x1)
    x0 = streams.normal(N, *x1.shape[1:]).transpose(0, 1).flatten(0, 1)
    return Batch(x1, x0, streams.uniform(N).T.flatten())


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
        self.fit(artefact, net, labels, images, steps, name)
        self.adopt(net, artefact.key, labels)

    def fit(self, artefact: Artefact, net: nn.Module, labels: list[int], images: Images, steps: int, name: str) -> None:
        """Give a network the weights of an artefact, which is made by training it from those it has."""
        context, e, team = self.context, self.context.experiment, self.context.runtime.team

        def make() -> None:
            if "weights" in artefact.inputs:
                load_base(net, read_checkpoint(e.base_weights), e.base_weights)
            self.trainer(artefact, net, labels, images, steps, name).finish(batch=e.base.batch, processes=team.size)

        net.load_state_dict(context.tensors(artefact, make))

    def trainer(self, artefact: Artefact, net: UNet, labels: list[int], images: Images, steps: int, name: str):
        """The training of the whole network; of several processes each computes its part of every batch."""
        e, runtime = self.context.experiment, self.context.runtime
        device, team, B = runtime.device, runtime.team, e.base.batch
        model = team.wrap(prepared(net, device).train())
        pixels, positions = images.on(device, labels)
        shuffle = Shuffle(len(images), e.seed, name, "order")

        def inputs_at(step: int) -> Inputs:
            dropout = torch.tensor(seed_of(e.seed, name, "dropout", step, *team.key))
            seeds = torch.tensor([seed_of(e.seed, name, step)])
            own = torch.tensor([step, seed_of(e.seed, name, "own", step)])
            return {"order": shuffle.batch(step, B)[None], "seeds": seeds, "dropout": dropout, "own": own}

        def losses_of(inputs: Inputs) -> Tensor:
            x1, x0, t, *_ = noisy_batch(pixels, inputs["order"], e.flip, inputs["seeds"])
            batch = Batch(*team.part(x1, x0, t, positions[inputs["order"][0]]), *inputs["own"])
            low = rounded(net, e.precision, device) if team.size == 1 else {}
            network = (lambda *inputs: functional_call(model, low, inputs)) if low else model
            with dropout_from(inputs["dropout"]), autocast(e.precision, device):
                return team.mean(self.loss(lambda t, x: network(t, x, batch.y), batch), B)[None]

        def draw(weights: dict[str, Tensor]) -> Tensor:
            other, shown = copy(self), deepcopy(net).eval().requires_grad_(False)
            shown.load_state_dict(weights, strict=False)
            other.adopt(shown, "", labels)
            return glimpse(other, labels)

        parameters = dict(net.named_parameters())
        optimizer = torch.optim.Adam(parameters.values(), lr=e.base.lr, fused=True)
        plan = Plan.of(e.base, e.base.lr, steps, e.log_every)
        given = optimizer, parameters, inputs_at, losses_of, runtime, [{"stage": name}]
        return Trainer(artefact, plan, *given, clip=e.grad_clip, draw=draw)

    def adopt(self, net: UNet, key: str, labels: list[int]) -> None:
        """Take a trained network as the current one; nothing trains it until the next task does."""
        self.net = prepared(net, self.context.runtime.device).eval().requires_grad_(False)
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
