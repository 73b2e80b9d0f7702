"""The Lloyd–Max levels of a normal distribution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from hlwq.compiled import cpu_kernels
from hlwq.grids.base import Parameters, check_sizes, fit_group_size, ratio_or_zero, round_to_storage, sum_by_halves
from hlwq.lloyd import codebook
from hlwq.options import option


@dataclass(frozen=True)
class LloydGrid:
    """The Lloyd–Max levels of N(0,1), scaled by the group's norm: w = norm/√group_size · centroid[code].

    The weights are meant to be nearly Gaussian, as they are after the Hadamard rotation.

    Attributes:
        bits: width of a code, 1 to 8.
        group_size: weights that share a norm.
        least_squares: store the norm that is best for the codes, r·⟨z, c⟩/⟨c, c⟩, instead of r = ‖w‖.
        storage: dtypes that norms are rounded to, in this order.
    """

    name: ClassVar[str] = "lloyd"
    title: ClassVar[str] = "Lloyd–Max levels"
    reference: ClassVar[str] = "Lloyd–Max quantization: Max 1960; Lloyd 1982"
    bits: int = option("Bits of a code in the file.")
    group_size: int = option("Weights that share a scale or norm in the file.")
    least_squares: bool = True
    storage: tuple[torch.dtype, ...] = (torch.float16,)

    def __post_init__(self) -> None:
        check_sizes(self, range(1, 9))

    @property
    def fit_columns(self) -> int:
        """A group."""
        return self.group_size

    @property
    def symmetry(self) -> None:
        """Files of these codes do not say."""

    def with_bits(self, bits: int) -> LloydGrid:
        """The grid with codes of another width."""
        return replace(self, bits=bits)

    def fitted(self, in_features: int, symmetric: bool) -> LloydGrid:
        """The grid with groups that divide the width. Raises UnsupportedError if no group size does."""
        return replace(self, group_size=fit_group_size(self.group_size, in_features))

    def fit(self, weights: Tensor) -> Parameters:
        """Norms for groups of float32 weights (…, group); `scale` holds the norm. A zero group has norm 0.

        Raises:
            UnsupportedError: a norm overflows the storage dtype.
        """
        kernels = self._kernels_for_groups(weights)
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
        """Norms that `fit_weighted` chooses among: the group's own, and others near it.

        What `fit` gives is not among them: it lowers the weighted error, but on SmolLM2 at 4 bits not the loss.
        """
        norm = torch.linalg.vector_norm(weights, dim=-1, keepdim=True)
        for fraction in (1.0, 0.9, 1.1):
            yield Parameters(round_to_storage(norm * fraction, self.storage))

    def refit(self, weights: Tensor, codes: Tensor, importance: Tensor, parameters: Parameters) -> Parameters:
        """The norm of least weighted squared error for codes already chosen."""
        levels = self.decode(codes, Parameters(torch.ones_like(parameters.scale)))
        norm = ratio_or_zero(
            (importance * levels * weights).sum(-1, True), (importance * levels * levels).sum(-1, True)
        )
        return Parameters(round_to_storage(norm.clamp(min=0), self.storage))

    def rescaled(self, parameters: Parameters, factor: Tensor) -> Parameters:
        """The norms times a factor. Raises UnsupportedError if one overflows its storage."""
        return Parameters(round_to_storage(parameters.scale * factor.clamp(min=0), self.storage))

    def round(self, weights: Tensor, parameters: Parameters) -> Tensor:
        """The nearest codes, uint8 (…, group), for float32 weights (…, group)."""
        kernels, norms = self._kernels_for_groups(weights), parameters.scale
        if kernels and norms.dtype == torch.float32:
            codes: Tensor = kernels.nearest_codes(weights, norms.expand(*weights.shape[:-1], 1), self.bits)
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

    def _kernels_for_groups(self, weights: Tensor) -> ModuleType | None:
        """The same, where weights are float32 and whole groups, not a solver's single column."""
        whole = weights.dtype == torch.float32 and weights.shape[-1] == self.group_size
        return self.kernels(weights) if whole else None
