"""Does an engine compute what the codes say? Its log-probabilities against transformers on the decoded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hlwq.evaluate.model import load_model
from hlwq.hadamard import rotate_blocks

TOLERANCE = {("vllm", "smollm2"): 0.08, ("vllm", "hybrid"): 0.03, ("mlx", "smollm2"): 0.01, ("mlx", "hybrid"): 0.01}
"""Mean absolute difference of the prompt's log-probabilities, in nats. vLLM computes in bfloat16, whose noise grows
with the layers (30 against 4); mlx-lm is asked to compute in float32, since its CPU kernels sum in the weights' dtype.
Each of the mistakes in `MISTAKES` moves the result past four times the tolerance, which is tested."""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_qkv", "out_proj")


def reference(directory: Path, prompt: str, mistake: str | None = None) -> tuple[list[int], Tensor]:
    """The prompt's token ids, and the log-probability of each but the first, by transformers on the decoded weights."""
    model, tokenizer = load_model(directory, dtype=torch.float32)
    tokens = tokenizer(prompt)["input_ids"][:96]
    if mistake is not None:
        MISTAKES[mistake](model)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1].float()
    chosen = torch.tensor(tokens[1:])[:, None]
    return tokens, logits.log_softmax(-1).gather(-1, chosen)[:, 0]


def difference(logprobs: list[float], expected: Tensor) -> float:
    mean = float((torch.tensor(logprobs) - expected).abs().mean())
    print(f"mean absolute difference of log-probabilities: {mean:.4f}")
    return mean


def _linears(model: Any) -> list[torch.nn.Linear]:
    return [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in LINEARS]


@torch.no_grad()
def _swap_nibbles(model: Any) -> None:
    for linear in _linears(model):
        linear.weight.copy_(linear.weight.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


@torch.no_grad()
def _shift_zero(model: Any) -> None:
    for linear in _linears(model):
        groups = linear.weight.unflatten(-1, (-1, 64))
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
        linear.weight.copy_((groups + step).flatten(-2))


@torch.no_grad()
def _lose_rotation(model: Any) -> None:
    for linear in _linears(model):
        linear.weight.copy_(rotate_blocks(linear.weight, 64))


@torch.no_grad()
def _lose_gates(model: Any) -> None:
    for name, module in model.named_modules():
        if name.endswith(("in_proj_a", "in_proj_b")):
            module.weight.zero_()


MISTAKES = {
    "swapped nibbles": _swap_nibbles,
    "wrong zero point": _shift_zero,
    "missed rotation": _lose_rotation,
    "missed exclusion": _lose_gates,
}
