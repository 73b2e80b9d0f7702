"""What every solver provides, and what solvers may need to know of a matrix beside its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from hlwq.bases import Basis
from hlwq.grids import Grid
from hlwq.matrix import QuantizedMatrix

INPUTS, ORIGINAL_INPUTS, STREAM = "inputs", "original inputs", "stream"
"""Needs of a solver: what the calibration data give a matrix as inputs, what they gave it in the original model, and
how the hidden states that its outputs are added to differ from the original model's."""

ERROR_ROWS = 2048
"""Rows that `output_error` looks at."""


@dataclass
class Gram:
    """Second moments of a linear layer's inputs, summed over tokens.

    Attributes:
        hessian: XᵀX, float32 (in, in), X being the inputs (tokens, in) that the quantized prefix gives.
        cross: (X̃ − X)ᵀX, float32 (in, in), X̃ being those of the original model; None unless a solver needs it.
        stream: (R̃ − R)ᵀX, float32 (out, in), R̃ and R being the hidden states (tokens, out) that the outputs are added
            to, in the original model and after the quantized prefix; None unless a solver needs it and there are such.
    """

    hessian: Tensor
    cross: Tensor | None = None
    stream: Tensor | None = None


class Solver(Protocol):
    """How the codes of a matrix are chosen. A solver knows no file format and no model."""

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """What it must know beside the weights: none, or some of `INPUTS`, `ORIGINAL_INPUTS` and `STREAM`."""

    @property
    def scatters_groups(self) -> bool:
        """Whether groups are formed of columns anywhere in the matrix, not of neighbours."""

    def without_originals(self) -> Solver:
        """The same solver for a matrix of which nothing is known but its inputs."""

    def memory(self, rows: int, columns: int) -> int:
        """Bytes that a matrix (rows, columns) takes while it is solved, beside its statistics and its result."""

    def solve(self, weights: Tensor, grid: Grid, basis: Basis, gram: Gram | None = None) -> QuantizedMatrix:
        """Choose codes for float32 weights (out, in), given the moments of the inputs if the solver needs them.

        Raises:
            UnsupportedError: a group's parameters overflow the grid's storage dtype.
            CheckpointError: the moments cannot be factored.
        """


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """‖D X‖² over the calibration tokens, D (out, in) being a difference of weights: tr(D H Dᵀ).

    Where there are more than `ERROR_ROWS` rows, that many, evenly spaced, stand for all: all would cost more than the
    solver itself.
    """
    step = -(-len(difference) // ERROR_ROWS)
    rows = difference[::step]
    total = float(((rows @ hessian) * rows).sum(-1).cpu().sum(dtype=torch.float64))
    return total * len(difference) / len(rows)
