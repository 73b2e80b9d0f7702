"""What formats of uniform codes share: widths and groups that engines run, integer zeros, decoding."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hlwq.bases import Basis, Identity
from hlwq.errors import UnsupportedError
from hlwq.formats.base import Scheme, check_bits
from hlwq.grids import Grid, Parameters, UniformGrid
from hlwq.matrix import QuantizedMatrix

WORD_BITS = (4, 8)
"""Widths of codes in int32 words that engines run."""
READABLE_BITS = (2, 4, 8)
"""Widths that leave no gap in such a word."""
GROUP_SIZES = (32, 64, 128)
"""What engines run uniform codes in."""


def uniform_grid(
    name: str, bits: tuple[int, ...], recipe: str, grid: Grid, basis: Basis, *, rotated: bool = False, **stored: Any
) -> UniformGrid:
    """The grid of a format of uniform codes.

    Args:
        name: the format's.
        bits: widths of its codes.
        recipe: one whose last stage has uniform codes, for those who ask for others.
        grid: what was asked for.
        basis: likewise.
        rotated: whether columns can be rotated.
        stored: the fields of the grid that the format decides.

    Raises:
        UnsupportedError: the format has no such codes.
    """
    if not isinstance(grid, UniformGrid):
        raise UnsupportedError(
            f"format {name} stores uniform codes, not Lloyd–Max codes. Use `recipe={recipe!r}`, or format hlwq or "
            "dense.",
            argument="format",
        )
    if basis != Identity() and not rotated:
        raise UnsupportedError(
            f"format {name} has no place for a rotation, which engines would have to undo. Use `basis='identity'`, or "
            "format compressed-tensors or dense."
        )
    check_bits(name, grid.bits, bits)
    if grid.group_size not in GROUP_SIZES:
        *most, last = GROUP_SIZES
        raise UnsupportedError(
            f"format {name} has groups of {', '.join(map(str, most))} or {last}, not {grid.group_size}. "
            "Set `group_size`."
        )
    return replace(grid, **stored)


def engine_storage(dtype: str) -> tuple[torch.dtype, ...]:
    """The dtypes that scales of a GPTQ file end up in: float16 in the file, the model's bfloat16 in the engine."""
    return (torch.bfloat16, torch.float16) if dtype == "BF16" else (torch.float16,)


def check_multiples_of_32(name: str, module: str, shape: tuple[int, int]) -> None:
    """Raise UnsupportedError unless both sides of a matrix are multiples of 32, as packing and engines need them."""
    if shape[0] % 32 or shape[1] % 32:
        raise UnsupportedError(
            f"{module} has shape {shape}; format {name} needs multiples of 32. Keep it in its own dtype: "
            f"`exclude='{re.escape(module.rsplit('.', 1)[-1])}$'`.",
            tensor=module,
        )


def symmetric_zero(bits: int) -> int:
    """The code that stands for 0 in symmetric files."""
    return 1 << (bits - 1)


def integer_zeros(matrix: QuantizedMatrix) -> Tensor:
    """The codes that stand for 0 in each group of a matrix on a grid with integer zeros: uint8 (out, groups)."""
    scale, bias = matrix.parameters.scale, matrix.parameters.bias
    if bias is None:
        raise ValueError("Integer zeros are those of a grid with biases.")
    # A group of scale 0 is all zeros whatever its zero says.
    empty = scale == 0
    zeros = torch.where(empty, symmetric_zero(matrix.grid.bits), -bias / torch.where(empty, 1, scale))
    return zeros.round().to(torch.uint8)


def decode(
    codes: Tensor, scales: Tensor, zeros: Tensor | int, scheme: Scheme, group_of_column: Tensor | None = None
) -> Tensor:
    """scale · (code − zero).

    Args:
        codes: uint8 (out, in).
        scales: (out, groups), of any floating dtype.
        zeros: (out, groups), or one for all.
        scheme: the module's.
        group_of_column: int64 (in,), or None where groups are runs of neighbouring columns.

    Returns:
        float32 (out, in).
    """
    scales = scales.to(torch.float32)
    grid = UniformGrid(scheme.bits, scheme.group_size, bool(scheme.symmetric))
    matrix = QuantizedMatrix(codes, Parameters(scales, -(zeros * scales)), grid, group_of_column=group_of_column)
    return matrix.dequantize()
