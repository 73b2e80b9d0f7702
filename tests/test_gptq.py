from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_grids import GRIDS, GROUP_KINDS, PLAIN, ROTATED, every_grid, groups_of, nearest
from torch import Tensor

from hlwq import CheckpointError, Gptq, RequestError
from hlwq.bases import Basis
from hlwq.grids import Grid, LloydGrid, Parameters, UniformGrid, fit_weighted
from hlwq.hadamard import rotate_blocks
from hlwq.matrix import QuantizedMatrix
from hlwq.solvers import Gram, output_error
from hlwq.solvers.gptq import inverse_factor

INT4 = UniformGrid(4, 32)


def correlated_inputs(width: int, tokens: int = 2000, seed: int = 0) -> Tensor:
    """Inputs as layers have them: a few directions and a few columns carry most of the energy."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.rand(width, 1, generator=generator) ** 3
    scales = 10 ** torch.randn(width, generator=generator).mul(0.5)
    return (torch.randn(tokens, width, generator=generator) @ mixing) * scales


def problem(rows: int = 48, width: int = 128, seed: int = 0) -> tuple[Tensor, Gram]:
    inputs = correlated_inputs(width, seed=seed)
    weights = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 1))
    generator = torch.Generator().manual_seed(seed + 2)
    noise = torch.randn(inputs.shape, generator=generator) * 0.1 * inputs.std(0)
    drift = inputs @ torch.randn(width, rows, generator=generator) * 0.01
    return weights, Gram(inputs.T @ inputs, noise.T @ inputs, drift.T @ inputs)


def solve(weights: Tensor, gram: Gram, grid: Grid, basis: Basis = PLAIN, **options: Any) -> QuantizedMatrix:
    return Gptq(**options).solve(weights, grid, basis.fitted(weights.shape[1], grid.group_size), gram)


def loss(weights: Tensor, gram: Gram, grid: Grid, basis: Basis = PLAIN, **options: Any) -> float:
    matrix = solve(weights, gram, grid, basis, **options)
    return output_error(weights - matrix.dequantize(), gram.hessian)


@every_grid
def test_outputs_change_less_than_by_rounding_to_nearest(grid: Grid, basis: Basis) -> None:
    weights, gram = problem()
    rounded = output_error(weights - nearest(weights, grid, basis).dequantize(), gram.hessian)
    assert loss(weights, gram, grid, basis) < 0.6 * rounded


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"foem_beta": 0.3},
        {"gptaq_alpha": 0.5},
        {"foem_beta": 0.3, "gptaq_alpha": 0.5},
        {"mismatch": 0.5},
        {"foem_beta": 0.3, "mismatch": 1.0},
        {"stream_change": 0.5},
        {"mismatch": 0.5, "stream_change": 1.0},
    ],
)
@pytest.mark.parametrize("desc_act", [False, True])
def test_agrees_with_the_textbook(options: dict[str, Any], desc_act: bool) -> None:
    """The loop without its lazy batches: every column's error goes to all later columns at once, in float64."""
    weights, gram = problem(rows=16, width=64)
    chosen = Gptq(desc_act=desc_act, **options)
    matrix = chosen.solve(weights, INT4, PLAIN, gram)
    expected = textbook(weights, gram, INT4, chosen)
    # float32 and float64 may round a tie differently, after which a row goes its own way.
    same = ((matrix.dequantize() - expected).abs() < 1e-3).all(1)
    assert same.float().mean() > 0.75


def textbook(weights: Tensor, gram: Gram, grid: Grid, options: Gptq) -> Tensor:
    size, diagonal = grid.group_size, gram.hessian.diagonal()
    if options.desc_act:
        order = diagonal.argsort(descending=True)
    else:
        groups = sorted(range(0, len(diagonal), size), key=lambda start: -float(diagonal[start : start + size].sum()))
        runs = [start + diagonal[start : start + size].argsort(descending=True) for start in groups]
        order = torch.cat(runs)
    hessian = gram.hessian.double()[order][:, order]
    damped = hessian + options.damping * hessian.diagonal().mean() * torch.eye(len(order))
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert gram.cross is not None
    assert gram.stream is not None
    owed = options.gptaq_alpha * (gram.cross.double()[order][:, order] @ factor.T).triu(1) @ factor
    original = weights.double()[:, order]
    changes = options.mismatch * original @ gram.cross.double()[order][:, order]
    original = original + (changes + options.stream_change * gram.stream.double()[:, order]) @ damped.inverse()
    latent, decoded = original.clone(), torch.zeros_like(original)
    for column in range(len(order)):
        if column % size == 0:
            group = slice(column, column + size)
            parameters = fit_weighted(grid, latent[:, group].float(), factor.diagonal()[group].float() ** -2)
        latent[:, column] -= options.foem_beta * (latent[:, column] - original[:, column])
        value = latent[:, column].clone()
        decoded[:, column] = grid.decode(grid.round(value[:, None].float(), parameters), parameters)[:, 0]
        error = value - decoded[:, column] - options.foem_beta * (value - original[:, column])
        later = slice(column + 1, None)
        latent[:, later] -= (error / factor[column, column])[:, None] * factor[column, later]
        latent[:, later] += value[:, None] * owed[column, later]
    result = torch.empty_like(decoded)
    result[:, order] = decoded
    return result.float()


