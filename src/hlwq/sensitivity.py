"""How much the model's predictions change for what rounding does to each matrix, before anything is rounded.

To second order, weights that change by Δ change the predictions by a divergence of ½ Δᵀ F Δ, F being the Fisher
information: the covariance of the gradient of log p(y) with y drawn from the model itself. Rounding errors are taken as
independent, with one variance in each group, which leaves of F a mean of squares of gradients for each group. A batch's
gradient may be squared as a whole, since the gradients of drawn tokens are independent and have no mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hlwq.errors import CheckpointError, HlwqError
from hlwq.families import ModelLayout
from hlwq.matrix import CHUNK_WEIGHTS
from hlwq.plan import PlannedTensor
from hlwq.recipes import Stage
from hlwq.solvers import Nearest
from hlwq.transformers_models import quiet_transformers
from hlwq.work import check_finite, quantize_matrix

Read = Callable[[str], Tensor]


def gradient_squares(
    model: Any,
    layout: ModelLayout,
    tensors: Sequence[PlannedTensor],
    tokens: Tensor,
    seed: int,
    progress: Callable[[int], None],
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information, summed over each group, in the coordinates that are rounded.

    Args:
        model: the original, a causal language model of transformers.
        layout: how it is laid out.
        tensors: the matrices, as they are planned.
        tokens: int64 (samples, length).
        seed: seed of the tokens drawn.
        progress: told how many samples are done.

    Returns:
        By the module, float32 (out, groups) on the CPU: per token of the samples.
    """
    squares: dict[str, Tensor] = {}

    def take(tensor: PlannedTensor, parameter: Tensor) -> None:
        gradient, stage = parameter.grad, tensor.stages[-1]
        parameter.grad = None
        if gradient is None:
            return
        groups = partial(_by_group, stage=stage)
        summed = torch.cat([groups(rows.float()).sum(-1).cpu() for rows in gradient.split(_rows(gradient))])
        squares[tensor.module] = squares.get(tensor.module, 0) + summed

    model.requires_grad_(False)
    hooks = []
    for tensor in tensors:
        weight = parameter_of(model, layout, tensor.module).requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(partial(take, tensor)))
    generator = torch.Generator(model.device).manual_seed(seed)
    with quiet_transformers(), torch.enable_grad():
        for done, sample in enumerate(tokens):
            logits = model(input_ids=sample[None].to(model.device), use_cache=False).logits[0].float()
            if not torch.isfinite(logits).all():
                raise CheckpointError("the model's predictions are not finite. Is the checkpoint damaged?")
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
            progress(done + 1)
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    return {module: sums / tokens.numel() for module, sums in squares.items()}


def parameter_of(model: Any, layout: ModelLayout, module: str) -> nn.Parameter:
    """The weight of a quantized module in a model of transformers, whose own names may differ from the file's."""
    if module == layout.embedding:
        weight: nn.Parameter = model.get_input_embeddings().weight
    elif module == layout.head:
        weight = model.get_output_embeddings().weight
    else:
        weight = model.get_decoder().get_parameter(f"{module.removeprefix(layout.prefix)}.weight")
    return weight


def rounded(weights: Tensor, tensor: PlannedTensor, bits: int, device: torch.device) -> Tensor:
    """Weights rounded to nearest codes of another width than planned, float32 on the CPU.

    Raises:
        UnsupportedError: a group's parameters overflow.
    """
    stage = tensor.stages[-1]
    grid = stage.grid.with_bits(bits)
    try:
        matrix, _ = quantize_matrix(weights, [replace(stage, grid=grid, solver=Nearest())], device)
    except HlwqError as error:
        raise error.about(tensor.spec.name) from None
    return matrix.dequantize()


def divergences(
    read: Read,
    tensors: Sequence[PlannedTensor],
    squares: Mapping[str, Tensor],
    widths: Sequence[int],
    device: torch.device,
    progress: Callable[[int], None],
) -> dict[str, dict[int, float]]:
    """The divergence, in nats per token, that rounding each matrix alone would cause, by the module and the width.

    Args:
        read: gives the original weights.
        tensors: the matrices.
        squares: what `gradient_squares` gave.
        widths: those to look at.
        device: where to round.
        progress: told how many matrices are done.
    """
    losses: dict[str, dict[int, float]] = {}
    for done, tensor in enumerate(tensors):
        weights, stage = read(tensor.spec.name), tensor.stages[-1]
        check_finite(weights, tensor.spec.name)
        losses[tensor.module] = {}
        for bits in widths:
            error = rounded(weights, tensor, bits, device).sub_(weights)
            variance = torch.cat([_by_group(rows, stage).mean(-1) for rows in error.split(_rows(error))])
            losses[tensor.module][bits] = float((variance * squares[tensor.module]).sum(dtype=torch.float64)) / 2
        progress(done + 1)
    return losses


def _by_group(values: Tensor, stage: Stage) -> Tensor:
    """The squares of values (rows, in) in the coordinates that are rounded, (rows, groups, group)."""
    squares: Tensor = stage.basis.rotate(values).square_().unflatten(1, (-1, stage.grid.group_size))
    return squares


def _rows(values: Tensor) -> int:
    """Rows that are looked at together."""
    return max(1, CHUNK_WEIGHTS // values.shape[1])
