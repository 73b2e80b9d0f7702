"""Lloyd–Max codebooks of the standard normal distribution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import inf, pi, sqrt

import torch
from torch import Tensor

from hlwq.errors import RequestError


@dataclass(frozen=True)
class Codebook:
    """The levels that minimise the mean squared error of rounding N(0,1).

    Attributes:
        centroids: float32 (2^bits,), ascending and symmetric about 0.
        boundaries: float32 (2^bits − 1,), the midpoints: level k serves (boundaries[k−1], boundaries[k]].
        mse: the expected squared error on N(0,1), which has unit variance.
    """

    centroids: Tensor
    boundaries: Tensor
    mse: float


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept may later be used where gradients are taken
def codebook(bits: int, device: torch.device | str = "cpu") -> Codebook:
    """Solve the Lloyd–Max conditions for N(0,1) with 2^bits levels.

    With cells (t_i−1, t_i), t_0 = −∞ and t_L = +∞, the conditions are
    c_i = (φ(t_i−1) − φ(t_i)) / (Φ(t_i) − Φ(t_i−1)) and t_i = (c_i + c_i+1)/2 (Max 1960, eqs. 4 and 6).
    They are solved by Newton's method, since the usual alternation needs about 10^5 rounds at 8 bits.

    Args:
        bits: 1 to 8.
        device: where its tensors are wanted. They are shared: do not write to them.

    Raises:
        RequestError: `bits` is out of range.
    """
    if not 1 <= bits <= 8:
        raise RequestError(f"Codebooks exist for 1 to 8 bits, not {bits}.")
    levels = 2**bits
    quantiles = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    # Panter and Dite (1951): the best levels have density φ^(1/3), that of a normal √3 times as wide.
    centroids = sqrt(3) * torch.special.ndtri(quantiles)
    for _ in range(50):
        means, _, slope_left, slope_right = _cells(centroids)
        jacobian = torch.eye(levels, dtype=torch.float64)
        # Each cell edge is the mean of two centroids, so it moves half as fast as either.
        jacobian -= torch.diag((slope_left + slope_right) / 2)
        jacobian -= torch.diag(slope_left[1:] / 2, -1) + torch.diag(slope_right[:-1] / 2, 1)
        step = torch.linalg.solve(jacobian, means - centroids)
        centroids = centroids + step
        if float(step.abs().max()) < 1e-13:
            break
    centroids = (centroids - centroids.flip(0)) / 2
    _, mass, _, _ = _cells(centroids)
    return Codebook(
        centroids.to(torch.float32).to(device),
        ((centroids[1:] + centroids[:-1]) / 2).to(torch.float32).to(device),
        # For centroids, E[x·c] = E[c²], so E[(x − c)²] = 1 − E[c²].
        float(1 - (centroids**2 * mass).sum()),
    )


def _cells(centroids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean of each cell, its probability, and the slopes of the mean in its left and its right edge."""
    edge = torch.tensor([inf], dtype=torch.float64)
    edges = torch.cat([-edge, (centroids[1:] + centroids[:-1]) / 2, edge])
    left, right = edges[:-1], edges[1:]
    density = torch.exp(-(edges**2) / 2) / sqrt(2 * pi)
    upper = torch.special.ndtr(-left) - torch.special.ndtr(-right)
    lower = torch.special.ndtr(right) - torch.special.ndtr(left)
    mass = torch.where(left > 0, upper, lower)  # the difference of two small numbers, not of two near 1
    means = (density[:-1] - density[1:]) / mass
    slope_left = torch.nan_to_num(density[:-1] * (means - left) / mass)  # 0 · ∞ at the outer edges
    slope_right = torch.nan_to_num(density[1:] * (right - means) / mass)
    return means, mass, slope_left, slope_right
