"""Dormand-Prince 5(4) in which every image chooses its own step size, so its picture does not depend on its neighbours.

An ordinary adaptive solver takes one step for the whole batch, chosen by the error of all images together. Here time
and step are vectors, one entry an image; images that have arrived wait, and the batch keeps its shape, so that an
image's bits depend on its own noise and on the size of the batch only.

Letters: B images; stages 1-7 of a step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from funlora_lab.errors import LabError

# Dormand & Prince 1980: times and weights of the stages, the solution of order 5, and its difference to order 4
TIMES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SMALLEST = 1e-7  # a step below this share of the way is a velocity that no step size can follow


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) of the type of ``like`` (B, ...)."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def _size(x: Tensor) -> Tensor:
    """Root mean square of every image -> (B,), in float64."""
    return x.double().flatten(1).square().mean(1).sqrt()


def dopri5_each(velocity: Callable[[Tensor, Tensor], Tensor], x0: Tensor, tolerance: float) -> Tensor:
    """Images at t = 1 from noise x0 (B, ...) at t = 0, the error of every step within ``tolerance`` for each image.

    velocity(t (B,), x (B, ...)) -> (B, ...). Raises LabError when it is not finite or no step is small enough.
    """
    x = x0
    t = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    slope = velocity(t.to(x.dtype), x)
    h = _first_step(velocity, x, slope, tolerance)
    while (active := t < 1).any():
        h = torch.minimum(h, 1 - t)  # images that have arrived take steps of length zero
        slopes = [slope]
        for i in range(1, 7):
            x_i = x + _wide(h, x) * sum(a * k for a, k in zip(STAGES[i], slopes, strict=True) if a)
            slopes.append(velocity((t + TIMES[i] * h).to(x.dtype), x_i))
        error = _wide(h, x) * sum(e * k for e, k in zip(ERROR, slopes, strict=True) if e)
        ratio = _size(error / (tolerance + tolerance * torch.maximum(x.abs(), x_i.abs())))
        if not torch.isfinite(ratio[active]).all():
            raise LabError("The solver dopri5-each met a velocity that is not finite: the network has diverged.")
        taken = active & (ratio <= 1)
        last = taken & (t + h >= 1 - 1e-12)
        x = torch.where(_wide(taken, x).bool(), x_i, x)
        slope = torch.where(_wide(taken, x).bool(), slopes[-1], slope)  # the last stage is the next step's first
        t = torch.where(last, 1.0, torch.where(taken, t + h, t))
        factor = (0.9 * ratio.clamp(min=1e-10) ** -0.2).clamp(0.2, 10.0)
        h = torch.where(active, h * torch.where(taken, factor, factor.clamp(max=1.0)), h)
        if (h[t < 1] < SMALLEST).any():
            raise LabError(
                f"The solver dopri5-each gave up (underflow in dt, a step below {SMALLEST:g}): the velocity is not "
                "smooth; accepted alternatives are a fixed grid (euler, midpoint, rk4) or a larger tolerance."
            )
    return x


def _first_step(velocity, x: Tensor, slope: Tensor, tolerance: float) -> Tensor:
    """A first step for every image (B,), by Hairer, Norsett & Wanner, Solving ODEs I, II.4."""
    scale = tolerance + tolerance * x.abs()
    d0, d1 = _size(x / scale), _size(slope / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1.clamp(min=1e-30))
    ahead = velocity(h0.to(x.dtype), x + _wide(h0, x) * slope)
    d2 = _size((ahead - slope) / scale) / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (h0 * 1e-3).clamp(min=1e-6), (0.01 / steepest.clamp(min=1e-30)) ** 0.2)
    return torch.minimum(100 * h0, h1).clamp(SMALLEST, 1.0)
