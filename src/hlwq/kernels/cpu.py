"""Kernels for processors, compiled by numba. Each has a plain version in torch that it equals bit for bit, but for
`matmul`, whose sums have another order.

Codes are turned into levels in registers, 32 at a time: they are cut out of the bit stream by shuffling and shifting
bytes, and looked up by `vpshufb`, which finds 32 bytes in a table of 16; a float32 takes four such tables, one for each
of its bytes, and a codebook of 2^bits levels 2^(bits−5) times as many, since it is symmetric. Without AVX2 the levels are
loaded one by one; everything else is the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from math import sqrt
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic, models, register_model
from torch import Tensor

from hlwq import hadamard
from hlwq.lloyd import codebook

AVX2 = bool(binding.get_host_cpu_features().get("avx2"))
GROUP_SIZES = (8, 16, 32, 64, 128, 256)
"""Groups that are kept in registers."""
THREAD_WEIGHTS = 1 << 18
"""Weights that are worth a thread of their own."""
CACHED_WEIGHTS = 1 << 15
"""Float32 that fit the cache of a core beside other things, and that torch copies without threads of its own."""
BINS = 2048
"""Equal steps of the range of levels: finer than their smallest distance, so that a step contains one boundary at most."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile on first use, without the interpreter's lock, and keep the machine code where a file can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither this package's directory nor the user's cache is writable
        return numba.njit(nogil=True)(function)


