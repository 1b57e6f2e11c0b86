"""Diffusion by noise prediction (Ho et al. 2020): schedules, the loss, and the samplers of the prior systems.

Letters: B images, C channels, H x W pixels. Time is a whole number t = 0, ..., T - 1, the last the noisiest, and goes
to the network as it is. abar_t is the share of variance that the image x keeps at t, and e the noise in
x_t = sqrt(abar_t) x + sqrt(1 - abar_t) e.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial

import torch
from torch import Tensor

from funlora_lab.errors import LabError
from funlora_lab.seeds import stream

Noise = Callable[[Tensor, Tensor], Tensor]  # the network, e(t, x_t): t (B,) or (), x_t (B, C, H, W) -> (B, C, H, W)

SCHEDULES = {  # beta at the first and at the last of 1000 times, and the power of it whose inverse is linear in time
    "linear": (1e-3, 2e-2, 1),  # as GUIDE and JDCL run it
    "ho": (1e-4, 2e-2, 1),  # Ho et al. 2020
    "cosine": (),  # abar is a squared cosine of time (Nichol & Dhariwal 2021)
    "stable": (8.5e-4, 1.2e-2, 2),  # sqrt(beta) is linear (Stable Diffusion)
}
SAMPLERS = {"ddim": "deterministic (Song et al. 2021)", "ddpm": "ancestral, with the larger variance (Ho et al. 2020)"}


def betas(kind: str, T: int) -> Tensor:
    """The noise added at every step (T,), float64; those given for 1000 steps are scaled to T, none exceeds 0.999."""
    if kind == "cosine":
        angle = (torch.linspace(0, 1, T + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2
        kept = angle.cos().square()
        return (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    first, last, power = SCHEDULES[kind]
    ends = [(value * 1000 / T) ** (1 / power) for value in (first, last)]
    return (torch.linspace(*ends, T, dtype=torch.float64) ** power).clamp(max=0.999)


@dataclass(frozen=True)
class Schedule:
    """How much noise there is at each time."""

    kind: str = "linear"
    T: int = 1000

    abar = cached_property(lambda self: (1 - betas(self.kind, self.T)).cumprod(0))  # (T,), float64
    abar_on = cached_property(lambda self: cache(self.abar.to))  # once a device: a GPU records no copies from the CPU
    identity = property(lambda self: {"schedule": self.kind, "T": self.T})

    def __post_init__(self):
        if self.kind not in SCHEDULES:
            raise LabError(f"noise_schedule={self.kind}: accepted is one of {', '.join(SCHEDULES)}.")

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of images x at whole times t (B,)."""
        abar = self.abar_on(t.device)[t].to(x.dtype)[:, None, None, None]
        return abar.sqrt() * x + (1 - abar).sqrt() * noise


