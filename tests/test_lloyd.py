from __future__ import annotations

from math import inf

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from hlwq import HlwqError
from hlwq.lloyd import Codebook, codebook

WIDTHS = range(1, 9)


def cells(book: Codebook) -> list[tuple[float, float, float]]:
    """Each level: the left edge of its cell, the level, the right edge."""
    levels, inner = book.centroids.double().tolist(), book.boundaries.double().tolist()
    return list(zip([-inf, *inner], levels, [*inner, inf], strict=True))


# Max's last printed digits are off from 3 bits on: the true values are 0.034548, 0.0095010 and 0.0025047.
@pytest.mark.parametrize(
    ("bits", "printed", "tolerance"),
    [(1, 0.3634, 6e-5), (2, 0.1175, 2e-4), (3, 0.03454, 3e-4), (4, 0.009497, 5e-4), (5, 0.002499, 2.3e-3)],
)
def test_mse_is_what_max_printed_in_1960(bits: int, printed: float, tolerance: float) -> None:
    assert codebook(bits).mse == pytest.approx(printed, rel=tolerance)


@pytest.mark.parametrize(("bits", "positive"), [(2, [0.4528, 1.510]), (3, [0.2451, 0.7560, 1.344, 2.152])])
def test_centroids_are_maxs_to_four_digits(bits: int, positive: list[float]) -> None:
    expected = [-level for level in reversed(positive)] + positive
    assert [float(f"{level:.4g}") for level in codebook(bits).centroids.tolist()] == expected


def test_one_bit_is_the_mean_of_the_half_normal() -> None:
    assert codebook(1).centroids.tolist() == pytest.approx([-((2 / torch.pi) ** 0.5), (2 / torch.pi) ** 0.5], rel=1e-7)


@pytest.mark.parametrize("bits", WIDTHS)
def test_mse_is_the_integral_of_the_squared_error(bits: int) -> None:
    total = sum(
        quad(lambda x, level=level: (x - level) ** 2 * norm.pdf(x), left, right, epsabs=1e-14)[0]
        for left, level, right in cells(codebook(bits))
    )
    assert codebook(bits).mse == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
def test_each_level_is_the_mean_of_its_cell(bits: int) -> None:
    for left, level, right in cells(codebook(bits)):
        # In either tail, the difference of two small numbers.
        mass = norm.sf(left) - norm.sf(right) if left > 0 else norm.cdf(right) - norm.cdf(left)
        assert level == pytest.approx((norm.pdf(left) - norm.pdf(right)) / mass, abs=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_ascend_symmetrically_with_boundaries_midway(bits: int) -> None:
    book = codebook(bits)
    assert book.centroids.dtype == book.boundaries.dtype == torch.float32
    assert (len(book.centroids), len(book.boundaries)) == (2**bits, 2**bits - 1)
    assert (book.centroids.diff() > 0).all()
    assert torch.equal(book.centroids, -book.centroids.flip(0))
    midpoints = (book.centroids.double()[1:] + book.centroids.double()[:-1]) / 2
    torch.testing.assert_close(book.boundaries.double(), midpoints, rtol=0, atol=3e-7)


@pytest.mark.parametrize("bits", [-1, 0, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(HlwqError, match=f"1 to 8 bits, not {bits}"):
        codebook(bits)