def in_threads(work: Callable[[slice], object], rows: int, weights: int) -> None:
    """Call `work` on ranges of rows that together are all, in as many threads as torch has at most."""
    parts = max(1, min(torch.get_num_threads(), rows, weights // THREAD_WEIGHTS))
    slices = [slice(rows * part // parts, rows * (part + 1) // parts) for part in range(parts)]
    others = [_pool(os.getpid()).submit(work, each) for each in slices[1:]]
    work(slices[0])
    for each in others:
        each.result()


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, so each process has its own."""
    return ThreadPoolExecutor(os.cpu_count())


# Eight float32 in a register, as a type that compiled functions can hold in variables.


class Vector(types.Type):
    """Eight float32."""

    def __init__(self) -> None:
        super().__init__("Vector")


vector = Vector()
I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
V8 = ir.VectorType(F32, 8)
UNDEFINED = ir.Constant(V8, ir.Undefined)


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """Lies in memory as it does in the register."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, V8)


def constant(element: ir.Type, values: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, len(values)), list(values))


def shuffle(builder: ir.IRBuilder, first: ir.Value, second: ir.Value, order: Sequence[int]) -> ir.Value:
    """Elements of two vectors, those of the second counted on from the first."""
    return builder.shuffle_vector(first, second, constant(I32, order))


def pointer(builder: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    return builder.inttoptr(builder.add(address, ir.Constant(address.type, offset)), kind.as_pointer())


def load_vectors(builder: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    return [builder.load(pointer(builder, address, 32 * index, V8), align=4) for index in range(count)]


@intrinsic
def load(context, address):
    """Eight float32 from memory."""
    return vector(types.intp), lambda _, builder, __, args: load_vectors(builder, args[0], 1)[0]


@intrinsic
def store(context, address, values):
    """Eight float32 to memory."""

    def generate(_, builder, __, args):
        builder.store(args[1], pointer(builder, args[0], 0, V8), align=4)

    return types.void(types.intp, vector), generate


@intrinsic
def spread(context, value):
    """One float32, eight times."""

    def generate(_, builder, __, args):
        return shuffle(builder, builder.insert_element(UNDEFINED, args[0], ir.Constant(I32, 0)), UNDEFINED, [0] * 8)

    return vector(types.float32), generate


@intrinsic
def zeros(context):
    """Eight zeros."""
    return vector(), lambda *_: ir.Constant(V8, [0.0] * 8)


@intrinsic
def multiply(context, left, right):
    """left · right."""
    return vector(vector, vector), lambda _, builder, __, args: builder.fmul(*args)


@intrinsic
def multiply_add(context, left, right, summand):
    """left · right + summand, in one rounding or two, whichever is faster."""

    def generate(_, builder, __, args):
        kind = ir.FunctionType(V8, [V8] * 3)
        return builder.call(builder.module.declare_intrinsic("llvm.fmuladd.v8f32", (), kind), args)

    return vector(vector, vector, vector), generate


def halves_added(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """The sum of all elements: the second half is added to the first until one is left."""
    while len(vectors) > 1:
        half = len(vectors) // 2
        vectors = [builder.fadd(*pair) for pair in zip(vectors[:half], vectors[half:], strict=True)]
    (total,) = vectors
    for half in (4, 2, 1):
        moved = [(lane + half) % 8 for lane in range(8)]
        total = builder.fadd(total, shuffle(builder, total, total, moved))
    return builder.extract_element(total, ir.Constant(I32, 0))


@intrinsic
def total(context, values):
    """The sum of the eight."""
    return types.float32(vector), lambda _, builder, __, args: halves_added(builder, [args[0]])


@intrinsic(prefer_literal=True)
def dot_by_halves(context, left, right, size):
    """Σ left · right over `size` neighbouring float32 of each, added as `hlwq.grids.sum_by_halves` does."""

    def generate(_, builder, __, args):
        count = size.literal_value // 8
        vectors = [load_vectors(builder, address, count) for address in args[:2]]
        return halves_added(builder, [builder.fmul(*pair) for pair in zip(*vectors, strict=True)])

    return types.float32(types.intp, types.intp, size), generate


@intrinsic(prefer_literal=True)
def rotate(context, source, target, size):
    """The Walsh–Hadamard transform of `size` neighbouring float32, in registers, as `hlwq.hadamard` computes it."""

    def generate(_, builder, __, args):
        vectors = load_vectors(builder, args[0], size.literal_value // 8)
        for distance in (1, 2, 4):  # within a vector, (a, b) becomes (b + a, a + (−b))
            swapped = [lane ^ distance for lane in range(8)]
            signed = [lane + 8 if lane & distance else lane for lane in range(8)]
            negated = [builder.fneg(each) for each in vectors]
            vectors = [
                builder.fadd(shuffle(builder, each, each, swapped), shuffle(builder, each, minus, signed))
                for each, minus in zip(vectors, negated, strict=True)
            ]
        distance = 1
        while distance < len(vectors):
            for index in range(len(vectors)):
                if not index & distance:
                    pair = vectors[index], vectors[index + distance]
                    vectors[index], vectors[index + distance] = builder.fadd(*pair), builder.fsub(*pair)
            distance *= 2
        norm = ir.Constant(V8, [float(np.float32(size.literal_value**-0.5))] * 8)
        for index, each in enumerate(vectors):
            builder.store(builder.fmul(each, norm), pointer(builder, args[1], 32 * index, V8), align=4)

    return types.void(types.intp, types.intp, size), generate


# Codes to levels.

LANE_ORDER = [8 * (index // 4) + index % 4 + 4 * lane for lane in (0, 1) for index in range(16)]
"""The code that each byte of a register holds, so that `interleave`, which works within lanes of 16 bytes as processors
do, ends with neighbours beside each other."""


def interleave(builder: ir.IRBuilder, first: ir.Value, second: ir.Value, high: int, element: ir.Type) -> ir.Value:
    """Elements of two vectors in turns, from the low or the high half of each lane, seen as elements twice as wide."""
    lane = first.type.count // 2
    order = [
        side * 2 * lane + start + high * lane // 2 + index
        for start in (0, lane)
        for index in range(lane // 2)
        for side in (0, 1)
    ]
    return builder.bitcast(shuffle(builder, first, second, order), ir.VectorType(element, lane))


def cut_codes(builder: ir.IRBuilder, source: ir.Value, width: int) -> ir.Value:
    """The 32 codes of `width` bits that begin at an address, in bytes, in the order of lanes."""
    size = 16 if width >= 4 else 8
    parts = []
    for first in (0, 16):
        start = first // 16 * (4 * width - size)  # nothing is read before or after the codes
        raw = builder.load(pointer(builder, source, start, ir.VectorType(I8, size)), align=1)
        offsets = [code * width - 8 * start for code in LANE_ORDER if first <= code < first + 16]
        lower = [min(offset // 8, size - 2) for offset in offsets]
        words = shuffle(builder, raw, raw, [byte for each in lower for byte in (each, each + 1)])
        shifts = constant(I16, [offset - 8 * byte for offset, byte in zip(offsets, lower, strict=True)])
        codes = builder.lshr(builder.bitcast(words, ir.VectorType(I16, 16)), shifts)
        codes = builder.and_(codes, constant(I16, [2**width - 1] * 16))
        parts.append(builder.bitcast(codes, ir.VectorType(I8, 32)))
    low_bytes = [32 * part + 16 * lane + 2 * word for lane in (0, 1) for part in (0, 1) for word in range(8)]
    return shuffle(builder, *parts, low_bytes)


def cut_nibbles(builder: ir.IRBuilder, source: ir.Value) -> ir.Value:
    """The same for codes of 4 bits, of which none begins in one byte and ends in the next."""
    raw = builder.load(pointer(builder, source, 0, ir.VectorType(I8, 16)), align=1)
    both = shuffle(builder, raw, raw, [code // 2 for code in LANE_ORDER])
    words = builder.bitcast(both, ir.VectorType(I16, 16))
    high = builder.and_(builder.lshr(words, constant(I16, [4] * 16)), constant(I16, [0x0F00] * 16))
    codes = builder.or_(builder.and_(words, constant(I16, [0x000F] * 16)), high)
    return builder.bitcast(codes, ir.VectorType(I8, 32))


def shuffled_levels(builder: ir.IRBuilder, codes: ir.Value, tables: ir.Value, bits: int) -> list[ir.Value]:
    """The levels of 32 codes, found by `vpshufb` in the tables that `level_tables` makes."""
    kind = codes.type
    find = builder.module.declare_intrinsic("llvm.x86.avx2.pshuf.b", (), ir.FunctionType(kind, [kind, kind]))

    def bit(number: int) -> ir.Value:
        return builder.icmp_signed("<", builder.shl(codes, constant(I8, [7 - number] * 32)), ir.Constant(kind, None))

    folded = bits > 4
    if folded:  # the upper half of the levels is the lower half backwards, with the other sign
        positive = bit(bits - 1)
        codes = builder.select(positive, builder.xor(codes, constant(I8, [2**bits - 1] * 32)), codes)
    choices = [bit(number) for number in range(4, bits - folded)]
    codes = builder.and_(codes, constant(I8, [15] * 32))
    planes = []
    for byte in range(4):
        numbers = range(byte << len(choices), (byte + 1) << len(choices))
        found = [builder.load(pointer(builder, tables, 32 * number, kind), align=1) for number in numbers]
        found = [builder.call(find, [table, codes]) for table in found]
        for choice in choices:
            found = [builder.select(choice, *pair) for pair in zip(found[1::2], found[::2], strict=True)]
        planes += found
    if folded:
        planes[3] = builder.xor(planes[3], builder.and_(builder.sext(positive, kind), constant(I8, [-128] * 32)))
    halves = [[interleave(builder, *pair, high, I16) for pair in (planes[:2], planes[2:])] for high in (0, 1)]
    return [interleave(builder, *half, high, F32) for half in halves for high in (0, 1)]


def loaded_levels(builder: ir.IRBuilder, codes: ir.Value, centroids: ir.Value) -> list[ir.Value]:
    """The levels of 32 codes, loaded one by one."""
    vectors = [UNDEFINED] * 4
    for index in range(32):
        code = builder.extract_element(codes, ir.Constant(I32, LANE_ORDER.index(index)))
        table = pointer(builder, centroids, 0, F32)
        level = builder.load(builder.gep(table, [builder.zext(code, I32)]), align=4)
        vectors[index // 8] = builder.insert_element(vectors[index // 8], level, ir.Constant(I32, index % 8))
    return vectors


@intrinsic(prefer_literal=True)
def levels(context, source, tables, width, bits, shuffled):
    """The levels of 32 codes of `bits` bits, `width` bits apart, that begin at the address `source`."""
    signature = types.UniTuple(vector, 4)(types.intp, types.intp, width, bits, shuffled)

    def generate(target, builder, __, args):
        bits_apart = width.literal_value
        codes = cut_nibbles(builder, args[0]) if bits_apart == 4 else cut_codes(builder, args[0], bits_apart)
        if shuffled.literal_value:
            found = shuffled_levels(builder, codes, args[1], bits.literal_value)
        else:
            found = loaded_levels(builder, codes, args[1])
        return target.make_tuple(builder, signature.return_type, found)

    return signature, generate


@lru_cache
def level_tables(bits: int, shuffled: bool) -> np.ndarray:
    """The levels as `levels` looks them up: byte by byte in tables of 16, each twice; or just float32."""
    centroids = codebook(bits).centroids.numpy()
    if not shuffled:
        return centroids
    entries = np.resize(centroids, 16) if bits <= 4 else centroids[: len(centroids) // 2]
    tables = entries.view(np.uint8).reshape(-1, 16, 4).transpose(2, 0, 1)
    return np.ascontiguousarray(np.concatenate([tables, tables], -1))


# Compiled loops over rows. Arrays are contiguous; groups have 2^group_log columns.


@lru_cache
def row_kernels(width: int, bits: int, shuffled: bool) -> tuple[Any, Any, Any]:
    """Loops for codes of `bits` bits, `width` bits apart: `look_up`, `multiply_row` and `multiply_rows`."""
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
    def look_up(packed, scales, group_log, tables, centroids, target):
        for row in range(len(packed)):
            look_up_row(packed[row], scales[row], group_log, tables, centroids, target[row])

    @compiled
    def multiply_vector(inputs, packed, scales, group_log, tables, outputs):
        """One row of inputs, groups of at least 32: nothing leaves the registers."""
        table = np.intp(tables.ctypes.data)
        for row in range(len(packed)):
            source, inputs_from = np.intp(packed[row].ctypes.data), np.intp(inputs.ctypes.data)
            even = odd = zeros()
            for group in range(scales.shape[1]):
                sum_even = sum_odd = zeros()
                for _ in range(1 << (group_log - 5)):
                    first, second, third, fourth = levels(source, table, width, bits, shuffled)
                    sum_even = multiply_add(first, load(inputs_from), sum_even)
                    sum_odd = multiply_add(second, load(inputs_from + 32), sum_odd)
                    sum_even = multiply_add(third, load(inputs_from + 64), sum_even)
                    sum_odd = multiply_add(fourth, load(inputs_from + 96), sum_odd)
                    source += 4 * width
                    inputs_from += 128
                scale = spread(scales[row, group])
                even, odd = multiply_add(sum_even, scale, even), multiply_add(sum_odd, scale, odd)
            outputs[0, row] = total(even) + total(odd)

    @compiled
    def multiply_rows(inputs, packed, scales, group_log, tables, centroids, outputs):
        """A multiple of four rows of inputs: a row of the matrix is decoded into the cache, and used for four at once."""
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

    return look_up, multiply_vector, multiply_rows


@lru_cache
def group_kernels(size: int) -> tuple[Any, Any]:
    """Loops over groups of `size` columns: `rotate_groups` and `fit_groups`."""

    @compiled
    def rotate_groups(source, target):
        for group in range(len(source)):
            rotate(np.intp(source[group].ctypes.data), np.intp(target[group].ctypes.data), size)

    @compiled
    def fit_groups(weights, centroids, lower_codes, boundaries, bin_scale, norms, refined):
        values, places, levels_of = np.empty(size, np.float32), np.empty(size, np.int32), np.empty(size, np.float32)
        root = np.float32(sqrt(size))
        for group in range(len(weights)):
            here, there = np.intp(weights[group].ctypes.data), np.intp(levels_of.ctypes.data)
            norms[group] = np.sqrt(dot_by_halves(here, here, size))
            find_bins(weights[group], norms[group], bin_scale, values, places)
            for column in range(size):
                place = np.uint32(places[column])
                code = lower_codes[place] + np.uint8(values[column] > boundaries[place])
                levels_of[column] = centroids[code] * (np.float32(1) / root)
            refined[group] = dot_by_halves(here, there, size) / dot_by_halves(there, there, size)

    return rotate_groups, fit_groups


@compiled
def find_bins(weights, norm, bin_scale, values, places):
    """The values √size/norm · weights of a group, and the bins that they fall into."""
    inverse = np.float32(1) / norm * np.float32(sqrt(len(weights))) if norm > 0 else np.float32(0)
    last = np.float32(BINS - 1)
    for column in range(len(weights)):
        values[column] = weights[column] * inverse
        place = values[column] * bin_scale + np.float32(BINS // 2)
        place = place if place > 0 else np.float32(0)
        places[column] = np.int32(place if place < last else last)


@compiled
def round_groups(weights, norms, lower_codes, boundaries, bin_scale, codes):
    """How many boundaries lie below a value: those of lower bins, and the one in its own bin, if any, by comparison."""
    values, places = np.empty(weights.shape[1], np.float32), np.empty(weights.shape[1], np.int32)
    for group in range(len(weights)):
        find_bins(weights[group], norms[group], bin_scale, values, places)
        for column in range(weights.shape[1]):
            place = np.uint32(places[column])
            codes[group, column] = lower_codes[place] + np.uint8(values[column] > boundaries[place])


@lru_cache
def bins(bits: int) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Of each bin the number of boundaries in lower bins and the boundary in it, and the scale.

    Values fall into bins by the same arithmetic as the boundaries do, and it never decreases: so a boundary in a lower
    bin is smaller than the value, and one in a higher bin larger.
    """
    edges = codebook(bits).boundaries.numpy()
    scale = np.float32((BINS // 2 - 1) / edges[-1])
    at = (edges * scale + np.float32(BINS // 2)).astype(np.int32)
    assert len(np.unique(at)) == len(edges)
    boundaries = np.full(BINS, np.inf, np.float32)
    boundaries[at] = edges
    return np.searchsorted(at, np.arange(BINS)).astype(np.uint8), boundaries, scale


@compiled
def pack_octets(codes, bits, packed):
    for octet in range(len(codes)):
        word = np.uint64(0)
        for index in range(8):
            word |= np.uint64(codes[octet, index]) << np.uint64(index * bits)
        for byte in range(bits):
            packed[octet, byte] = word >> np.uint64(8 * byte)


@compiled
def unpack_octets(packed, bits, codes):
    mask = np.uint64(2**bits - 1)
    for octet in range(len(packed)):
        word = np.uint64(0)
        for byte in range(bits):
            word |= np.uint64(packed[octet, byte]) << np.uint64(8 * byte)
        for index in range(8):
            codes[octet, index] = (word >> np.uint64(index * bits)) & mask


# What the rest of the library calls: torch tensors in, torch tensors out.


def matmul(inputs: Tensor, packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    """See `hlwq.kernels.matmul`; inputs (rows, in), for few rows. Sums and result are float32."""
    rows, columns = inputs.shape
    group_size = columns // norms.shape[1]
    alone = rows == 1 and group_size >= 32
    rotated = hadamard.rotate_blocks(inputs.to(torch.float32), group_size)
    padded = rotated if alone else torch.nn.functional.pad(rotated, (0, 0, 0, -rows % 4))
    outputs = np.empty((len(padded), len(packed)), np.float32)
    _, multiply_vector, multiply_rows = row_kernels(bits, bits, AVX2)
    x, codes, scales = padded.numpy(), packed.contiguous().numpy(), scales_of(norms, group_size)
    log, tables, centroids = group_size.bit_length() - 1, level_tables(bits, AVX2), level_tables(bits, False)

    def work(part: slice) -> None:
        if alone:
            multiply_vector(x, codes[part], scales[part], log, tables, outputs[:, part])
        else:
            multiply_rows(x, codes[part], scales[part], log, tables, centroids, outputs[:, part])

    in_threads(work, len(packed), len(packed) * columns)
    return torch.from_numpy(outputs[:rows])


def scales_of(norms: Tensor, group_size: int) -> np.ndarray:
    """norm/√group_size, float32."""
    scales: np.ndarray = (norms.to(torch.float32) / sqrt(group_size)).contiguous().numpy()
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
    kernel, *_ = row_kernels(width, bits, AVX2)
    rotate_groups = group_kernels(group_size)[0] if rotated else None
    lines, scales = codes.contiguous().numpy(), scales_of(norms, group_size)
    log, tables, centroids = group_size.bit_length() - 1, level_tables(bits, AVX2), level_tables(bits, False)

    def work(part: slice) -> None:
        step = max(1, CACHED_WEIGHTS // max(1, columns))
        weights = torch.empty(step, columns)
        for start in range(part.start, part.stop, step):
            some = slice(start, min(start + step, part.stop))
            decoded = weights[: some.stop - some.start]
            kernel(lines[some], scales[some], log, tables, centroids, decoded.numpy())
            if rotate_groups:
                groups = decoded.view(-1, group_size).numpy()
                rotate_groups(groups, groups)
            target[some] = decoded

    in_threads(work, rows, target.numel())


def rotate_blocks(values: Tensor, block_size: int) -> Tensor:
    """See `hlwq.hadamard.rotate_blocks`; `block_size` is one of GROUP_SIZES."""
    blocks = values.reshape(-1, block_size).contiguous().numpy()
    target = np.empty_like(blocks)
    kernel, _ = group_kernels(block_size)
    in_threads(lambda part: kernel(blocks[part], target[part]), len(blocks), blocks.size)
    return torch.from_numpy(target).view(values.shape)


def fit_norms(weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Of groups (…, size): their norms and their norms by least squares, float32 (…, 1). See `LloydGrid.fit`."""
    groups = weights.reshape(-1, weights.shape[-1]).contiguous().numpy()
    norms, refined = np.empty(len(groups), np.float32), np.empty(len(groups), np.float32)
    _, kernel = group_kernels(weights.shape[-1])
    centroids = codebook(bits).centroids.numpy()
    in_threads(
        lambda part: kernel(groups[part], centroids, *bins(bits), norms[part], refined[part]),
        len(groups),
        groups.size,
    )
    shape = (*weights.shape[:-1], 1)
    return torch.from_numpy(norms).view(shape), torch.from_numpy(refined).view(shape)


def nearest_codes(weights: Tensor, norms: Tensor, bits: int) -> Tensor:
    """The codes of groups (…, size) with norms (…, 1), uint8. See `LloydGrid.round`."""
    groups = weights.reshape(-1, weights.shape[-1]).contiguous().numpy()
    codes, scales = np.empty(groups.shape, np.uint8), norms.reshape(-1).numpy()
    in_threads(
        lambda part: round_groups(groups[part], scales[part], *bins(bits), codes[part]),
        len(groups),
        groups.size,
    )
    return torch.from_numpy(codes).view(weights.shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """See `hlwq.packing.pack`."""
    octets = codes.reshape(-1, 8).contiguous().numpy()
    packed = np.empty((len(octets), bits), np.uint8)
    in_threads(lambda part: pack_octets(octets[part], bits, packed[part]), len(octets), octets.size)
    return torch.from_numpy(packed).view(*codes.shape[:-1], -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """See `hlwq.packing.unpack`."""
    octets = packed.reshape(-1, bits).contiguous().numpy()
    codes = np.empty((len(octets), 8), np.uint8)
    in_threads(lambda part: unpack_octets(octets[part], bits, codes[part]), len(octets), codes.size)
    return torch.from_numpy(codes).view(*packed.shape[:-1], -1)
