"""Rotations with blocks of their own, which need not be the groups that share a scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.linalg import hadamard
from test_gptq import problem
from torch import Tensor

from hlwq import Gptq, Hadamard, Identity, LloydGrid, Nearest, RequestError, UniformGrid
from hlwq.bases import Basis
from hlwq.grids import Grid
from hlwq.matrix import QuantizedMatrix
from hlwq.solvers import output_error

WIDTH = 512
GRIDS: dict[str, Grid] = {
    f"{name}, {size}": grid
    for size in (64, 128)
    for name, grid in (
        ("signed", UniformGrid(4, size)),
        ("integer zero", UniformGrid(4, size, symmetric=False)),
        ("any bias", UniformGrid(4, size, symmetric=False, integer_zero=False)),
        ("lloyd", LloydGrid(4, size)),
    )
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
every_block = pytest.mark.parametrize("block", [32, 64, 128, 256])


def outlying(seed: int = 0) -> tuple[Tensor, Any]:
    """Weights some of whose columns are larger than the others."""
    weights, gram = problem(rows=24, width=WIDTH, seed=seed)
    weights[:, ::37] *= 8
    return weights, gram


def decoded_by_hand(matrix: QuantizedMatrix, block: int) -> Tensor:
    """Levels column by column, and then each block times the matrix of Sylvester."""
    codes, group_of_column = matrix.codes, matrix.group_of_column
    if group_of_column is None:
        group_of_column = torch.arange(WIDTH) // matrix.grid.group_size
    levels = matrix.grid.decode(codes, matrix.parameters.apply(lambda each: each[:, group_of_column]))
    rotation = torch.from_numpy(hadamard(block)).double() / block**0.5
    return (levels.double().unflatten(1, (-1, block)) @ rotation).flatten(1).float()


@every_block
@every_grid
def test_nearest_decodes_as_by_hand(grid: Grid, block: int) -> None:
    weights, _ = outlying()
    matrix = Nearest().solve(weights, grid, Hadamard(block))
    torch.testing.assert_close(matrix.dequantize(), decoded_by_hand(matrix, block), rtol=1e-4, atol=1e-4)
    error = (matrix.dequantize() - weights).square().sum() / weights.square().sum()
    plain = (Nearest().solve(weights, grid, Identity()).dequantize() - weights).square().sum() / weights.square().sum()
    assert error < 0.02
    assert error < 0.9 * plain


@every_block
@every_grid
@pytest.mark.parametrize("desc_act", [False, True])
def test_gptq_decodes_as_by_hand_and_lowers_the_output_error(grid: Grid, block: int, desc_act: bool) -> None:
    weights, gram = outlying()
    matrix = Gptq(desc_act=desc_act).solve(weights, grid, Hadamard(block), gram)
    assert (matrix.group_of_column is not None) == desc_act
    torch.testing.assert_close(matrix.dequantize(), decoded_by_hand(matrix, block), rtol=1e-4, atol=1e-4)
    nearest = Nearest().solve(weights, grid, Hadamard(block))
    errors = [output_error(weights - each.dequantize(), gram.hessian) for each in (matrix, nearest)]
    assert errors[0] < 0.6 * errors[1]


def test_each_block_size_gives_another_result() -> None:
    weights, _ = outlying()
    decoded = [Nearest().solve(weights, LloydGrid(4, 64), Hadamard(block)).dequantize() for block in (32, 64, 128, 256)]
    for index, one in enumerate(decoded):
        assert all(not torch.equal(one, other) for other in decoded[:index])


@pytest.mark.parametrize("basis", [Identity(), Hadamard(32), Hadamard(256)], ids=str)
def test_rotating_back_undoes_rotating_and_lengths_stay(basis: Basis) -> None:
    values = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    rotated = basis.rotate(values)
    torch.testing.assert_close(basis.unrotate(rotated), values, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotated.norm(dim=1), values.norm(dim=1))
    assert torch.equal(rotated, values) == (basis == Identity())


@pytest.mark.parametrize(
    ("block", "width", "fitted"),
    [(256, 512, 256), (256, 384, 128), (256, 192, 64), (64, 192, 64), (32, 96, 32), (128, 72, 8), (64, 2, 2)],
)
def test_a_block_that_does_not_divide_becomes_the_largest_power_of_two_that_does(
    block: int, width: int, fitted: int
) -> None:
    assert Hadamard(block).fitted(width, 32) == Hadamard(fitted)


@pytest.mark.parametrize("group_size", [32, 128])
def test_a_block_that_is_not_given_is_the_group(group_size: int) -> None:
    assert Hadamard().fitted(256, group_size) == Hadamard(group_size)
    assert Identity().fitted(256, group_size) == Identity()


def test_a_block_that_is_not_fitted_yet_cannot_rotate() -> None:
    with pytest.raises(ValueError, match="not fitted"):
        Hadamard().rotate(torch.ones(1, 64))


@pytest.mark.parametrize("size", [96, 48, 3, 1, 0, -64, 64.0, "64", True])
def test_a_block_that_is_no_power_of_two_is_refused(size: Any) -> None:
    with pytest.raises(RequestError, match=f"`block_size` is {size!r}; it must be a") as refused:
        Hadamard(size)
    assert refused.value.argument == "block_size"


def test_what_no_block_divides_is_refused() -> None:
    with pytest.raises(RequestError, match="in_features is 33") as refused:
        Hadamard(64).fitted(33, 33)
    assert refused.value.argument == "block_size"
    with pytest.raises(RequestError, match="`group_size` 96 must be a power of two") as refused:
        Hadamard().fitted(192, 96)
    assert refused.value.argument == "group_size"
