"""What a group of weights can be rounded to, given the group's few parameters.

A grid sees weights grouped: float32 tensors of shape (…, group). Its parameters have shape (…, 1), so that the
same functions serve a whole matrix (out, groups, group) and one column (out, 1) of a solver's loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from hlwq.compiled import cpu_kernels
from hlwq.errors import HlwqError
from hlwq.hadamard import rotate_blocks
from hlwq.lloyd import codebook

CHUNK_WEIGHTS = 1 << 20
"""Rows of a matrix are worked on in chunks that fit the processor's cache: faster, and memory stays bounded."""

SHRINKING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
"""Fractions of a group's range that `fit_weighted` tries: clipping the largest weight can serve the others better."""
REFITS = 3
"""Rounds of least squares after that; more change little."""

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
        if self.symmetric:
            extreme = weights.gather(-1, weights.abs().argmax(-1, keepdim=True))
            middle = 2 ** (self.bits - 1)
            return self._symmetric(-extreme / middle if self.scale_method == "signed" else extreme.abs() / (middle - 1))
        if self.integer_zero:
            return self._with_zero(*_range_with_zero(weights))
        return self._fit_affine(weights)

    def candidates(self, weights: Tensor) -> Iterator[Parameters]:
        """Parameters that `fit_weighted` chooses among: the group's range, shrunk by several fractions."""
        if not self.symmetric and not self.integer_zero:
            low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
            middle, half = (high + low) / 2, (high - low) / 2
            for fraction in SHRINKING:
                scale = self._stored(2 * half * fraction / (2**self.bits - 1))
                yield Parameters(scale, self._stored(middle - half * fraction))
        elif self.symmetric:
            scale = self.fit(weights).scale
            for fraction in SHRINKING:
                yield self._symmetric(scale * fraction)
                if self.scale_method == "signed":  # the side with one level more may serve the smaller weights better
                    yield self._symmetric(-scale * fraction)
        else:
            low, high = _range_with_zero(weights)
            for fraction in SHRINKING:
                yield self._with_zero(low * fraction, high * fraction)

    def refit(self, weights: Tensor, codes: Tensor, importance: Tensor, parameters: Parameters) -> Parameters:
        """The parameters of least weighted squared error for codes already chosen; an integer zero stays."""
        assert parameters.bias is not None
        if self.symmetric or self.integer_zero:
            # A group of scale 0 has lost its zero, and needs none.
            zero = -(parameters.bias / torch.where(parameters.scale == 0, 1, parameters.scale)).round()
            steps = codes - (2 ** (self.bits - 1) if self.symmetric else zero)
            scale = _ratio((importance * steps * weights).sum(-1, True), (importance * steps * steps).sum(-1, True))
            if self.symmetric:
                return self._symmetric(scale)
            scale = self._stored(scale)
            return Parameters(scale, -zero * scale)
        levels, share = codes.float(), importance / importance.sum(-1, keepdim=True)
        mean_level, mean = (share * levels).sum(-1, True), (share * weights).sum(-1, True)
        slope = _ratio(
            (share * (levels - mean_level) * weights).sum(-1, True), (share * (levels - mean_level) ** 2).sum(-1, True)
        )
        scale = self._stored(slope)
        return Parameters(scale, self._stored(mean - scale * mean_level))

    def _symmetric(self, scale: Tensor) -> Parameters:
        stored = self._stored(scale)
        return Parameters(stored, -(2 ** (self.bits - 1)) * stored)

    def _with_zero(self, low: Tensor, high: Tensor) -> Parameters:
        top = 2**self.bits - 1
        scale = self._stored((high - low) / top)
        zero = torch.where(scale > 0, -low / scale, 0).round().clamp(0, top)
        return Parameters(scale, -zero * scale)

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
        kernels = self.kernels(weights)
        norm, best = kernels.fit_norms(weights, self.bits, self.least_squares) if kernels else self._norms(weights)
        round_to_storage(norm, self.storage)  # an infinite norm would come back from the least squares as anything
        return Parameters(round_to_storage(best, self.storage))

    def _norms(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The groups' own norms, and those to store: the same, or those of least squared error."""
        squares = sum_by_halves(weights * weights)
        norm = squares.cpu().to(torch.float64).sqrt().to(squares)  # torch's float32 square root is not always nearest
        if not self.least_squares:
            return norm, norm
        levels = self.decode(self._round(weights, Parameters(norm)), Parameters(torch.ones_like(norm)))
        return norm, sum_by_halves(weights * levels) / sum_by_halves(levels * levels)

    def candidates(self, weights: Tensor) -> Iterator[Parameters]:
        """Norms that `fit_weighted` chooses among: the group's own, and others near it."""
        norm = torch.linalg.vector_norm(weights, dim=-1, keepdim=True)
        for fraction in (1.0, 0.9, 1.1):
            yield Parameters(round_to_storage(norm * fraction, self.storage))

    def refit(self, weights: Tensor, codes: Tensor, importance: Tensor, parameters: Parameters) -> Parameters:
        """The norm of least weighted squared error for codes already chosen."""
        levels = self.decode(codes, Parameters(torch.ones_like(parameters.scale)))
        norm = _ratio((importance * levels * weights).sum(-1, True), (importance * levels * levels).sum(-1, True))
        return Parameters(round_to_storage(norm.clamp(min=0), self.storage))

    def round(self, weights: Tensor, parameters: Parameters) -> Tensor:
        """The nearest codes, uint8 (…, group), for float32 weights (…, group)."""
        kernels = self.kernels(weights)
        if kernels and weights.shape[-1] == self.group_size:  # not a solver's single column
            codes: Tensor = kernels.nearest_codes(weights, parameters.scale, self.bits)
            return codes
        return self._round(weights, parameters)

    def _round(self, weights: Tensor, parameters: Parameters) -> Tensor:
        norm = parameters.scale
        inverse = torch.where(norm > 0, sqrt(self.group_size) / norm, 0)
        boundaries = codebook(self.bits, weights.device).boundaries
        return torch.bucketize(weights * inverse, boundaries, out_int32=True).to(torch.uint8)

    def decode(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """The weights, float32 (…, group), that uint8 codes (…, group) stand for."""
        centroids = codebook(self.bits, codes.device).centroids
        return centroids[codes.int()] * (parameters.scale / sqrt(self.group_size))

    def kernels(self, values: Tensor) -> ModuleType | None:
        """The compiled kernels, where they serve this grid: the same bits, ten times as fast."""
        kernels = cpu_kernels(values)
        return kernels if kernels and self.bits > 1 and self.group_size in kernels.GROUP_SIZES else None


Grid = UniformGrid | LloydGrid


def fit_weighted(grid: Grid, weights: Tensor, importance: Tensor) -> Parameters:
    """Parameters chosen by the squared error that they leave, each weight counting by its importance.

    The best of the grid's candidates, improved by alternating between codes and least squares; every step is kept
    group by group only where it helps, so the result is never worse than any candidate.

    Args:
        grid: what a group can be rounded to.
        weights: float32 (…, group).
        importance: float32, broadcastable to `weights`, positive.

    Raises:
        HlwqError: a parameter overflows the storage dtype.
    """

    def error_of(parameters: Parameters) -> Tensor:
        difference = grid.decode(grid.round(weights, parameters), parameters) - weights
        return (difference.square_() * importance).sum(-1, keepdim=True)

    candidates = grid.candidates(weights)
    best = next(candidates)
    least = error_of(best)
    for candidate in candidates:
        best, least = _better(best, least, candidate, error_of(candidate))
    for _ in range(REFITS):
        try:
            refitted = grid.refit(weights, grid.round(weights, best), importance, best)
        except HlwqError:  # a group whose least squares overflow: the candidates serve
            break
        best, least = _better(best, least, refitted, error_of(refitted))
    return best


def _better(best: Parameters, least: Tensor, other: Parameters, error: Tensor) -> tuple[Parameters, Tensor]:
    """Of two sets of parameters, group by group, those with the smaller error."""
    better = error < least
    bias = None if best.bias is None or other.bias is None else torch.where(better, other.bias, best.bias)
    return Parameters(torch.where(better, other.scale, best.scale), bias), torch.where(better, error, least)


@dataclass(frozen=True)
class QuantizedMatrix:
    """A weight matrix as codes: what a solver returns and a format writes.

    Attributes:
        codes: uint8 (out, in).
        parameters: each (out, groups).
        grid: what the codes mean.
        basis: the coordinates that were rounded. `hadamard`: decoded blocks are rotated back.
        group_of_column: int64 (in,), where groups are not runs of neighbouring columns (`desc_act`); else None.
    """

    codes: Tensor
    parameters: Parameters
    grid: Grid
    basis: Basis = "identity"
    group_of_column: Tensor | None = None

    def cpu(self) -> QuantizedMatrix:
        """The same matrix with its tensors on the CPU."""
        bias, group = self.parameters.bias, self.group_of_column
        parameters = Parameters(self.parameters.scale.cpu(), None if bias is None else bias.cpu())
        group = None if group is None else group.cpu()
        return replace(self, codes=self.codes.cpu(), parameters=parameters, group_of_column=group)

    def split_rows(self, sizes: Sequence[int]) -> list[QuantizedMatrix]:
        """The matrices that were stacked to be quantized together; `sizes` are their numbers of rows."""
        bias = self.parameters.bias
        biases = [None] * len(sizes) if bias is None else bias.split(list(sizes))
        scales = self.parameters.scale.split(list(sizes))
        return [
            replace(self, codes=codes, parameters=Parameters(*parameters))
            for codes, *parameters in zip(self.codes.split(list(sizes)), scales, biases, strict=True)
        ]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded weights, (out, in), computed in float32 and returned in `dtype`."""
        if self.group_of_column is not None:
            scale, bias = self.parameters.scale, self.parameters.bias
            spread = Parameters(scale[:, self.group_of_column], None if bias is None else bias[:, self.group_of_column])
            return self.grid.decode(self.codes, spread).to(dtype)
        weights = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        if isinstance(self.grid, LloydGrid):
            kernels = self.grid.kernels(self.codes)
            if kernels:
                rotated = self.basis == "hadamard"
                kernels.decode(self.codes, self.parameters.scale, self.grid.bits, 8, rotated, weights)
                return weights
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


def sum_by_halves(values: Tensor) -> Tensor:
    """The sums over the last axis, which is kept: halves are added until one is left, on every machine alike."""
    while (length := values.shape[-1]) > 1:
        half = length // 2
        values = torch.cat([values[..., :half] + values[..., length - half :], values[..., half : length - half]], -1)
    return values


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0)


def _range_with_zero(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest of each group, or 0 if that is farther out: an integer zero stands between them."""
    return weights.amin(-1, keepdim=True).clamp(max=0), weights.amax(-1, keepdim=True).clamp(min=0)


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
