"""The experts of a layer, one in memory at a time: run with weights read for it, or calibrated on its tokens."""

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
    """What the experts of a layer are given.

    Attributes:
        hidden: (tokens, hidden).
        experts: int64 (tokens, k), which experts each token goes to.
        weights: (tokens, k), how much of each is added.
    """

    hidden: Tensor
    experts: Tensor
    weights: Tensor

    @classmethod
    def joined(cls, batches: Sequence[Routed]) -> Routed:
        """Those of several batches, in their order."""
        return cls(*(torch.cat([getattr(each, name) for each in batches]) for name in ("hidden", "experts", "weights")))


@contextmanager
def without_stacks(layer: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Take the stacks of all experts out of a layer's modules meanwhile: nothing shall load them, or look for them."""
    taken = {name: [layer.get_submodule(name)._parameters.pop(stack) for stack in STACKS] for name in names}
    try:
        yield
    finally:
        for name, stacks in taken.items():
            module = layer.get_submodule(name)
            for own in ("forward", "read"):
                module.__dict__.pop(own, None)
            for stack, parameter in zip(STACKS, stacks, strict=True):
                module.register_parameter(stack, parameter)


def stream_experts(module: nn.Module, read: ReadExpert) -> None:
    """Have a module of experts read each expert's matrices when tokens go to it, and let them go again.

    Where it does so already, it will read them from there, even in a forward pass that has come to the module.
    """
    module.__dict__["read"] = read

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        outputs = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            matrices = [module.__dict__["read"](expert, name) for name in MATRICES]
            result = run_expert(module, matrices, hidden_states[token]) * top_k_weights[token, place, None]
            outputs.index_add_(0, token, result.to(outputs.dtype))
        return outputs

    module.__dict__["forward"] = forward


def run_expert(module: Any, matrices: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """What an expert makes of inputs (n, hidden): (n, hidden)."""
    return hidden_of(module, matrices[0], matrices[1], inputs) @ matrices[2].T


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
