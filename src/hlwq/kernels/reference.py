"""The product with a packed matrix in plain torch: any device, and what the other kernels are tested against."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from hlwq.hadamard import rotate_blocks
from hlwq.lloyd import codebook
from hlwq.packing import unpack

TILE_WEIGHTS = 1 << 22
"""Weights that are decoded at once."""


def matmul(inputs: Tensor, packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    """See `hlwq.kernels.matmul`.

    Since H is symmetric and orthogonal, x · (norm/√d · H c)ᵀ = (x H) · (norm/√d · c)ᵀ: the inputs are rotated once, and
    a tile of rows is only looked up.
    """
    columns = packed.shape[1] * 8 // bits
    group_size = columns // norms.shape[1]
    rotated = rotate_blocks(inputs.to(torch.float32), group_size).to(inputs.dtype)
    rows = max(1, TILE_WEIGHTS // columns)
    parts = [
        rotated @ look_up(some, their_norms, bits).to(inputs.dtype).T
        for some, their_norms in zip(packed.split(rows), norms.split(rows), strict=True)
    ]
    return torch.cat(parts, -1)


def look_up(packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    """Decode to the rotated coordinates: norm/√d · centroid[code], float32 (out, in)."""
    centroids = codebook(bits, packed.device).centroids
    levels = centroids[unpack(packed, bits).int()].unflatten(-1, (norms.shape[1], -1))
    weights: Tensor = levels * (norms.to(torch.float32) / sqrt(levels.shape[-1])).unsqueeze(-1)
    return weights.flatten(-2)
