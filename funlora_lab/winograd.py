"""3 x 3 convolutions with half the products: Winograd's F(4, 3) over the rows (Lavin & Gray 2016, arXiv:1509.09308).

Down a column, four outputs y_r = g_0 x_r + g_1 x_{r+1} + g_2 x_{r+2} cost twelve products. They are part of a product
of two polynomials, and that takes six, one at each of the points 0, 1, -1, 2, -2 and infinity: y = A [(G g) * (D x)]
with the matrices below. So four rows out cost six convolutions of 1 x 3 instead of twelve. Doing the same along the
rows would halve the products once more, but as many passes over larger tensors then take what is saved.

Letters: B images, C input and O output channels, H x W pixels, T = H / 4 groups of rows, 6 points.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 4  # that come out of a group; six go in
D = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
A = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


@cache
def matrices(H: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(D of all groups (6, T, H), taking what lies outside the image as zero; G (6, 3); A of all groups (H, 6T))"""
    groups = torch.eye(H // ROWS, dtype=dtype)
    into = torch.zeros(6, H // ROWS, H + 2, dtype=dtype)
    for t in range(H // ROWS):
        into[:, t, ROWS * t : ROWS * t + 6] = torch.tensor(D, dtype=dtype)
    out = torch.einsum("rp,ts->trps", torch.tensor(A, dtype=dtype), groups).reshape(H, -1)
    return into[:, :, 1:-1].contiguous(), torch.tensor(G, dtype=dtype), out


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, C, H, W) padded by one pixel of zeros, H a multiple of four, weight (O, C, 3, 3) -> (B, O, H, W)"""
    (B, C, H, W), O = x.shape, len(weight)
    into, kernel, out = matrices(H, x.dtype)
    columns = x.reshape(B * C, H, W)
    kernels = torch.einsum("pk,ockw->pocw", kernel, weight)[:, :, :, None]  # (6, O, C, 1, 3)
    products = [
        F.conv2d(torch.bmm(rows.expand(B * C, -1, -1), columns).view(B, C, -1, W), kernel, padding=(0, 1))
        for rows, kernel in zip(into, kernels, strict=True)
    ]
    points = torch.cat(products, 2).view(B * O, -1, W)
    return torch.bmm(out.expand(B * O, -1, -1), points).view(B, O, H, W) + bias[:, None, None]
