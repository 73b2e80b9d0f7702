"""What every grid provides, and what grids share: parameters, and a fit that counts weights by their importance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from hlwq.errors import RequestError, UnsupportedError
from hlwq.options import check_types

GROUP_SIZES = (128, 64, 32)
"""What stands in for a group size that does not divide in_features, the first that is not above it and divides."""
REFITS = 3
"""Rounds of least squares after the candidates; more change little."""


@dataclass(frozen=True)
class Parameters:
    """The parameters of groups, float32 but exactly representable in the dtypes the grid stores them in.

    Attributes:
        scale: (…, groups), in units of the weights.
        bias: (…, groups), in units of the weights, or None where the grid has none.
    """

    scale: Tensor
    bias: Tensor | None = None

    def apply(self, function: Callable[[Tensor], Tensor]) -> Parameters:
        """The same function applied to each parameter that there is."""
        return Parameters(function(self.scale), None if self.bias is None else function(self.bias))

    def where(self, chosen: Tensor, other: Parameters) -> Parameters:
        """These where `chosen`, broadcastable to `scale`, is true, and elsewhere the other's."""
        bias = None if self.bias is None or other.bias is None else torch.where(chosen, self.bias, other.bias)
        return Parameters(torch.where(chosen, self.scale, other.scale), bias)

    @staticmethod
    def joined(parts: Sequence[Parameters], axis: int) -> Parameters:
        """Several along an axis."""
        biases = [part.bias for part in parts if part.bias is not None]
        return Parameters(torch.cat([part.scale for part in parts], axis), torch.cat(biases, axis) if biases else None)


class Grid(Protocol):
    """The values that a run of weights can be rounded to, given its few parameters.

    Tensors are float32. A run is `fit_columns` neighbouring weights whose parameters are fitted together; it has a
    scale for each of its groups of `group_size`. Where a run is a single group, parameters have the shape (…, 1), and
    the same functions serve a whole matrix (out, groups, group) and one column (out, 1) of a solver's loop.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]

    @property
    def bits(self) -> int:
        """Width of a code."""

    @property
    def group_size(self) -> int:
        """Weights that share a scale."""

    @property
    def fit_columns(self) -> int:
        """Weights whose parameters are fitted together: a multiple of `group_size`."""

    @property
    def symmetry(self) -> bool | None:
        """Whether the levels are symmetric, where files say so; None where the word has no meaning."""

    def with_bits(self, bits: int) -> Grid:
        """The grid with codes of another width."""

    def fitted(self, in_features: int, symmetric: bool) -> Grid:
        """The grid for matrices of this width, with groups that divide it.

        Args:
            in_features: the width.
            symmetric: the choice between symmetric and asymmetric levels, where the grid leaves it to others.

        Raises:
            UnsupportedError: no group size divides the width.
        """

    def fit(self, weights: Tensor) -> Parameters:
        """Parameters for runs of weights (…, run), from each run alone.

        Raises:
            UnsupportedError: a parameter overflows the storage dtype.
        """

    def candidates(self, weights: Tensor) -> Iterator[Parameters]:
        """Parameters that `fit_weighted` chooses among; of uniform grids, their own `fit` is one."""

    def refit(self, weights: Tensor, codes: Tensor, importance: Tensor, parameters: Parameters) -> Parameters:
        """The parameters of least weighted squared error for codes already chosen."""

    def rescaled(self, parameters: Parameters, factor: Tensor) -> Parameters:
        """The parameters with which codes stand for so many times the weights, but for rounding to the storage dtype.

        Raises:
            UnsupportedError: one overflows it.
        """

    def round(self, weights: Tensor, parameters: Parameters) -> Tensor:
        """The nearest codes, uint8, for weights (…, run), or for any columns of one group."""

    def decode(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """The weights that codes (…, run), or any columns of one group, stand for."""


def check_sizes(grid: Grid, widths: range) -> None:
    """Raise RequestError unless a grid's options have their types, its bits are of these, and groups hold weights."""
    check_types(grid)
    if grid.bits not in widths:
        raise RequestError(f"`bits` is {grid.bits}; {grid.title} have {widths.start} to {widths.stop - 1} bits.")
    if grid.group_size < 1:
        raise RequestError(f"`group_size` is {grid.group_size}; it must be positive.")


def fit_group_size(wanted: int, in_features: int) -> int:
    """`wanted` if it divides in_features, else the largest of 128, 64 and 32 below it that does.

    Raises:
        UnsupportedError: none does.
    """
    for size in (wanted, *GROUP_SIZES):
        if size <= wanted and in_features % size == 0:
            return size
    raise UnsupportedError(
        f"in_features is {in_features}, which neither {wanted} nor a smaller one of 128, 64 and 32 divides. "
        "Choose a `group_size` that does, or keep the tensor with `exclude`."
    )


def fit_weighted(grid: Grid, weights: Tensor, importance: Tensor) -> Parameters:
    """Parameters chosen by the squared error that they leave, each weight counting by its importance.

    The best of the grid's candidates, improved by alternating between codes and least squares; every step is kept
    run by run only where it helps, so the result is never worse than any candidate.

    Args:
        grid: what a run can be rounded to.
        weights: float32 (…, run).
        importance: float32, broadcastable to `weights`, positive.

    Raises:
        UnsupportedError: a parameter overflows the storage dtype.
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
        except UnsupportedError:  # a group whose least squares overflow: the candidates serve
            break
        best, least = _better(best, least, refitted, error_of(refitted))
    return best


def _better(best: Parameters, least: Tensor, other: Parameters, error: Tensor) -> tuple[Parameters, Tensor]:
    """The parameters with the smaller error, run by run, and that error."""
    better = error < least
    return other.where(better, best), torch.where(better, error, least)


def sum_by_halves(values: Tensor) -> Tensor:
    """The sums over the last axis, which is kept: halves are added until one is left, on every machine alike."""
    while (length := values.shape[-1]) > 1:
        half = length // 2
        values = torch.cat([values[..., :half] + values[..., length - half :], values[..., half : length - half]], -1)
    return values


def ratio_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The ratio, or 0 where the denominator is not positive."""
    return torch.where(denominator > 0, numerator / denominator, 0)


def round_to_storage(values: Tensor, storage: tuple[torch.dtype, ...]) -> Tensor:
    """Round float32 values through each dtype of `storage` and back to float32.

    Raises:
        UnsupportedError: a finite value becomes infinite on the way.
    """
    rounded = values
    for dtype in storage:
        rounded = rounded.to(dtype).to(torch.float32)
    if not torch.isfinite(rounded).all():
        limit = min(torch.finfo(dtype).max for dtype in storage)
        raise UnsupportedError(
            f"a group parameter of {float(values.abs().max()):.3g} exceeds {limit:.5g}, the most its format can store; "
            "leave this matrix in its own dtype with `exclude`"
        )
    return rounded
