"""The bits of each matrix within a budget, by what rounding it would do to the model's predictions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from hashlib import sha256
from math import exp, log
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from hlwq.allocation import choose, equal_widths, widths_of
from hlwq.cache import cached_tensor
from hlwq.calibration import Calibration
from hlwq.containers import Source
from hlwq.devices import available_memory, compute_dtype, memory_errors, torch_device
from hlwq.errors import HlwqWarning
from hlwq.evaluate.model import load_model
from hlwq.evaluate.results import fingerprint
from hlwq.pipeline import samples_for
from hlwq.plan import Plan, PlannedTensor
from hlwq.request import Budget
from hlwq.sensitivity import divergences, gradient_squares, parameter_of, rounded
from hlwq.transformers_models import load_tokenizer, quiet_transformers
from hlwq.work import Progress

MEASURED_SAMPLES, HELD_OUT_SAMPLES = 32, 4
"""Samples that gradients are taken on, and that the chosen widths are compared with equal ones on."""
CACHED = 128
"""Measurements that the cache holds: some kilobytes each."""
CALIBRATED_POWER = 0.5
"""Power that the losses of matrices are raised to, relative to each other, for recipes that are calibrated.

Calibration makes up for the more of a loss, the larger it is. On SmolLM2, recipe best in format mlx with a mean of 4
bits, 1 gave a divergence of 0.082, 0.5 gave 0.078, and equal widths gave 0.076.
"""


def measured_bits(
    source: Source,
    plan: Plan,
    budget: Budget,
    calibration: Calibration,
    device: str | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, int], dict[str, Any]]:
    """The width of each quantized matrix, and what `hlwq.json` says of how it was found.

    What the expected loss prefers is compared, on other samples and rounded to nearest, with the largest width that
    all matrices can have alike, and given up for it if its divergence from the original is not less. The whole model is
    in memory meanwhile, and the gradient of a matrix.

    Args:
        source: the checkpoint.
        plan: what is made of it, with any widths.
        budget: what the codes may cost.
        calibration: its texts are measured on.
        device: where the model runs; by default a GPU if there is one.
        progress: told how far the work is.

    Raises:
        ResourceError: the model does not fit in memory.
        HlwqError: see `samples_for`, `load_model` and `choose`.
    """
    place, report = torch_device(device), progress or (lambda done, total, item: None)
    needed, available = plan.sensitivity_memory(calibration, place), available_memory(place)
    if available is not None and needed > available:
        memory = f"{needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available"
        warnings.warn(f"this may need {memory}. Use whole `bits`.", HlwqWarning, stacklevel=2)
    report(0, 1, "reading calibration data")
    number = max(min(calibration.samples, MEASURED_SAMPLES + HELD_OUT_SAMPLES), len(calibration.sources))
    samples = samples_for(plan, replace(calibration, samples=number), load_tokenizer(source.path))
    apart = min(HELD_OUT_SAMPLES, len(samples.tokens) // 2)
    own = samples.tokens[apart:]
    held_out = samples.tokens[:apart] if apart else own  # of a single sample, there is nothing else
    tensors, widths, dtype = plan.quantized(), widths_of(plan.format), compute_dtype(place)

    @cache
    def model() -> Any:
        report(0, 1, "loading the whole model, whose sensitivity is measured")
        return load_model(source.path, str(place), dtype)[0]

    def measure() -> Tensor:
        item = f"gradients of {len(own)} samples"
        squares = gradient_squares(
            model(), plan.layout, tensors, own, calibration.seed, lambda done: report(done, len(own), item)
        )
        losses = divergences(
            source.read, tensors, squares, widths, place, lambda done: report(done, len(tensors), "errors of rounding")
        )
        return torch.tensor([[losses[each.module][bits] for bits in widths] for each in tensors], dtype=torch.float64)

    def compare(ways: Sequence[Mapping[str, int]]) -> Tensor:
        report(0, 1, "comparing the chosen bits with equal ones")
        with torch.no_grad():
            wanted = [_log_probabilities(model(), sample) for sample in held_out]
            found = []
            for bits in ways:
                for tensor in tensors:
                    values = rounded(source.read(tensor.spec.name).float(), tensor, bits[tensor.module], place)
                    parameter = parameter_of(model(), plan.layout, tensor.module)
                    parameter.copy_(values)
                each = [
                    nn.functional.kl_div(_log_probabilities(model(), sample), goal, reduction="sum", log_target=True)
                    for sample, goal in zip(held_out, wanted, strict=True)
                ]
                found.append(float(sum(each)) / held_out.numel())
        return torch.tensor(found, dtype=torch.float64)

    # All but the widths.
    stored = [(each.module, each.stages[-1].basis, each.stages[-1].grid.with_bits(widths[0])) for each in tensors]
    depends_on = (
        fingerprint(source.path, report),
        str(dtype),
        place.type,
        widths,
        calibration.seed,
        own.tolist(),
        stored,
    )
    key = sha256(repr(depends_on).encode()).hexdigest()[:24]
    lacking = "There is too little memory for the whole model, whose sensitivity is measured. Use whole `bits`."
    with memory_errors(lacking):
        table = cached_tensor("sensitivity", key, measure, keep=CACHED)
        found = {tensor.module: row for tensor, row in zip(tensors, table.tolist(), strict=True)}
        losses = {module: dict(zip(widths, row, strict=True)) for module, row in _evened(tensors, found).items()}
        bits, equal = choose(plan, budget, losses), equal_widths(plan, budget)
        if equal and equal != bits:
            ways = [bits, equal]
            key = sha256(repr((key, ways, held_out.tolist())).encode()).hexdigest()[:24]
            chosen, alike = cached_tensor("sensitivity", key, lambda: compare(ways), keep=CACHED).tolist()
            if chosen >= alike:
                message = "bits of each matrix's own were no better on other text than equal ones, which are taken."
                warnings.warn(message, HlwqWarning, stacklevel=2)
                bits = equal
    return bits, {**asdict(budget), "measured_on": samples.origin}


def _evened(tensors: Sequence[PlannedTensor], losses: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Losses by the module and the width, as they are after solvers have made up for some of them."""
    of_weight = {each.module: losses[each.module][0] / each.spec.parameters for each in tensors}
    calibrated = [each.module for each in tensors if each.calibrated and of_weight[each.module] > 0]
    factors = dict.fromkeys(of_weight, 1.0)
    if calibrated:
        usual = exp(fmean(log(of_weight[module]) for module in calibrated))
        factors |= {module: (of_weight[module] / usual) ** (CALIBRATED_POWER - 1) for module in calibrated}
    return {module: [factor * loss for loss in losses[module]] for module, factor in factors.items()}


def _log_probabilities(model: Any, sample: Tensor) -> Tensor:
    """What a model predicts for each token of a sample (length), float32 (length, vocabulary)."""
    with quiet_transformers():
        logits: Tensor = model(input_ids=sample[None].to(model.device), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)
