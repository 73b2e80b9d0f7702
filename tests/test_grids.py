from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hlwq import Hadamard, Identity, Nearest, UnsupportedError
from hlwq.bases import Basis
from hlwq.grids import Grid, LloydGrid, Parameters, UniformGrid, fit_weighted, round_to_storage
from hlwq.hadamard import rotate_blocks
from hlwq.lloyd import codebook
from hlwq.matrix import QuantizedMatrix

PLAIN, ROTATED = Identity(), Hadamard()
BOTH = (torch.bfloat16, torch.float16)
GRIDS: dict[str, tuple[Grid, Basis]] = {
    "signed": (UniformGrid(4, 32), PLAIN),
    "absmax": (UniformGrid(4, 32, scale_method="absmax"), PLAIN),
    "integer zero": (UniformGrid(4, 32, symmetric=False), PLAIN),
    "any bias": (UniformGrid(4, 32, symmetric=False, integer_zero=False), PLAIN),
    "lloyd": (LloydGrid(4, 32), ROTATED),
    "lloyd, plain norm": (LloydGrid(4, 32, least_squares=False), ROTATED),
}
every_grid = pytest.mark.parametrize(("grid", "basis"), GRIDS.values(), ids=GRIDS.keys())
# Each shape is one that some grid finds hard; the numbers are multiplied with the groups' random spread.
GROUP_KINDS = ("gaussian", "heavy tails", "positive", "negative", "one weight", "constant")


