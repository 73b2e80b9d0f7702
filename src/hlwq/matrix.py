"""Weight matrices as codes: what a solver returns and a format writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from hlwq.bases import Basis, Identity, rotates_groups
from hlwq.grids import Grid, LloydGrid, Parameters

CHUNK_WEIGHTS = 1 << 20
"""Weights per chunk of rows: chunks fit the processor's cache, which is faster, and bound the memory."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """A weight matrix as codes: what a solver returns and a format writes.

    Attributes:
        codes: uint8 (out, in).
        parameters: each (out, groups).
        grid: what the codes mean.
        basis: the coordinates that were rounded; decoded rows are rotated back.
        group_of_column: int64 (in,), where groups are not runs of neighbouring columns (`desc_act`); else None.
    """

    codes: Tensor
    parameters: Parameters
    grid: Grid
    basis: Basis = field(default_factory=Identity)
    group_of_column: Tensor | None = None

    def cpu(self) -> QuantizedMatrix:
        """The same matrix with its tensors on the CPU."""
        group = None if self.group_of_column is None else self.group_of_column.cpu()
        return replace(
            self, codes=self.codes.cpu(), parameters=self.parameters.apply(Tensor.cpu), group_of_column=group
        )

    @staticmethod
    def joined(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
        """Chunks of rows as one matrix, on the CPU."""
        parts = [part.cpu() for part in parts]
        parameters = Parameters.joined([part.parameters for part in parts], 0)
        return replace(parts[0], codes=torch.cat([part.codes for part in parts]), parameters=parameters)

    def split_rows(self, sizes: Sequence[int]) -> list[QuantizedMatrix]:
        """The matrices that were stacked to be quantized together; `sizes` are their numbers of rows."""
        stops = list(accumulate(sizes))
        parts = [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
        return [replace(self, codes=self.codes[rows], parameters=self._parameters(rows)) for rows in parts]

    def _parameters(self, rows: slice) -> Parameters:
        return self.parameters.apply(lambda values: values[rows])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded weights, (out, in), computed in float32 and returned in `dtype`."""
        if self.group_of_column is not None:
            group_of_column = self.group_of_column
            decoded = self.grid.decode(self.codes, self.parameters.apply(lambda each: each[:, group_of_column]))
            return self.basis.unrotate(decoded).to(dtype)
        weights = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        if isinstance(self.grid, LloydGrid):
            kernels = self.grid.kernels(self.codes)
            rotated = rotates_groups(self.basis, self.grid.group_size)
            if kernels and (rotated or self.basis == Identity()):
                kernels.decode(self.codes, self.parameters.scale, self.grid.bits, 8, rotated, weights)
                return weights
        rows = max(1, CHUNK_WEIGHTS // max(1, self.codes.shape[1]))
        for start in range(0, len(weights), rows):
            weights[start : start + rows] = self._decode_rows(slice(start, start + rows))
        return weights

    def _decode_rows(self, rows: slice) -> Tensor:
        run = self.grid.fit_columns
        parameters = self._parameters(rows).apply(lambda each: each.unflatten(-1, (-1, run // self.grid.group_size)))
        weights = self.grid.decode(self.codes[rows].unflatten(-1, (-1, run)), parameters)
        return self.basis.unrotate(weights.flatten(-2))
