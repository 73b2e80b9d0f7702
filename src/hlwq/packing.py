"""Codes of 2 to 8 bits, packed without waste."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hlwq.compiled import cpu_kernels
from hlwq.errors import RequestError

CHUNK_BYTES = 1 << 20


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the last axis of `codes` into a bit stream, least significant bits first.

    Eight codes become `bits` bytes: code i occupies bits [i·bits, (i+1)·bits) of a little-endian word. GPTQ's
    int32 words, MLX's uint32 words and HLWQ's bytes are views of this one stream.

    Args:
        codes: uint8 (…, n), each below 2^bits; n a multiple of 8.
        bits: 1 to 8.

    Returns:
        uint8 (…, n·bits/8).

    Raises:
        RequestError: `bits` is out of range or n is not a multiple of 8.
    """
    _check(bits, codes.shape[-1], 8)
    kernels = cpu_kernels(codes)
    if kernels and codes.dtype == torch.uint8:
        packed: Tensor = kernels.pack(codes, bits)
        return packed
    return _in_chunks(lambda rows: _pack(rows, bits), codes)


def _pack(codes: Tensor, bits: int) -> Tensor:
    octets = codes.unflatten(-1, (-1, 8)).to(torch.int64)
    word = octets[..., 0].clone()
    for index in range(1, 8):
        word |= octets[..., index] << (index * bits)
    packed: Tensor = word.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: uint8 (…, m), m a multiple of `bits`.
        bits: 1 to 8.

    Returns:
        uint8 (…, 8·m/bits).

    Raises:
        RequestError: `bits` is out of range or does not divide m.
    """
    _check(bits, packed.shape[-1], bits)
    kernels = cpu_kernels(packed)
    if kernels and packed.dtype == torch.uint8:
        codes: Tensor = kernels.unpack(packed, bits)
        return codes
    return _in_chunks(lambda rows: _unpack(rows, bits), packed)


def unpack_big_endian(packed: Tensor, bits: int) -> Tensor:
    """Like `unpack`, for a stream whose most significant bits come first, as early HLWQ files have it."""
    _check(bits, packed.shape[-1], bits)
    turned = packed.unflatten(-1, (-1, bits)).flip(-1).flatten(-2)
    codes: Tensor = unpack(turned, bits).unflatten(-1, (-1, 8)).flip(-1).flatten(-2)
    return codes


def _unpack(packed: Tensor, bits: int) -> Tensor:
    groups = packed.unflatten(-1, (-1, bits))
    octets = torch.zeros(*groups.shape[:-1], 8, dtype=torch.uint8, device=packed.device)
    octets[..., :bits] = groups
    word = octets.view(torch.int64)
    shifts = torch.arange(0, 8 * bits, bits, device=packed.device)
    codes: Tensor = ((word >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)
    return codes


def _in_chunks(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Work on some rows at a time, since the words in between take up to sixteen times the bytes."""
    if values.ndim < 2 or not len(values):
        return function(values)
    rows = max(1, CHUNK_BYTES // max(1, values[0].numel()))
    return torch.cat([function(chunk) for chunk in values.split(rows)])


def _check(bits: int, length: int, divisor: int) -> None:
    if not 1 <= bits <= 8:
        raise RequestError(f"Codes have 1 to 8 bits, not {bits}.")
    if length % divisor:
        raise RequestError(f"An axis of {length} is not a multiple of {divisor}, which {bits}-bit packing needs.")
