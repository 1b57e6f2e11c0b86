"""What the learned numbers say about a network: the rank of F, and the importance of a layer."""

import torch
from torch import Tensor

TOLERANCE = 1e-5  # of the largest singular value: what float32 tells from rounding in a hundred rows (100 * 1.2e-7)


def importance(A: Tensor, B: Tensor) -> float:
    """Eq. 20: mean |A - 1| + mean |B - 1| of one class and layer, for vectors trained with vanilla mul."""
    return float((A - 1).abs().mean() + (B - 1).abs().mean())


def singular_values(F: Tensor) -> Tensor:
    """Singular values of F (..., O, I), largest first, in float64 -> (..., min(O, I))."""
    return torch.linalg.svdvals(F.double())


def numerical_rank(F: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Singular values of F (..., O, I) above ``tolerance`` times the largest, counted in float64 -> (...)."""
    values = singular_values(F)
    return (values > tolerance * values[..., :1]).sum(-1)


def effective_rank(F: Tensor) -> Tensor:
    """exp of the entropy of the singular values as shares (Roy & Vetterli 2007): how many count -> (...)."""
    values = singular_values(F)
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()
