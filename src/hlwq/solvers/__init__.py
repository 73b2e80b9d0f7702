"""Solvers: how the codes of one matrix are chosen."""

from __future__ import annotations

from hlwq.solvers.base import INPUTS, ORIGINAL_INPUTS, STREAM, Gram, Solver, output_error
from hlwq.solvers.gptq import Gptq
from hlwq.solvers.nearest import Nearest

__all__ = ["INPUTS", "ORIGINAL_INPUTS", "SOLVERS", "STREAM", "Gptq", "Gram", "Nearest", "Solver", "output_error"]

SOLVERS: dict[str, type[Nearest] | type[Gptq]] = {solver.name: solver for solver in (Nearest, Gptq)}
