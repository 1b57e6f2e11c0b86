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


WAVES_AT_ONCE = 2**22  # numbers in the waves held together: all of a small layer's, one of a large one's


class _SumOfCosines(torch.autograd.Function):
    """sum_i ponderation_i cos(frequency_i z), recomputing waves on the way back instead of keeping all p of them.

    z (K, O, I), ponderation and frequency (K, p) -> (K, O, I); waves are (K, b, O, I) for a block of b functions.
    """

    @staticmethod
    def blocks(z: Tensor, p: int):
        b = max(1, min(p, WAVES_AT_ONCE // z.numel()))
        return [slice(i, i + b) for i in range(0, p, b)]

    @staticmethod
    def forward(ctx, z: Tensor, ponderation: Tensor, frequency: Tensor) -> Tensor:
        ctx.save_for_backward(z, ponderation, frequency)
        total = torch.zeros_like(z)
        for i in _SumOfCosines.blocks(z, ponderation.shape[-1]):
            waves = torch.cos(frequency[..., i, None, None] * z[..., None, :, :])
            total += (ponderation[..., i, None, None] * waves).sum(-3)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        z, ponderation, frequency = ctx.saved_tensors
        grad_z = torch.zeros_like(z)
        grad_ponderation, grad_frequency = torch.empty_like(ponderation), torch.empty_like(frequency)
        for i in _SumOfCosines.blocks(z, ponderation.shape[-1]):
            angle = frequency[..., i, None, None] * z[..., None, :, :]
            grad_ponderation[..., i] = (torch.cos(angle) * upstream[..., None, :, :]).sum((-2, -1))
            slope = torch.sin(angle) * upstream[..., None, :, :]
            grad_frequency[..., i] = -ponderation[..., i] * (slope * z[..., None, :, :]).sum((-2, -1))
            grad_z -= ((ponderation * frequency)[..., i, None, None] * slope).sum(-3)
        return grad_z, grad_ponderation, grad_frequency


def cosine(A: Tensor, B: Tensor, ponderation: Tensor, frequency: Tensor) -> Tensor:
    """f_i = cos(frequency_i * AB), element by element (Eq. 16-19). Its rank may exceed p."""
    return _SumOfCosines.apply(product(A, B), ponderation, frequency) / ponderation.shape[-1]


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
