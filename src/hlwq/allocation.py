"""Bits where they matter: of all ways to give each matrix a width of its own within a budget, the one of least loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from hlwq.errors import RequestError
from hlwq.formats import Format
from hlwq.plan import Plan, PlannedTensor
from hlwq.request import Budget

MOST_STEPS = 1 << 17
"""Steps that the budget is counted in at most; where sizes have no common measure as large, costs are rounded up."""
HEADER_BYTES = 256
"""More than a tensor's entry in the header of its file takes."""


@dataclass(frozen=True)
class Choice:
    """Matrices that are given one width together.

    Attributes:
        modules: which.
        costs: of each width, in any unit.
        losses: of each width, in any unit.
    """

    modules: tuple[str, ...]
    costs: Mapping[int, int]
    losses: Mapping[int, float]


def widths_of(output_format: Format) -> list[int]:
    """Widths that every engine of a format loads."""
    return [bits for bits in output_format.bits if all(bits in engine.bits for engine in output_format.engines)]


def units(plan: Plan) -> list[list[PlannedTensor]]:
    """The quantized matrices, those together that engines of the format run as one."""
    fusions = plan.layout.fusions() if plan.format.fused_alike else {}
    whole_of = {module: whole for whole, modules in fusions.items() for module in modules}
    members: dict[str, list[PlannedTensor]] = {}
    for tensor in plan.quantized():
        members.setdefault(whole_of.get(tensor.module, tensor.module), []).append(tensor)
    return list(members.values())


def stored_bytes(plan: Plan, tensor: PlannedTensor, bits: int) -> int:
    """Bytes of a quantized matrix whose codes have this width."""
    rows, columns = tensor.spec.shape
    grid = tensor.stages[-1].grid.with_bits(bits)
    return sum(spec.nbytes for spec in plan.format.outputs(tensor.module, (rows, columns), grid, plan.dtype))


def widths_told(plan: Plan, *, measured: bool) -> str:
    """How many matrices have which width, in words; `measured`: and it is known which."""
    quantized = plan.quantized()
    numbers = Counter(tensor.scheme.bits for tensor in quantized)
    weights = sum(tensor.spec.parameters for tensor in quantized)
    mean = sum(tensor.scheme.bits * tensor.spec.parameters for tensor in quantized) / weights
    counts = ", ".join(f"{bits} bits in {numbers[bits]}" for bits in sorted(numbers))
    which = "" if measured else ", before it is measured which"
    return f"{counts} matrices; {mean:.2f} in the mean of all weights{which}"


def unmeasured(plan: Plan) -> dict[str, dict[int, float]]:
    """Losses that know nothing of the model: rounding errors of all weights count alike."""
    widths = widths_of(plan.format)
    return {each.module: {bits: each.spec.parameters * 4.0**-bits for bits in widths} for each in plan.quantized()}


def choose(plan: Plan, budget: Budget, losses: Mapping[str, Mapping[int, float]]) -> dict[str, int]:
    """The width of each quantized matrix, by the module.

    Args:
        plan: with any widths.
        budget: what they may cost.
        losses: by the module, of each width of `widths_of`.

    Raises:
        RequestError: the budget is too small, or so large that it limits nothing; or the format stores no codes.
    """
    return allocate(*_priced(plan, budget, losses))


def equal_widths(plan: Plan, budget: Budget) -> dict[str, int]:
    """The largest width that all matrices can have alike within a budget, by the module; empty if there is none."""
    choices, available = _priced(plan, budget, unmeasured(plan))
    fitting = [bits for bits in widths_of(plan.format) if sum(each.costs[bits] for each in choices) <= available]
    return {module: max(fitting) for each in choices for module in each.modules} if fitting else {}


def _priced(plan: Plan, budget: Budget, losses: Mapping[str, Mapping[int, float]]) -> tuple[list[Choice], int]:
    """What is to be decided, and what it may cost. Raises RequestError as `choose` says."""
    if plan.format.stores_decoded:
        message = f"{budget.words} changes nothing: format {plan.format.name} stores decoded weights."
        raise RequestError(message, argument=budget.argument)
    widths, choices, in_bytes = widths_of(plan.format), [], budget.nbytes is not None
    for unit in units(plan):
        choices.append(
            Choice(
                tuple(tensor.module for tensor in unit),
                {bits: sum(_cost(plan, tensor, bits, in_bytes) for tensor in unit) for bits in widths},
                {bits: sum(losses[tensor.module][bits] for tensor in unit) for bits in widths},
            )
        )
    least, most = (sum(function(each.costs.values()) for each in choices) for function in (min, max))
    if budget.nbytes is not None:
        outputs = list(plan.outputs())
        quantized = sum(spec.nbytes for tensor in plan.quantized() for spec in tensor.outputs)
        others = sum(spec.nbytes for spec in outputs) - quantized + HEADER_BYTES * len(outputs)
        available = budget.nbytes - others
        floor = f"at {min(widths)} bits it takes {(least + others) / 1e6:,.1f} MB"
    else:
        available = int((budget.bits or 0) * sum(tensor.spec.parameters for tensor in plan.quantized()))
        floor = f"in format {plan.format.name}, codes have {', '.join(map(str, widths))} bits"
    if available < least:
        raise RequestError(f"{budget.words} is too little: {floor}.", argument=budget.argument)
    if available >= most:
        message = f"{budget.words} limits nothing: all codes can have {max(widths)} bits. Use `bits={max(widths)}`."
        raise RequestError(message, argument=budget.argument)
    return choices, available


def _cost(plan: Plan, tensor: PlannedTensor, bits: int, in_bytes: bool) -> int:
    return stored_bytes(plan, tensor, bits) if in_bytes else bits * tensor.spec.parameters


def allocate(choices: Sequence[Choice], budget: int) -> dict[str, int]:
    """Widths of least loss in all, by dynamic programming: exact where costs share a divisor that leaves few steps.

    Args:
        choices: what is to be decided.
        budget: the most that all may cost together; at least what the cheapest widths do.

    Returns:
        The width of each module.
    """
    cheapest = [min(choice.costs.values()) for choice in choices]
    spare = budget - sum(cheapest)
    pairs = list(zip(choices, cheapest, strict=True))
    more = [{bits: cost - least for bits, cost in choice.costs.items()} for choice, least in pairs]
    step = max(1, gcd(*(cost for costs in more for cost in costs.values())), -(-spare // MOST_STEPS))
    steps = spare // step
    # best[s]: the least loss of the choices so far that takes at most s steps.
    best, taken = np.zeros(steps + 1), []
    for choice, costs in zip(choices, more, strict=True):
        options = sorted(costs, key=costs.__getitem__)
        reached = np.full((len(options), steps + 1), np.inf)
        for row, bits in enumerate(options):
            offset = -(-costs[bits] // step)
            if offset <= steps:
                reached[row, offset:] = best[: steps + 1 - offset] + choice.losses[bits]
        picked = reached.argmin(0)
        best = np.take_along_axis(reached, picked[None], 0)[0]
        taken.append((options, picked.astype(np.uint8)))
    chosen: dict[str, int] = {}
    left = steps
    for choice, costs, (options, picked) in zip(reversed(choices), reversed(more), reversed(taken), strict=True):
        bits = options[picked[left]]
        chosen |= dict.fromkeys(choice.modules, bits)
        left -= -(-costs[bits] // step)
    return chosen
