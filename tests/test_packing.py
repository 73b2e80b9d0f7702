from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hlwq import HlwqError
from hlwq.packing import pack, unpack

WIDTHS = range(1, 9)


@st.composite
def widths_and_codes(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    bits = draw(st.sampled_from(WIDTHS))
    leading = draw(st.lists(st.integers(1, 3), max_size=2))
    shape = (*leading, 8 * draw(st.integers(1, 6)))
    return bits, draw(arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))


@given(widths_and_codes())
def test_unpacking_undoes_packing_and_no_bit_is_wasted(drawn: tuple[int, np.ndarray]) -> None:
    bits, codes = drawn
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*codes.shape[:-1], codes.shape[-1] * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits).numpy(), codes)


@given(widths_and_codes())
def test_the_stream_has_the_least_significant_bits_first(drawn: tuple[int, np.ndarray]) -> None:
    bits, codes = drawn
    each_bit = (codes[..., None] >> np.arange(bits)) & 1
    stream = np.packbits(each_bit.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    np.testing.assert_array_equal(pack(torch.from_numpy(codes), bits).numpy(), stream)


@pytest.mark.parametrize("bits", WIDTHS)
def test_any_bytes_unpack_to_codes_that_pack_to_them(bits: int) -> None:
    stream = torch.arange(256, dtype=torch.uint8).repeat(bits)
    codes = unpack(stream, bits)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) == 2**bits - 1
    assert torch.equal(pack(codes, bits), stream)


@pytest.mark.parametrize("bits", WIDTHS)
def test_memory_order_does_not_matter(bits: int) -> None:
    codes = torch.randint(2**bits, (16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes.T.contiguous(), bits)
    assert torch.equal(pack(codes.T, bits), packed)
    assert torch.equal(unpack(packed.T.contiguous().T, bits), codes.T)


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(HlwqError, match=f"1 to 8 bits, not {bits}"):
        pack(torch.zeros(8, dtype=torch.uint8), bits)
    with pytest.raises(HlwqError, match=f"1 to 8 bits, not {bits}"):
        unpack(torch.zeros(8, dtype=torch.uint8), bits)


def test_an_axis_that_leaves_a_remainder_is_refused() -> None:
    with pytest.raises(HlwqError, match="axis of 12 is not a multiple of 8"):
        pack(torch.zeros(2, 12, dtype=torch.uint8), 4)
    with pytest.raises(HlwqError, match="axis of 12 is not a multiple of 5"):
        unpack(torch.zeros(2, 12, dtype=torch.uint8), 5)
