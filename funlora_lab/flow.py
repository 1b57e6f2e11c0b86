"""Flow matching: the training loss of Eq. 1-2 and the solver that turns noise into images.

Letters: B images, C channels, H x W pixels. Time runs from t = 0 (noise) to t = 1 (image); images lie in [-1, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass

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

    def integrate(self, velocity: Velocity, x0: Tensor) -> tuple[Tensor, int]:
        """(images at t = 1, evaluations of the network) from noise x0 (B, C, H, W) at t = 0."""
        evaluations = 0

        def counted(t: Tensor, x: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return velocity(t, x).float()

        def grid(*_) -> Tensor:
            return torch.linspace(0, 1, self.steps + 1, device=x0.device)

        ends = torch.tensor([0.0, 1.0], device=x0.device)
        if self.name == "dopri5":
            settings = {"atol": self.tolerance, "rtol": self.tolerance}
        else:
            settings = {"options": {"grid_constructor": grid}}
        try:
            with torch.no_grad():
                if self.name == "dopri5-each":
                    x1 = dopri5_each(counted, x0, self.tolerance)
                else:
                    x1 = odeint(counted, x0, ends, method=self.name, **settings)[-1]
        except AssertionError as reason:
            raise LabError(
                f"The solver {self.name} gave up ({reason}): the velocity is not finite or not smooth; "
                "accepted alternatives are a fixed grid (euler, midpoint, rk4) or a larger tolerance."
            ) from None
        if not torch.isfinite(x1).all():
            raise LabError(f"The solver {self.name} left the finite numbers: the network has diverged.")
        return x1, evaluations


def noise(seed: int, cls: int, chunk: int, shape: tuple[int, ...]) -> Tensor:
    """The starting noise of one chunk of one class, drawn on the CPU: the same for every method, run and device."""
    return torch.randn(shape, generator=stream(seed, "noise", cls, chunk))
