"""Kernels for processors, compiled by numba: loops over rows, and what calls them, torch tensors in and out.

Each equals its plain version in torch bit for bit, but for `matmul`, whose sums have another order.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hlwq import hadamard
from hlwq.kernels.vectors import (
    AVX2,
    compiled,
    dot_by_halves,
    keep,
    level_tables,
    levels,
    load,
    multiply,
    multiply_add,
    nearest_codes_of_eight,
    nearest_levels_of_eight,
    rotate,
    search_tables,
    spread,
    store,
    total,
    zeros,
)

GROUP_SIZES = (8, 16, 32, 64, 128, 256)
"""Groups that are kept in registers."""
THREAD_WEIGHTS = 1 << 18
"""Weights that are worth a thread of their own."""
CACHED_WEIGHTS = 1 << 15
"""Float32 that fit the cache of a core beside other things, and that torch copies without threads of its own."""


def in_threads(work: Callable[[slice], object], rows: int, weights: int) -> None:
    """Call `work` on ranges of rows that together are all, in as many threads as torch has at most."""
    parts = max(1, min(torch.get_num_threads(), rows, weights // THREAD_WEIGHTS))
    slices = [slice(rows * part // parts, rows * (part + 1) // parts) for part in range(parts)]
    inference = torch.is_inference_mode_enabled()

    def elsewhere(part: slice) -> None:
        with torch.inference_mode(inference):  # each thread has a mode of its own
            work(part)

    others = [_pool(os.getpid()).submit(elsewhere, each) for each in slices[1:]]
    work(slices[0])
    for each in others:
        each.result()


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, so each process has its own."""
    return ThreadPoolExecutor(os.cpu_count())


# Compiled loops over rows. Arrays are contiguous; groups have 2^group_log columns.


