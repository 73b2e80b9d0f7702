"""Round each weight to the nearest level of its group: no data needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hlwq.bases import Basis
from hlwq.grids import Grid
from hlwq.matrix import QuantizedMatrix
from hlwq.solvers.base import Gram


@dataclass(frozen=True)
class Nearest:
    """RTN with a `UniformGrid`; with a `LloydGrid` in the Hadamard basis, data-free HLWQ."""

    name: ClassVar[str] = "nearest"
    title: ClassVar[str] = "rounded to nearest"
    reference: ClassVar[str] = ""

    @property
    def needs(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    @property
    def scatters_groups(self) -> bool:
        """Never."""
        return False

    def without_originals(self) -> Nearest:
        """Itself."""
        return self

    def memory(self, rows: int, columns: int) -> int:
        """Nothing that grows with the matrix: a chunk of rows is worked on at a time."""
        return 0

    def solve(self, weights: Tensor, grid: Grid, basis: Basis, gram: Gram | None = None) -> QuantizedMatrix:
        """Fit each run of weights and round to the nearest levels.

        Rows do not depend on each other, so a large matrix can be quantized a chunk of rows at a time.

        Args:
            weights: float32 (out, in); `in` a multiple of `grid.fit_columns`.
            grid: what a run can be rounded to.
            basis: the coordinates to round in.
            gram: not needed.

        Raises:
            UnsupportedError: a group's parameters overflow the grid's storage dtype.
        """
        runs = basis.rotate(weights).unflatten(-1, (-1, grid.fit_columns))
        parameters = grid.fit(runs)
        codes = grid.round(runs, parameters).flatten(-2)
        return QuantizedMatrix(codes, parameters.apply(lambda each: each.flatten(-2)), grid, basis)
