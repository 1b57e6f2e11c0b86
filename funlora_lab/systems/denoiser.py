"""Deep generative replay with a diffusion model: a network predicts noise, and a classifier goes on beside it.

``dgr-diffusion`` is the baseline of GUIDE (Cywinski et al. 2024) and, but for what the classifier is shown, GUIDE: one
generator is trained for both. Deviations from its public code: this backbone (the label is added, not concatenated; no
scale and shift in its normalisations); the averaged weights replay; DDIM replays to the generator where theirs takes
1000 ancestral steps; lengths, classifier and augmentation are the preset's.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from funlora_lab.data import Images, to_floats
from funlora_lab.diffusion import Noise, Sampler, Schedule, noise_loss
from funlora_lab.seeds import Shuffle, seed_of, stream
from funlora_lab.store import Artefact
from funlora_lab.systems.baselines import SelfReplay
from funlora_lab.systems.classifier import augment, build_classifier
from funlora_lab.systems.generator import Batch, Context, Source, system
from funlora_lab.systems.network import WholeNetwork
from funlora_lab.training import Inputs, Plan, Trainer, autocast, computing, prepared


class Denoiser(WholeNetwork):
    """A whole network that predicts the noise of a diffusion, where others predict a velocity."""

    # where the experiment does not say; steps: of images of up to 16 pixels a side, and of larger ones
    schedule, denoiser, steps_by_size, clip, scale = "linear", "ddim", (20, 50), True, 0.0

    def __init__(self, context: Context):
        super().__init__(context)
        e, own = context.experiment, context.experiment.prior
        schedule = Schedule(own.noise_schedule or self.schedule, own.diffusion_steps)
        steps = own.denoising_steps or self.steps_by_size[e.image_size > 16]
        self.sampler = Sampler(schedule, own.denoiser or self.denoiser, steps, self.clip)

    def artefact(self, name: str, labels: list[int], steps: int, **inputs) -> Artefact:
        return super().artefact(name, labels, steps, **inputs, objective=self.sampler.schedule.identity)

    def loss(self, network: Noise, batch: Batch) -> Tensor:
        schedule = self.sampler.schedule
        return noise_loss(network, schedule, batch.x1, batch.x0, (batch.t * schedule.T).long())

    def source(self, cls: int) -> Source:
        return super().source(cls)._replace(solver=self.sampler)


@dataclass
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
        e, self.context, self.key, self.seen = context.experiment, context, "", []
        self.net = prepared(build_classifier(e, len(context.classes), "lasting"), context.runtime.device)

    def logits(self, x: Tensor) -> Tensor:
        """Of the classes seen (B, K), for images in [-1, 1]."""
        return self.net.eval()(x)[:, : len(self.seen)]

    def learn(self, task: int, replay_of: Callable[[int, int], Replay]) -> None:
        """Go on with ``task``: real images and, after task 1, those of ``replay_of(task, images of a batch)``."""
        context, e = self.context, self.context.experiment
        real = context.dataset.train.of(context.tasks[task])
        batch = min(e.classifier.batch, len(real))
        replay = replay_of(task, batch) if task else None
        settings = asdict(e.classifier) | {"image_size": e.image_size, "channels": e.channels}
        inputs = {"after": self.key, "classes": context.tasks[task], "settings": settings}
        if replay:  # its steps are counted in samples_per_class
            settings |= {"later_rate": e.prior.later_rate, "samples_per_class": e.samples_per_class}
            inputs["replay"] = replay.identity | {"count": replay.count, "every": replay.every}
        artefact = context.store.artefact("lasting", **context.inputs, **inputs)
        self.seen = self.seen + context.tasks[task]
        self.net.load_state_dict(context.tensors(artefact, partial(self.train, artefact, task, real, batch, replay)))
        self.key = artefact.key

    def train(self, artefact: Artefact, task: int, real: Images, batch: int, replay: Replay | None) -> None:
        e, runtime, net, seen = self.context.experiment, self.context.runtime, self.net, len(self.seen)
        device, c, count = runtime.device, e.classifier, replay.count if replay else 0
        pixels, labels = real.on(device, self.seen)
        steps = c.epochs * -(-(e.samples_per_class * seen if replay else len(real)) // batch)
        shuffle = Shuffle(len(real), e.seed, "lasting order", task)
        images = torch.zeros(count, *pixels.shape[1:], device=device)  # replayed,
        positions = torch.zeros(count, dtype=torch.long, device=device)  # and their classes

        def inputs_at(step: int) -> Inputs:
            seed = torch.tensor(seed_of(e.seed, "augment", "lasting", task, step))
            return {"order": shuffle.batch(step, batch - count), "seed": seed}

        def replace_replayed(step: int) -> None:
            if replay and step % replay.every == 0:
                for held, drawn in zip((images, positions), replay.draw(step), strict=True):
                    held.copy_(drawn)

        def losses_of(inputs: Inputs) -> Tensor:
            x = torch.cat([to_floats(pixels[inputs["order"]]), images])
            y = torch.cat([labels[inputs["order"]], positions])
            net.train()
            with autocast(e.precision, device):
                return F.cross_entropy(net(augment(x, e, inputs["seed"]))[:, :seen], y)[None]

        parameters, rate = dict(net.named_parameters()), c.lr * (e.prior.later_rate if task else 1)
        optimizer = torch.optim.SGD(parameters.values(), rate, c.momentum, weight_decay=c.weight_decay)
        label = {"stage": "own classifier", "classes": seen}
        if replay and replay.evaluations:
            drawn = count * -(-steps // replay.every)
            label |= {"generated": drawn, "evaluations": drawn * replay.evaluations}
        buffers = dict(net.named_buffers()) | {"replay/images": images, "replay/positions": positions}
        plan = Plan(steps, batch, rate, "linear", log_every=e.log_every)
        given = (plan, optimizer, parameters, inputs_at, losses_of, runtime, [label], buffers)
        Trainer(artefact, *given, before=replace_replayed).finish(net.state_dict())


@system("dgr-diffusion", "deep generative replay with a diffusion model, and a classifier that goes on with its replay")
class DiffusionReplay(Denoiser, SelfReplay):
    lasting = cached_property(lambda self: LastingClassifier(self.context))

    def learn(self, task: int) -> None:
        self.lasting.learn(task, self.replay)  # while the generator is the previous one
        super().learn(task)

    def classifier(self, seen: list[int]) -> Callable[[Tensor], Tensor]:
        return self.lasting.logits

    def guided(self, new: int) -> Sampler:
        """The sampler of images replayed to the classifier while it learns ``new`` classes more."""
        return self.sampler

    def replay(self, task: int, batch: int) -> Replay:
        """Images of the previous generator, drawn every ``replay_every`` steps: a share k / (k + 1) of every batch."""
        e, runtime, net = self.context.experiment, self.context.runtime, self.net
        sampler, known = self.guided(len(self.context.tasks[task])), len(self.labels)
        count = task * (batch // (task + 1))

        def draw(step: int) -> tuple[Tensor, Tensor]:
            generator = stream(e.seed, "replay", task, step)
            y = torch.randint(known, (count,), generator=generator).to(runtime.device)
            x0 = torch.randn(count, e.channels, e.image_size, e.image_size, generator=generator).to(runtime.device)
            with computing(runtime.device), autocast(e.precision, runtime.device):
                return sampler.integrate(lambda t, x: net(t, x, y), x0)[0], y

        identity = {"generator": self.key, "guidance": self.guidance} | sampler.identity
        return Replay(identity, count, e.prior.replay_every, draw, sampler.evaluations)

    @property
    def guidance(self) -> float:
        """The scale of the classifier's gradient; 0 where the system has no guidance, whatever the experiment says."""
        return self.scale and (self.context.experiment.prior.guidance or self.scale)


def towards_new(logits: Tensor, new: int, scale: float) -> Tensor:
    """scale * log p(c) of every image (B,), with c the likeliest of the last ``new`` outputs of logits (B, K)."""
    likeliest = logits[:, -new:].argmax(1, keepdim=True) + logits.shape[1] - new
    return scale * torch.log_softmax(logits.float(), 1).gather(1, likeliest)[:, 0]


@system("guide", "dgr-diffusion whose replay to the classifier is guided towards the classes being learned")
class Guide(DiffusionReplay):
    """Replayed images of old classes that the classifier almost takes for new ones."""

    scale = 0.5

    def guided(self, new: int) -> Sampler:
        classifier, scale = self.lasting.logits, self.guidance
        return replace(self.sampler, score=lambda x: towards_new(classifier(x), new, scale), predicted=True)
