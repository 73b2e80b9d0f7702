"""Registers for functions that numba compiles: eight float32 that variables can hold, and what is done with them.

Codes are turned into levels 32 at a time. They are cut out of the bit stream by shuffling and shifting bytes, and
looked up by `vpshufb`, which finds 32 bytes in a table of 16: a float32 takes four such tables, one for each of its
bytes, and a codebook of more than 4 bits takes 2^(bits−5) times as many, since it is symmetric. Weights are rounded
eight at a time, by a binary search in tables that `vpermps` looks up. Without AVX2, levels and boundaries are loaded
one by one; all else is LLVM's, for any processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numba
import numpy as np
from filelock import FileLock
from llvmlite import binding, ir
from numba import types
from numba.core.caching import FunctionCache, NullCache
from numba.core.ccallback import CFunc
from numba.extending import intrinsic, models, register_model

from hlwq.lloyd import codebook

AVX2 = bool(binding.get_host_cpu_features().get("avx2"))
I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
V8, V8_INTEGERS = ir.VectorType(F32, 8), ir.VectorType(I32, 8)
UNDEFINED = ir.Constant(V8, ir.Undefined)
SOURCE = crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))


class SharedCache(FunctionCache):
    """Machine code on disk for several processes. With numba's own, two that compile at the same time may each number
    their code alike, and one be given the other's; and functions that call others are never found again."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Code for a signature, if there is some and it can be read."""
        try:
            with self._alone():
                return super().load_overload(sig, target_context)
        except OSError:
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep code for a signature, unless the disk is full or another user's."""
        with suppress(OSError), self._alone():
            super().save_overload(sig, data)

    def _alone(self) -> FileLock:
        self._impl.locator.ensure_cache_path()
        return FileLock(Path(self.cache_path) / "hlwq.lock", mode=0o666)

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return sig, codegen.magic_tuple()  # all else is in the name, see `named`


def compiled(function: Callable[..., Any]) -> Any:
    """Compile on first use, free of the interpreter's lock, and keep the machine code where a file can be written."""
    dispatcher = numba.njit(nogil=True)(named(function))
    dispatcher._cache = cache_for(function)
    return dispatcher


def callback(function: Callable[[int], None]) -> tuple[Any, int]:
    """A function of an address, compiled for C to call, in threads that Python knows nothing of, and where its code is.

    The code lives as long as the first of the two.
    """
    made: Any = CFunc(named(function), ((types.intp,), types.void), {}, {})
    made._cache = cache_for(function)
    made.compile()
    return made, made.address


def named(function: Callable[..., Any]) -> Callable[..., Any]:
    """Name a function after all that its code depends on, as its file is that keeps the code.

    That is these modules, and what it holds of the functions around it: values, and compiled functions, whose names
    say the same of them.
    """
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    names = [getattr(each, "__qualname__", repr(each)) for each in held]
    function.__qualname__ += f"_{crc32(repr((SOURCE, names)).encode()):08x}"
    return function


def cache_for(function: Callable[..., Any]) -> SharedCache | NullCache:
    """Where the code of a function is kept: nowhere if neither this directory nor the user's cache is writable."""
    try:
        return SharedCache(function)
    except RuntimeError:
        return NullCache()


@compiled
def keep(array):
    """Nothing. It stands where an array is done with: one of which only the address is used is freed at once."""


class Vector(types.Type):
    """Eight float32."""

    def __init__(self) -> None:
        super().__init__("Vector")


