"""The product of one row of inputs with a packed matrix on a processor: what generation asks of every layer.

A small layer takes less time than Python takes to give tensors to a kernel, or work to a thread. So the kernels are
given addresses, and the threads are those of the OpenMP that torch itself uses, which wait busily for the next layer: a
second pool of threads would stand in their way. Like torch's own they do not survive a fork, whose child must do with
`torch.set_num_threads(1)`.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import binding
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor

from hlwq.kernels.cpu import group_kernels, in_threads, scale_table
from hlwq.kernels.vectors import (
    AVX2,
    I32,
    callback,
    compiled,
    keep,
    level_tables,
    levels,
    load,
    multiply_add,
    spread,
    total,
    zeros,
)

GROUP_SIZES = (32, 64, 128, 256)
BUSY_THREAD_WEIGHTS = 1 << 15
"""Weights that are worth a thread that waits busily."""
IDLE_THREAD_WEIGHTS = 1 << 23
"""Weights of a matrix that is worth threads that have to be woken."""


def serves(columns: int, norms: Tensor) -> bool:
    """Whether groups of a matrix with so many columns are of a size for these kernels."""
    size, rest = divmod(columns, norms.shape[1])
    return size in GROUP_SIZES and not rest


def matmul(inputs: Tensor, packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    """See `hlwq.kernels.matmul`; for one row of inputs, of groups that this `serves`.

    The result is bfloat16 if the inputs are, else float32.
    """
    half = inputs.dtype == torch.bfloat16
    source = (inputs if half else inputs.to(torch.float32)).contiguous()
    packed, norms = packed.contiguous(), norms.contiguous()
    *leading, columns = source.shape
    rows, groups = norms.shape
    weights = rows * columns
    outputs = source.new_empty((*leading, rows))
    kernels = kernels_for(bits, AVX2, columns // groups, half)
    at = source.data_ptr(), packed.data_ptr(), norms.data_ptr(), outputs.data_ptr(), *kernels.tables_at
    threads = torch.get_num_threads()
    if kernels.share_at:
        busy = max(1, min(threads, weights // BUSY_THREAD_WEIGHTS))
        # All threads or one: OpenMP ends those that a smaller team leaves over.
        kernels.in_team(*at, rows, groups, busy, threads if busy > 1 else 1, kernels.share_at)
    elif weights >= IDLE_THREAD_WEIGHTS:
        in_threads(lambda part: kernels.some_rows(*at, part.start, part.stop, groups), rows, weights)
    else:
        kernels.some_rows(*at, 0, rows, groups)
    return outputs


@lru_cache
def openmp() -> bool:
    """Whether compiled code can call torch's OpenMP, by the names that GCC gives it."""
    if sys.platform != "linux":
        return False
    process = ctypes.CDLL(None)
    names = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
    if not all(hasattr(process, name) for name in names):
        return False
    for name in names:
        binding.add_symbol(name, ctypes.cast(getattr(process, name), ctypes.c_void_p).value)
    return True


run_in_team = types.ExternalFunction("GOMP_parallel", types.void(types.intp, types.intp, types.uint32, types.uint32))
thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())


@intrinsic
def at(context, address):
    """An address as a pointer."""

    def generate(context, builder, _, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), generate


@intrinsic
def bits_of(context, value):
    """The bits of a float32."""
    return types.uint32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], I32)


@compiled
def read_halves(source, values):
    """From bfloat16."""
    for column, word in enumerate(carray(at(source), values.shape, np.uint16)):
        values.view(np.uint32)[column] = np.uint32(word) << np.uint32(16)


@compiled
def read_floats(source, values):
    """From float32."""
    values[:] = carray(at(source), values.shape, np.float32)


@compiled
def write_half(value, outputs, row):
    """As the nearest bfloat16, and the even one of two."""
    word = bits_of(value)
    rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    if value != value:  # adding could make a NaN anything
        rounded = np.uint32(0x7FC0)
    carray(at(outputs), (row + 1,), np.uint16)[row] = rounded


