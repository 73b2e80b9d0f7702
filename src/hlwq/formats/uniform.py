"""What formats of uniform codes share: widths and groups that engines run, integer zeros, decoding."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from hlwq.errors import HlwqError
from hlwq.formats.base import Scheme, check_bits
from hlwq.grids import Parameters, QuantizedMatrix, UniformGrid

WORD_BITS = (4, 8)
"""Widths of codes in int32 words that engines run."""
READABLE_BITS = (2, 4, 8)
"""Widths that leave no gap in such a word."""
GROUP_SIZES = (32, 64, 128)
"""What engines run uniform codes in."""


def no_lloyd_grid(format_name: str, recipe: str) -> HlwqError:
    """The error of a format that holds uniform codes only; `recipe` is one whose last stage has them, in words."""
    return HlwqError(
        f"format {format_name} stores uniform codes, not Lloyd–Max codes. Use --recipe {recipe}, "
        "or --format hlwq or dense."
    )


def check_codes(format_name: str, bits: int, allowed: tuple[int, ...], group_size: int) -> None:
    """Raise HlwqError unless a format has codes of this many bits, and engines run groups of this size."""
    check_bits(format_name, bits, allowed)
    if group_size not in GROUP_SIZES:
        *most, last = GROUP_SIZES
        raise HlwqError(
            f"format {format_name} has groups of {', '.join(map(str, most))} or {last}, not {group_size}. "
            "Set --group-size."
        )


def check_multiples_of_32(format_name: str, module: str, shape: tuple[int, int]) -> None:
    """Raise HlwqError unless both sides of a matrix are multiples of 32, as packing and engines need them."""
    if shape[0] % 32 or shape[1] % 32:
        raise HlwqError(
            f"{module} has shape {shape}; format {format_name} needs multiples of 32. Keep it in its own dtype: "
            f"--exclude '{re.escape(module.rsplit('.', 1)[-1])}$'."
        )


def symmetric_zero(bits: int) -> int:
    """The code that stands for 0 in symmetric files."""
    return 1 << (bits - 1)


def integer_zeros(matrix: QuantizedMatrix) -> Tensor:
    """The codes that stand for 0 in each group of a matrix on a grid with integer zeros: uint8 (out, groups)."""
    scale, bias = matrix.parameters.scale, matrix.parameters.bias
    assert bias is not None
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
        scheme: of the module.
        group_of_column: int64 (in,), or None where groups are runs of neighbouring columns.

    Returns:
        float32 (out, in).
    """
    scales = scales.to(torch.float32)
    grid = UniformGrid(scheme.bits, scheme.group_size, bool(scheme.symmetric))
    matrix = QuantizedMatrix(codes, Parameters(scales, -(zeros * scales)), grid, group_of_column=group_of_column)
    return matrix.dequantize()
