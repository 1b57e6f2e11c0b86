"""Flow matching: the training loss of Eq. 1-2 and the solvers that turn noise into images.

Letters: B images, C channels, H x W pixels. Time runs from t = 0 (noise) to t = 1 (image); images lie in [-1, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from funlora_lab.errors import LabError
from funlora_lab.seeds import stream

Velocity = Callable[[Tensor, Tensor], Tensor]  # v(t, x): t (B,) or (), x (B, C, H, W) -> (B, C, H, W)

SOLVERS = {
    "euler": "a fixed grid, order 1, one evaluation of the network a step",
    "midpoint": "a fixed grid, order 2, two evaluations a step",
    "rk4": "a fixed grid, order 4, four evaluations a step (torchdiffeq's 3/8 rule)",
    "dopri5": "Dormand-Prince 5(4), steps chosen to a tolerance for the batch as a whole",
    "dopri5-each": "Dormand-Prince 5(4), steps chosen to a tolerance for every image by itself",
}
EVALUATIONS_A_STEP = {"euler": 1, "midpoint": 2, "rk4": 4}  # of the solvers on a fixed grid


def flow_loss(velocity: Velocity, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Eq. 1 of every image, (B,): mean over pixels of (v(t, x_t) - (x1 - x0))^2, x_t = t x1 + (1 - t) x0 (Eq. 2)."""
    weight = t[:, None, None, None]
    predicted = velocity(t, weight * x1 + (1 - weight) * x0)
    return (predicted.float() - (x1 - x0)).square().mean((1, 2, 3))


def noise(seed: int, cls: int, chunk: int, shape: tuple[int, ...]) -> Tensor:
    """The starting noise of one chunk of one class, drawn on the CPU: the same for every method, run and device."""
    return torch.randn(shape, generator=stream(seed, "noise", cls, chunk))