def groups_of(kind: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.rand((*shape[:-1], 1), generator=generator)
    if kind == "heavy tails":
        return values**3
    if kind in ("positive", "negative"):
        return (values.abs() + 0.01) * (1 if kind == "positive" else -1)
    if kind == "one weight":
        return torch.where(values.abs() == values.abs().amax(-1, keepdim=True), values, 0)
    if kind == "constant":
        return values[..., :1].expand(shape).clone()
    return values


def nearest(weights: Tensor, grid: Grid, basis: Basis = PLAIN) -> QuantizedMatrix:
    return Nearest().solve(weights, grid, basis.fitted(weights.shape[-1], grid.group_size))


def relative_error(weights: Tensor, grid: Grid, basis: Basis = PLAIN) -> float:
    decoded = nearest(weights, grid, basis).dequantize()
    return float((decoded - weights).double().square().sum() / weights.double().square().sum())


@pytest.mark.parametrize("basis", [PLAIN, ROTATED])
@pytest.mark.parametrize("bits", range(2, 9))
def test_error_on_gaussian_weights_is_the_theoretical_one(bits: int, basis: Basis) -> None:
    weights = 0.02 * torch.randn(512, 1024, generator=torch.Generator().manual_seed(bits))
    error = relative_error(weights, LloydGrid(bits, 128), basis)
    assert 0.9 * codebook(bits).mse < error < 1.02 * codebook(bits).mse


@pytest.mark.parametrize("kind", GROUP_KINDS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_least_squares_norm_is_never_worse_than_the_plain_one(bits: int, kind: str) -> None:
    groups = groups_of(kind, (200, 64), bits)
    exact = LloydGrid(bits, 64, storage=(torch.float32,))

    def errors(grid: LloydGrid) -> Tensor:
        parameters = grid.fit(groups)
        return (grid.decode(grid.round(groups, parameters), parameters) - groups).double().square().sum(-1)

    fitted, plain = errors(exact), errors(replace(exact, least_squares=False))
    assert (fitted <= plain * (1 + 1e-5) + 1e-12 * groups.double().square().sum(-1)).all()
    assert fitted.sum() < plain.sum()


AFFINE = UniformGrid(4, 32, symmetric=False, integer_zero=False)
FITTING: dict[str, Grid] = {
    **{name: grid for name, (grid, _) in GRIDS.items()},
    "integer zero, both": UniformGrid(4, 32, symmetric=False, storage=BOTH),
    "any bias, bfloat16": replace(AFFINE, storage=(torch.bfloat16,)),
}
LLOYD_IS_WORSE = pytest.mark.xfail(strict=True, reason="what LloydGrid fits alone is none of its candidates")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "grid",
    [pytest.param(grid, id=name, marks=LLOYD_IS_WORSE if name == "lloyd" else ()) for name, grid in FITTING.items()],
)
def test_a_weighted_fit_is_never_worse_than_the_grids_own(grid: Grid, bits: int) -> None:
    grid, generator = replace(grid, bits=bits), torch.Generator().manual_seed(bits)
    for kind in GROUP_KINDS:
        groups = groups_of(kind, (500, 32), bits)
        for importance in (
            torch.ones(32),
            torch.rand(32, generator=generator) ** 4 + 1e-3,
            torch.rand(groups.shape, generator=generator) + 0.01,
        ):
            own, weighted = (
                (grid.decode(grid.round(groups, each), each) - groups).double().square().mul(importance).sum(-1)
                for each in (grid.fit(groups), fit_weighted(grid, groups, importance))
            )
            slack = 1e-14 * groups.double().square().sum(-1)  # where both are exact but for rounding
            assert (weighted <= own * (1 + 1e-5) + slack).all(), kind


@every_grid
@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_each_weight_gets_the_nearest_level(grid: Grid, basis: Basis, kind: str) -> None:
    groups = groups_of(kind, (8, 32))
    parameters = grid.fit(groups)
    levels = torch.stack(
        [grid.decode(torch.full((8, 32), code, dtype=torch.uint8), parameters) for code in range(2**grid.bits)]
    )
    chosen = grid.decode(grid.round(groups, parameters), parameters)
    least = (levels - groups).abs().amin(0)
    torch.testing.assert_close((chosen - groups).abs(), least, rtol=1e-5, atol=1e-6)


@every_grid
def test_a_zero_block_decodes_to_exact_zeros(grid: Grid, basis: Basis) -> None:
    weights = groups_of("gaussian", (4, 96))
    weights[:, 32:64] = 0
    decoded = nearest(weights, grid, basis).dequantize()
    assert (decoded[:, 32:64] == 0).all()
    assert (decoded[:, :32] != 0).any()


@every_grid
@pytest.mark.parametrize("magnitude", [1e-7, 1e-9, 1e-20, 1e-30, 1e-42])
def test_tiny_rows_are_flushed_without_nan(grid: Grid, basis: Basis, magnitude: float) -> None:
    weights = torch.cat([magnitude * groups_of("gaussian", (4, 64)), magnitude * groups_of("positive", (4, 64))])
    matrix = nearest(weights, grid, basis)
    decoded = matrix.dequantize()
    assert torch.isfinite(decoded).all()
    assert torch.isfinite(matrix.parameters.scale).all()
    assert (decoded.abs() <= max(16 * magnitude, 1e-6)).all()


@every_grid
@pytest.mark.parametrize("magnitude", [3e6, 1e12, 1e20, 1e30])
@pytest.mark.parametrize("group", [torch.linspace(-1, 1, 32), torch.eye(32)[1]], ids=["ramp", "one weight"])
def test_parameters_beyond_float16_are_refused(grid: Grid, basis: Basis, magnitude: float, group: Tensor) -> None:
    weights = torch.zeros(3, 64)
    weights[1, 32:] = magnitude * group
    with pytest.raises(UnsupportedError, match="exceeds 65504"):
        nearest(weights, grid, basis)


@pytest.mark.parametrize("storage", [(torch.bfloat16,), (torch.float32,)])
def test_wider_parameters_hold_what_float16_cannot(storage: tuple[torch.dtype, ...]) -> None:
    weights = 1e7 * groups_of("gaussian", (3, 64))
    assert relative_error(weights, UniformGrid(8, 32, storage=storage)) < 1e-4
    assert relative_error(weights, LloydGrid(8, 32, storage=storage)) < 1e-4


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("storage", [(torch.float16,), BOTH])
def test_signed_full_range_keeps_the_largest_weight_of_a_group_exactly(
    bits: int, storage: tuple[torch.dtype, ...]
) -> None:
    weights = (0.05 * groups_of("heavy tails", (64, 128), bits) + 1e-3).bfloat16().float()
    matrix = nearest(weights, UniformGrid(bits, 32, storage=storage))
    largest = weights.unflatten(-1, (-1, 32)).abs().argmax(-1, keepdim=True)
    before, after = (each.unflatten(-1, (-1, 32)).gather(-1, largest) for each in (weights, matrix.dequantize()))
    assert torch.equal(before, after)
    assert (before < 0).any()
    assert (before > 0).any()


def test_absmax_gives_the_largest_weight_the_outermost_code_of_its_sign() -> None:
    weights = groups_of("gaussian", (64, 32))
    codes = nearest(weights, UniformGrid(4, 32, scale_method="absmax")).codes
    largest = weights.abs().argmax(-1, keepdim=True)
    expected = torch.where(weights.gather(-1, largest) > 0, 15, 1)
    assert torch.equal(codes.gather(-1, largest).long(), expected)
    assert int(codes.min()) == 1


@pytest.mark.parametrize("magnitude", [1, 1e-6])  # the smaller one makes scales subnormal, which rounds them coarsely
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_integer_zeros_are_codes(kind: str, bits: int, magnitude: float) -> None:
    weights = 2**bits * magnitude * groups_of(kind, (64, 128))
    parameters = nearest(weights, UniformGrid(bits, 32, symmetric=False, storage=BOTH)).parameters
    assert parameters.bias is not None
    used = parameters.scale > 0
    assert used.any()
    zeros = -parameters.bias[used] / parameters.scale[used]
    assert torch.equal(zeros, zeros.round())
    assert (zeros >= 0).all()
    assert (zeros <= 2**bits - 1).all()


@pytest.mark.parametrize(("integer_zero", "steps"), [(True, 0.5), (False, 1)])
@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_asymmetric_grids_cover_the_range_of_a_group(kind: str, integer_zero: bool, steps: float) -> None:
    weights = groups_of(kind, (64, 32))
    grid = UniformGrid(4, 32, symmetric=False, integer_zero=integer_zero, storage=(torch.float32,))
    matrix = nearest(weights, grid)
    assert ((matrix.dequantize() - weights).abs() <= steps * matrix.parameters.scale.abs() * (1 + 1e-4)).all()


@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "positive", "negative"])
def test_any_bias_makes_zero_a_level_and_keeps_the_larger_edge(kind: str) -> None:
    weights = groups_of(kind, (64, 32))
    matrix = nearest(weights, UniformGrid(4, 32, False, False, storage=(torch.float32,)))
    scale, bias = matrix.parameters.scale, matrix.parameters.bias
    assert bias is not None
    torch.testing.assert_close(bias / scale, (bias / scale).round(), rtol=0, atol=1e-4)
    largest = weights.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(matrix.dequantize().gather(-1, largest), weights.gather(-1, largest))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("magnitude", [1e-6, 1e-4, 1e-2, 1.0, 100.0])
