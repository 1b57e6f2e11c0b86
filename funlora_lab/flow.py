"""Flow matching: the training loss of Eq. 1-2 and the solver that turns noise into images.

Letters: B images, C channels, H x W pixels. Time runs from t = 0 (noise) to t = 1 (image); images lie in [-1, 1].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torchdiffeq import odeint

from funlora_lab.adaptive import dopri5_each
from funlora_lab.errors import LabError
from funlora_lab.streams import stream

Velocity = Callable[[Tensor, Tensor], Tensor]


def flow_loss(velocity: Velocity, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Eq. 1 for each image: mean over pixels of (v(t, x_t) - (x1 - x0))^2, with x_t = t x1 + (1 - t) x0 (Eq. 2).

    x1 images (B, C, H, W), x0 noise of the same shape, t (B,) in [0, 1] -> (B,)
    """
    weight = t[:, None, None, None]
    predicted = velocity(t, weight * x1 + (1 - weight) * x0)
    return (predicted.float() - (x1 - x0)).square().mean((1, 2, 3))


@dataclass(frozen=True)
class Solver:
    """How dx/dt = v is integrated: euler, midpoint or rk4 on a fixed grid of ``steps``, or dopri5 to ``tolerance``.

    Evaluations of the network a step: euler 1, midpoint 2, rk4 (torchdiffeq's 3/8 rule) 4. dopri5 chooses its steps
    for the batch as a whole, so its images depend, within the tolerance, on what is drawn together; in dopri5-each
    every image chooses its own.
    """

    name: str = "midpoint"
    steps: int = 4
    tolerance: float = 1e-5

    def path(self, velocity: Velocity, x0: Tensor, frames: int | None = None) -> tuple[Tensor, int]:
        """(states (frames, B, C, H, W) at equal times from noise x0 at t = 0 to images at t = 1, evaluations).

        ``frames`` is by default one for the noise and one for every step of the grid (11 for dopri5), and never changes
        the last state of a fixed grid; frames between two steps are interpolated (dopri5-each starts anew at each).
        """
        frames = frames or (11 if self.name.startswith("dopri5") else self.steps + 1)
        evaluations = 0

        def counted(t: Tensor, x: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return velocity(t, x).float()

        def grid(*_) -> Tensor:
            return torch.linspace(0, 1, self.steps + 1, device=x0.device)

        times = torch.linspace(0, 1, frames, device=x0.device)
        if self.name == "dopri5":
            settings = {"atol": self.tolerance, "rtol": self.tolerance}
        else:
            settings = {"options": {"grid_constructor": grid}}
        try:
            with torch.no_grad():
                if self.name == "dopri5-each":
                    states = torch.stack(list(self._each(counted, x0, times.tolist())))
                else:
                    states = odeint(counted, x0, times, method=self.name, **settings)
        except AssertionError as reason:
            raise LabError(
                f"The solver {self.name} gave up ({reason}): the velocity is not finite or not smooth; "
                "accepted alternatives are a fixed grid (euler, midpoint, rk4) or a larger tolerance."
            ) from None
        if not torch.isfinite(states[-1]).all():
            raise LabError(f"The solver {self.name} left the finite numbers: the network has diverged.")
        return states, evaluations

    def _each(self, velocity: Velocity, x: Tensor, times: list[float]) -> Iterator[Tensor]:
        """The states of dopri5-each at ``times``: from one to the next it runs over a time of its own from 0 to 1."""
        yield x
        for first, last in pairwise(times):

            def stretched(t: Tensor, x: Tensor, first=first, span=last - first) -> Tensor:
                return span * velocity(first + span * t, x)

            x = dopri5_each(stretched, x, self.tolerance)
            yield x

    def integrate(self, velocity: Velocity, x0: Tensor) -> tuple[Tensor, int]:
        """(images at t = 1, evaluations of the network) from noise x0 (B, C, H, W) at t = 0."""
        states, evaluations = self.path(velocity, x0, frames=2)
        return states[-1], evaluations


def noise(seed: int, cls: int, chunk: int, shape: tuple[int, ...]) -> Tensor:
    """The starting noise of one chunk of one class, drawn on the CPU: the same for every method, run and device."""
    return torch.randn(shape, generator=stream(seed, "noise", cls, chunk))