@dataclass(frozen=True)
class Solver:
    """How dx/dt = v is integrated: one of SOLVERS, on a grid of ``steps`` or, where ``adaptive``, to ``tolerance``."""

    name: str = "midpoint"
    steps: int = 4
    tolerance: float = 1e-5
    repeated: Callable = partial  # (function, its first arguments) -> what is called at every step in their place

    def __post_init__(self):
        if self.name not in SOLVERS:
            raise LabError(f"solver={self.name}: accepted is one of {', '.join(SOLVERS)}.")

    @property
    def adaptive(self) -> bool:
        return self.name not in EVALUATIONS_A_STEP

    @property
    def identity(self) -> dict:
        """The settings that an image depends on."""
        return {"solver": self.name} | ({"tolerance": self.tolerance} if self.adaptive else {"steps": self.steps})

    def step(self, velocity: Velocity, t: Tensor, after: Tensor, x: Tensor) -> Tensor:
        """The state at the time ``after`` from x (B, C, H, W) at t, by one step of a fixed grid; both times are ()."""
        h, v = after - t, lambda t, x: velocity(t, x).float()
        k1 = v(t, x)
        if self.name == "euler":
            return x + h * k1
        if self.name == "midpoint":
            return x + h * v(t + 0.5 * h, x + k1 * (0.5 * h))
        k2 = v(t + h * (1 / 3), x + h * k1 * (1 / 3))
        k3 = v(t + h * (2 / 3), x + h * (k2 - k1 * (1 / 3)))
        return x + (k1 + 3 * (k2 + k3) + v(after, x + h * (k1 - k2 + k3))) * h * 0.125

    def path(self, velocity: Velocity, x0: Tensor, frames: int = 0) -> tuple[Tensor, int]:
        """(states (frames, B, C, H, W) at equal times from noise x0 at t = 0 to images at t = 1, evaluations).

        By default the noise and every step of the grid (11 states of an adaptive solver); states between two steps are
        interpolated, but dopri5-each starts anew at each.
        """
        from torchdiffeq import odeint

        evaluations = self.steps * EVALUATIONS_A_STEP.get(self.name, 0)

        def counted(t: Tensor, x: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return self.repeated(velocity)(t, x).float()

        times = torch.linspace(0, 1, frames or 11, device=x0.device)
        try:
            if self.name == "dopri5":
                states = odeint(counted, x0, times, rtol=self.tolerance, atol=self.tolerance, method="dopri5")
            elif self.name == "dopri5-each":
                each = partial(dopri5_each, counted, self.tolerance)
                states = torch.stack(list(accumulate(pairwise(times.tolist()), each, initial=x0)))
            else:
                states = self._on_grid(self.repeated(self.step, velocity), x0, frames)
        except (AssertionError, FloatingPointError) as reason:  # torchdiffeq's and ours
            raise LabError(
                f"The solver {self.name} gave up ({str(reason).partition(':')[0]}): the velocity is not finite or not "
                "smooth; accepted alternatives are a fixed grid (euler, midpoint, rk4) or a larger tolerance."
            ) from None
        if not torch.isfinite(states[-1]).all():
            raise LabError(f"The solver {self.name} left the finite numbers: the network has diverged.")
        return states, evaluations

    def _on_grid(self, step: Callable, x0: Tensor, frames: int) -> Tensor:
        grid = torch.linspace(0, 1, self.steps + 1, device=x0.device)
        states = torch.stack(list(accumulate(pairwise(grid), lambda x, span: step(*span, x), initial=x0)))
        place = torch.linspace(0, self.steps, frames or self.steps + 1, dtype=x0.dtype, device=x0.device)
        low = place.long().clamp(max=self.steps - 1)
        return torch.lerp(states[low], states[low + 1], (place - low)[:, None, None, None, None])

    def integrate(self, velocity: Velocity, x0: Tensor) -> tuple[Tensor, int]:
        """(images at t = 1, evaluations of the network) from noise x0 (B, C, H, W) at t = 0."""
        states, evaluations = self.path(velocity, x0, 2)
        return states[-1], evaluations


# Dormand & Prince 1980: times and weights of the stages, the solution of order 5, and its difference to order 4
TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SMALLEST, ROUNDING = 1e-7, 1e-12  # no step size follows a velocity that needs a smaller one; times as near are one


def dopri5_each(velocity: Velocity, tolerance: float, x: Tensor, span: tuple[float, float]) -> Tensor:
    """States (B, C, H, W) at the end of ``span`` from states x at its start, each image's error within ``tolerance``.

    Each has its own time and step and waits when it has arrived: its bits depend on its noise and the batch size only.
    """
    t, last = torch.full((len(x),), span[0], dtype=torch.float64, device=x.device), span[1]
    slope = velocity(t.to(x.dtype), x)
    h = _first_step(velocity, t, x, slope, tolerance).detach()
    while (active := t < last - ROUNDING).any():
        h = torch.minimum(h, last - t)  # images that have arrived stay where they are
        wide, slopes = h.to(x.dtype)[:, None, None, None], [slope]
        for time, stage in zip(TIMES, STAGES, strict=True):
            x_i = x + wide * sum(a * k for a, k in zip(stage, slopes, strict=True) if a)
            slopes.append(velocity((t + time * h).to(x.dtype), x_i))
        error = wide * sum(e * k for e, k in zip(ERROR, slopes, strict=True) if e)
        ratio = _size(error / (tolerance + tolerance * torch.maximum(x.abs(), x_i.abs()))).detach()
        if not torch.isfinite(ratio[active]).all():
            raise FloatingPointError("a velocity that is not finite")
        taken = active & (ratio <= 1)
        x = torch.where(taken[:, None, None, None], x_i, x)
        slope = torch.where(taken[:, None, None, None], slopes[-1], slope)  # the last stage is the next step's first
        t = torch.where(taken, t + h, t)
        factor = (0.9 * ratio.clamp(min=1e-10) ** -0.2).clamp(0.2, 10.0)
        h = torch.where(active, h * torch.where(taken, factor, factor.clamp(max=1.0)), h)
        if (h[t < last - ROUNDING] < SMALLEST).any():
            raise FloatingPointError(f"underflow in dt, a step below {SMALLEST:g}")
    return x


def _first_step(velocity: Velocity, t: Tensor, x: Tensor, slope: Tensor, tolerance: float) -> Tensor:
    """A first step for every image (B,), by Hairer, Norsett & Wanner, Solving ODEs I, II.4."""
    scale = tolerance + tolerance * x.abs()
    d0, d1 = _size(x / scale), _size(slope / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1.clamp(min=1e-30))
    ahead = velocity((t + h0).to(x.dtype), x + h0.to(x.dtype)[:, None, None, None] * slope)
    d2 = _size((ahead - slope) / scale) / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (h0 * 1e-3).clamp(min=1e-6), (0.01 / steepest.clamp(min=1e-30)) ** 0.2)
    return torch.minimum(100 * h0, h1).clamp(SMALLEST, 1.0)


def _size(x: Tensor) -> Tensor:
    """Root mean square of every image -> (B,), in float64."""
    return x.double().flatten(1).square().mean(1).sqrt()
