"""The product of one row of bfloat16 with a packed matrix on a processor: what generation asks of every layer.

A small layer is done in less time than Python takes to give tensors to its kernel. So what stays the same is prepared
once, and the kernel is given addresses. The result is that of `hlwq.kernels.matmul`, bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba import carray
from numba.extending import intrinsic
from torch import Tensor

from hlwq.kernels.cpu import group_kernels, in_threads, look_up_scales, row_kernels, scale_table
from hlwq.kernels.vectors import AVX2, compiled, level_tables

ONE_THREAD_WEIGHTS = 1 << 23
"""Below this, a second thread takes longer to start than it saves."""


class OneRow:
    """A packed matrix, ready to be multiplied.

    Attributes:
        packed: the codes that it was prepared for.
        norms: their norms.
    """

    def __init__(self, packed: Tensor, norms: Tensor, bits: int) -> None:
        """Take the addresses of the codes and the norms, which must stay where they are.

        Args:
            packed: as for `hlwq.kernels.matmul`, contiguous, on the CPU.
            norms: likewise, of groups of 32 to 256.
            bits: of a code, 2 to 8.
        """
        self.packed, self.norms = packed, norms
        self._rows, self._columns = packed.shape[0], packed.shape[1] * 8 // bits
        self._alone = self._rows * self._columns < ONE_THREAD_WEIGHTS
        self._kernel = kernel(bits, self._columns // norms.shape[1])
        self._tables = level_tables(bits, AVX2), scale_table(self._columns // norms.shape[1])
        self._codes_at, self._norms_at = packed.data_ptr(), norms.data_ptr()

    def __call__(self, inputs: Tensor) -> Tensor:
        """Inputs (…, in), contiguous bfloat16, a single row of them, to (…, out)."""
        outputs = inputs.new_empty((*inputs.shape[:-1], self._rows))
        source, target = inputs.data_ptr(), outputs.data_ptr()
        if self._alone:
            self._kernel(source, self._columns, self._codes_at, self._norms_at, self._rows, *self._tables, target)
            return outputs

        def work(part: slice) -> None:
            codes_at = self._codes_at + part.start * self.packed.shape[1]
            norms_at = self._norms_at + part.start * self.norms.shape[1] * 2
            rows, there = part.stop - part.start, target + 2 * part.start
            self._kernel(source, self._columns, codes_at, norms_at, rows, *self._tables, there)

        in_threads(work, self._rows, self._rows * self._columns)
        return outputs


@intrinsic
def at(context, address):
    """An address as a pointer."""

    def generate(context, builder, _, args):
        return builder.inttoptr(args[0], context.get_value_type(numba.types.voidptr))

    return numba.types.voidptr(numba.types.intp), generate


@lru_cache
def kernel(bits: int, group_size: int) -> Any:
    """The loop for codes of so many bits and groups of this size."""
    _, multiply_vector, _ = row_kernels(bits, bits, AVX2)
    rotate_groups, *_ = group_kernels(group_size)
    group_log = group_size.bit_length() - 1

    @compiled
    def product(inputs, columns, packed, norms, rows, tables, of_norm, outputs):
        groups = columns // group_size
        values, rotated = np.empty(columns, np.float32), np.empty((1, columns), np.float32)
        for column, word in enumerate(carray(at(inputs), (columns,), np.uint16)):
            values.view(np.uint32)[column] = np.uint32(word) << np.uint32(16)
        rotate_groups(values.reshape(groups, group_size), rotated.reshape(groups, group_size))
        scales = np.empty((rows, groups), np.float32)
        look_up_scales(carray(at(norms), (rows, groups), np.uint16), of_norm, scales)
        sums = np.empty((1, rows), np.float32)
        codes = carray(at(packed), (rows, columns * bits // 8), np.uint8)
        multiply_vector(rotated, codes, scales, group_log, tables, sums)
        results = carray(at(outputs), (rows,), np.uint16)
        for row, word in enumerate(sums.view(np.uint32)[0]):  # to the nearest, and to the even one of two
            results[row] = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)

    return product
