"""The functions of Eq. 8-19: from two vectors to a matrix of higher rank. Pure; no state.

Letters: K leading class axes (any number, also none), O = Cout, I = Cin, p functions.

    F = (1/p) * sum_{i=1..p} ponderation_i * f_i(A, B)                                                    (Eq. 8)

with A (K, O), B (K, I), ponderation (K, p) and, for power and cosine, one exponent or frequency per function (K, p).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from funlora_lab.errors import LabError
from funlora_lab.unet.layers import gpu_kernels


def product(A: Tensor, B: Tensor) -> Tensor:
    """The rank-1 matrix A B of Eq. 4-7: (K, O), (K, I) -> (K, O, I)."""
    return A[..., :, None] * B[..., None, :]


def _separable(term: Callable, A: Tensor, B: Tensor, ponderation: Tensor) -> Tensor:
    """(1/p) sum_i ponderation_i term(A, i) term(B, i), i = 1..p: one matrix product, rank at most p."""
    p = ponderation.shape[-1]
    left, right = ([term(vector, i) for i in range(1, p + 1)] for vector in (A, B))
    weighted = torch.stack(left, dim=-1) * ponderation[..., None, :]  # (K, O, p)
    with torch.autocast(weighted.device.type, enabled=False):  # F is fp32 whatever the convolutions compute in
        return weighted @ torch.stack(right, dim=-2) / p


def shift(A: Tensor, B: Tensor, ponderation: Tensor) -> Tensor:
    """f_i = (P^i A)(B P^-i): both vectors shifted right by i (Eq. 9-10)."""
    return _separable(lambda x, i: x.roll(i, -1), A, B, ponderation)


def power_frozen(A: Tensor, B: Tensor, ponderation: Tensor) -> Tensor:
    """f_i = (AB)^i element by element (Eq. 11-13)."""
    return _separable(lambda x, i: x**i, A, B, ponderation)


def power(A: Tensor, B: Tensor, ponderation: Tensor, exponent: Tensor) -> Tensor:
    """f_i = sign(AB) |AB|^exponent_i (Eq. 14-15); for even exponents it differs from (AB)^i in the sign."""

    def signed_power(x: Tensor, i: int) -> Tensor:
        magnitude = x.abs().clamp_min(torch.finfo(x.dtype).tiny)  # at 0 the gradient is 0 instead of NaN
        return x.sign() * magnitude ** exponent[..., i - 1, None]

    return _separable(signed_power, A, B, ponderation)


# numbers in the waves of a layer that are held together (on a CPU in its caches, on a GPU enough to keep it busy), and
# that are kept for the way back instead of computed again; on a GPU so many times as many
WAVES_AT_ONCE, WAVES_KEPT, ON_A_GPU = 2**20, 2**22, 64


class _SumOfCosines(torch.autograd.Function):
    """sum_i ponderation_i cos(frequency_i z): z (K, n), ponderation and frequency (K, p) -> (K, n).

    The waves (classes, p, n) of some classes at a time meet ponderations and gradients in matrix products.
    """

    @staticmethod
    def blocks(z: Tensor, p: int) -> list[slice]:
        together = max(1, WAVES_AT_ONCE * (ON_A_GPU if z.is_cuda else 1) // (p * z.shape[1]))
        return [slice(k, k + together) for k in range(0, len(z), together)]

    @staticmethod
    def forward(ctx, z: Tensor, ponderation: Tensor, frequency: Tensor) -> Tensor:
        p, total, kept = ponderation.shape[1], torch.empty_like(z), []
        keep = any(ctx.needs_input_grad) and z.numel() * p <= WAVES_KEPT * (ON_A_GPU if z.is_cuda else 1)
        for k in _SumOfCosines.blocks(z, p):
            waves = (frequency[k, :, None] * z[k, None, :]).cos_()
            total[k] = (ponderation[k, None, :] @ waves)[:, 0]
            kept += [waves] if keep else []
        ctx.save_for_backward(z, ponderation, frequency, *kept)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        z, ponderation, frequency, *kept = ctx.saved_tensors
        grad_z, inner = torch.empty_like(z), upstream * z
        grad_ponderation, grad_frequency = torch.empty_like(ponderation), torch.empty_like(frequency)
        for i, k in enumerate(_SumOfCosines.blocks(z, ponderation.shape[1])):
            angle = frequency[k, :, None] * z[k, None, :]
            waves = kept[i] if kept else angle.cos()
            grad_ponderation[k] = (upstream[k, None, :] @ waves.mT)[:, 0]
            slope = angle.sin_()
            grad_frequency[k] = (inner[k, None, :] @ slope.mT)[:, 0]
            grad_z[k] = ((ponderation * frequency)[k, None, :] @ slope)[:, 0]
        return grad_z.mul_(upstream).neg_(), grad_ponderation, grad_frequency.mul_(ponderation).neg_()


def cosine(A: Tensor, B: Tensor, ponderation: Tensor, frequency: Tensor) -> Tensor:
    """f_i = cos(frequency_i * AB), element by element (Eq. 16-19). Its rank may exceed p."""
    z, p = product(A, B), ponderation.shape[-1]
    rows = (each.reshape(-1, p) for each in (ponderation / p, frequency))
    with torch.autocast(z.device.type, enabled=False):
        return _SumOfCosines.apply(z.reshape(-1, z.shape[-2] * z.shape[-1]), *rows).reshape(z.shape)


def cosine_frozen(A: Tensor, B: Tensor, ponderation: Tensor) -> Tensor:
    """``cosine`` with the frequencies 1..p (Eq. 16-18)."""
    return cosine(A, B, ponderation, _steps(ponderation))


def _steps(ponderation: Tensor) -> Tensor:
    p, like = ponderation.shape[-1], {"device": ponderation.device, "dtype": ponderation.dtype}
    return torch.arange(1, p + 1, **like).expand_as(ponderation)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W0: Tensor, F: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(W0)
        one = torch.empty_like(W0, device="meta")  # every class's weights lie in memory as W0 does
        size, stride = (len(F), *W0.shape), (W0.numel(), *one.stride())
        weights = torch.empty_strided(size, stride, dtype=dtype, device=W0.device)
        for one, weight in zip(F, weights, strict=True):
            torch.mul(W0, one, out=weight)
        return weights

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (W0,) = ctx.saved_tensors
        return None, torch.stack([(one * W0).sum((2, 3), keepdim=True) for one in upstream]), None


def scaled(W0: Tensor, F: Tensor) -> Tensor:
    """W0 * F of K classes: W0 (O, I, k, k) without gradient, F (K, O, I, 1, 1) -> (K, O, I, k, k).

    Class by class in the type in which the convolution computes: never are those of many classes in fp32 together.
    """
    with torch.autocast(W0.device.type, enabled=False):
        return _Scaled.apply(W0, F, _computed_in(W0))


def _computed_in(W0: Tensor) -> torch.dtype:
    kind = W0.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else W0.dtype


def scaled_by(f: Callable, W0: Tensor, A: Tensor, B: Tensor, *numbers: Tensor) -> Tensor:
    """``scaled`` by F = f(A, B, *numbers); on a GPU the F of a sum of cosines never leaves the registers."""
    if f in (cosine, cosine_frozen) and W0.dim() == 4 and (kernels := gpu_kernels(W0)):
        ponderation, frequency = numbers if f is cosine else (*numbers, _steps(*numbers))
        return kernels.cosine_weights(W0, A, B, ponderation / ponderation.shape[-1], frequency, _computed_in(W0))
    F = f(A, B, *numbers)
    return scaled(W0, F.reshape(*F.shape, *[1] * (W0.dim() - 2)))


def first_ponderation(function: Callable, start: str, p: int, *others: Tensor) -> Tensor:
    """The p ponderations at which training starts, with A = B = 1 and the first values (p,) of the other numbers.

    literal and kaiming: 1, as the paper writes; exact for shift and power, but for the cosine F is then -0.14, not 1.
    identity: those of least norm for which F = 1. equal: all the same, and F = 1. LabError when every f_i(1, 1) is 0.
    """
    if start in ("literal", "kaiming"):
        return torch.ones(p)
    ones, each = torch.ones(p, 1, dtype=torch.float64), torch.eye(p, dtype=torch.float64)
    values = p * function(ones, ones, each, *(other.double().expand(p, p) for other in others))[:, 0, 0]
    weights = values if start == "identity" else torch.ones_like(values)
    if not (weights * values).sum():
        raise LabError(f"start={start}: f_i(1, 1) is 0 for every i of this function; accepted is literal.")
    return (p * weights / (weights * values).sum()).float()
