from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from hlwq import HlwqError
from hlwq.hadamard import hadamard_matrix, rotate_blocks

SIZES = [1, 2, 8, 32, 64, 128, 256]


@pytest.mark.parametrize("size", SIZES)
def test_matrix_is_the_normalised_sylvester_matrix(size: int) -> None:
    np.testing.assert_allclose(hadamard_matrix(size).numpy(), hadamard(size) / np.sqrt(size), rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_matrix_is_symmetric_orthogonal_and_its_own_inverse(size: int) -> None:
    matrix = hadamard_matrix(size)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [8, 64, 128])
def test_each_block_is_multiplied_by_the_matrix(size: int) -> None:
    values = torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(1))
    blocks = values.double().numpy().reshape(3, 2, size) @ (hadamard(size) / np.sqrt(size))
    np.testing.assert_allclose(rotate_blocks(values, size).numpy(), blocks.reshape(3, -1), atol=3e-6)


@pytest.mark.parametrize("size", SIZES)
def test_rotating_twice_is_the_identity_and_once_is_not(size: int) -> None:
    values = torch.rand(5, 512, generator=torch.Generator().manual_seed(2))
    once = rotate_blocks(values, size)
    assert torch.equal(once, values) == (size == 1)
    assert (rotate_blocks(once, size) - values).norm() < 1e-6 * values.norm()


def test_rotation_keeps_each_blocks_norm() -> None:
    values = torch.randn(4, 256, generator=torch.Generator().manual_seed(3))
    before, after = (each.unflatten(-1, (-1, 64)).norm(dim=-1) for each in (values, rotate_blocks(values, 64)))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [-4, 0, 3, 48, 96])
def test_matrix_of_an_order_that_is_no_power_of_two_is_refused(size: int) -> None:
    with pytest.raises(HlwqError, match=f"power of two, not {size}"):
        hadamard_matrix(size)


@pytest.mark.parametrize(("length", "size"), [(96, 64), (96, 48), (128, 0), (128, -64)])
def test_blocks_that_do_not_fit_are_refused(length: int, size: int) -> None:
    with pytest.raises(HlwqError, match=str(size)):
        rotate_blocks(torch.ones(2, length), size)