def noise_loss(network: Noise, schedule: Schedule, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Ho et al.'s simple loss of every image, (B,): mean over pixels of (e(t, x_t) - noise)^2 at whole times t (B,)."""
    return (network(t.float(), schedule.noised(x, noise, t)).float() - noise).square().mean((1, 2, 3))


@dataclass(frozen=True)
class Sampler:
    """Noise to images in ``steps`` of the schedule's times, with the interface of ``flow.Solver``.

    With guidance it follows the gradient by x_t of a ``score`` of images, (B, C, H, W) -> (B,) and scaled: that of the
    predicted image, through the network (GUIDE), or that of x_t itself (Dhariwal & Nichol 2021, DDGR).
    """

    schedule: Schedule = Schedule()
    name: str = "ddim"
    steps: int = 50
    clip: bool = True  # predicted images into [-1, 1]
    score: Callable[[Tensor], Tensor] | None = None
    predicted: bool = False  # the score is that of the predicted image
    repeated: Callable = partial  # as a Solver's

    def __post_init__(self):
        if self.name not in SAMPLERS:
            raise LabError(f"denoiser={self.name}: accepted is one of {', '.join(SAMPLERS)}.")
        if not 1 <= self.steps <= (T := self.schedule.T):
            raise LabError(f"denoising_steps={self.steps}: accepted is a whole number from 1 to diffusion_steps={T}.")

    @property
    def identity(self) -> dict:
        """The settings that an image depends on, but for guidance."""
        return {"sampler": self.name, "steps": self.steps, "clip": self.clip} | self.schedule.identity

    @property
    def evaluations(self) -> int:
        """Evaluations of the network an image; a backward pass through it counts as two."""
        return self.steps * (3 if self.score and self.predicted else 1)

    @property
    def times(self) -> list[int]:
        """The times visited, noisiest first: DDIM in strides from 0 up, DDPM evenly from T - 1 down to 0."""
        T, steps = self.schedule.T, range(self.steps)
        if self.name == "ddim":
            return [i * T // self.steps for i in reversed(steps)]
        return [T - 1 - round(i * (T - 1) / max(self.steps - 1, 1)) for i in steps]

    def guided(self, network: Noise, t: Tensor, x: Tensor, image: Callable) -> tuple[Tensor, Tensor | float]:
        """(predicted noise, gradient of the score) at x_t; ``image(x_t, noise)`` predicts the image."""
        if not self.score:
            return network(t, x).float(), 0.0
        with torch.set_grad_enabled(self.predicted):
            x = x.detach().requires_grad_()
            noise = network(t, x).float()
        with torch.enable_grad():
            score = self.score(image(x, noise) if self.predicted else x).sum()
        return noise.detach(), torch.autograd.grad(score, x)[0]

    def step(self, network: Noise, t: Tensor, abar: Tensor, x: Tensor) -> Tensor:
        """x (B, C, H, W) at the next time, without what DDPM adds, from x at t; abar (2,) at both times, float64.

        Guidance with gradient g moves the predicted image by (1 - abar) / sqrt(abar) g under DDIM, which is the noise
        e - sqrt(1 - abar) g of GUIDE, and the mean by the variance times g under DDPM.
        """
        a, after = abar

        def image(x: Tensor, noise: Tensor) -> Tensor:
            predicted = (x - (1 - a).sqrt() * noise) / a.sqrt()
            return predicted.clamp(-1, 1) if self.clip else predicted

        noise, gradient = self.guided(network, t, x, image)
        x0 = image(x, noise)
        if self.name == "ddim":
            x0 = x0 + (1 - a) / a.sqrt() * gradient
            return after.sqrt() * x0 + ((1 - after) / (1 - a)).sqrt() * (x - a.sqrt() * x0)
        beta = 1 - a / after  # of the jump from this time to the next
        return (after.sqrt() * beta * x0 + (a / after).sqrt() * (1 - after) * x) / (1 - a) + beta * gradient

    @torch.no_grad()
    def path(self, network: Noise, x: Tensor, frames: int = 0) -> tuple[Tensor, int]:
        """(``frames`` states (frames, B, C, H, W), by default all, from the noise to the images, evaluations)."""
        times, step, states = torch.tensor(self.times, device=x.device), self.repeated(self.step, network), [x]
        abar = torch.nn.functional.pad(self.schedule.abar_on(x.device)[times], (0, 1), value=1.0)  # 1: of the images
        name = hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest() if self.name == "ddpm" else ""
        for i, (t, both) in enumerate(zip(times.float(), abar.unfold(0, 2, 1), strict=True)):
            x = step(t, both, x)
            if name and i + 1 < self.steps:  # what is added depends on the noise at the start alone
                fresh = torch.randn(x.shape, generator=stream(0, "ancestral", name, i))
                x = x + (1 - both[0] / both[1]).sqrt() * fresh.to(x.device)
            states.append(x)
        if not torch.isfinite(x).all():
            raise LabError(f"The sampler {self.name} left the finite numbers: the network has diverged.")
        kept = torch.linspace(0, self.steps, frames or self.steps + 1).round().long().tolist()
        return torch.stack([states[i] for i in kept]), self.evaluations

    def integrate(self, network: Noise, x: Tensor) -> tuple[Tensor, int]:
        """(images (B, C, H, W), evaluations of the network) from noise x."""
        return self.path(network, x, 2)[0][-1], self.evaluations