@compiled
def write_float(value, outputs, row):
    """As float32."""
    carray(at(outputs), (row + 1,), np.float32)[row] = value


class RowKernels(NamedTuple):
    """What multiplies by matrices of one kind.

    Attributes:
        some_rows: multiplies by some rows of the matrix.
        in_team: by all of them, in some of OpenMP's threads.
        share_at: the address of what each of these does, or 0 where there is no OpenMP.
        tables_at: the addresses of the tables of levels and scales.
        behind: what must live as long as these addresses.
    """

    some_rows: Any
    in_team: Any
    share_at: int
    tables_at: tuple[int, ...]
    behind: object


@lru_cache
def kernels_for(bits: int, shuffled: bool, group_size: int, half: bool) -> RowKernels:
    """Kernels for codes of so many bits, groups of this size, and inputs in bfloat16 or float32."""
    rotate_groups, *_ = group_kernels(group_size)
    read, write = (read_halves, write_half) if half else (read_floats, write_float)
    blocks = group_size // 32

    @compiled
    def rotated(source, groups):
        values = np.empty((groups, group_size), np.float32)
        read(source, values.reshape(-1))
        rotate_groups(values, values)
        return values

    @compiled
    def multiply(first, last, inputs, packed, norms, outputs, tables, scales, groups):
        norm, of_norm = carray(at(norms), (last * groups,), np.uint16), carray(at(scales), (1 << 16,), np.float32)
        source = packed + first * groups * blocks * 4 * bits
        for row in range(first, last):
            inputs_from = inputs
            even = odd = zeros()
            for group in range(row * groups, (row + 1) * groups):
                sum_even = sum_odd = zeros()
                for _ in range(blocks):
                    one, two, three, four = levels(source, tables, bits, bits, shuffled)
                    sum_even = multiply_add(one, load(inputs_from), sum_even)
                    sum_odd = multiply_add(two, load(inputs_from + 32), sum_odd)
                    sum_even = multiply_add(three, load(inputs_from + 64), sum_even)
                    sum_odd = multiply_add(four, load(inputs_from + 96), sum_odd)
                    source += 4 * bits
                    inputs_from += 128
                scale = spread(of_norm[norm[group]])
                even, odd = multiply_add(sum_even, scale, even), multiply_add(sum_odd, scale, odd)
            write(total(even) + total(odd), outputs, row)

    @compiled
    def some_rows(source, packed, norms, outputs, tables, scales, first, last, groups):
        inputs = rotated(source, groups)
        multiply(first, last, np.intp(inputs.ctypes.data), packed, norms, outputs, tables, scales, groups)
        keep(inputs)

    @compiled
    def in_team(source, packed, norms, outputs, tables, scales, rows, groups, busy, threads, share):
        inputs, arguments = rotated(source, groups), np.empty(9, np.intp)
        arguments[0], arguments[1], arguments[2] = np.intp(inputs.ctypes.data), packed, norms
        arguments[3], arguments[4], arguments[5] = outputs, tables, scales
        arguments[6], arguments[7], arguments[8] = rows, groups, busy
        run_in_team(share, np.intp(arguments.ctypes.data), np.uint32(threads), np.uint32(0))
        keep(inputs)
        keep(arguments)

    def share(address):
        inputs, packed, norms, outputs, tables, scales, rows, groups, busy = carray(at(address), (9,), np.intp)
        thread, threads = thread_number(), min(busy, thread_count())
        if thread < threads:
            first, last = rows * thread // threads, rows * (thread + 1) // threads
            multiply(first, last, inputs, packed, norms, outputs, tables, scales, groups)

    shared, share_at = callback(share) if openmp() else (None, 0)
    tables = level_tables(bits, shuffled), scale_table(group_size)
    tables_at = tuple(int(table.ctypes.data) for table in tables)
    return RowKernels(some_rows, in_team, share_at, tables_at, (shared, tables))
