"""Deep generative replay with a diffusion model: a network predicts noise, and a classifier goes on beside it.

``dgr-diffusion`` is the baseline of GUIDE (Cywinski et al. 2024) and, but for guidance, GUIDE itself. Deviations from
its public code: this backbone (the label is added, not concatenated; no scale and shift in its normalisations); the
averaged weights replay; DDIM replays to the generator where theirs takes 1000 ancestral steps; lengths are those of the
experiment; the classifier and its augmentation are the preset's.
"""

from functools import cached_property

import torch
from torch import Tensor, nn

from funlora_lab.diffusion import Noise, Sampler, Schedule, noise_loss
from funlora_lab.seeds import stream
from funlora_lab.store import Artefact
from funlora_lab.systems.baselines import SelfReplay
from funlora_lab.systems.classifier import Answers, LastingClassifier, Replay
from funlora_lab.systems.generator import Batch, Context, Source, system
from funlora_lab.systems.network import WholeNetwork
from funlora_lab.training import autocast


class Denoiser(WholeNetwork):
    """A whole network that predicts the noise of a diffusion, where others predict a velocity."""

    # where the experiment does not say; steps: of images of up to 16 pixels a side, and of larger ones
    schedule, denoiser, steps_by_size, clip, scale = "linear", "ddim", (20, 50), True, 0.0

    @cached_property
    def sampler(self) -> Sampler:
        e, own = self.context.experiment, self.context.experiment.prior
        schedule = Schedule(own.noise_schedule or self.schedule, own.diffusion_steps)
        steps = own.denoising_steps or self.steps_by_size[e.image_size > 16]
        return Sampler(schedule, own.denoiser or self.denoiser, steps, self.clip)

    def check(self) -> None:
        super().check()
        _ = self.sampler.schedule.abar

    def artefact(self, name: str, labels: list[int], steps: int, **inputs) -> Artefact:
        return super().artefact(name, labels, steps, **inputs, objective=self.sampler.schedule.identity)

    def loss(self, network: Noise, batch: Batch) -> Tensor:
        schedule = self.sampler.schedule
        return noise_loss(network, schedule, batch.x1, batch.x0, (batch.t * schedule.T).long())

    def source(self, cls: int) -> Source:
        return super().source(cls)._replace(solver=self.sampler)


@system("dgr-diffusion", "deep generative replay with a diffusion model, and a classifier that goes on with its replay")
class DiffusionReplay(Denoiser, SelfReplay):
    def __init__(self, context: Context):
        super().__init__(context)
        self.lasting = LastingClassifier(context)

    def learn(self, task: int) -> None:
        self.lasting.learn(task, self.replay(task) if task else None)  # while the generator is the previous one
        super().learn(task)

    def classifier(self, seen: list[int]) -> nn.Module:
        return Answers(self.lasting.net, self.lasting.logits)

    def guided(self, new: int) -> Sampler:
        """The sampler of images replayed to the classifier while it learns ``new`` classes more."""
        return self.sampler

    def replay(self, task: int) -> Replay:
        """Images of the previous generator, drawn every ``replay_every`` steps: a share k / (k + 1) of every batch."""
        e, runtime, net = self.context.experiment, self.context.runtime, self.net
        sampler, known = self.guided(len(self.context.tasks[task])), len(self.labels)
        real = self.batch(task) // (task + 1)

        def draw(step: int) -> tuple[Tensor, Tensor]:
            generator = stream(e.seed, "replay", task, step)
            y = torch.randint(known, (task * real,), generator=generator).to(runtime.device)
            x0 = torch.randn(len(y), e.channels, e.image_size, e.image_size, generator=generator).to(runtime.device)
            with autocast(e.precision, runtime.device):
                return sampler.integrate(lambda t, x: net(t, x, y), x0)[0], y

        identity = {"generator": self.key, "guidance": self.guidance} | sampler.identity
        return Replay(identity, task * real, e.prior.replay_every, draw, sampler.evaluations)

    @property
    def guidance(self) -> float:
        """The scale of the classifier's gradient; 0 where the system has no guidance, whatever the experiment says."""
        return self.scale and (self.context.experiment.prior.guidance or self.scale)

    def batch(self, task: int) -> int:
        """Images of a step of the lasting classifier."""
        real = self.context.dataset.train.of(self.context.tasks[task])
        return min(self.context.experiment.classifier.batch, len(real))