def test_without_correlations_it_is_rounding_to_nearest() -> None:
    weights = torch.randn(16, 64)
    importance = torch.rand(64) + 0.1
    matrix = solve(weights, Gram(importance.diag()), INT4)
    damped = importance + 0.01 * importance.mean()
    for start in (0, 32):
        groups = weights[:, start : start + 32]
        parameters = fit_weighted(INT4, groups, damped[start : start + 32])
        assert torch.equal(matrix.codes[:, start : start + 32], INT4.round(groups, parameters))


def test_rows_can_be_stacked() -> None:
    weights, gram = problem()
    stacked = solve(weights, gram, INT4).split_rows([10, 38])
    for part, rows in zip(stacked, weights.split([10, 38]), strict=True):
        alone = solve(rows, gram, INT4)
        assert (part.dequantize() - alone.dequantize()).abs().gt(1e-3).float().mean() < 0.01
        assert part.codes.shape == rows.shape


TERMS: list[dict[str, Any]] = [
    {"foem_beta": 0.2},
    {"gptaq_alpha": 0.25},
    {"mismatch": 0.5},
    {"stream_change": 0.5},
    {"desc_act": True},
    {"scale_candidates": 8},
    {"sweeps": 1},
]


@pytest.mark.parametrize("options", [{}, *TERMS])
def test_rows_are_solved_in_chunks(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    weights, gram = problem()
    whole = solve(weights, gram, INT4, **options).dequantize()
    monkeypatch.setattr("hlwq.solvers.gptq.SOLVED_WEIGHTS", 10 * weights.shape[1])
    parts = solve(weights, gram, INT4, **options).dequantize()
    assert whole.shape == parts.shape
    assert ((whole - parts).abs() < 1e-3).all(1).float().mean() > 0.9  # a tie may round differently


def test_calibrated_hlwq_beats_data_free_hlwq_and_its_error_is_the_same_in_either_basis() -> None:
    weights, gram = problem(width=256)
    grid = LloydGrid(4, 64)
    rounded = output_error(weights - nearest(weights, grid, ROTATED).dequantize(), gram.hessian)
    assert loss(weights, gram, grid, ROTATED) < 0.5 * rounded
    # A rotation of the inputs' columns is the identity basis seen from elsewhere.
    rotated = Gram(rotate_blocks(rotate_blocks(gram.hessian, 64).T, 64).T)
    assert loss(rotate_blocks(weights, 64), rotated, grid) == pytest.approx(
        loss(weights, gram, grid, ROTATED), rel=0.02
    )


@pytest.mark.parametrize("options", [*TERMS, {"damping": 0.1}])
def test_each_option_changes_the_result(options: dict[str, Any]) -> None:
    weights, gram = problem()
    plain = solve(weights, gram, INT4)
    other = solve(weights, gram, INT4, **options)
    assert not torch.equal(plain.dequantize(), other.dequantize())


@pytest.mark.parametrize("option", ["gptaq_alpha", "mismatch"])
@pytest.mark.parametrize("basis", [PLAIN, ROTATED], ids=["plain", "rotated"])
def test_the_difference_of_the_inputs_is_made_up_for(option: str, basis: Basis) -> None:
    """The target is the original model's output: W X̃, not W X."""
    inputs, generator = correlated_inputs(128), torch.Generator().manual_seed(7)
    originals = inputs @ (torch.eye(128) + 0.02 * torch.randn(128, 128, generator=generator))
    gram = Gram(inputs.T @ inputs, (originals - inputs).T @ inputs)
    weights = torch.randn(32, 128, generator=generator)

    def distance(share: float) -> float:
        decoded = solve(weights, gram, UniformGrid(8, 32), basis, **{option: share}).dequantize()
        return float((inputs @ decoded.T - originals @ weights.T).square().sum())

    assert distance(1.0) < 0.6 * distance(0.0)


@pytest.mark.parametrize("basis", [PLAIN, ROTATED], ids=["plain", "rotated"])
def test_the_change_of_the_stream_is_made_up_for(basis: Basis) -> None:
    """The target is what stands after the addition: W X + R̃ − R, R having gone its own way."""
    inputs, generator = correlated_inputs(128), torch.Generator().manual_seed(8)
    change = inputs @ torch.randn(128, 32, generator=generator) * 0.05
    gram = Gram(inputs.T @ inputs, torch.zeros(128, 128), change.T @ inputs)
    weights = torch.randn(32, 128, generator=generator)

    def distance(share: float) -> float:
        decoded = solve(weights, gram, UniformGrid(8, 32), basis, stream_change=share).dequantize()
        return float((inputs @ (decoded - weights).T - change).square().sum())

    assert distance(1.0) < 0.1 * distance(0.0)
    assert distance(0.5) < 0.5 * distance(0.0)


def test_desc_act_groups_columns_of_like_importance() -> None:
    weights, gram = problem()
    matrix = solve(weights, gram, INT4, desc_act=True)
    assert matrix.group_of_column is not None
    assert matrix.group_of_column.bincount().tolist() == [32] * 4
    diagonal = gram.hessian.diagonal()
    for group in range(3):
        ahead, behind = (diagonal[matrix.group_of_column == each].mean() for each in (group, group + 1))
        assert ahead > behind


def test_columns_that_were_never_active_are_rounded_to_nearest() -> None:
    inputs = correlated_inputs(64)
    inputs[:, [3, 40]] = 0
    weights = torch.randn(16, 64)
    matrix = solve(weights, Gram(inputs.T @ inputs), UniformGrid(8, 32))
    difference = (matrix.dequantize() - weights)[:, [3, 40]].abs()
    step = matrix.parameters.scale.abs()
    assert (difference <= step * 1.01).all()


def test_a_singular_hessian_is_damped_until_it_can_be_factored() -> None:
    direction = torch.ones(1, 64) * 1e3
    gram = Gram(direction.T @ direction - 30 * torch.eye(64))
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(gram.hessian)
    assert torch.isfinite(solve(torch.randn(8, 64), gram, INT4, damping=1e-6).dequantize()).all()


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        solve(torch.randn(8, 64), Gram(torch.full((64, 64), float("nan"))), INT4)


def test_inputs_that_are_all_zero_leave_rounding_to_nearest() -> None:
    weights = torch.randn(8, 64)
    matrix = solve(weights, Gram(torch.zeros(64, 64)), UniformGrid(8, 32))
    assert (matrix.dequantize() - weights).abs().max() < 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"foem_beta": 1.5},
        {"gptaq_alpha": -0.1},
        {"mismatch": 2.0},
        {"stream_change": 1.5},
        {"damping": 0.0},
        {"scale_candidates": 0},
        {"scale_candidates": 9},
        {"sweeps": -1},
    ],
)
def test_terms_out_of_range_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(RequestError, match="must be between") as refused:
        Gptq(**options)
    assert refused.value.argument == name