def test_scales_stored_through_both_half_dtypes_are_equal_in_both(symmetric: bool, magnitude: float) -> None:
    weights = magnitude * groups_of("gaussian", (64, 128))
    scale = nearest(weights, UniformGrid(4, 32, symmetric, storage=BOTH)).parameters.scale
    assert torch.equal(scale.bfloat16().float(), scale)
    assert torch.equal(scale.half().float(), scale)


@given(st.lists(st.floats(-60000, 60000, width=32), min_size=1), st.sampled_from([BOTH, BOTH[::-1], BOTH[:1]]))
def test_rounding_to_storage_gives_values_that_its_dtypes_hold(
    values: list[float], storage: tuple[torch.dtype, ...]
) -> None:
    original = torch.tensor(values)
    rounded = round_to_storage(original, storage)
    assert all(torch.equal(rounded.to(dtype).float(), rounded) for dtype in storage)
    assert ((rounded - original).abs() <= original.abs() / 128 + 1e-7).all()


ASYMMETRIC = UniformGrid(4, 32, symmetric=False)
OPTIONS: list[tuple[Grid, dict[str, Any]]] = [
    (UniformGrid(4, 32), {"bits": 5}),
    (UniformGrid(4, 32), {"group_size": 64}),
    (UniformGrid(4, 32), {"symmetric": False}),
    (UniformGrid(4, 32), {"scale_method": "absmax"}),
    (UniformGrid(4, 32), {"storage": BOTH}),
    (ASYMMETRIC, {"integer_zero": False}),
    (LloydGrid(4, 32), {"bits": 5}),
    (LloydGrid(4, 32), {"group_size": 64}),
    (LloydGrid(4, 32), {"least_squares": False}),
    (LloydGrid(4, 32), {"storage": BOTH}),
]


