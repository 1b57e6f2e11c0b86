"""The functions of Eq. 8-19: from two vectors to a matrix of higher rank. Pure; no state.

Letters: K leading class axes (any number, also none), O = Cout, I = Cin, p functions.

    F = (1/p) * sum_{i=1..p} ponderation_i * f_i(A, B)                                                    (Eq. 8)

with A (K, O), B (K, I), ponderation (K, p) and, for power and cosine, one exponent or frequency per function (K, p).
"""

import torch
from torch import Tensor


def product(A: Tensor, B: Tensor) -> Tensor:
    """The rank-1 matrix A B of Eq. 4-7: (K, O), (K, I) -> (K, O, I)."""
    return A[..., :, None] * B[..., None, :]


def _separable(left: list[Tensor], right: list[Tensor], ponderation: Tensor) -> Tensor:
    """(1/p) sum_i ponderation_i left_i right_i for p vectors each: one matrix product, rank at most p."""
    weighted = torch.stack(left, dim=-1) * ponderation[..., None, :]  # (K, O, p)
    with torch.autocast(weighted.device.type, enabled=False):  # F is fp32 whatever the convolutions compute in
        return weighted @ torch.stack(right, dim=-2) / ponderation.shape[-1]


def shift(A: Tensor, B: Tensor, ponderation: Tensor) -> Tensor:
    """f_i = (P^i A)(B P^-i): both vectors shifted right by i, then multiplied (Eq. 9-10)."""
    steps = range(1, ponderation.shape[-1] + 1)
    return _separable([A.roll(i, -1) for i in steps], [B.roll(i, -1) for i in steps], ponderation)


def power_frozen(A: Tensor, B: Tensor, ponderation: Tensor) -> Tensor:
    """f_i = (AB)^i element by element, i = 1..p (Eq. 11-13)."""
    steps = range(1, ponderation.shape[-1] + 1)
    return _separable([A**i for i in steps], [B**i for i in steps], ponderation)


def _signed_power(x: Tensor, exponent: Tensor) -> Tensor:
    """sign(x) |x|^exponent, with gradient 0 instead of NaN at x = 0; x (K, n), exponent (K,)."""
    magnitude = x.abs().clamp_min(torch.finfo(x.dtype).tiny)
    return x.sign() * magnitude ** exponent[..., None]


def power(A: Tensor, B: Tensor, ponderation: Tensor, exponent: Tensor) -> Tensor:
    """f_i = sign(AB) |AB|^exponent_i (Eq. 14-15); for even exponents it differs from (AB)^i in the sign."""
    steps = range(ponderation.shape[-1])
    left = [_signed_power(A, exponent[..., i]) for i in steps]
    right = [_signed_power(B, exponent[..., i]) for i in steps]
    return _separable(left, right, ponderation)


# numbers in the waves held together: on a CPU they should stay in its caches, on a GPU keep it busy
WAVES_AT_ONCE = 2**20
WAVES_KEPT = 2**22  # numbers in the waves of a layer that are kept for the way back instead of computed again
ON_A_GPU = 64  # times as many


class _SumOfCosines(torch.autograd.Function):
    """sum_i ponderation_i cos(frequency_i z); the waves of many classes are computed again on the way back, not kept.

    z (K, n), ponderation and frequency (K, p) -> (K, n). The p waves of some classes at a time, (classes, p, n), meet
    their ponderations and gradients in matrix products; those of all classes never exist together.
    """

    @staticmethod
    def blocks(z: Tensor, p: int) -> list[slice]:
        K, n = z.shape
        limit = WAVES_AT_ONCE * (ON_A_GPU if z.is_cuda else 1)
        together = max(1, limit // (p * n))
        return [slice(k, k + together) for k in range(0, K, together)]

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


class _Scaled(torch.autograd.Function):
    """W0 * F rounded once to the type in which the convolution computes, class by class; W0 is frozen."""

    @staticmethod
    def forward(ctx, W0: Tensor, F: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(W0)
        weights = W0.new_empty(len(F), *W0.shape, dtype=dtype)
        for one, weight in zip(F.reshape(*F.shape, *[1] * (W0.dim() - 2)), weights, strict=True):
            torch.mul(W0, one, out=weight)
        return weights

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (W0,) = ctx.saved_tensors
        kernel = tuple(range(2, W0.dim()))
        return None, torch.stack([(one * W0).sum(kernel) for one in upstream]), None


def scaled(W0: Tensor, F: Tensor) -> Tensor:
    """The weights W0 * F of K classes: W0 (O, I, ...) without gradient, F (K, O, I) -> (K, O, I, ...).

    Under autocast they come in the type in which the convolution will want them, so that those of many classes never
    exist in fp32 together, nor do their gradients.
    """
    autocast = torch.is_autocast_enabled(W0.device.type)
    with torch.autocast(W0.device.type, enabled=False):
        return _Scaled.apply(W0, F, torch.get_autocast_dtype(W0.device.type) if autocast else W0.dtype)


def first_ponderation(function: str, start: str, p: int) -> Tensor:
    """The p ponderations at which training starts, with A = B = 1 and frequencies or exponents 1..p.

    literal: 1, as the paper writes; exact for shift and power, but for the cosine F is then -0.14, not 1.
    identity: the ponderations of least norm for which F = 1. equal: all the same, and F = 1.
    """
    if function != "cosine" or start == "literal":
        return torch.ones(p)
    waves = torch.arange(1, p + 1, dtype=torch.float64).cos()
    weights = waves if start == "identity" else torch.ones_like(waves)
    return (p * weights / (weights * waves).sum()).float()


def rank_bound(function: str, p: int, outputs: int, inputs: int) -> int:
    """The largest rank F can have by its formula: 1, p, or (cosine) only the size of the matrix."""
    bound = {"product": 1, "shift": p, "power": p, "cosine": outputs}[function]
    return min(bound, outputs, inputs)
