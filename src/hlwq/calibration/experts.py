"""The experts of a layer, one in memory at a time: each runs once, on the tokens of all samples that go to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STACKS = ("gate_up_proj", "down_proj")
"""The parameters in which transformers' modules hold all experts of a layer."""
MATRICES = ("gate_proj", "up_proj", "down_proj")
STARVED = 256
"""Tokens below which an expert's own say too little of what it will be given."""
SHRINKAGE = 0.1
"""Weight of the other tokens that such an expert is calibrated on, relative to its own."""

TOGETHER = 1 << 13
"""Tokens that go through an expert at once."""

ReadExpert = Callable[[int, str], Tensor]
"""Gives a matrix of an expert by its number and name, such as `gate_proj`."""


@dataclass(frozen=True)
class Routed:
    """What the experts of a layer are given, and what they make of it.

    Attributes:
        hidden: (tokens, hidden).
        experts: int64 (tokens, k), which experts each token goes to.
        weights: (tokens, k), how much of each is added.
        outputs: (tokens, hidden), the sums so far.
    """

    hidden: Tensor
    experts: Tensor
    weights: Tensor
    outputs: Tensor


@contextmanager
def without_stacks(layer: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Take the stacks of all experts out of a layer's modules meanwhile: nothing shall load them, or look for them."""
    taken = {name: [layer.get_submodule(name)._parameters.pop(stack) for stack in STACKS] for name in names}
    try:
        yield
    finally:
        for name, stacks in taken.items():
            module = layer.get_submodule(name)
            module.__dict__.pop("forward", None)
            for stack, parameter in zip(STACKS, stacks, strict=True):
                module.register_parameter(stack, parameter)


def add_expert(routed: Routed, expert: int, module: Any, matrices: Sequence[Tensor]) -> None:
    """Add what an expert makes of its tokens to the outputs.

    Args:
        routed: the tokens; changed in place.
        expert: its number.
        module: of transformers, which has the activation.
        matrices: the expert's `MATRICES`, where they run.
    """
    token, place = torch.where(routed.experts == expert)
    for some, places in zip(token.split(TOGETHER), place.split(TOGETHER), strict=True):
        inputs = routed.hidden[some].to(matrices[0].device)
        results = hidden_of(module, matrices[0], matrices[1], inputs) @ matrices[2].T
        weighted = results * routed.weights[some, places, None].to(results.device)
        routed.outputs[some] += weighted.to(routed.outputs)


def hidden_of(module: Any, gate: Tensor, up: Tensor, inputs: Tensor) -> Tensor:
    """What its last matrix is given: (n, inner)."""
    return torch.cat([module._apply_gate(torch.cat([x @ gate.T, x @ up.T], -1)) for x in inputs.split(TOGETHER)])


def tokens_of(routed: Routed, expert: int) -> tuple[Tensor, Tensor, int]:
    """The tokens that an expert is calibrated on, the weight of each, and how many of them go to it.

    One that fewer than `STARVED` go to is given others too, evenly spaced and with little weight: what it has learned
    little of in calibration is kept near what it would make of any token of the layer.
    """
    token, place = torch.where(routed.experts == expert)
    weights, count = routed.weights[token, place].float(), len(token)
    if count < STARVED:
        mean = float(weights.mean()) if count else 1.0
        others = torch.ones(len(routed.hidden), dtype=torch.bool, device=token.device)
        others[token] = False
        others = others.nonzero()[:, 0]
        others = others[:: max(1, len(others) // (STARVED - count))][: STARVED - count]
        token = torch.cat([token, others])
        weights = torch.cat([weights, weights.new_full((len(others),), SHRINKAGE * mean)])
    return token, weights, count


def module_of(matrices: Mapping[str, Tensor]) -> nn.Module:
    """A module that has these matrices by their paths inside a layer, as weights of linear layers."""
    root = nn.Module()
    for path, values in matrices.items():
        module = root
        for name in path.split("."):
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.weight = nn.Parameter(values, requires_grad=False)
    return root