vector = Vector()


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """Lies in memory as it does in the register."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, V8)


def constant(element: ir.Type, values: Sequence[int]) -> ir.Constant:
    """A vector of integers."""
    return ir.Constant(ir.VectorType(element, len(values)), list(values))


def shuffle(builder: ir.IRBuilder, first: ir.Value, second: ir.Value, order: Sequence[int]) -> ir.Value:
    """Elements of two vectors, those of the second counted on from the first."""
    return builder.shuffle_vector(first, second, constant(I32, order))


def pointer(builder: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    """To some bytes after an address."""
    return builder.inttoptr(builder.add(address, ir.Constant(address.type, offset)), kind.as_pointer())


def load_vectors(builder: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    """Neighbouring float32, eight to a vector."""
    return [builder.load(pointer(builder, address, 32 * index, V8), align=4) for index in range(count)]


def repeated(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A float32, eight times."""
    return shuffle(builder, builder.insert_element(UNDEFINED, value, ir.Constant(I32, 0)), UNDEFINED, [0] * 8)


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

    return vector(types.float32), lambda _, builder, __, args: repeated(builder, args[0])


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


LANE_ORDER = [8 * (index // 4) + index % 4 + 4 * lane for lane in (0, 1) for index in range(16)]
"""The code that each byte of a register holds, so that `interleave`, which works within lanes of 16 bytes as processors
do, ends with neighbours beside each other."""
LANES = [0] * 8 + [16] * 8
"""Where the lane of each word of a register begins."""


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
        raw = shuffle(builder, raw, raw, [*range(size)] * (32 // size))  # what follows stays within a lane
        offsets = [code * width - 8 * start for code in LANE_ORDER if first <= code < first + 16]
        # Of the two bytes that hold a code the second is its last: so none begins at their lowest bit, and all shifts
        # are one multiplication. Before the first byte there may be any.
        second = [(offset + width - 1) // 8 for offset in offsets]
        pairs = [lane + max(byte, 0) for lane, each in zip(LANES, second, strict=True) for byte in (each - 1, each)]
        words = builder.bitcast(shuffle(builder, raw, raw, pairs), ir.VectorType(I16, 16))
        down = [offset - 8 * (byte - 1) for offset, byte in zip(offsets, second, strict=True)]
        codes = builder.and_(builder.lshr(words, constant(I16, down)), constant(I16, [2**width - 1] * 16))
        parts.append(builder.bitcast(codes, ir.VectorType(I8, 32)))
    low_bytes = [32 * part + 16 * lane + 2 * word for lane in (0, 1) for part in (0, 1) for word in range(8)]
    return shuffle(builder, parts[0], parts[1], low_bytes)


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
        middle = 2 ** (bits - 1)
        positive = builder.sext(builder.icmp_unsigned(">=", codes, constant(I8, [middle] * 32)), kind)
        codes = builder.and_(builder.xor(codes, positive), constant(I8, [middle - 1] * 32))
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
        planes[3] = builder.xor(planes[3], builder.and_(positive, constant(I8, [128] * 32)))
    first, second, third, fourth = planes
    words = [(interleave(builder, first, second, n, I16), interleave(builder, third, fourth, n, I16)) for n in (0, 1)]
    return [interleave(builder, low, high, n, F32) for low, high in words for n in (0, 1)]


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


def taken(builder: ir.IRBuilder, table: ir.Value, index: ir.Value, count: int, shuffled: bool) -> ir.Value:
    """Of a table of `count` float32, filled up to a multiple of eight, those at eight indices."""
    if count == 1:
        return repeated(builder, builder.load(pointer(builder, table, 0, F32), align=4))
    if not shuffled:
        found, entries = UNDEFINED, pointer(builder, table, 0, F32)
        for lane in range(8):
            place = builder.gep(entries, [builder.extract_element(index, ir.Constant(I32, lane))])
            found = builder.insert_element(found, builder.load(place, align=4), ir.Constant(I32, lane))
        return found
    find = builder.module.declare_intrinsic("llvm.x86.avx2.permps", (), ir.FunctionType(V8, [V8, V8_INTEGERS]))
    parts = [builder.call(find, [part, index]) for part in load_vectors(builder, table, -(-count // 8))]
    bit = 8
    while len(parts) > 1:
        chosen = builder.icmp_unsigned(
            "!=", builder.and_(index, constant(I32, [bit] * 8)), ir.Constant(V8_INTEGERS, None)
        )
        parts = [builder.select(chosen, *pair) for pair in zip(parts[1::2], parts[::2], strict=True)]
        bit *= 2
    return parts[0]


def search(
    builder: ir.IRBuilder, source: ir.Value, factor: ir.Value, tables: ir.Value, bits: int, shuffled: bool
) -> tuple[ir.Value, ir.Value]:
    """Of eight float32 times a factor: how many of the positive boundaries lie below their sizes, and −1 for those that
    are not positive.

    The boundaries are symmetric, so that half of them are searched, in a binary search for all eight values at a time.
    A boundary belongs to the level below it. For a negative value that is the larger of the two: it is searched for
    as the next larger number.
    """
    values = builder.fmul(load_vectors(builder, source, 1)[0], repeated(builder, factor))
    negative = builder.sext(builder.fcmp_ordered("<=", values, ir.Constant(V8, None)), V8_INTEGERS)
    size = builder.and_(builder.bitcast(values, V8_INTEGERS), constant(I32, [0x7FFFFFFF] * 8))
    size = builder.bitcast(builder.sub(size, negative), V8)
    index = ir.Constant(V8_INTEGERS, None)
    offset = 0
    for depth in range(bits - 1):
        table = builder.add(tables, ir.Constant(tables.type, offset))
        boundaries = taken(builder, table, index, 1 << depth, shuffled)
        above = builder.sext(builder.fcmp_ordered(">", size, boundaries), V8_INTEGERS)
        index = builder.sub(builder.add(index, index), above)
        offset += 4 * max(8, 1 << depth)
    return index, negative


@intrinsic(prefer_literal=True)
def nearest_codes_of_eight(context, source, factor, tables, target, bits, shuffled):
    """Write the codes, one in a byte, of eight float32 times a factor. The tables are `search_tables`."""

    def generate(_, builder, __, args):
        width = bits.literal_value
        index, negative = search(builder, args[0], args[1], args[2], width, bool(shuffled.literal_value))
        codes = builder.or_(index, constant(I32, [1 << (width - 1)] * 8))
        codes = builder.xor(codes, builder.and_(negative, constant(I32, [(1 << width) - 1] * 8)))
        kind = ir.VectorType(I8, 8)
        builder.store(builder.trunc(codes, kind), pointer(builder, args[3], 0, kind), align=1)

    return types.void(types.intp, types.float32, types.intp, types.intp, bits, shuffled), generate


@intrinsic(prefer_literal=True)
def nearest_levels_of_eight(context, source, factor, tables, target, bits, shuffled):
    """Write the levels nearest to eight float32 times a factor, as they stand at the end of the tables."""

    def generate(_, builder, __, args):
        width = bits.literal_value
        index, negative = search(builder, args[0], args[1], args[2], width, bool(shuffled.literal_value))
        end = sum(max(8, 1 << depth) for depth in range(width - 1))
        table = builder.add(args[2], ir.Constant(args[2].type, 4 * end))
        found = taken(builder, table, index, 1 << (width - 1), bool(shuffled.literal_value))
        sign = builder.and_(negative, constant(I32, [1 << 31] * 8))
        found = builder.bitcast(builder.xor(builder.bitcast(found, V8_INTEGERS), sign), V8)
        builder.store(found, pointer(builder, args[3], 0, V8), align=4)

    return types.void(types.intp, types.float32, types.intp, types.intp, bits, shuffled), generate


@lru_cache
def search_tables(bits: int, scale: float) -> np.ndarray:
    """The positive boundaries, one table for each step of a binary search, and the positive levels times `scale`.

    Args:
        bits: 2 to 8.
        scale: a float32.
    """
    half = 1 << (bits - 1)
    book = codebook(bits)
    boundaries = book.boundaries.numpy()[half:]
    strides = [half >> (depth + 1) for depth in range(bits - 1)]
    steps = [boundaries[stride - 1 :: 2 * stride] for stride in strides]
    tables = [*steps, book.centroids.numpy()[half:] * np.float32(scale)]
    return np.concatenate([np.resize(table, max(8, len(table))) for table in tables])
