"""What is reported: accuracies over tasks, and what the adapters' numbers say about the network."""

from statistics import mean

import torch
from torch import Tensor

# a singular value counts when it exceeds this share of the largest: about what float32, in which adapters are learned
# and applied, tells from rounding in matrices of a hundred rows (100 * 1.2e-7)
TOLERANCE = 1e-5


def average_accuracies(matrix: list[list[float] | None]) -> list[float | None]:
    """A_k = mean over j <= k of a_{k,j} (Eq. 22) for every k; ``matrix[k][j]`` is the accuracy on task j after k.

    A task after which nothing was scored has None for its row and its average.
    """
    return [row and mean(row) for row in matrix]


def last_accuracy(matrix: list[list[float] | None]) -> float | None:
    """LA = A_T (Eq. 22), in [0, 1]; None when the last task was not scored."""
    return average_accuracies(matrix)[-1]


def average_incremental_accuracy(matrix: list[list[float] | None]) -> float | None:
    """AIA = mean_k A_k (Eq. 23), in [0, 1]; None unless every task was scored."""
    averages = average_accuracies(matrix)
    return None if None in averages else mean(averages)


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
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()