@lru_cache
def row_kernels(width: int, bits: int, shuffled: bool) -> tuple[Any, Any]:
    """For codes of `bits` bits, `width` bits apart: a row looked up, and the loop that multiplies rows of inputs."""
    mask = 2**width - 1

    @compiled
    def look_up_row(packed, scales, group_log, tables, centroids, target):
        source, table, to = np.intp(packed.ctypes.data), np.intp(tables.ctypes.data), np.intp(target.ctypes.data)
        blocks = len(target) // 32
        for block in range(blocks):
            group = 32 * block
            first, second, third, fourth = levels(source, table, width, bits, shuffled)
            store(to, multiply(first, spread(scales[group >> group_log])))
            store(to + 32, multiply(second, spread(scales[(group + 8) >> group_log])))
            store(to + 64, multiply(third, spread(scales[(group + 16) >> group_log])))
            store(to + 96, multiply(fourth, spread(scales[(group + 24) >> group_log])))
            source += 4 * width
            to += 128
        for octet in range(4 * blocks, len(target) // 8):  # where groups are of 8 or 16
            word = np.uint64(0)
            for byte in range(width):
                word |= np.uint64(packed[octet * width + byte]) << np.uint64(8 * byte)
            for column in range(8 * octet, 8 * octet + 8):
                target[column] = centroids[word & np.uint64(mask)] * scales[column >> group_log]
                word >>= np.uint64(width)

    @compiled
    def multiply_rows(inputs, packed, scales, group_log, tables, centroids, outputs):
        """A multiple of four rows of inputs: a row of the matrix is decoded into the cache, and used for four."""
        decoded = np.empty(inputs.shape[1], np.float32)
        stride = 4 * inputs.shape[1]
        for row in range(len(packed)):
            look_up_row(packed[row], scales[row], group_log, tables, centroids, decoded)
            for first in range(0, len(inputs), 4):
                inputs_from, decoded_from = np.intp(inputs[first].ctypes.data), np.intp(decoded.ctypes.data)
                sum0 = sum1 = sum2 = sum3 = zeros()
                for _ in range(inputs.shape[1] // 8):
                    weights = load(decoded_from)
                    sum0 = multiply_add(weights, load(inputs_from), sum0)
                    sum1 = multiply_add(weights, load(inputs_from + stride), sum1)
                    sum2 = multiply_add(weights, load(inputs_from + 2 * stride), sum2)
                    sum3 = multiply_add(weights, load(inputs_from + 3 * stride), sum3)
                    inputs_from += 32
                    decoded_from += 32
                outputs[first, row], outputs[first + 1, row] = total(sum0), total(sum1)
                outputs[first + 2, row], outputs[first + 3, row] = total(sum2), total(sum3)
        keep(decoded)

    return look_up_row, multiply_rows


@lru_cache
def decode_kernel(width: int, bits: int, shuffled: bool, rotated: int) -> Any:
    """The loop over rows that looks them up and rotates their groups of `rotated` columns, or none if that is 0."""
    look_up_row, _ = row_kernels(width, bits, shuffled)
    if not rotated:

        @compiled
        def look_up(packed, scales, group_log, tables, centroids, target):
            for row in range(len(packed)):
                look_up_row(packed[row], scales[row], group_log, tables, centroids, target[row])

        return look_up
    rotate_groups, *_ = group_kernels(rotated)

    @compiled
    def decode_rows(packed, scales, group_log, tables, centroids, target):
        for row in range(len(packed)):
            look_up_row(packed[row], scales[row], group_log, tables, centroids, target[row])
            groups = target[row].reshape(len(target[row]) // rotated, rotated)
            rotate_groups(groups, groups)

    return decode_rows


@lru_cache
def group_kernels(size: int) -> tuple[Any, Any]:
    """Loops over groups of `size` columns."""

    @compiled
    def rotate_groups(source, target):
        for group in range(len(source)):
            rotate(np.intp(source[group].ctypes.data), np.intp(target[group].ctypes.data), size)

    @compiled
    def measure_groups(weights, norms):
        for group in range(len(weights)):
            here = np.intp(weights[group].ctypes.data)
            norms[group] = np.sqrt(dot_by_halves(here, here, size))

    return rotate_groups, measure_groups


@lru_cache
def rounding_kernels(bits: int, shuffled: bool, size: int) -> tuple[Any, Any]:
    """Loops over groups of `size` columns: their codes, and the norms of least squared error for these."""

    @compiled
    def round_groups(weights, norms, tables, codes):
        table = np.intp(tables.ctypes.data)
        for group in range(len(weights)):
            source, target = np.intp(weights[group].ctypes.data), np.intp(codes[group].ctypes.data)
            factor = factor_of(norms[group], size)
            for octet in range(size // 8):
                nearest_codes_of_eight(source + 32 * octet, factor, table, target + 8 * octet, bits, shuffled)

    @compiled
    def refine_groups(weights, norms, tables, refined):
        levels_of, table = np.empty(size, np.float32), np.intp(tables.ctypes.data)
        for group in range(len(weights)):
            here, there = np.intp(weights[group].ctypes.data), np.intp(levels_of.ctypes.data)
            factor = factor_of(norms[group], size)
            for octet in range(size // 8):
                nearest_levels_of_eight(here + 32 * octet, factor, table, there + 32 * octet, bits, shuffled)
            refined[group] = dot_by_halves(here, there, size) / dot_by_halves(there, there, size)
        keep(levels_of)

    return round_groups, refine_groups


@compiled
def factor_of(norm, size):
    """√size/norm, which turns a group's weights into what is rounded."""
    return np.float32(1) / norm * np.float32(sqrt(size)) if norm > 0 else np.float32(0)


@compiled
def pack_octets(codes, bits, packed):
    """Codes (octets, 8) to bytes (octets, bits)."""
    for octet in range(len(codes)):
        word = np.uint64(0)
        for index in range(8):
            word |= np.uint64(codes[octet, index]) << np.uint64(index * bits)
        for byte in range(bits):
            packed[octet, byte] = word >> np.uint64(8 * byte)


@compiled
def unpack_octets(packed, bits, codes):
    """Bytes (octets, bits) to codes (octets, 8)."""
    mask = np.uint64(2**bits - 1)
    for octet in range(len(packed)):
        word = np.uint64(0)
        for byte in range(bits):
            word |= np.uint64(packed[octet, byte]) << np.uint64(8 * byte)
        for index in range(8):
            codes[octet, index] = (word >> np.uint64(index * bits)) & mask


# What the rest of the library calls: torch tensors in, torch tensors out.


@lru_cache
def scale_table(group_size: int) -> np.ndarray:
    """norm/√group_size, float32, of each norm that float16 has, by its bits. It is shared: do not write to it."""
    with np.errstate(invalid="ignore"):
        scales: np.ndarray = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
        scales /= np.float32(sqrt(group_size))
    return scales


@compiled
def look_up_scales(norms, table, scales):
    """Of the bits of norms, by `scale_table`."""
    for row in range(len(norms)):
        for group in range(norms.shape[1]):
            scales[row, group] = table[norms[row, group]]


def matmul(inputs: Tensor, packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    """See `hlwq.kernels.matmul`; inputs (rows, in), for few rows. Sums and result are float32."""
    rows, columns = inputs.shape
    group_size = columns // norms.shape[1]
    rotated = hadamard.rotate_blocks(inputs.to(torch.float32), group_size)
    padded = torch.nn.functional.pad(rotated, (0, 0, 0, -rows % 4))
    outputs = np.empty((len(padded), len(packed)), np.float32)
    _, multiply_rows = row_kernels(bits, bits, AVX2)
    x, codes = padded.numpy(), packed.contiguous().numpy()
    halves, of_norm = norms.contiguous().view(torch.int16).numpy().view(np.uint16), scale_table(group_size)
    log, tables, centroids = group_size.bit_length() - 1, level_tables(bits, AVX2), level_tables(bits, False)

    def work(part: slice) -> None:
        # Not by torch, whose own threads would go on waiting busily for a while on the cores that are needed now.
        scales = np.empty(halves[part].shape, np.float32)
        look_up_scales(halves[part], of_norm, scales)
        multiply_rows(x, codes[part], scales, log, tables, centroids, outputs[:, part])

    in_threads(work, len(packed), len(packed) * columns)
    return torch.from_numpy(outputs[:rows])


def scales_of(norms: Tensor, group_size: int) -> np.ndarray:
    """norm/√group_size, float32. By numpy, see `matmul`."""
    scales: np.ndarray = norms.contiguous().numpy().astype(np.float32) / np.float32(sqrt(group_size))
    return scales


def decode(codes: Tensor, norms: Tensor, bits: int, width: int, rotated: bool, target: Tensor) -> None:
    """Write norm/√d · centroid[code] to `target` (out, in), of any dtype.

    Args:
        codes: uint8, of `bits` bits each, `width` bits apart.
        norms: (out, groups).
        bits: 2 to 8.
        width: `bits` for packed codes, 8 for one in a byte.
        rotated: whether groups are rotated, which decodes HLWQ; their size is then one of GROUP_SIZES.
        target: where to.
    """
    rows, columns = target.shape
    group_size = columns // norms.shape[1]
    kernel = decode_kernel(width, bits, AVX2, group_size if rotated else 0)
    lines, scales = codes.contiguous().numpy(), scales_of(norms, group_size)
    log, tables, centroids = group_size.bit_length() - 1, level_tables(bits, AVX2), level_tables(bits, False)
    in_place = target.dtype == torch.float32 and target.is_contiguous()

    def work(part: slice) -> None:
        if in_place:
            kernel(lines[part], scales[part], log, tables, centroids, target[part].numpy())
            return
        step = max(1, CACHED_WEIGHTS // max(1, columns))
        weights = torch.empty(step, columns)
        for start in range(part.start, part.stop, step):
            some = slice(start, min(start + step, part.stop))
            decoded = weights[: some.stop - some.start]
            kernel(lines[some], scales[some], log, tables, centroids, decoded.numpy())
            target[some] = decoded

    in_threads(work, rows, target.numel())


def rotate_blocks(values: Tensor, block_size: int) -> Tensor:
    """See `hlwq.hadamard.rotate_blocks`; `block_size` is one of GROUP_SIZES."""
    blocks = values.reshape(-1, block_size).contiguous().numpy()
    target = np.empty_like(blocks)
    kernel, *_ = group_kernels(block_size)
    in_threads(lambda part: kernel(blocks[part], target[part]), len(blocks), blocks.size)
    return torch.from_numpy(target).view(values.shape)


def fit_norms(weights: Tensor, bits: int, least_squares: bool) -> tuple[Tensor, Tensor]:
    """Of groups (…, size): their norms and those to store, float32 (…, 1). See `LloydGrid.fit`."""
    groups = weights.reshape(-1, weights.shape[-1]).contiguous().numpy()
    norms = np.empty(len(groups), np.float32)
    best = np.empty_like(norms) if least_squares else norms
    size = weights.shape[-1]
    _, measure = group_kernels(size)
    _, refine = rounding_kernels(bits, AVX2, size)
    tables = search_tables(bits, 1 / np.float32(sqrt(size)))

    def work(part: slice) -> None:
        measure(groups[part], norms[part])
        if least_squares:
            refine(groups[part], norms[part], tables, best[part])

    in_threads(work, len(groups), groups.size)
    shape = (*weights.shape[:-1], 1)
    return torch.from_numpy(norms).view(shape), torch.from_numpy(best).view(shape)


def nearest_codes(weights: Tensor, norms: Tensor, bits: int) -> Tensor:
    """The codes of groups (…, size) with norms (…, 1), uint8. See `LloydGrid.round`."""
    groups = weights.reshape(-1, weights.shape[-1]).contiguous().numpy()
    codes, scales = np.empty(groups.shape, np.uint8), norms.reshape(-1).numpy()
    round_groups, _ = rounding_kernels(bits, AVX2, groups.shape[1])
    tables = search_tables(bits, 1.0)
    in_threads(lambda part: round_groups(groups[part], scales[part], tables, codes[part]), len(groups), groups.size)
    return torch.from_numpy(codes).view(weights.shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """See `hlwq.packing.pack`."""
    octets = codes.reshape(-1, 8).contiguous().numpy()
    packed = np.empty((len(octets), bits), np.uint8)
    in_threads(lambda part: pack_octets(octets[part], bits, packed[part]), len(octets), octets.size)
    return torch.from_numpy(packed).view(*codes.shape[:-1], codes.shape[-1] * bits // 8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """See `hlwq.packing.unpack`."""
    octets = packed.reshape(-1, bits).contiguous().numpy()
    codes = np.empty((len(octets), 8), np.uint8)
    in_threads(lambda part: unpack_octets(octets[part], bits, codes[part]), len(octets), codes.size)
    return torch.from_numpy(codes).view(*packed.shape[:-1], packed.shape[-1] * 8 // bits)
