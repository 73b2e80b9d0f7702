"""GPTQ, with FOEM and GPTAQ as terms of the same loop: round column by column, make up for each error in the rest.

Everything is in the coordinates that are rounded: in the `hadamard` basis both the weights and the Hessian are rotated
first, W' = W R and H' = Rᵀ H R, which leaves ‖(W − Ŵ) X‖ as it was since R is orthogonal. With a `LloydGrid` that is
calibrated HLWQ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hlwq.errors import HlwqError
from hlwq.grids import Basis, Grid, Parameters, QuantizedMatrix, fit_weighted
from hlwq.hadamard import rotate_blocks

SOLVED_WEIGHTS = 1 << 23
"""Of how many weights rows are solved at once on a CPU."""
ERROR_ROWS = 2048
DAMPING_TRIES = 6
"""How often damping is raised tenfold before a Hessian is given up."""


@dataclass(frozen=True)
class GptqOptions:
    """What the loop does beyond plain GPTQ (Frantar et al., arXiv 2210.17323).

    Attributes:
        foem_beta: β of FOEM (arXiv 2507.11017): how far each column is drawn back to its original weights before it is
            rounded, and how much of its drift is left out of the error that is passed on. 0 is plain GPTQ.
        gptaq_alpha: α of GPTAQ (arXiv 2504.02692): how much of the difference between the inputs of the original model
            and those of the quantized prefix is made up for. 0 leaves it out.
        desc_act: form the groups of columns of similar importance, wherever those stand in the matrix. Otherwise
            groups are runs of neighbouring columns, taken in the order of their importance.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
    """

    foem_beta: float = 0.0
    gptaq_alpha: float = 0.0
    desc_act: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        for name, low, high in (("foem_beta", 0, 1), ("gptaq_alpha", 0, 1), ("damping", 1e-6, 1)):
            if not low <= getattr(self, name) <= high:
                option = name.replace("_", "-")
                raise HlwqError(f"--{option} {getattr(self, name)} must be between {low:g} and {high:g}.")


@dataclass
class Gram:
    """Second moments of a linear layer's inputs, summed over tokens.

    Attributes:
        hessian: XᵀX, float32 (in, in), X being the inputs (tokens, in) that the quantized prefix gives.
        cross: (X̃ − X)ᵀX, float32 (in, in), X̃ being those of the original model; None unless GPTAQ wants it.
    """

    hessian: Tensor
    cross: Tensor | None = None


def quantize_gptq(
    weights: Tensor, gram: Gram, grid: Grid, basis: Basis = "identity", options: GptqOptions | None = None
) -> QuantizedMatrix:
    """Quantize a matrix so that its outputs on the calibration data change least.

    Rows are independent given the Hessian: matrices that share an input can be stacked and solved at once.

    Args:
        weights: float32 (out, in); `in` a multiple of `grid.group_size`.
        gram: of the inputs, on the same device.
        grid: what a group can be rounded to. Its parameters are fitted when the loop reaches the group, by the squared
            errors that later columns cannot make up for.
        basis: the coordinates to round in.
        options: the loop's terms.

    Raises:
        HlwqError: the Hessian stays singular whatever the damping, or a group's parameters overflow.
    """
    options = options or GptqOptions()
    size = grid.group_size
    hessian, cross = gram.hessian, gram.cross if options.gptaq_alpha else None
    if basis == "hadamard":
        hessian = _rotate_both_sides(hessian, size)
        cross = None if cross is None else _rotate_both_sides(cross, size)
    order = _column_order(hessian.diagonal().contiguous(), size, options.desc_act)
    factor = inverse_factor(hessian, order, options.damping)
    del hessian
    owed = None
    if cross is not None:  # GPTAQ, eq. 18
        owed = options.gptaq_alpha * (cross[order][:, order] @ factor.T).triu_(1) @ factor
    problem = _Problem(grid, order, factor, owed, options.foem_beta)
    # A processor works best on what fits its cache; a GPU, on as much as there is.
    chunk = max(1, SOLVED_WEIGHTS // len(order)) if weights.device.type == "cpu" else len(weights)
    parts = [
        _solve_rows(rotate_blocks(rows, size) if basis == "hadamard" else rows, problem)
        for rows in weights.split(chunk)
    ]
    codes = torch.cat([codes for codes, _ in parts])
    scale = torch.cat([parameters.scale for _, parameters in parts])
    biases = [parameters.bias for _, parameters in parts if parameters.bias is not None]
    bias = torch.cat(biases) if biases else None
    place = order.argsort()
    if options.desc_act:
        return QuantizedMatrix(codes, Parameters(scale, bias), grid, basis, place // size)
    # The order keeps runs of columns whole: the run that starts at column c was solved as group place[c] // size.
    runs = place[::size] // size
    return QuantizedMatrix(codes, Parameters(scale[:, runs], None if bias is None else bias[:, runs]), grid, basis)


@dataclass(frozen=True)
class _Problem:
    """What all rows of a matrix have in common.

    Attributes:
        grid: what a group can be rounded to.
        order: in which columns are rounded, (in,).
        factor: of the inverse Hessian in that order, see `inverse_factor`.
        owed: GPTAQ's P in that order: what each column owes the later ones for the difference of its inputs.
        beta: FOEM's.
    """

    grid: Grid
    order: Tensor
    factor: Tensor
    owed: Tensor | None
    beta: float


def _solve_rows(weights: Tensor, problem: _Problem) -> tuple[Tensor, Parameters]:
    """Codes (rows, in), and the parameters of each group (rows, groups) in the order in which groups were solved."""
    size = problem.grid.group_size
    # Columns as rows, so that a column is contiguous.
    latent = weights.T[problem.order].contiguous()
    original = latent.clone() if problem.beta else latent
    codes = torch.empty(latent.shape, dtype=torch.uint8, device=weights.device)
    fitted: list[Parameters] = []
    # What the loss of a column's error is once the later columns have made up for it.
    importance = problem.factor.diagonal().square().reciprocal()
    for start in range(0, len(latent), size):
        group = slice(start, start + size)
        fitted.append(fit_weighted(problem.grid, latent[group].T.contiguous(), importance[group]))
        _solve_group(latent, original, codes, group, fitted[-1], problem)
    scale = torch.cat([parameters.scale for parameters in fitted], dim=1)
    biases = [parameters.bias for parameters in fitted if parameters.bias is not None]
    parameters = Parameters(scale, torch.cat(biases, dim=1) if biases else None)
    return codes[problem.order.argsort()].T.contiguous(), parameters


def _solve_group(
    latent: Tensor, original: Tensor, codes: Tensor, group: slice, parameters: Parameters, problem: _Problem
) -> None:
    """Round the columns of one group, passing each error on within it, and then all of them to the later columns.

    Algorithm 1 of GPTQ with the lazy batch as wide as the group. FOEM's terms are the two with β.
    """
    grid, factor, owed, beta = problem.grid, problem.factor, problem.owed, problem.beta
    stop = group.stop
    errors, rounded_from = torch.empty_like(latent[group]), torch.empty_like(latent[group])
    for i in range(group.start, stop):
        column = latent[i]
        if beta:
            column.lerp_(original[i], beta)
        chosen = grid.round(column[:, None], parameters)
        codes[i] = chosen[:, 0]
        error = column - grid.decode(chosen, parameters)[:, 0]
        if beta:
            error -= beta * (column - original[i])
        error /= factor[i, i]
        errors[i - group.start], rounded_from[i - group.start] = error, column
        later = latent[i + 1 : stop]
        later.addr_(factor[i, i + 1 : stop], error, alpha=-1)
        if owed is not None:
            later.addr_(owed[i, i + 1 : stop], column)
    latent[stop:] -= factor[group, stop:].T @ errors
    if owed is not None:
        latent[stop:] += owed[group, stop:].T @ rounded_from


def inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """The upper triangular U with UᵀU = (H + λ·mean(diag H)·I)⁻¹, by one Cholesky factorisation.

    With J the reversal of the order, JHJ = LLᵀ gives H = AAᵀ where A = JLJ is upper triangular, so U = A⁻¹ = JL⁻¹J.

    Args:
        hessian: float32 (n, n), symmetric, positive semidefinite. Columns that were never active (a zero diagonal)
            count as average ones without any correlation: they are rounded to nearest.
        order: int64 (n,), in which its columns are taken.
        damping: λ, raised tenfold as often as the factorisation fails.

    Raises:
        HlwqError: the Hessian is not finite, or the factorisation fails however large λ.
    """
    device = hessian.device
    if device.type == "mps":  # its Cholesky is young, and has been silently wrong
        hessian, order = hessian.cpu(), order.cpu()
    mean = hessian.diagonal().mean()
    if not torch.isfinite(mean):
        raise HlwqError("its inputs are not finite on the calibration data. Is the checkpoint damaged?")
    if mean == 0:
        return torch.eye(len(hessian), device=device)
    backwards = order.flip(0)
    idle = hessian.diagonal()[backwards] == 0
    for attempt in range(DAMPING_TRIES):
        damped = hessian[backwards[:, None], backwards]
        damped.diagonal().add_(damping * 10**attempt * mean)
        damped.diagonal()[idle] = mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # large models have Hessians of a gigabyte
        if not failed:
            identity = torch.eye(len(hessian), device=hessian.device)
            inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
            del lower, identity
            return inverse.flip(0, 1).to(device)
    raise HlwqError("the Hessian of its inputs is singular. Use more calibration samples.")


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """‖D X‖² over the calibration tokens, D (out, in) being a difference of weights: tr(D H Dᵀ).

    Of more than `ERROR_ROWS` rows so many, evenly spaced, stand for all: for large matrices all would cost more than
    the solver itself.
    """
    step = -(-len(difference) // ERROR_ROWS)
    rows = difference[::step]
    total = float(((rows @ hessian) * rows).sum(-1).cpu().sum(dtype=torch.float64))
    return total * len(difference) / len(rows)


def _column_order(importance: Tensor, group_size: int, desc_act: bool) -> Tensor:
    """Columns from the most important to the least; unless `desc_act`, groups stay whole and are ordered so too."""
    if desc_act:
        return importance.argsort(descending=True, stable=True)
    groups = importance.unflatten(0, (-1, group_size))
    within = groups.argsort(dim=1, descending=True, stable=True)
    within += group_size * torch.arange(len(groups), device=importance.device)[:, None]
    order: Tensor = within[groups.sum(1).argsort(descending=True, stable=True)]
    return order.flatten()


def _rotate_both_sides(matrix: Tensor, block_size: int) -> Tensor:
    return rotate_blocks(rotate_blocks(matrix, block_size).T, block_size).T
