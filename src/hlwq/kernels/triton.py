"""The product of few rows with a packed matrix on a CUDA device, in Triton."""

from __future__ import annotations

from math import sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from hlwq.kernels.reference import rotate_inputs
from hlwq.lloyd import codebook

BLOCK_ROWS, BLOCK_COLUMNS = 16, 128
"""The part of the matrix that a program decodes at a time, in registers. Not tuned."""


@triton.jit
def multiply(
    inputs,
    packed,
    scales,
    centroids,
    outputs,
    rows,
    columns,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    batch: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """outputs = inputs · Ŵᵀ for `block_rows` rows of Ŵ and all `batch` rows of inputs."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    in_row = row.to(tl.int64)[:, None]
    line = tl.arange(0, batch)[:, None]
    sums = tl.zeros((batch, block_rows), dtype=tl.float32)
    for start in range(0, columns, block_columns):
        column = start + tl.arange(0, block_columns)
        there = (row < rows)[:, None] & (column < columns)[None, :]
        # A code lies in one byte, or begins in it and ends in the next.
        byte, shift = (column * bits // 8)[None, :], (column * bits % 8)[None, :]
        address = packed + in_row * (columns * bits // 8) + byte
        low = tl.load(address, mask=there, other=0).to(tl.int32)
        high = tl.load(address + 1, mask=there & (shift + bits > 8), other=0).to(tl.int32)
        code = ((low | (high << 8)) >> shift) & (2**bits - 1)
        scale = tl.load(
            scales + in_row * (columns // group_size) + (column // group_size)[None, :], mask=there, other=0
        )
        weights = tl.load(centroids + code) * scale
        for index in tl.static_range(batch):
            values = tl.load(inputs + index * columns + column, mask=column < columns, other=0)
            sums += tl.where(line == index, tl.sum(weights * values[None, :], axis=1)[None, :], 0)
    tl.store(outputs + line * rows + row[None, :], sums, mask=(row < rows)[None, :])


def matmul(inputs: Tensor, packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    """See `hlwq.kernels.matmul`; inputs (rows, in), for few rows. Sums and result are float32."""
    count, columns = inputs.shape
    group_size = columns // norms.shape[1]
    batch = triton.next_power_of_2(count)
    rotated = torch.nn.functional.pad(rotate_inputs(inputs.to(torch.float32), group_size), (0, 0, 0, batch - count))
    packed, scales = packed.contiguous(), (norms.to(torch.float32) / sqrt(group_size)).contiguous()
    centroids = codebook(bits, inputs.device).centroids
    outputs = torch.empty(batch, len(packed), device=inputs.device)
    sizes = bits, group_size, batch, BLOCK_ROWS, BLOCK_COLUMNS
    grid = (triton.cdiv(len(packed), BLOCK_ROWS),)
    with torch.cuda.device_of(inputs):  # Triton runs on the current device
        multiply[grid](rotated, packed, scales, centroids, outputs, len(packed), columns, *sizes)
    return outputs[:count]
