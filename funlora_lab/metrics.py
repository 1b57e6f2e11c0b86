"""What is reported: accuracies over tasks, and what the adapters' numbers say about the network."""

from statistics import mean

import torch
from torch import Tensor


def average_accuracies(matrix: list[list[float]]) -> list[float]:
    """A_k = mean over j <= k of a_{k,j} (Eq. 22) for every k; ``matrix[k][j]`` is the accuracy on task j after k."""
    return [mean(row[: k + 1]) for k, row in enumerate(matrix)]


def last_accuracy(matrix: list[list[float]]) -> float:
    """LA = A_T (Eq. 22), in [0, 1]."""
    return average_accuracies(matrix)[-1]


def average_incremental_accuracy(matrix: list[list[float]]) -> float:
    """AIA = mean_k A_k (Eq. 23), in [0, 1]."""
    return mean(average_accuracies(matrix))


def importance(A: Tensor, B: Tensor) -> float:
    """Eq. 20: mean |A - 1| + mean |B - 1| of one class and layer, for vectors trained with vanilla mul."""
    return float((A - 1).abs().mean() + (B - 1).abs().mean())


def numerical_rank(F: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Singular values of F (..., O, I) above ``tolerance`` times the largest, counted in float64 -> (...)."""
    values = torch.linalg.svdvals(F.double())
    return (values > tolerance * values[..., :1]).sum(-1)