@pytest.mark.parametrize(("grid", "option"), OPTIONS, ids=lambda each: str(each) if isinstance(each, dict) else None)
def test_each_option_changes_the_output(grid: Grid, option: dict[str, Any]) -> None:
    weights = groups_of("gaussian", (8, 128))
    changed = replace(grid, **option)
    assert not torch.equal(nearest(weights, changed).dequantize(), nearest(weights, grid).dequantize())


@every_grid
def test_the_basis_changes_the_output(grid: Grid, basis: Basis) -> None:
    weights = groups_of("gaussian", (8, 128))
    rotated, plain = (nearest(weights, grid, each).dequantize() for each in (ROTATED, PLAIN))
    assert not torch.equal(rotated, plain)


def test_rotation_helps_where_weights_have_outliers() -> None:
    weights = groups_of("heavy tails", (64, 256))
    grid = LloydGrid(4, 128)
    assert relative_error(weights, grid, ROTATED) < 0.7 * relative_error(weights, grid, PLAIN)


def test_signed_full_range_beats_absmax() -> None:
    weights = groups_of("gaussian", (64, 256))
    assert relative_error(weights, UniformGrid(4, 64)) < relative_error(
        weights, UniformGrid(4, 64, scale_method="absmax")
    )


@every_grid
def test_more_bits_mean_less_error(grid: Grid, basis: Basis) -> None:
    weights = groups_of("gaussian", (32, 128))
    errors = [relative_error(weights, replace(grid, bits=bits), basis) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 1000


@every_grid
def test_codes_parameters_and_decoded_weights_have_the_promised_shapes(grid: Grid, basis: Basis) -> None:
    matrix = nearest(groups_of("gaussian", (5, 96)), grid, basis)
    assert (matrix.codes.dtype, matrix.codes.shape) == (torch.uint8, (5, 96))
    assert matrix.parameters.scale.shape == (5, 3)
    assert matrix.parameters.bias is None or matrix.parameters.bias.shape == (5, 3)
    assert (matrix.dequantize().dtype, matrix.dequantize().shape) == (torch.float32, (5, 96))


def test_groups_do_not_depend_on_each_other() -> None:
    weights = groups_of("gaussian", (4, 128))
    changed = weights.clone()
    changed[2, 40] += 1
    before, after = (nearest(each, ASYMMETRIC).dequantize() for each in (weights, changed))
    touched = torch.zeros(4, 128, dtype=torch.bool)
    touched[2, 32:64] = True
    assert torch.equal(before[~touched], after[~touched])
    assert not torch.equal(before[touched], after[touched])


def test_decoding_is_scale_times_code_plus_bias() -> None:
    codes = torch.tensor([[0, 15, 3, 8], [1, 2, 3, 4]], dtype=torch.uint8)
    parameters = Parameters(torch.tensor([[0.5, -0.25], [2, 1]]), torch.tensor([[-4.0, 2], [0, -8]]))
    matrix = QuantizedMatrix(codes, parameters, UniformGrid(4, 2))
    assert matrix.dequantize().tolist() == [[-4, 3.5, 1.25, 0], [2, 4, -5, -4]]


def test_decoding_lloyd_codes_scales_centroids_by_the_norm_and_rotates_back() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 3, 2, 1, 0]], dtype=torch.uint8)
    norms = torch.tensor([[2.0, 3]])
    levels = codebook(2).centroids[codes.long()] * torch.tensor([[2.0] * 4 + [3.0] * 4]) / 2
    plain = QuantizedMatrix(codes, Parameters(norms), LloydGrid(2, 4))
    torch.testing.assert_close(plain.dequantize(), levels)
    torch.testing.assert_close(replace(plain, basis=Hadamard(4)).dequantize(), rotate_blocks(levels, 4))
