"""What a group of weights can be rounded to, given the group's few parameters.

A grid sees weights grouped: float32 tensors of shape (…, group). Its parameters have shape (…, 1), so that the
same functions serve a whole matrix (out, groups, group) and one column (out, 1) of a solver's loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from hlwq.errors import HlwqError
from hlwq.hadamard import rotate_blocks
from hlwq.lloyd import codebook

CHUNK_WEIGHTS = 1 << 20
"""Rows of a matrix are worked on in chunks that fit the processor's cache: faster, and memory stays bounded."""

ScaleMethod = Literal["signed", "absmax"]
Basis = Literal["identity", "hadamard"]


@dataclass(frozen=True)
class Parameters:
    """The parameters of each group, float32 but exactly representable in the dtypes the grid stores them in.

    Attributes:
        scale: (…, 1), in units of the weights.
        bias: (…, 1), in units of the weights, or None where the grid has none.
    """

    scale: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class UniformGrid:
    """Evenly spaced levels: w = scale · code + bias, code in 0 … 2^bits − 1.

    Attributes:
        bits: 2 to 8.
        group_size: weights that share parameters.
        symmetric: bias = −2^(bits−1) · scale. Otherwise the bias is fitted to the group's range.
        integer_zero: bias = −zero · scale with an integer zero, 0 … 2^bits − 1 (GPTQ). Otherwise any bias (MLX).
        scale_method: how symmetric scales are chosen. `signed`: s = −w/2^(bits−1), where w is the weight of the
            largest magnitude, with its sign, which is then exact but for the rounding of the scale.
            `absmax`: s = |w|/(2^(bits−1) − 1).
        storage: dtypes that parameters are rounded to, in this order. GPTQ files store float16 but engines
            compute with the model's bfloat16: rounded to both, they decode to the same bits everywhere.
    """

    bits: int
    group_size: int
    symmetric: bool = True
    integer_zero: bool = True
    scale_method: ScaleMethod = "signed"
    storage: tuple[torch.dtype, ...] = (torch.float16,)

    def fit(self, weights: Tensor) -> Parameters:
        """Parameters for groups of float32 weights (…, group), from each group's range.

        Raises:
            HlwqError: a scale overflows the storage dtype.
        """
        top, middle = 2**self.bits - 1, 2 ** (self.bits - 1)
        if self.symmetric:
            extreme = weights.gather(-1, weights.abs().argmax(-1, keepdim=True))
            scale = -extreme / middle if self.scale_method == "signed" else extreme.abs() / (middle - 1)
            scale = self._stored(scale)
            return Parameters(scale, -middle * scale)
        if self.integer_zero:
            high = weights.amax(-1, keepdim=True).clamp(min=0)
            low = weights.amin(-1, keepdim=True).clamp(max=0)
            scale = self._stored((high - low) / top)
            zero = torch.where(scale > 0, -low / scale, 0).round().clamp(0, top)
            return Parameters(scale, -zero * scale)
        return self._fit_affine(weights)

    def _fit_affine(self, weights: Tensor) -> Parameters:
        """The range, anchored at its edge of larger magnitude and stretched so that 0 is a level, as MLX does."""
        top = 2**self.bits - 1
        low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
        low_is_edge = low.abs() > high.abs()
        edge = torch.where(low_is_edge, low, high)
        scale = ((high - low) / top).clamp(min=1e-7)
        scale = torch.where(low_is_edge, scale, -scale)
        steps = (edge / scale).round()
        scale = self._stored(torch.where(steps != 0, edge / steps, scale))
        bias = self._stored(torch.where(steps != 0, edge, 0))
        return Parameters(scale, bias)

    def round(self, weights: Tensor, parameters: Parameters) -> Tensor:
        """The nearest codes, uint8 (…, group), for float32 weights (…, group)."""
        assert parameters.bias is not None
        empty = parameters.scale == 0
        steps = (weights - parameters.bias) / torch.where(empty, 1, parameters.scale)
        return steps.round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """The weights, float32 (…, group), that uint8 codes (…, group) stand for."""
        assert parameters.bias is not None
        return codes * parameters.scale + parameters.bias

    def _stored(self, values: Tensor) -> Tensor:
        return round_to_storage(values, self.storage)


