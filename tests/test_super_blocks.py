"""Groups whose scales are fitted together, as in the super-blocks of other formats: a toy grid through both solvers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from test_gptq import problem
from torch import Tensor

from hlwq import Gptq, Hadamard, Identity, Nearest, RequestError
from hlwq.bases import Basis
from hlwq.grids import Parameters, fit_weighted
from hlwq.solvers import Gram, output_error

TOP = 63


@dataclass(frozen=True)
class SuperBlocks:
    """Symmetric codes in groups of 16; the scales of four groups are multiples, 0 to 63, of one number in float16."""

    name: ClassVar[str] = "super"
    bits: int = 4
    group_size: int = 16
    fit_columns: int = 64
    symmetry: bool = True

    def fitted(self, in_features: int, symmetric: bool) -> SuperBlocks:
        assert in_features % self.fit_columns == 0
        return self

    def fit(self, weights: Tensor) -> Parameters:
        return self._stored(weights.unflatten(-1, (-1, self.group_size)).abs().amax(-1) / 7)

    def candidates(self, weights: Tensor) -> Iterator[Parameters]:
        scales = self.fit(weights).scale
        for fraction in (1, 0.9, 0.8, 0.7):
            yield self._stored(scales * fraction)

    def refit(self, weights: Tensor, codes: Tensor, importance: Tensor, parameters: Parameters) -> Parameters:
        steps = codes.float() - 8
        shares = [
            each.expand_as(weights).unflatten(-1, (-1, self.group_size)).sum(-1)
            for each in (importance * steps * weights, importance * steps * steps)
        ]
        return self._stored((shares[0] / shares[1].clamp(min=1e-20)).clamp(min=0))

    def rescaled(self, parameters: Parameters, factor: Tensor) -> Parameters:
        return self._stored(parameters.scale * factor.clamp(min=0))

    def round(self, weights: Tensor, parameters: Parameters) -> Tensor:
        scale = self._spread(parameters, weights)
        return (weights / torch.where(scale == 0, 1, scale)).round().add(8).clamp(0, 15).to(torch.uint8)

    def decode(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return (codes.float() - 8) * self._spread(parameters, codes)

    def _spread(self, parameters: Parameters, like: Tensor) -> Tensor:
        return parameters.scale.repeat_interleave(like.shape[-1] // parameters.scale.shape[-1], -1)

    def _stored(self, scales: Tensor) -> Parameters:
        step = (scales.amax(-1, keepdim=True) / TOP).half().float()
        multiples = (scales / torch.where(step == 0, 1, step)).round().clamp(0, TOP)
        return Parameters(step * multiples)


GRID = SuperBlocks()
every_basis = pytest.mark.parametrize("basis", [Identity(), Hadamard(32), Hadamard(128)], ids=str)


def uneven_problem() -> tuple[Tensor, Gram]:
    """A matrix of four runs, whose groups are of very different spread."""
    weights, gram = problem(rows=40, width=256)
    return weights * torch.rand(16, generator=torch.Generator().manual_seed(9)).repeat_interleave(16), gram


def decoded_by_hand(codes: Tensor, scales: Tensor, basis: Basis) -> Tensor:
    return basis.unrotate((codes.float() - 8) * scales.repeat_interleave(16, 1))


def assert_multiples(scales: Tensor) -> None:
    """Of a number for each run of four groups."""
    runs = scales.unflatten(1, (-1, 4))
    # The largest is nearly, but for the rounding of the step to float16, 63 of them.
    steps = runs / (runs.amax(-1, keepdim=True) / TOP)
    assert ((steps - steps.round()).abs() < 1e-3).all()
    assert len(steps.round().unique()) > 10


@every_basis
def test_nearest_decodes_as_by_hand(basis: Basis) -> None:
    weights, _ = uneven_problem()
    matrix = Nearest().solve(weights, GRID, basis)
    assert (matrix.codes.shape, matrix.parameters.scale.shape) == ((40, 256), (40, 16))
    assert_multiples(matrix.parameters.scale)
    torch.testing.assert_close(matrix.dequantize(), decoded_by_hand(matrix.codes, matrix.parameters.scale, basis))
    assert (matrix.dequantize() - weights).square().sum() < 0.015 * weights.square().sum()


@every_basis
@pytest.mark.parametrize("options", [{}, {"foem_beta": 0.2}, {"gptaq_alpha": 0.25}], ids=str)
def test_gptq_decodes_as_by_hand_and_lowers_the_output_error(options: dict[str, float], basis: Basis) -> None:
    weights, gram = uneven_problem()
    matrix = Gptq(**options).solve(weights, GRID, basis, gram)
    assert matrix.group_of_column is None
    assert_multiples(matrix.parameters.scale)
    torch.testing.assert_close(matrix.dequantize(), decoded_by_hand(matrix.codes, matrix.parameters.scale, basis))
    nearest = Nearest().solve(weights, GRID, basis)
    errors = [output_error(weights - each.dequantize(), gram.hessian) for each in (matrix, nearest)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("basis", [Identity(), Hadamard(32), Hadamard(64)], ids=str)
@pytest.mark.parametrize("order", [[3, 2, 1, 0], [1, 3, 0, 2]])
def test_the_order_of_runs_changes_nothing(order: list[int], basis: Basis) -> None:
    """The blocks that are rotated lie inside the runs here, so that runs can change places."""
    weights, gram = uneven_problem()
    columns = torch.cat([torch.arange(64 * run, 64 * run + 64) for run in order])
    groups = torch.cat([torch.arange(4 * run, 4 * run + 4) for run in order])
    permuted = Gram(gram.hessian[columns][:, columns])
    for moved, plain in (
        (Nearest().solve(weights[:, columns], GRID, basis), Nearest().solve(weights, GRID, basis)),
        (
            Gptq().solve(weights[:, columns], GRID, basis, permuted),
            Gptq().solve(weights, GRID, basis, Gram(gram.hessian)),
        ),
    ):
        # Sums in another order may round a tie differently, after which a row goes its own way.
        same = (moved.codes == plain.codes[:, columns]).all(1)
        assert same.float().mean() > 0.85
        expected = plain.parameters.scale[:, groups]
        torch.testing.assert_close(moved.parameters.scale[same], expected[same], rtol=1e-3, atol=1e-6)


def test_without_correlations_each_run_is_fitted_and_rounded_by_itself() -> None:
    weights, _ = uneven_problem()
    importance = torch.rand(256, generator=torch.Generator().manual_seed(4)) + 0.1
    matrix = Gptq().solve(weights, GRID, Identity(), Gram(importance.diag()))
    damped = importance + 0.01 * importance.mean()
    for start in range(0, 256, 64):
        run = weights[:, start : start + 64]
        parameters = fit_weighted(GRID, run, damped[start : start + 64])
        torch.testing.assert_close(matrix.parameters.scale[:, start // 16 : start // 16 + 4], parameters.scale)
        assert torch.equal(matrix.codes[:, start : start + 64], GRID.round(run, parameters))


def test_rows_can_be_stacked() -> None:
    weights, gram = uneven_problem()
    stacked = Gptq().solve(weights, GRID, Hadamard(32), gram).split_rows([10, 30])
    for part, rows in zip(stacked, weights.split([10, 30]), strict=True):
        alone = Gptq().solve(rows, GRID, Hadamard(32), gram)
        assert (part.dequantize() - alone.dequantize()).abs().gt(1e-3).float().mean() < 0.02


def test_scattered_groups_are_refused() -> None:
    weights, gram = uneven_problem()
    with pytest.raises(RequestError, match="one by one") as refused:
        Gptq(desc_act=True).solve(weights, GRID, Identity(), gram)
    assert refused.value.argument == "desc_act"
