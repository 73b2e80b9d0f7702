"""Round each weight to the nearest level of its group: no data needed."""

from __future__ import annotations

from torch import Tensor

from hlwq.grids import Basis, Grid, Parameters, QuantizedMatrix
from hlwq.hadamard import rotate_blocks


def quantize_nearest(weights: Tensor, grid: Grid, basis: Basis = "identity") -> QuantizedMatrix:
    """Quantize a matrix by fitting each group and rounding to the nearest level.

    With a `UniformGrid` this is RTN; with a `LloydGrid` in the `hadamard` basis it is data-free HLWQ. Rows do not
    depend on each other, so a large matrix can be quantized a chunk of rows at a time.

    Args:
        weights: float32 (out, in); `in` a multiple of `grid.group_size`.
        grid: what a group can be rounded to.
        basis: the coordinates to round in.

    Raises:
        HlwqError: a group's parameters overflow the grid's storage dtype.
    """
    if basis == "hadamard":
        weights = rotate_blocks(weights, grid.group_size)
    groups = weights.unflatten(-1, (-1, grid.group_size))
    parameters = grid.fit(groups)
    codes = grid.round(groups, parameters).flatten(-2)
    bias = None if parameters.bias is None else parameters.bias.squeeze(-1)
    return QuantizedMatrix(codes, Parameters(parameters.scale.squeeze(-1), bias), grid, basis)
