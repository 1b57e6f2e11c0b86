"""Nearest neighbours among tens of thousands of feature vectors, on whatever device they lie.

Letters: N and M vectors, D features each. Squared distances come from matrix products in float32, a block of rows at a
time, so memory stays bounded; whatever they leave in doubt is computed again in float64, from differences. The results
are therefore those of the exact form.
"""

import torch
from torch import Tensor

BLOCK = 2**24  # squared distances held at once: 64 MB
SPARE = 4  # neighbours kept beyond those asked for, since rounding may change their order
ROUNDING = 2e-5  # bound of the error of a squared distance, as a share of the largest squared length


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances between rows (..., N, D) and (..., M, D), from differences -> (..., N, M) in float64."""
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def _blocks(x: Tensor, y: Tensor):
    """(first row, squared distances (rows, M) in float32) of blocks of rows of x (N, D) to all rows of y (M, D).

    Both are moved to y's mean and scaled to a largest length of 1, so the error is below ROUNDING.
    """
    centre = y.double().mean(0)
    x, y = (part.double() - centre for part in (x, y))
    scale = torch.cat([x.square().sum(1), y.square().sum(1)]).max().sqrt().clamp(min=1e-300)
    x, y = ((part / scale).float() for part in (x, y))
    lengths, rows = y.square().sum(1), max(1, BLOCK // len(y))
    fast, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        for first in range(0, len(x), rows):
            part = x[first : first + rows]
            yield first, torch.addmm(lengths[None] + part.square().sum(1)[:, None], part, y.T, alpha=-2), scale
    finally:
        torch.backends.cuda.matmul.allow_tf32 = fast


def nearest(x: Tensor, y: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """(distances (N, k) in float64, indices (N, k)) of the k rows of y (M, D) nearest to each row of x (N, D).

    Where y is x itself, a row is no neighbour of its own.
    """
    found, chosen = [], []
    for first, squares, _ in _blocks(x, y):
        if own := y is x:
            squares[:, first : first + len(squares)].fill_diagonal_(torch.inf)
        kept = squares.topk(min(k + SPARE, len(y) - own), largest=False).indices
        for part, indices in zip(x[first : first + len(squares)].split(256), kept.split(256), strict=True):
            values, order = distances(part[:, None], y[indices])[:, 0].sort(stable=True)
            found.append(values[:, :k])
            chosen.append(indices.gather(1, order[:, :k]))
    return torch.cat(found), torch.cat(chosen)


def within(x: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Which rows of x (N, D) lie in at least one ball around ``centres`` (M, D) with ``radii`` (M,) -> bool (N,)."""
    inside = torch.empty(len(x), dtype=torch.bool, device=x.device)
    for first, squares, scale in _blocks(x, centres):
        beyond = squares.sub_((radii / scale).square().float()).amin(1)  # how far outside the nearest ball
        inside[first : first + len(beyond)] = beyond < 0
        unsure = first + (beyond.abs() < ROUNDING).nonzero()[:, 0]
        for some in unsure.split(max(1, BLOCK // len(centres))):
            inside[some] = (distances(x[some], centres) <= radii).any(1)
    return inside