@dataclass(frozen=True)
class LloydGrid:
    """The Lloyd–Max levels of N(0,1), scaled by the group's norm: w = norm/√group_size · centroid[code].

    The weights are meant to be nearly Gaussian, as they are after the Hadamard rotation.

    Attributes:
        bits: 1 to 8.
        group_size: weights that share a norm.
        least_squares: store the norm that is best for the codes, r·⟨z, c⟩/⟨c, c⟩, instead of r = ‖w‖.
        storage: dtypes that norms are rounded to, in this order.
    """

    bits: int
    group_size: int
    least_squares: bool = True
    storage: tuple[torch.dtype, ...] = (torch.float16,)

    def fit(self, weights: Tensor) -> Parameters:
        """Norms for groups of float32 weights (…, group); `scale` holds the norm. A zero group has norm 0.

        Raises:
            HlwqError: a norm overflows the storage dtype.
        """
        norm = torch.linalg.vector_norm(weights, dim=-1, keepdim=True)
        round_to_storage(norm, self.storage)  # an infinite norm would come back from the least squares as anything
        if self.least_squares:
            levels = self.decode(self.round(weights, Parameters(norm)), Parameters(torch.ones_like(norm)))
            norm = (weights * levels).sum(-1, keepdim=True) / (levels * levels).sum(-1, keepdim=True)
        return Parameters(round_to_storage(norm, self.storage))

    def round(self, weights: Tensor, parameters: Parameters) -> Tensor:
        """The nearest codes, uint8 (…, group), for float32 weights (…, group)."""
        norm = parameters.scale
        inverse = torch.where(norm > 0, sqrt(self.group_size) / norm, 0)
        boundaries = codebook(self.bits).to(weights.device).boundaries
        return torch.bucketize(weights * inverse, boundaries, out_int32=True).to(torch.uint8)

    def decode(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """The weights, float32 (…, group), that uint8 codes (…, group) stand for."""
        centroids = codebook(self.bits).to(codes.device).centroids
        return centroids[codes.int()] * (parameters.scale / sqrt(self.group_size))


Grid = UniformGrid | LloydGrid


@dataclass(frozen=True)
class QuantizedMatrix:
    """A weight matrix as codes: what a solver returns and a format writes.

    Attributes:
        codes: uint8 (out, in).
        parameters: each (out, groups).
        grid: what the codes mean.
        basis: the coordinates that were rounded. `hadamard`: decoded blocks are rotated back.
    """

    codes: Tensor
    parameters: Parameters
    grid: Grid
    basis: Basis = "identity"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded weights, (out, in), computed in float32 and returned in `dtype`."""
        weights = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        rows = max(1, CHUNK_WEIGHTS // max(1, self.codes.shape[1]))
        for start in range(0, len(weights), rows):
            weights[start : start + rows] = self._decode_rows(slice(start, start + rows))
        return weights

    def _decode_rows(self, rows: slice) -> Tensor:
        scale, bias = self.parameters.scale[rows].unsqueeze(-1), self.parameters.bias
        parameters = Parameters(scale, None if bias is None else bias[rows].unsqueeze(-1))
        codes = self.codes[rows].unflatten(-1, (-1, self.grid.group_size))
        weights = self.grid.decode(codes, parameters).flatten(-2)
        return rotate_blocks(weights, self.grid.group_size) if self.basis == "hadamard" else weights


def round_to_storage(values: Tensor, storage: tuple[torch.dtype, ...]) -> Tensor:
    """Round float32 values through each dtype of `storage` and back to float32.

    Raises:
        HlwqError: a finite value becomes infinite on the way.
    """
    rounded = values
    for dtype in storage:
        rounded = rounded.to(dtype).to(torch.float32)
    if not torch.isfinite(rounded).all():
        limit = min(torch.finfo(dtype).max for dtype in storage)
        raise HlwqError(
            f"a group parameter of {float(values.abs().max()):.3g} exceeds {limit:.5g}, the most its format can store; "
            "leave this matrix in its own dtype with --exclude"
        )
    return rounded
