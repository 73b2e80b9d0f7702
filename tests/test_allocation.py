"""Bits of each matrix within a budget, by what rounding it would do."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from torch import nn

from hlwq import Calibration, HlwqError, RequestError
from hlwq.allocation import Choice, allocate, units
from hlwq.decoded import DecodedCheckpoint
from hlwq.demo import bundled_model, held_out_text
from hlwq.errors import HlwqWarning
from hlwq.evaluate.model import load_model
from hlwq.files import hash_file, read_json
from hlwq.pipeline import run_plan
from hlwq.plan import make_plan
from hlwq.quantize import plan_for, quantize
from hlwq.request import Budget, Request
from hlwq.sensitivity import divergences, gradient_squares, parameter_of, rounded

DATA: dict[str, Any] = {"calibration": "embedded", "samples": 6, "sequence_length": 48}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


def choices_of(costs: list[dict[int, int]], losses: list[dict[int, float]]) -> list[Choice]:
    return [Choice((f"m{number}",), *each) for number, each in enumerate(zip(costs, losses, strict=True))]


@pytest.mark.parametrize("seed", range(8))
def test_no_other_widths_within_the_budget_lose_less(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = (2, 3, 4, 8)
    sizes = torch.randint(1, 40, (5,), generator=generator).tolist()
    costs = [{bits: bits * size for bits in widths} for size in sizes]
    losses = [
        dict(zip(widths, torch.rand(4, generator=generator).sort(descending=True).values.tolist(), strict=True))
        for _ in sizes
    ]
    budget = 4 * sum(sizes) + 7
    chosen = allocate(choices_of(costs, losses), budget)
    ways = [way for way in product(widths, repeat=5) if sum(map(dict.__getitem__, costs, way)) <= budget]
    least = min(sum(map(dict.__getitem__, losses, way)) for way in ways)
    assert sum(losses[number][chosen[f"m{number}"]] for number in range(5)) == pytest.approx(least)


def test_sizes_without_a_common_measure_stay_within_the_budget() -> None:
    sizes = [1_000_003, 7_777_777, 123_457]
    costs = [{bits: bits * size for bits in (2, 4, 8)} for size in sizes]
    budget = 5 * sum(sizes)
    chosen = allocate(choices_of(costs, [{2: 1.0, 4: 0.1, 8: 0.0}] * 3), budget)
    assert sum(costs[number][chosen[f"m{number}"]] for number in range(3)) <= budget
    assert set(chosen.values()) - {2}


def test_expected_divergences_are_those_measured() -> None:
    """Each matrix of a layer rounded alone: the divergence found is the one expected, within a factor of two."""
    _, plan = plan_for(Request.of(bundled_model(), "rtn", format="mlx", bits=3))
    model, tokenizer = load_model(bundled_model(), "cpu", torch.float32)
    text = held_out_text().read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text)["input_ids"][: 12 * 128]).reshape(12, 128)
    tensors = [tensor for tensor in plan.quantized() if ".layers.1." in tensor.spec.name]
    squares = gradient_squares(model, plan.layout, tensors, tokens, 0, lambda done: None)
    originals = {each.module: parameter_of(model, plan.layout, each.module).detach().clone() for each in tensors}
    expected = divergences(
        lambda name: originals[name.removesuffix(".weight")],
        tensors,
        squares,
        (3,),
        torch.device("cpu"),
        lambda done: None,
    )

    def predictions() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits.log_softmax(-1)

    wanted = predictions()
    for tensor in tensors:
        original = originals[tensor.module]
        parameter = parameter_of(model, plan.layout, tensor.module)
        parameter.data = rounded(original, tensor, 3, torch.device("cpu"))
        found = nn.functional.kl_div(predictions(), wanted, reduction="sum", log_target=True) / tokens.numel()
        parameter.data = original
        assert 0.5 < float(found) / expected[tensor.module][3] < 2, tensor.module


@pytest.mark.parametrize("format", ["hlwq", "mlx", "gptq", "compressed-tensors"])
def test_a_mean_of_bits_is_kept_and_engines_accept_it(format: str, tmp_path: Path) -> None:
    recipe = "hlwq" if format == "hlwq" else "rtn"
    others = {"include_embeddings": False} if format == "hlwq" else {}  # vLLM packs none of this family
    result = quantize(bundled_model(), tmp_path / "out", recipe, format=format, bits=4.5, **others, **DATA)
    assert all(check.passed for check in result.checks)
    quantized = result.plan.quantized()
    weights = sum(tensor.spec.parameters for tensor in quantized)
    mean = sum(tensor.scheme.bits * tensor.spec.parameters for tensor in quantized) / weights
    assert 4.2 < mean <= 4.5
    assert len({tensor.scheme.bits for tensor in quantized}) > 1
    for unit in units(result.plan):  # engines run these as one
        assert len({tensor.scheme.bits for tensor in unit}) == 1
    assert read_json(tmp_path / "out" / "hlwq.json")["origin"]["budget"]["bits"] == 4.5


def test_a_size_is_kept_and_used_up(tmp_path: Path) -> None:
    plain = quantize(bundled_model(), tmp_path / "plain", "rtn", format="mlx")
    for factor in (0.9, 1.1):
        size = int(plain.nbytes * factor)
        result = quantize(bundled_model(), tmp_path / f"{factor}", "rtn", format="mlx", size=size, **DATA)
        assert 0.97 * size < result.nbytes <= size


def test_calibrated_matrices_of_one_input_may_differ_in_bits(tmp_path: Path) -> None:
    reader, plan = plan_for(Request.of(bundled_model(), "best", format="mlx"))
    bits = {tensor.module: 3 if "up_proj" in tensor.module else 5 for tensor in plan.quantized()}
    plan = make_plan(reader, plan.recipe, "mlx", bits=bits)
    calibration = Calibration(("embedded",), samples=4, sequence_length=64, generated_samples=0)
    result = run_plan(reader, plan, tmp_path / "out", origin={}, calibration=calibration)
    assert all(check.passed for check in result.checks)
    stored = DecodedCheckpoint(tmp_path / "out")
    for module, error in result.output_errors.items():
        scheme = stored.scheme_of(f"{module}.weight")
        assert scheme
        assert scheme.bits == bits[module]
        if "gate_proj" in module:
            assert 6 * error < result.output_errors[module.replace("gate_proj", "up_proj")]


def test_measured_bits_are_the_same_again_and_need_no_model_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(bundled_model(), tmp_path / "first", "hlwq", bits=3.5, **DATA)
    monkeypatch.delattr("hlwq.measured.load_model")
    quantize(bundled_model(), tmp_path / "second", "hlwq", bits=3.5, **DATA)
    assert len({hash_file(tmp_path / name / "model.safetensors") for name in ("first", "second")}) == 1


def test_a_single_sample_is_enough(tmp_path: Path) -> None:
    result = quantize(bundled_model(), tmp_path / "out", "rtn", bits=4.5, calibration="embedded", samples=1)
    assert {tensor.scheme.bits for tensor in result.plan.quantized()} == {4, 8}


def test_equal_bits_are_taken_where_they_are_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def worst(choices: list[Choice], budget: int) -> dict[str, int]:
        return {module: min(choice.costs) for choice in choices for module in choice.modules}

    monkeypatch.setattr("hlwq.allocation.allocate", worst)
    with pytest.warns(HlwqWarning, match="no better on other text than equal ones"):
        result = quantize(bundled_model(), tmp_path / "out", "hlwq", bits=4.5, **DATA)
    assert {tensor.scheme.bits for tensor in result.plan.quantized()} == {4}


def test_matrices_that_are_not_calibrated_count_like_those_that_are(tmp_path: Path) -> None:
    """An embedding that is no output head is rounded to nearest by any recipe."""
    source = make_checkpoint(tmp_path / "model", "llama", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, source / name)
    options: dict[str, Any] = {"format": "mlx", "bits": 4.5, **DATA}
    bits = {}
    for recipe, others in (("rtn", {}), ("best", {"generated_samples": 0})):
        result = quantize(source, tmp_path / recipe, recipe, **options, **others)
        bits[recipe] = result.plan.contents().quantized["model.embed_tokens"].bits
    assert abs(bits["best"] - bits["rtn"]) <= 1


def test_a_plan_without_measurement_has_the_size(tmp_path: Path) -> None:
    _, plan = plan_for(Request.of(bundled_model(), "hlwq", bits=4.5))
    result = quantize(bundled_model(), tmp_path / "out", "hlwq", bits=4.5, **DATA)
    assert plan.output_bytes() == pytest.approx(result.plan.output_bytes(), rel=0.02)
    assert plan.budget == Budget(bits=4.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1.5}, "`bits` 1.5 is too little: in format gptq, codes have 4, 8 bits"),
        ({"bits": 8.5}, "`bits` 8.5 limits nothing: all codes can have 8 bits. Use `bits=8`"),
        ({"size": "10KB"}, "`size` 0.01 MB is too little: at 4 bits it takes"),
        ({"size": "5GB"}, "`size` 5,000 MB limits nothing"),
        ({"size": "5 pounds"}, "`size` 5 pounds is not a size"),
        ({"bits": float("nan")}, "`bits` is nan; it must be a number"),
        ({"bits": 4.5, "batch_size": 2}, "`batch_size` changes nothing: recipe rtn rounds to nearest"),
        ({"bits": "4.5"}, "`bits` is '4.5'; it must be a number"),
        ({"size": "5GB", "bits": 4}, "`size` decides on the bits of each matrix"),
        ({"format": "dense", "bits": 4.5}, "`bits` 4.5 changes nothing: format dense stores decoded weights"),
        ({"recipe": "hlwq-int4", "bits": 4.5}, "`bits` 4.5 is for recipes that round once"),
    ],
)
def test_what_no_budget_can_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = options.pop("recipe", "rtn")
    with pytest.raises(HlwqError) as caught:
        quantize(bundled_model(), tmp_path / "out", recipe, **options)
    assert str(caught.value).startswith(message)


def test_a_whole_number_given_as_a_fraction_is_one() -> None:
    assert Request.of("model", "rtn", bits=4.0).budget is None
    assert Request.of("model", "rtn", bits=4.0).changes["bits"] == 4
    with pytest.raises(RequestError, match="Calibration data changes nothing"):
        Request.of("model", "rtn", bits=4.0, samples=4).changed_recipe()
