"""Packed matrices in plain torch: any device, any number of rows, and what the other kernels are tested against."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from hlwq.compiled import cpu_kernels
from hlwq.devices import compute_dtype
from hlwq.hadamard import hadamard_matrix
from hlwq.lloyd import codebook
from hlwq.packing import unpack

TILE_WEIGHTS = 1 << 20
"""Weights that are decoded at once: they stay in a processor's cache."""


def matmul(inputs: Tensor, packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    """See `hlwq.kernels.matmul`; inputs (rows, in). A tile of rows of the matrix is looked up at a time."""
    dtype = compute_dtype(inputs.device, inputs.dtype)
    rotated = rotate_inputs(inputs, inputs.shape[1] // norms.shape[1]).to(dtype)
    rows = max(1, TILE_WEIGHTS // inputs.shape[1])
    tiles = zip(packed.split(rows), norms.split(rows), strict=True)
    return torch.cat([rotated @ look_up(*tile, bits).to(dtype).T for tile in tiles], -1)


def rotate_inputs(inputs: Tensor, group_size: int) -> Tensor:
    """Rotate (rows, in) in float32, as one product, and return them in their own dtype."""
    groups = inputs.to(torch.float32).unflatten(-1, (-1, group_size))
    rotated: Tensor = groups @ hadamard_matrix(group_size, inputs.device)
    return rotated.flatten(-2).to(inputs.dtype)


def look_up(packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    """Decode to the rotated coordinates: norm/√d · centroid[code], float32 (out, in)."""
    kernels = cpu_kernels(packed)
    if kernels:
        weights = torch.empty(len(packed), packed.shape[1] * 8 // bits)
        kernels.decode(packed, norms, bits, width=bits, rotated=False, target=weights)
        return weights
    return _look_up(packed, norms, bits)


def _look_up(packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    centroids = codebook(bits, packed.device).centroids
    levels = centroids[unpack(packed, bits).int()].unflatten(-1, (norms.shape[1], -1))
    weights: Tensor = levels * (norms.to(torch.float32) / sqrt(levels.shape[-1])).unsqueeze(-1)
    return weights.flatten(-2)
