"""GPTQ, with FOEM and GPTAQ as terms of the same loop: round column by column, make up for each error in the rest.

Everything is in the coordinates that are rounded: both the weights and the Hessian are rotated first, W' = W R and
H' = Rᵀ H R, which leaves ‖(W − Ŵ) X‖ as it was since R is orthogonal. With a `LloydGrid` in the Hadamard basis that is
calibrated HLWQ.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import ClassVar

import torch
from torch import Tensor

from hlwq.bases import Basis
from hlwq.errors import CheckpointError, RequestError, UnsupportedError
from hlwq.grids import Grid, Parameters, fit_weighted
from hlwq.matrix import QuantizedMatrix
from hlwq.options import check_types, option
from hlwq.solvers.base import INPUTS, ORIGINAL_INPUTS, STREAM, Gram
from hlwq.solvers.sweeps import Run, swept

SOLVED_WEIGHTS = 1 << 23
"""Weights per chunk of rows solved together on a CPU."""
DAMPING_TRIES = 6
"""Factorisations tried, each with ten times the damping, before a Hessian is given up."""
SCALE_FACTORS = (1.0, 0.97, 1.03, 0.94, 1.06, 0.9, 1.1, 0.86)
"""What the scales that `fit_weighted` finds are multiplied by: each number of candidates takes the first ones."""


@dataclass(frozen=True)
class Gptq:
    """GPTQ's loop (Frantar et al., arXiv 2210.17323) and its relatives' terms.

    Attributes:
        foem_beta: β of FOEM (arXiv 2507.11017): how far each column is drawn back to its original weights before it is
            rounded, and how much of its drift is left out of the error that is passed on. 0 is plain GPTQ.
        gptaq_alpha: α of GPTAQ (arXiv 2504.02692): how much of the difference between the inputs of the original model
            and those of the quantized prefix is made up for. 0 leaves it out.
        mismatch: how much of the same difference is made up for before the loop, by weights that predict the original
            outputs from the new inputs: W + mismatch · W D (H + λI)⁻¹ with D = (X̃ − X)ᵀX. 1 is the least-squares
            prediction (Qronos, arXiv 2505.11695), whose outputs vary less than the original's; with 0.5 they vary as
            much, to first order. 0 leaves it out.
        stream_change: the same for how the hidden states that the outputs are added to differ from the original
            model's: stream_change · S (H + λI)⁻¹ with S = (R̃ − R)ᵀX is added to the weights before the loop.
        desc_act: form the groups of columns of similar importance, wherever those stand in the matrix. Otherwise
            groups are runs of neighbouring columns, taken in the order of their importance.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
        scale_candidates: scales that each group is solved with, of which the one with the least loss stays. 1 takes the
            scale that rounding to nearest would prefer.
        sweeps: times that all scales and codes are gone through again after the loop; see `swept`.
    """

    name: ClassVar[str] = "gptq"
    title: ClassVar[str] = "GPTQ's loop, columns in the order of their importance inside fixed groups"
    reference: ClassVar[str] = "GPTQ: Frantar et al., arXiv 2210.17323"
    foem_beta: float = option(
        "FOEM's β: 0 to 1, 0.2 in foem and hlwq-v7.", default=0.0, reference="FOEM: Zheng et al., arXiv 2507.11017"
    )
    gptaq_alpha: float = option(
        "GPTAQ's α: 0 to 1; 0.25 in calibrated rtn and hlwq.",
        default=0.0,
        reference="GPTAQ: Li et al., arXiv 2504.02692",
    )
    mismatch: float = option(
        "Share of the change of inputs made up for before the loop: 0 to 1.",
        default=0.0,
        reference="Qronos: Zhang et al., arXiv 2505.11695",
    )
    stream_change: float = option(
        "Share of the residual stream's change made up for by the matrices that write into it: 0 to 1.",
        default=0.0,
        reference="LoaQ: Lin & Wan, arXiv 2509.06297",
    )
    desc_act: bool = option("Groups by importance of columns. vLLM refuses it; GPTQModel does not.", default=False)
    damping: float = option("Share of its mean added to the Hessian's diagonal.", default=0.01)
    scale_candidates: int = option(
        f"Scales that each group is solved with, to keep the best: 1 to {len(SCALE_FACTORS)}.", default=1
    )
    sweeps: int = option("Times that scales and codes are improved in turn after the loop.", default=0)

    def __post_init__(self) -> None:
        check_types(self)
        shares = ("foem_beta", "gptaq_alpha", "mismatch", "stream_change")
        for name, low, high in (*((share, 0, 1) for share in shares), ("damping", 1e-6, 1)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise RequestError(f"`{name}` {value} must be between {low:g} and {high:g}.")
        for name, least, most in (("scale_candidates", 1, len(SCALE_FACTORS)), ("sweeps", 0, 100)):
            if not least <= getattr(self, name) <= most:
                raise RequestError(f"`{name}` {getattr(self, name)} must be between {least} and {most}.")
        if self.gptaq_alpha and self.sweeps:
            message = "`sweeps` would undo what `gptaq_alpha` does. Set one of them to 0, or use `mismatch`."
            raise RequestError(message, argument="sweeps")
        if self.gptaq_alpha and self.mismatch:
            message = "`gptaq_alpha` and `mismatch` make up for the same difference twice. Set one of them to 0."
            raise RequestError(message, argument="mismatch")

    @property
    def needs(self) -> frozenset[str]:
        """The inputs, and where changes are made up for, what the original model has instead."""
        needs = {INPUTS}
        if self.gptaq_alpha or self.mismatch or self.stream_change:
            needs.add(ORIGINAL_INPUTS)
        if self.stream_change:
            needs.add(STREAM)
        return frozenset(needs)

    @property
    def scatters_groups(self) -> bool:
        """As `desc_act` says."""
        return self.desc_act

    def without_originals(self) -> Gptq:
        """The solver that makes up for nothing but its own errors."""
        return replace(self, gptaq_alpha=0.0, mismatch=0.0, stream_change=0.0)

    def memory(self, rows: int, columns: int) -> int:
        """Float32 of the Hessian, its damped copy, factor and inverse; of the weights, what they become, and errors."""
        return 4 * columns * (5 * columns + (9 if self.sweeps else 6) * rows)

    def solve(self, weights: Tensor, grid: Grid, basis: Basis, gram: Gram | None = None) -> QuantizedMatrix:
        """Quantize a matrix so that its outputs on the calibration data change least.

        Rows are independent given the Hessian: matrices that share an input can be stacked and solved at once.

        Args:
            weights: float32 (out, in); `in` a multiple of `grid.fit_columns`.
            grid: what a run can be rounded to. Its parameters are fitted when the loop reaches the run, by the squared
                errors that later columns cannot make up for.
            basis: the coordinates to round in.
            gram: moments of the inputs, on the same device.

        Raises:
            CheckpointError: the Hessian stays singular whatever the damping.
            UnsupportedError: a group's parameters overflow the grid's storage dtype.
        """
        if gram is None:
            raise ValueError("GPTQ needs the moments of the inputs.")
        run = grid.fit_columns
        if self.desc_act and run != grid.group_size:
            raise RequestError("`desc_act` needs a grid whose groups are fitted one by one.")
        hessian = _rotate_both_sides(gram.hessian, basis)
        order = _column_order(hessian.diagonal().contiguous(), run, self.desc_act)
        factor, damping = inverse_factor(hessian, order, self.damping)
        damped = damped_hessian(hessian, order, damping) if self.sweeps else None
        del hessian
        correction = None
        if gram.cross is not None and self.gptaq_alpha:  # GPTAQ, eq. 18
            cross = _rotate_both_sides(gram.cross, basis)[order][:, order]
            correction = self.gptaq_alpha * (cross @ factor.T).triu_(1) @ factor
        rotated = self._with_changes_made_up_for(basis.rotate(weights), gram, basis, order, factor)
        problem = _Problem(self, grid, order, factor, damped, correction)
        # A processor works best on what fits its cache; a GPU, on as much as there is.
        chunk = max(1, SOLVED_WEIGHTS // len(order)) if weights.device.type == "cpu" else len(weights)
        parts = [_solve_rows(rows, problem) for rows in rotated.split(chunk)]
        codes = torch.cat([codes for codes, _ in parts])
        parameters = Parameters.joined([parameters for _, parameters in parts], 0)
        place = order.argsort()
        if self.desc_act:
            return QuantizedMatrix(codes, parameters, grid, basis, place // grid.group_size)
        # The order keeps runs of columns whole: the run that starts at column c was solved as number place[c] // run.
        # A run solved as number n left its groups' parameters at n·k … n·k + k − 1.
        groups = run // grid.group_size
        solved = place[::run] // run * groups
        columns = (solved[:, None] + torch.arange(groups, device=solved.device)).flatten()
        return QuantizedMatrix(codes, parameters.apply(lambda values: values[:, columns]), grid, basis)

    def _with_changes_made_up_for(
        self, rotated: Tensor, gram: Gram, basis: Basis, order: Tensor, factor: Tensor
    ) -> Tensor:
        """W + (mismatch · W D + stream_change · S) (H + λI)⁻¹, all in rotated coordinates."""
        if not (self.mismatch or self.stream_change):
            return rotated
        owed = torch.zeros_like(rotated)
        if gram.cross is not None and self.mismatch:
            owed += self.mismatch * rotated @ _rotate_both_sides(gram.cross, basis)
        if gram.stream is not None and self.stream_change:
            owed += self.stream_change * basis.rotate(gram.stream)
        return rotated + (owed[:, order] @ factor.T @ factor)[:, order.argsort()]


@dataclass(frozen=True)
class _Problem:
    """What all rows of a matrix have in common.

    Attributes:
        options: the solver.
        grid: what a run can be rounded to.
        order: the order in which columns are rounded, (in,).
        factor: factor of the inverse Hessian in that order, see `inverse_factor`.
        hessian: the damped Hessian itself in that order; None unless `sweeps` need it.
        correction: GPTAQ's P in that order: what each column adds to the later ones for the difference of its inputs.
    """

    options: Gptq
    grid: Grid
    order: Tensor
    factor: Tensor
    hessian: Tensor | None
    correction: Tensor | None


def _solve_rows(weights: Tensor, problem: _Problem) -> tuple[Tensor, Parameters]:
    """Codes (rows, in), and the parameters of each group (rows, groups) in the order in which runs were solved."""
    # Columns as rows, so that a column is contiguous.
    latent = weights.T[problem.order].contiguous()
    original = latent.clone() if problem.options.foem_beta or problem.options.sweeps else latent
    codes = torch.empty(latent.shape, dtype=torch.uint8, device=weights.device)
    # What the loss of a column's error is once the later columns have made up for it.
    importance = problem.factor.diagonal().square().reciprocal()
    runs = []
    for start in range(0, len(latent), problem.grid.fit_columns):
        columns = slice(start, start + problem.grid.fit_columns)
        # Groups inside a run are of neighbours: the fit is given the columns as they stand, not as they are taken.
        several = problem.grid.fit_columns > problem.grid.group_size
        place = problem.order[columns] % problem.grid.fit_columns if several else None
        standing = slice(None) if place is None else place.argsort()
        weights = latent[columns][standing].T.contiguous()
        run = Run(columns, place, fit_weighted(problem.grid, weights, importance[columns][standing]))
        runs.append(replace(run, parameters=_solve_run(latent, original, codes, run, problem)))
    if problem.hessian is not None:
        for _ in range(problem.options.sweeps):
            runs = swept(original, codes, runs, problem.grid, problem.hessian)
    fitted = Parameters.joined([run.parameters for run in runs], 1)
    return codes[problem.order.argsort()].T.contiguous(), fitted


def _solve_run(latent: Tensor, original: Tensor, codes: Tensor, run: Run, problem: _Problem) -> Parameters:
    """Round the columns of one run, passing each error on within it, and then all of them to the later columns.

    Algorithm 1 of GPTQ with the lazy batch as wide as the run, done at once for several multiples of the scales, of
    which each row keeps the one with the least loss. FOEM's terms are the two with β.

    Returns:
        The parameters kept.
    """
    grid, factor, correction, beta = problem.grid, problem.factor, problem.correction, problem.options.foem_beta
    columns, candidates = run.columns, _candidates(run.parameters, problem)
    start, stop, copies = columns.start, columns.stop, len(candidates)
    run = replace(run, parameters=Parameters.joined(candidates, 0))
    values = latent[columns].repeat(1, copies)
    goal = original[columns].repeat(1, copies) if beta else values
    errors, chosen = torch.empty_like(values), torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    for i, column in enumerate(values):
        parameters = run.serving(i, grid)
        if beta:
            column.lerp_(goal[i], beta)
        codes_of_column = grid.round(column[:, None], parameters)
        chosen[i] = codes_of_column[:, 0]
        error = column - grid.decode(codes_of_column, parameters)[:, 0]
        if beta:
            error -= beta * (column - goal[i])
        error /= factor[start + i, start + i]
        errors[i] = error
        later = values[i + 1 :]
        later.addr_(factor[start + i, start + i + 1 : stop], error, alpha=-1)
        if correction is not None:
            later.addr_(correction[start + i, start + i + 1 : stop], column)
    if copies > 1:
        least = errors.square().sum(0).unflatten(0, (copies, -1)).argmin(0)
        kept = least * latent.shape[1] + torch.arange(latent.shape[1], device=latent.device)
        errors, chosen, values = errors[:, kept], chosen[:, kept], values[:, kept]
        run = replace(run, parameters=run.parameters.apply(itemgetter(kept)))
    codes[columns] = chosen
    latent[stop:] -= factor[columns, stop:].T @ errors
    if correction is not None:
        latent[stop:] += correction[columns, stop:].T @ values
    return run.parameters


def _candidates(parameters: Parameters, problem: _Problem) -> list[Parameters]:
    """Parameters to solve a run with: those given, and multiples of them."""
    candidates = [parameters]
    for factor in SCALE_FACTORS[1 : problem.options.scale_candidates]:
        with suppress(UnsupportedError):  # a multiple may overflow
            candidates.append(problem.grid.rescaled(parameters, torch.tensor(factor)))
    return candidates


def inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper triangular U with UᵀU = (H + λ·mean(diag H)·I)⁻¹, by one Cholesky factorisation.

    With J the reversal of the order, JHJ = LLᵀ gives H = AAᵀ where A = JLJ is upper triangular, so U = A⁻¹ = JL⁻¹J.

    Args:
        hessian: float32 (n, n), symmetric, positive semidefinite. Columns that were never active (a zero diagonal)
            count as average ones without any correlation: they are rounded to nearest.
        order: int64 (n,), the order in which its columns are taken.
        damping: λ, raised tenfold as often as the factorisation fails.

    Returns:
        U, and the λ that it took.

    Raises:
        CheckpointError: the Hessian is not finite, or the factorisation fails however large λ.
    """
    device = hessian.device
    if device.type == "mps":  # its Cholesky is young, and has been silently wrong
        hessian, order = hessian.cpu(), order.cpu()
    mean = hessian.diagonal().mean()
    if not torch.isfinite(mean):
        raise CheckpointError("its inputs are not finite on the calibration data. Is the checkpoint damaged?")
    for _ in range(DAMPING_TRIES):
        lower, failed = torch.linalg.cholesky_ex(damped_hessian(hessian, order.flip(0), damping))
        if not failed:
            identity = torch.eye(len(hessian), device=hessian.device)
            inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
            del lower, identity  # large models have Hessians of a gigabyte
            return inverse.flip(0, 1).to(device), damping
        damping *= 10
    raise CheckpointError("the Hessian of its inputs is singular. Use more calibration samples.")


def damped_hessian(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """H + λ·mean(diag H)·I, (n, n), its columns in this order; those that were never active count as average ones."""
    damped = hessian[order[:, None], order]
    mean = hessian.diagonal().mean()
    idle = damped.diagonal() == 0
    damped.diagonal().add_(damping * mean)
    damped.diagonal()[idle] = mean if mean else 1
    return damped


def _column_order(importance: Tensor, run: int, desc_act: bool) -> Tensor:
    """Columns from the most important to the least; unless `desc_act`, runs stay whole and are ordered so too."""
    if desc_act:
        return importance.argsort(descending=True, stable=True)
    runs = importance.unflatten(0, (-1, run))
    within = runs.argsort(dim=1, descending=True, stable=True)
    within += run * torch.arange(len(runs), device=importance.device)[:, None]
    order: Tensor = within[runs.sum(1).argsort(descending=True, stable=True)]
    return order.flatten()


def _rotate_both_sides(matrix: Tensor, basis: Basis) -> Tensor:
    """Rᵀ M R."""
    return basis.rotate(basis.rotate(matrix).T).T