def test_the_difference_is_made_up_for_once() -> None:
    with pytest.raises(RequestError, match="the same difference twice"):
        Gptq(mismatch=0.5, gptaq_alpha=0.1)


def test_sweeps_would_undo_gptaq() -> None:
    with pytest.raises(RequestError, match="undo what `gptaq_alpha` does") as refused:
        Gptq(gptaq_alpha=0.25, sweeps=1)
    assert refused.value.argument == "sweeps"


@every_grid
def test_more_scales_and_sweeps_leave_less(grid: Grid, basis: Basis) -> None:
    weights, gram = problem(width=256)
    plain, tried, swept = (
        loss(weights, gram, grid, basis, scale_candidates=candidates, sweeps=sweeps)
        for candidates, sweeps in ((1, 0), (8, 0), (8, 2))
    )
    assert swept < tried < plain


@every_grid
@pytest.mark.parametrize("desc_act", [False, True])
def test_no_sweep_raises_the_loss(grid: Grid, basis: Basis, desc_act: bool) -> None:
    """The damped loss, which they go by; the weights that they go for are the given ones, for want of other moments."""
    weights, gram = problem(width=256)
    damped = gram.hessian + 0.01 * gram.hessian.diagonal().mean() * torch.eye(256)
    losses = []
    for sweeps in range(4):
        matrix = solve(weights, gram, grid, basis, desc_act=desc_act, sweeps=sweeps)
        losses.append(output_error(weights - matrix.dequantize(), damped))
    assert all(later < before for before, later in pairwise(losses[:3]))
    assert losses[3] <= losses[2] * (1 + 1e-6)


