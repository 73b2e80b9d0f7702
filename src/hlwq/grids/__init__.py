"""Grids: the values that weights can be rounded to.

A grid says how wide its codes are, which weights share a scale and which are fitted together; it fits parameters,
rounds and decodes. It knows neither solvers nor formats.
"""

from __future__ import annotations

from hlwq.grids.base import Grid, Parameters, fit_group_size, fit_weighted, round_to_storage, sum_by_halves
from hlwq.grids.lloyd import LloydGrid
from hlwq.grids.uniform import ScaleMethod, UniformGrid

__all__ = [
    "GRIDS",
    "Grid",
    "LloydGrid",
    "Parameters",
    "ScaleMethod",
    "UniformGrid",
    "fit_group_size",
    "fit_weighted",
    "round_to_storage",
    "sum_by_halves",
]

GRIDS: dict[str, type[UniformGrid] | type[LloydGrid]] = {grid.name: grid for grid in (UniformGrid, LloydGrid)}
