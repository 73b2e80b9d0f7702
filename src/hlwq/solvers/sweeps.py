"""Scales and codes improved in turn, each where all others stay: coordinate descent on ‖(W − Ŵ) X‖².

GPTQ's loop decides on each column once, knowing nothing of how later ones will round. What it leaves is no minimum:
with E = Ŵ − W, the loss tr(E H Eᵀ) still falls along single scales and single codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hlwq.errors import UnsupportedError
from hlwq.grids import Grid, Parameters
from hlwq.grids.base import ratio_or_zero


@dataclass(frozen=True)
class Run:
    """Columns whose parameters are fitted together, in the order in which a solver takes them.

    Attributes:
        columns: which of the solver's.
        place: where each stands in the run as the matrix has it, (run,); None where the run is a single group.
        parameters: (rows, groups).
    """

    columns: slice
    place: Tensor | None
    parameters: Parameters

    def serving(self, index: int, grid: Grid) -> Parameters:
        """The parameters (rows, 1) of the run's column of this index."""
        if self.place is None:
            return self.parameters
        group = int(self.place[index]) // grid.group_size
        return self.parameters.apply(lambda values: values[:, [group]])

    def decoded(self, codes: Tensor, grid: Grid) -> Tensor:
        """The weights (run, rows) that codes (run, rows), columns in the solver's order, stand for."""
        if self.place is None:
            return grid.decode(codes.T, self.parameters).T.contiguous()
        return grid.decode(codes[self.place.argsort()].T, self.parameters).T[self.place]


def swept(target: Tensor, codes: Tensor, runs: Sequence[Run], grid: Grid, hessian: Tensor) -> list[Run]:
    """Go once through all runs: the best multiple of each run's scales, then the best code of each of its columns.

    No step raises the loss, but for float32.

    Args:
        target: the weights wanted, float32 (in, rows): columns as rows, in the solver's order.
        codes: uint8 (in, rows), replaced in place.
        runs: all runs, with the parameters as they are.
        grid: what they are rounded to.
        hessian: H, float32 (in, in), positive definite, in the same order.

    Returns:
        The runs with their new parameters.
    """
    decoded = torch.cat([run.decoded(codes[run.columns], grid) for run in runs])
    gradient = hessian @ (decoded - target)
    improved = []
    for run in runs:
        inner, slope, now = hessian[run.columns, run.columns], gradient[run.columns].clone(), decoded[run.columns]
        before = now.clone()
        run = _with_best_scales(run, codes[run.columns], now, slope, inner, grid)
        for i, column in enumerate(now):
            parameters = run.serving(i, grid)
            best = grid.round((column - slope[i] / inner[i, i])[:, None], parameters)
            value = grid.decode(best, parameters)[:, 0]
            slope.addr_(inner[i], value - column)
            codes[run.columns.start + i], now[i] = best[:, 0], value
        gradient.addmm_(hessian[:, run.columns], now - before)
        improved.append(run)
    return improved


def _with_best_scales(run: Run, codes: Tensor, now: Tensor, slope: Tensor, inner: Tensor, grid: Grid) -> Run:
    """A run with its parameters times the factor that lowers each row's loss most, where rounding leaves a gain.

    Args:
        run: the run.
        codes: (run, rows).
        now: what they stand for, (run, rows); replaced in place.
        slope: half of the loss's derivative by them, (run, rows); replaced in place.
        inner: the Hessian of these columns, (run, run).
        grid: what they are rounded to.
    """
    factor = 1 - ratio_or_zero((now * slope).sum(0), (now * (inner @ now)).sum(0))
    with suppress(UnsupportedError):  # the best multiple overflows
        proposed = replace(run, parameters=grid.rescaled(run.parameters, factor[:, None]))
        change = proposed.decoded(codes, grid) - now
        gains = (change * (2 * slope + inner @ change)).sum(0) < 0
        change *= gains
        now += change
        slope += inner @ change
        return replace(run, parameters=proposed.parameters.where(gains[:, None], run.parameters))
    return run
