"""Kernels for processors, compiled from native.cpp, with torch tensors in and out.

Each equals its plain version in torch bit for bit, but for the products, whose sums have another order. That order is
the same on all processors; on x86 without FMA, what is added to these sums is rounded once more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from hlwq import hadamard
from hlwq.kernels import _native
from hlwq.lloyd import codebook

GROUP_SIZES = (8, 16, 32, 64, 128, 256)
"""Groups that are rotated and rounded."""
ROW_GROUP_SIZES = (32, 64, 128, 256)
"""Groups of matrices that one row is multiplied by."""
ROW_GROUPS = 1024
"""As many groups as a row of these may have."""
OPENMP = _native.has_openmp()
"""Whether one row is multiplied in the threads of torch's OpenMP."""
THREAD_WEIGHTS = 1 << 18
"""Weights that are worth a thread of their own."""
BUSY_THREAD_WEIGHTS = 1 << 15
"""Weights that are worth a thread that waits busily."""
IDLE_THREAD_WEIGHTS = 1 << 23
"""Weights of a matrix, multiplied by one row, that is worth threads that have to be woken."""
CACHED_WEIGHTS = 1 << 15
"""Float32 that fit the cache of a core beside other things, and that torch copies without threads of its own."""


def in_threads(work: Callable[[slice], object], rows: int, weights: int, *held: object) -> None:
    """Call `work` on ranges of rows that together are all, in as many threads as torch has at most.

    What it reads and writes at addresses is `held`: an exception here, such as that of Ctrl-C, does not wait for the
    other threads.
    """
    parts = max(1, min(torch.get_num_threads(), rows, weights // THREAD_WEIGHTS))
    slices = [slice(rows * part // parts, rows * (part + 1) // parts) for part in range(parts)]
    inference = torch.is_inference_mode_enabled()

    def elsewhere(part: slice, held: object) -> None:
        with torch.inference_mode(inference):  # each thread has a mode of its own
            work(part)

    others = [_pool(os.getpid()).submit(elsewhere, each, held) for each in slices[1:]]
    work(slices[0])
    for each in others:
        each.result()


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, so each process has its own."""
    return ThreadPoolExecutor(os.cpu_count())


@lru_cache
def _set_codebook(bits: int) -> None:
    """Give the compiled code its codebook, once."""
    book = codebook(bits)
    _native.set_codebook(bits, book.centroids.data_ptr(), book.boundaries.data_ptr())


def multiplies_row(columns: int, norms: Tensor) -> bool:
    """Whether groups of a matrix with so many columns are of a size and number that `multiply_row` serves."""
    groups = norms.shape[1]
    size, rest = divmod(columns, groups)
    return size in ROW_GROUP_SIZES and not rest and groups <= ROW_GROUPS


def multiply_row(inputs: Tensor, packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    """See `hlwq.kernels.matmul`; for one row of inputs. It is what generation asks of every layer.

    A small layer takes less time than giving work to a thread of Python's. So the threads are those of the OpenMP that
    torch itself uses, which wait busily for the next layer: a second pool would stand in their way. Like torch's own
    they do not survive a fork, whose child must do with `torch.set_num_threads(1)`.

    Args:
        inputs: of which one row is all, (…, in).
        packed: uint8 (out, in·bits/8).
        norms: float16 (out, groups), of groups that `multiplies_row` allows.
        bits: 2 to 8.

    Returns:
        (…, out), bfloat16 if the inputs are, else float32.
    """
    _set_codebook(bits)
    half = inputs.dtype == torch.bfloat16
    source = (inputs if half else inputs.to(torch.float32)).contiguous()
    packed, norms = packed.contiguous(), norms.contiguous()
    *leading, columns = source.shape
    rows, groups = norms.shape
    weights = rows * columns
    outputs = source.new_empty((*leading, rows))
    at = source.data_ptr(), half, packed.data_ptr(), norms.data_ptr(), outputs.data_ptr()
    matrix = groups, columns // groups, bits
    if OPENMP:
        threads = torch.get_num_threads()
        busy = max(1, min(threads, weights // BUSY_THREAD_WEIGHTS))
        # Where there are several, all threads are called: OpenMP ends those that a smaller team leaves over.
        _native.multiply_row(*at, 0, rows, *matrix, busy, threads)
    elif weights >= IDLE_THREAD_WEIGHTS:
        held = source, packed, norms, outputs
        in_threads(lambda part: _native.multiply_row(*at, part.start, part.stop, *matrix, 1, 1), rows, weights, *held)
    else:
        _native.multiply_row(*at, 0, rows, *matrix, 1, 1)
    return outputs


def matmul(inputs: Tensor, packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    """See `hlwq.kernels.matmul`; inputs (rows, in), for few rows. Sums and result are float32."""
    _set_codebook(bits)
    count, columns = inputs.shape
    rows, groups = norms.shape
    group_size = columns // groups
    rotated = hadamard.rotate_blocks(inputs.to(torch.float32), group_size).contiguous()
    packed, norms = packed.contiguous(), norms.contiguous()
    outputs = torch.empty(count, rows)
    at = rotated.data_ptr(), count, packed.data_ptr(), norms.data_ptr(), outputs.data_ptr()

    def work(part: slice) -> None:
        _native.multiply_rows(*at, part.start, part.stop, rows, columns, group_size, bits)

    in_threads(work, rows, rows * columns, rotated, packed, norms, outputs)
    return outputs


def decode(codes: Tensor, norms: Tensor, bits: int, width: int, rotated: bool, target: Tensor) -> None:
    """Write norm/√d · centroid[code] to `target` (out, in), of any dtype.

    Args:
        codes: uint8, of `bits` bits each, `width` bits apart.
        norms: (out, groups).
        bits: 2 to 8.
        width: `bits` for packed codes, 8 for one in a byte.
        rotated: whether groups are rotated, which decodes HLWQ; their size is then one of GROUP_SIZES.
        target: where to.

    Raises:
        ValueError: the tensors do not fit each other.
    """
    _set_codebook(bits)
    rows, columns = target.shape
    groups = norms.shape[-1]
    fitting = codes.shape == (rows, columns * width // 8) and norms.shape == (rows, groups)
    if codes.dtype != torch.uint8 or not fitting or not columns or columns % 8 or not groups or columns % groups:
        raise ValueError(
            f"Codes {tuple(codes.shape)}, {codes.dtype}, with norms {tuple(norms.shape)} do not fit a matrix "
            f"{(rows, columns)}."
        )
    group_size = columns // groups
    codes = codes.contiguous()
    # Not by torch, whose own threads would go on waiting busily for a while on the cores that are needed now.
    scales = norms.contiguous().numpy().astype(np.float32) / np.float32(sqrt(group_size))
    codes_at, scales_at, row_bytes = codes.data_ptr(), scales.ctypes.data, columns * width // 8

    def decode_rows(first: int, last: int, weights: Tensor) -> None:
        sources = codes_at + first * row_bytes, scales_at + 4 * first * groups
        _native.decode_rows(*sources, weights.data_ptr(), last - first, columns, group_size, bits, width, rotated)

    def work(part: slice) -> None:
        if target.dtype == torch.float32 and target.is_contiguous():
            decode_rows(part.start, part.stop, target[part])
            return
        step = max(1, CACHED_WEIGHTS // max(1, columns))
        weights = torch.empty(step, columns)
        for first in range(part.start, part.stop, step):
            last = min(first + step, part.stop)
            decode_rows(first, last, weights)
            target[first:last] = weights[: last - first]

    in_threads(work, rows, target.numel(), codes, scales)


def rotate_blocks(values: Tensor, block_size: int) -> Tensor:
    """See `hlwq.hadamard.rotate_blocks`; `block_size` is one of GROUP_SIZES."""
    source = values.contiguous()
    target = torch.empty_like(source)
    at, to = source.data_ptr(), target.data_ptr()

    def work(part: slice) -> None:
        start = 4 * block_size * part.start
        _native.rotate_groups(at + start, to + start, part.stop - part.start, block_size)

    in_threads(work, source.numel() // block_size, source.numel(), source, target)
    return target


def fit_norms(weights: Tensor, bits: int, least_squares: bool) -> tuple[Tensor, Tensor]:
    """Of groups (…, size): their norms and those to store, float32 (…, 1). See `LloydGrid.fit`."""
    _set_codebook(bits)
    source, size = weights.contiguous(), weights.shape[-1]
    norms = torch.empty(*weights.shape[:-1], 1)
    best = torch.empty_like(norms) if least_squares else norms
    at, norms_at, best_at = source.data_ptr(), norms.data_ptr(), best.data_ptr()

    def work(part: slice) -> None:
        groups = part.stop - part.start
        some = at + 4 * size * part.start, norms_at + 4 * part.start
        _native.measure_groups(*some, groups, size)
        if least_squares:
            _native.refine_groups(*some, best_at + 4 * part.start, groups, size, bits)

    in_threads(work, norms.numel(), source.numel(), source, norms, best)
    return norms, best


def nearest_codes(weights: Tensor, norms: Tensor, bits: int) -> Tensor:
    """The codes of groups (…, size) with norms (…, 1), uint8. See `LloydGrid.round`."""
    _set_codebook(bits)
    source, scales, size = weights.contiguous(), norms.contiguous(), weights.shape[-1]
    codes = torch.empty(weights.shape, dtype=torch.uint8)
    at, scales_at, codes_at = source.data_ptr(), scales.data_ptr(), codes.data_ptr()

    def work(part: slice) -> None:
        start = part.start
        some = at + 4 * size * start, scales_at + 4 * start, codes_at + size * start
        _native.round_groups(*some, part.stop - start, size, bits)

    in_threads(work, source.numel() // size, source.numel(), source, scales, codes)
    return codes


def pack(codes: Tensor, bits: int) -> Tensor:
    """See `hlwq.packing.pack`."""
    packed = torch.empty(*codes.shape[:-1], codes.shape[-1] * bits // 8, dtype=torch.uint8)
    _repack(_native.pack, codes, packed, 8, bits, bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """See `hlwq.packing.unpack`."""
    codes = torch.empty(*packed.shape[:-1], packed.shape[-1] * 8 // bits, dtype=torch.uint8)
    _repack(_native.unpack, packed, codes, bits, 8, bits)
    return codes


def _repack(
    kernel: Callable[[int, int, int, int], None],
    source: Tensor,
    target: Tensor,
    from_bytes: int,
    to_bytes: int,
    bits: int,
) -> None:
    """Turn each run of `from_bytes` bytes, eight codes, into one of `to_bytes`."""
    source = source.contiguous()
    at, to, octets = source.data_ptr(), target.data_ptr(), source.numel() // from_bytes

    def work(part: slice) -> None:
        kernel(at + from_bytes * part.start, to + to_bytes * part.start, part.stop - part.start, bits)

    in_threads(work, octets, 8 * octets, source, target)
