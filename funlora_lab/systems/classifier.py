"""Classifiers: the network, its augmentation, and one that goes on from task to task as the prior systems have it.

Letters: B images, C channels, K classes.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funlora_lab.data import to_floats
from funlora_lab.experiment import Experiment
from funlora_lab.seeds import Shuffle, Streams, seed_of, seeded
from funlora_lab.systems.generator import Context
from funlora_lab.training import Inputs, Plan, Trainer, autocast, prepared


def build_classifier(experiment: Experiment, classes: int, *key: str | int) -> nn.Module:
    """A fresh classifier with ``classes`` outputs; its first weights depend on the seed and ``key`` alone."""
    with seeded(experiment.seed, "classifier weights", *key):
        if experiment.classifier.kind == "resnet18":
            from torchvision.models import resnet18

            net = resnet18(num_classes=classes)
            net.conv1 = nn.Conv2d(experiment.channels, 64, 3, padding=1, bias=False)  # small images: no early shrinking
            net.maxpool = nn.Identity()
            return net

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        return nn.Sequential(
            *block(experiment.channels, 32),
            *block(32, 64),
            nn.MaxPool2d(2),
            *block(64, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, classes),
        )


def augment(x: Tensor, experiment: Experiment, seed: Tensor) -> Tensor:
    """Random crops (after padding) and random mirroring of images (B, C, H, W) in [-1, 1]."""
    streams = Streams(seed[None])
    B, _, H, W = x.shape
    if experiment.flip:
        mirrored = streams.uniform(B)[0] < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    if pad := experiment.classifier.crop:
        x = F.pad(x, (pad, pad, pad, pad), value=-1.0)
        top = streams.integers(2 * pad + 1, B, 1, 1)[0]
        left = streams.integers(2 * pad + 1, B, 1, 1)[0]
        rows = top + torch.arange(H, device=x.device)[None, :, None]
        columns = left + torch.arange(W, device=x.device)[None, None, :]
        images = torch.arange(B, device=x.device)[:, None, None]
        x = x[images, :, rows, columns].permute(0, 3, 1, 2)
    return x


@dataclasses.dataclass
class Replay:
    """What stands in for the real images of old classes while a lasting classifier learns new ones."""

    identity: dict  # what its images depend on, beside the classifier itself
    count: int  # images of a batch
    every: int  # steps between two drawings
    draw: Callable[[int], tuple[Tensor, Tensor]]  # step -> (images (count, C, H, W) in [-1, 1], positions (count,))
    evaluations: int = 0  # of the generator's network for an image drawn while the classifier trains


class LastingClassifier:
    """One classifier for all tasks: it goes on with real images of new classes and replayed ones of old classes.

    SGD with momentum, its rate falling linearly to 0 in every task, and after task 1 starting at ``later_rate`` times
    the first. Outputs are in the order of learning, and only those of the classes seen take part. A task has as many
    steps as the protocol's classifier of the classes seen. The replayed batch is a buffer that is saved with the
    weights, so that a training interrupted between two drawings goes on as if it had not been.
    """

    def __init__(self, context: Context):
        e = context.experiment
        self.context, self.key = context, ""
        self.seen: list[int] = []
        self.net = prepared(build_classifier(e, len(context.classes), "lasting"), context.runtime.device)

    def logits(self, x: Tensor) -> Tensor:
        """Of the classes seen (B, K), for images in [-1, 1]."""
        return self.net.eval()(x)[:, : len(self.seen)]

    def learn(self, task: int, replay: Replay | None) -> None:
        """Go on with ``task``: every batch has ``replay.count`` replayed images, the rest real ones of its classes."""
        context, e = self.context, self.context.experiment
        settings = dataclasses.asdict(e.classifier) | {"image_size": e.image_size, "channels": e.channels}
        inputs = {"after": self.key, "classes": context.tasks[task], "settings": settings}
        if replay:
            settings["later_rate"] = e.prior.later_rate
            settings["samples_per_class"] = e.samples_per_class  # by which its steps are counted
            inputs["replay"] = replay.identity | {"count": replay.count, "every": replay.every}
        artefact = context.store.artefact("lasting", **context.inputs, **inputs)
        self.seen = self.seen + context.tasks[task]

        def make() -> None:
            _, facts = self.trainer(artefact, task, replay).fit()
            artefact.finish(self.net.state_dict(), **facts)
            context.runtime.team.wait()

        context.ready(artefact, make)
        weights, facts = artefact.result()
        self.net.load_state_dict(weights)
        self.key, context.seconds[artefact.key] = artefact.key, facts["seconds"]

    def trainer(self, artefact, task: int, replay: Replay | None) -> Trainer:
        e, device, net, seen = self.context.experiment, self.context.runtime.device, self.net, len(self.seen)
        real = self.context.dataset.train.of(self.context.tasks[task])
        labels = torch.tensor([self.seen.index(cls) for cls in real.labels.tolist()]).to(device)
        pixels = real.pixels.to(device)
        batch = min(e.classifier.batch, len(real))
        count = replay.count if replay else 0
        steps = e.classifier.epochs * -(-(e.samples_per_class * seen if replay else len(real)) // batch)
        shuffle = Shuffle(len(real), e.seed, "lasting order", task)
        replayed = {"images": torch.zeros(count, *pixels.shape[1:]), "positions": torch.zeros(count, dtype=torch.long)}
        replayed = {name: value.to(device) for name, value in replayed.items()}

        def inputs_at(step: int) -> Inputs:
            seed = torch.tensor(seed_of(e.seed, "augment", "lasting", task, step))
            return {"order": shuffle.batch(step, batch - count), "seed": seed, "step": torch.tensor(step)}

        def losses_of(inputs: Inputs) -> Tensor:
            if replay and (step := inputs["step"].item()) % replay.every == 0:
                for held, drawn in zip(replayed.values(), replay.draw(step), strict=True):
                    held.copy_(drawn)
            x = torch.cat([to_floats(pixels[inputs["order"]]), replayed["images"]])
            y = torch.cat([labels[inputs["order"]], replayed["positions"]])
            net.train()
            with autocast(e.precision, device):
                return F.cross_entropy(net(augment(x, e, inputs["seed"]))[:, :seen], y)[None]

        parameters, c = dict(net.named_parameters()), e.classifier
        rate = c.lr * (e.prior.later_rate if task else 1)
        optimizer = torch.optim.SGD(parameters.values(), rate, c.momentum, weight_decay=c.weight_decay)
        label = {"stage": "own classifier", "classes": seen}
        if replay and replay.evaluations:
            drawn = count * -(-steps // replay.every)
            label |= {"generated": drawn, "evaluations": drawn * replay.evaluations}
        buffers = dict(net.named_buffers()) | {f"replay/{name}": value for name, value in replayed.items()}
        plan = Plan(steps, batch, rate, "linear", log_every=e.log_every)
        given = (inputs_at, losses_of, self.context.runtime, [label], buffers)
        return Trainer(artefact, plan, optimizer, parameters, *given)


class Answers(nn.Module):
    """A function of images (B, C, H, W) to logits (B, K), beside the module whose weights it uses."""

    def __init__(self, module: nn.Module, logits: Callable[[Tensor], Tensor]):
        super().__init__()
        self.module, self.logits = module, logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)