def test_after_many_sweeps_no_single_code_or_scale_is_better() -> None:
    weights, gram = problem(rows=4, width=64)
    grid = replace(INT4, storage=())
    matrix = solve(weights, gram, grid, sweeps=60)
    damped = (gram.hessian + 0.01 * gram.hessian.diagonal().mean() * torch.eye(64)).double()

    def rows_loss(decoded: Tensor) -> Tensor:
        error = (decoded - weights).double()
        return ((error @ damped) * error).sum(1)

    best = rows_loss(matrix.dequantize())
    for column in range(64):
        for step in (-1, 1):
            codes = matrix.codes.to(torch.int16)
            codes[:, column] = (codes[:, column] + step).clamp(0, 15)
            assert (rows_loss(replace(matrix, codes=codes.to(torch.uint8)).dequantize()) > best * (1 - 1e-5)).all()
    for group in range(2):
        for factor in (0.999, 1.001):
            scale = torch.ones(2).index_fill(0, torch.tensor(group), factor)
            other = replace(matrix, parameters=matrix.parameters.apply(lambda values, scale=scale: values * scale))
            assert (rows_loss(other.dequantize()) > best * (1 - 1e-5)).all()


def test_inverse_factor_is_the_upper_factor_of_the_damped_inverse() -> None:
    hessian = problem()[1].hessian.double()
    factor, damping = inverse_factor(hessian.float(), torch.arange(len(hessian)), 0.01)
    assert damping == 0.01
    assert torch.equal(factor, factor.triu())
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    whole = torch.eye(len(hessian), dtype=torch.float64)
    assert torch.allclose(factor.double().T @ factor.double() @ damped, whole, atol=1e-4)


def test_output_error_is_that_of_the_outputs() -> None:
    inputs, difference = correlated_inputs(32), torch.randn(5, 32)
    expected = float((inputs @ difference.T).double().square().sum())
    assert output_error(difference, inputs.T @ inputs) == pytest.approx(expected, rel=1e-4)


def test_output_error_of_many_rows_is_estimated_from_some() -> None:
    difference, hessian = torch.randn(5000, 32), problem(width=32)[1].hessian
    exact = sum(output_error(rows, hessian) for rows in difference.split(1000))
    assert output_error(difference, hessian) == pytest.approx(exact, rel=0.1)


def weighted_error(grid: Grid, groups: Tensor, importance: Tensor, parameters: Parameters) -> Tensor:
    decoded = grid.decode(grid.round(groups, parameters), parameters)
    return ((decoded - groups).square() * importance).sum(-1)


@every_grid
@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_weighted_fit_is_never_worse_than_the_range(grid: Grid, basis: Basis, kind: str) -> None:
    groups = groups_of(kind, (200, 32))
    importance = torch.rand(32, generator=torch.Generator().manual_seed(1)) ** 4
    fitted = weighted_error(grid, groups, importance, fit_weighted(grid, groups, importance))
    start = next(iter(grid.candidates(groups)))
    assert (fitted <= weighted_error(grid, groups, importance, start) * (1 + 1e-5)).all()
    if kind == "gaussian":
        assert fitted.sum() < 0.85 * weighted_error(grid, groups, importance, grid.fit(groups)).sum()


@every_grid
def test_weighted_parameters_fit_the_file(grid: Grid, basis: Basis) -> None:
    both = replace(grid, storage=(torch.bfloat16, torch.float16))
    groups = torch.cat([groups_of("gaussian", (50, 32)), torch.zeros(1, 32)])
    parameters = fit_weighted(both, groups, torch.ones(32))
    for values in filter(lambda each: each is not None, (parameters.scale, parameters.bias)):
        assert values is not None
        if values is parameters.scale or not getattr(grid, "integer_zero", True):
            assert torch.equal(values, values.bfloat16().half().float())
    assert (both.decode(both.round(groups, parameters), parameters)[-1] == 0).all()
    if getattr(grid, "symmetric", False):
        assert parameters.bias is not None
        assert torch.equal(parameters.bias, -8 * parameters.scale)


def test_importance_decides() -> None:
    groups = groups_of("gaussian", (100, 32))
    focus = torch.full((32,), 1e-3)
    focus[5] = 1.0
    for grid, _ in GRIDS.values():
        parameters = fit_weighted(grid, groups, focus)
        error = (grid.decode(grid.round(groups, parameters), parameters) - groups).square()[:, 5].sum()
        plain = fit_weighted(grid, groups, torch.ones(32))
        assert error < 0.7 * (grid.decode(grid.round(groups, plain), plain) - groups).square()[:, 5].sum()
