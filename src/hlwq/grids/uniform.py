"""Evenly spaced levels, which engines decode by a multiplication."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hlwq.errors import RequestError
from hlwq.grids.base import Parameters, check_sizes, fit_group_size, ratio_or_zero, round_to_storage
from hlwq.options import option

SHRINKING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
"""Fractions of a group's range that `fit_weighted` tries: clipping the largest weight can serve the others better."""

ScaleMethod = Literal["signed", "absmax"]


@dataclass(frozen=True)
class UniformGrid:
    """Evenly spaced levels: w = scale · code + bias, code in 0 … 2^bits − 1.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: weights that share parameters.
        symmetric: bias = −2^(bits−1) · scale; if False, the bias is fitted to the group's range. None leaves the choice
            to the format, and is symmetric without one.
        scale_method: how symmetric scales are chosen. `signed`, the default: s = −w/2^(bits−1), where w is the weight
            of the largest magnitude, with its sign, which is then exact but for the rounding of the scale.
            `absmax`: s = |w|/(2^(bits−1) − 1).
        integer_zero: bias = −zero · scale with an integer zero, 0 … 2^bits − 1 (GPTQ). If False, any bias (MLX).
        storage: dtypes that parameters are rounded to, in this order. GPTQ files store float16 but engines
            compute with the model's bfloat16: rounded to both, they decode to the same bits everywhere.
    """

    name: ClassVar[str] = "uniform"
    title: ClassVar[str] = "uniform levels"
    reference: ClassVar[str] = ""
    bits: int = option("Bits of a code in the file.")
    group_size: int = option("Weights that share a scale or norm in the file.")
    symmetric: bool | None = option(
        "For uniform codes; by default as the format prefers.", default=None, flag="--symmetric/--asymmetric"
    )
    integer_zero: bool = True
    scale_method: ScaleMethod | None = option(
        "Symmetric scales: signed full range (largest weight exact), or absmax.", default=None, flag="--scale"
    )
    storage: tuple[torch.dtype, ...] = (torch.float16,)

    def __post_init__(self) -> None:
        check_sizes(self, range(2, 9))
        if self.scale_method is not None and self.symmetric is False:
            raise RequestError("`scale_method` changes nothing where the grid is asymmetric. Add `symmetric=True`.")

    @property
    def fit_columns(self) -> int:
        """A group."""
        return self.group_size

    @property
    def symmetry(self) -> bool:
        """Whether the levels are symmetric."""
        return self.symmetric is not False

    def with_bits(self, bits: int) -> UniformGrid:
        """The grid with codes of another width."""
        return replace(self, bits=bits)

    def fitted(self, in_features: int, symmetric: bool) -> UniformGrid:
        """The grid with groups that divide the width, symmetric as it says, else as told.

        Raises:
            UnsupportedError: no group size divides the width.
            RequestError: it has a method for symmetric scales, and is asymmetric.
        """
        symmetric = symmetric if self.symmetric is None else self.symmetric
        return replace(self, group_size=fit_group_size(self.group_size, in_features), symmetric=symmetric)

    def fit(self, weights: Tensor) -> Parameters:
        """Parameters for groups of float32 weights (…, group), from each group's range.

        Raises:
            UnsupportedError: a scale overflows the storage dtype.
        """
        if self.symmetry:
            extreme = weights.gather(-1, weights.abs().argmax(-1, keepdim=True))
            middle = 2 ** (self.bits - 1)
            return self._symmetric(extreme.abs() / (middle - 1) if self.scale_method == "absmax" else -extreme / middle)
        if self.integer_zero:
            return self._with_zero(*_range_with_zero(weights))
        return self._fit_affine(weights)

    def candidates(self, weights: Tensor) -> Iterator[Parameters]:
        """Parameters that `fit_weighted` chooses among: the group's range, shrunk by several fractions."""
        if not self.symmetry and not self.integer_zero:
            yield self._fit_affine(weights)
            low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
            middle, half = (high + low) / 2, (high - low) / 2
            for fraction in SHRINKING:
                scale = self._stored(2 * half * fraction / (2**self.bits - 1))
                yield Parameters(scale, self._stored(middle - half * fraction))
        elif self.symmetry:
            scale = self.fit(weights).scale
            for fraction in SHRINKING:
                yield self._symmetric(scale * fraction)
                if self.scale_method != "absmax":  # the side with one level more may serve the smaller weights better
                    yield self._symmetric(-scale * fraction)
        else:
            low, high = _range_with_zero(weights)
            for fraction in SHRINKING:
                yield self._with_zero(low * fraction, high * fraction)

    def refit(self, weights: Tensor, codes: Tensor, importance: Tensor, parameters: Parameters) -> Parameters:
        """The parameters of least weighted squared error for codes already chosen; an integer zero stays."""
        if self.symmetry or self.integer_zero:
            zero = _zero(parameters)
            steps = codes - (2 ** (self.bits - 1) if self.symmetry else zero)
            scale = ratio_or_zero(
                (importance * steps * weights).sum(-1, True), (importance * steps * steps).sum(-1, True)
            )
            if self.symmetry:
                return self._symmetric(scale)
            scale = self._stored(scale)
            return Parameters(scale, -zero * scale)
        levels, share = codes.float(), importance / importance.sum(-1, keepdim=True)
        mean_level, mean = (share * levels).sum(-1, True), (share * weights).sum(-1, True)
        slope = ratio_or_zero(
            (share * (levels - mean_level) * weights).sum(-1, True), (share * (levels - mean_level) ** 2).sum(-1, True)
        )
        scale = self._stored(slope)
        return Parameters(scale, self._stored(mean - scale * mean_level))

    def rescaled(self, parameters: Parameters, factor: Tensor) -> Parameters:
        """The scales and biases times a factor; an integer zero stays. Raises UnsupportedError if one overflows."""
        if self.symmetry:
            return self._symmetric(parameters.scale * factor)
        scale = self._stored(parameters.scale * factor)
        if self.integer_zero:
            return Parameters(scale, -_zero(parameters) * scale)
        return Parameters(scale, self._stored(_bias(parameters) * factor))

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
        empty = parameters.scale == 0
        steps = (weights - _bias(parameters)) / torch.where(empty, 1, parameters.scale)
        return steps.round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """The weights, float32 (…, group), that uint8 codes (…, group) stand for."""
        return codes * parameters.scale + _bias(parameters)

    def _stored(self, values: Tensor) -> Tensor:
        return round_to_storage(values, self.storage)


def _range_with_zero(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest of each group, or 0 if that is farther out: an integer zero stands between them."""
    return weights.amin(-1, keepdim=True).clamp(max=0), weights.amax(-1, keepdim=True).clamp(min=0)


def _zero(parameters: Parameters) -> Tensor:
    """The integer zero; a group of scale 0 has lost its own, and needs none."""
    return -(_bias(parameters) / torch.where(parameters.scale == 0, 1, parameters.scale)).round()


def _bias(parameters: Parameters) -> Tensor:
    if parameters.bias is None:
        raise ValueError("Uniform levels need a bias.")
    return parameters.bias
