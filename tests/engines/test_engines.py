from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import MISTAKES, TOLERANCE, difference, reference
from checkpoints import make_checkpoint
from engines import RunEngine, engine_python, skip_without_int4_kernel
from safetensors.torch import load_file

import hlwq
from hlwq.decoded import DecodedCheckpoint
from hlwq.demo import bundled_model, held_out_text
from hlwq.families import describe

PROMPT = (
    "The lighthouse stands at the northern end of the island. It was built in 1854, after a storm had driven three "
    "ships onto the rocks, and its lamp burned oil until electricity arrived in 1931. Today it is a museum. Visitors "
    "climb the 162 steps of the tower to see the harbour, the old town and, on a clear day, the mountains of the coast."
)


def assert_computes(engine: str, name: str, directory: Path, prompt: str, run_engine: RunEngine) -> None:
    """An engine's log-probabilities are those of the decoded weights."""
    tokens, expected = reference(directory, prompt)
    report = run_engine(engine, f"{engine}_logprobs.py", directory, tokens)
    assert difference(report["logprobs"], expected) < TOLERANCE[engine, name]
    assert report["text"]


CALIBRATION = hlwq.Calibration(("embedded",), samples=8, sequence_length=256)
OWN_BITS = {"bits": 4.5, "calibration": CALIBRATION}
"""Each matrix has its own width."""


@pytest.fixture(scope="module")
def models(smollm2: Path, experts_model: Path) -> dict[str, Path]:
    return {"smollm2": smollm2, "hybrid": bundled_model(), "experts": experts_model}


@pytest.fixture(scope="module")
def prompts() -> dict[str, str]:
    return {"smollm2": PROMPT, "hybrid": held_out_text().read_text(encoding="utf-8")[:2000]}


@pytest.mark.parametrize("name", ["smollm2", "hybrid"])
@pytest.mark.parametrize(("engine", "format_name"), [("vllm", "gptq"), ("vllm", "compressed-tensors"), ("mlx", "mlx")])
@pytest.mark.parametrize(("recipe", "calibration"), [("rtn", None), ("hlwq-v7", CALIBRATION)])
def test_engine_computes_what_the_codes_say(
    name: str,
    engine: str,
    format_name: str,
    recipe: str,
    calibration: hlwq.Calibration | None,
    models: dict[str, Path],
    prompts: dict[str, str],
    tmp_path: Path,
    run_engine: RunEngine,
) -> None:
    directory = tmp_path / "quantized"
    # Group 128 does not divide SmolLM2's 576: its modules then differ in their groups.
    hlwq.quantize(models[name], directory, recipe, format=format_name, group_size=128, calibration=calibration)
    if engine == "vllm":
        skip_without_int4_kernel()
    assert_computes(engine, name, directory, prompts[name], run_engine)


@pytest.mark.parametrize("name", ["smollm2", "hybrid"])
def test_asymmetric_codes_run_in_vllm(
    name: str, models: dict[str, Path], prompts: dict[str, str], tmp_path: Path, run_engine: RunEngine
) -> None:
    directory = tmp_path / "quantized"
    hlwq.quantize(models[name], directory, "rtn", format="compressed-tensors", group_size=128, symmetric=False)
    skip_without_int4_kernel()
    assert_computes("vllm", name, directory, prompts[name], run_engine)


@pytest.mark.parametrize("recipe", [{}, {"calibrate": True, "calibration": CALIBRATION, "block_size": 512}], ids=str)
@pytest.mark.parametrize("name", ["smollm2", "hybrid"])
def test_vllm_rotates_the_inputs(
    name: str,
    recipe: dict[str, Any],
    models: dict[str, Path],
    prompts: dict[str, str],
    tmp_path: Path,
    run_engine: RunEngine,
) -> None:
    directory = tmp_path / "quantized"
    hlwq.quantize(models[name], directory, "rtn", format="compressed-tensors", basis="hadamard", **recipe)
    # The fused kernel of type `hadamard` is for GPUs; on a CPU, vLLM multiplies by the matrix in the file instead.
    file = directory / "config.json"
    config = json.loads(file.read_text())
    for group in config["quantization_config"]["transform_config"]["config_groups"].values():
        assert group["type"] == "hadamard"
        group["type"] = "random-hadamard"
    file.write_text(json.dumps(config))
    skip_without_int4_kernel()
    assert_computes("vllm", name, directory, prompts[name], run_engine)


def test_quantized_output_head_runs_in_vllm(prompts: dict[str, str], tmp_path: Path, run_engine: RunEngine) -> None:
    source, directory = make_checkpoint(tmp_path / "model", "llama", vocab_size=2048), tmp_path / "quantized"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, source / name)
    hlwq.quantize(source, directory, "rtn", format="compressed-tensors", include="lm_head")
    skip_without_int4_kernel()
    assert_computes("vllm", "hybrid", directory, prompts["hybrid"], run_engine)


@pytest.mark.parametrize("name", ["smollm2", "hybrid"])
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"bits": 8}, {"bits": 2}, OWN_BITS], ids=str)
def test_transformers_decodes_compressed_tensors_to_the_same_weights(
    name: str, options: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    directory = tmp_path / "quantized"
    hlwq.quantize(models[name], directory, "rtn", format="compressed-tensors", group_size=128, **options)
    ours, loaded = DecodedCheckpoint(directory), AutoModelForCausalLM.from_pretrained(directory)
    with torch.inference_mode():
        assert loaded(input_ids=torch.arange(40, 60)[None]).logits.isfinite().all()  # its first pass decodes
    theirs = loaded.state_dict()
    for module in ours.quantized_modules():
        weight = theirs[f"{module.replace('.language_model', '')}.weight"]
        assert torch.equal(weight, ours.read(f"{module}.weight").to(weight.dtype)), module


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("smollm2", {}),
        ("smollm2", {"include_embeddings": False}),
        ("hybrid", {**OWN_BITS, "include_embeddings": False}),
    ],
)
def test_vllm_serves_packed_hlwq(
    name: str,
    options: dict[str, Any],
    models: dict[str, Path],
    prompts: dict[str, str],
    tmp_path: Path,
    run_engine: RunEngine,
) -> None:
    directory = tmp_path / "quantized"
    hlwq.quantize(models[name], directory, "hlwq", **options)
    assert_computes("vllm", name, directory, prompts[name], run_engine)


def test_vllm_keeps_to_the_schemes_of_the_file(tmp_path: Path, run_engine: RunEngine) -> None:
    directory = tmp_path / "quantized"
    hlwq.quantize(
        bundled_model(), directory, "hlwq", exclude=[r"layers\.1\.mlp"], group_size=512, include_embeddings=False
    )
    output = run_engine("vllm", "vllm_packed.py", directory)
    decoded = DecodedCheckpoint(directory)
    layout = describe(decoded.config, decoded.tensors)
    expected = {}
    for index, layer in enumerate(layout.layers):
        for matrix in layer.matrices():
            scheme = decoded.scheme_of(f"{layout.layer_prefix(index)}{matrix.name}.weight")
            fused = f"language_model.model.layers.{index}.{matrix.fused or matrix.name}"
            expected[fused] = scheme and [scheme.bits, scheme.group_size]
    assert output == expected


def test_vllm_computes_the_same_with_a_cache_of_experts(
    experts_model: Path, tmp_path: Path, run_engine: RunEngine
) -> None:
    hlwq.quantize(experts_model, tmp_path / "quantized", "hlwq", bits=4, include_embeddings=False)
    variables = [{}, *({"HLWQ_EXPERT_CACHE": size} for size in ("1", "6", "16", "1MB"))]
    variables.append({"HLWQ_EXPERT_CACHE": "6", "HLWQ_EXPERT_POLICY": "lru", "HLWQ_EXPERT_SOURCE": "memory"})
    mistakes = {
        "HLWQ_EXPERT_POLICY changes nothing without HLWQ_EXPERT_CACHE": {"HLWQ_EXPERT_POLICY": "lru"},
        "HLWQ_EXPERT_CACHE 50KB must hold an expert of each layer": {"HLWQ_EXPERT_CACHE": "50KB"},
        "HLWQ_EXPERT_SOURCE cloud is unknown": {"HLWQ_EXPERT_CACHE": "6", "HLWQ_EXPERT_SOURCE": "cloud"},
    }
    reports = run_engine("vllm", "vllm_experts.py", tmp_path / "quantized", [*variables, *mistakes.values()])
    whole, *cached = reports[: len(variables)]
    for report in cached:
        assert report.pop("counters") == report.pop("replay")
        assert report == whole
    for said, report in zip(mistakes, reports[len(variables) :], strict=True):
        assert said in report["error"]


def test_chain_runs_in_mlx(prompts: dict[str, str], tmp_path: Path, run_engine: RunEngine) -> None:
    directory = tmp_path / "quantized"
    hlwq.quantize(bundled_model(), directory, "hlwq-mlx")
    assert_computes("mlx", "hybrid", directory, prompts["hybrid"], run_engine)


@pytest.mark.parametrize("options", [{}, OWN_BITS], ids=str)
def test_quantized_embedding_runs_in_mlx(
    options: dict[str, Any], models: dict[str, Path], prompts: dict[str, str], tmp_path: Path, run_engine: RunEngine
) -> None:
    directory = tmp_path / "quantized"
    hlwq.quantize(models["smollm2"], directory, "rtn", format="mlx", **options)
    assert_computes("mlx", "smollm2", directory, prompts["smollm2"], run_engine)


@pytest.mark.parametrize("name", ["smollm2", "hybrid"])
def test_mistakes_exceed_the_tolerance(
    name: str, models: dict[str, Path], prompts: dict[str, str], tmp_path: Path
) -> None:
    directory = tmp_path / "quantized"
    hlwq.quantize(models[name], directory, "rtn")
    _, expected = reference(directory, prompts[name])
    for mistake in MISTAKES:
        if mistake == "missed exclusion" and name != "hybrid":
            continue
        _, mistaken = reference(directory, prompts[name], mistake)
        assert difference(mistaken.tolist(), expected) > 4 * TOLERANCE["vllm", name], mistake


@pytest.mark.parametrize(
    ("name", "recipe", "options"),
    [
        ("smollm2", "rtn", {"group_size": 128}),
        ("hybrid", "rtn", OWN_BITS),
        ("hybrid", "rtn", {"symmetric": False, "exclude": [r"layers\.1\.mlp"]}),
        ("hybrid", "hlwq-v7", {"desc_act": True, "calibration": CALIBRATION}),
        ("smollm2", "gptq", {"desc_act": True, "calibration": CALIBRATION}),
        ("experts", "best", {"calibration": CALIBRATION}),
    ],
)
def test_gptqmodel_decodes_the_same_weights(
    name: str, recipe: str, options: dict[str, Any], models: dict[str, Path], tmp_path: Path, run_engine: RunEngine
) -> None:
    directory = tmp_path / "quantized"
    hlwq.quantize(models[name], directory, recipe, **options)
    theirs = load_file(run_engine("gptqmodel", "gptqmodel_weights.py", directory, suffix=".safetensors"))
    ours = DecodedCheckpoint(directory)
    assert set(theirs) == set(ours.quantized_modules())
    for module, weight in theirs.items():
        assert torch.equal(weight, ours.read(f"{module}.weight").to(weight.dtype)), module


def test_vllm_reads_the_rules_of_experts_as_meant(
    models: dict[str, Path], tmp_path: Path, run_engine: RunEngine
) -> None:
    directory = tmp_path / "quantized"
    hlwq.quantize(models["experts"], directory, "rtn")
    place = "language_model.model.layers.2.mlp."
    expected = {
        **dict.fromkeys((f"{place}experts", f"{place}shared_expert.gate_up_proj", f"{place}experts.3.up_proj"), True),
        **dict.fromkeys((f"{place}gate", f"{place}shared_expert_gate", "visual.blocks.0.attn.qkv", "lm_head"), False),
    }
    output = run_engine("vllm", "vllm_rules.py", directory, list(expected))
    assert {name: rule is not False for name, rule in output["rules"].items()} == expected


def test_vllm_reads_the_dynamic_rules_as_meant(tmp_path: Path, run_engine: RunEngine) -> None:
    directory = tmp_path / "quantized"
    hlwq.quantize(bundled_model(), directory, "rtn", exclude=[r"layers\.1\.mlp"])
    decoded = DecodedCheckpoint(directory)
    layout = describe(decoded.config, decoded.tensors)
    quantized = set(decoded.quantized_modules())
    expected: dict[str, bool] = {"lm_head": False, "visual.blocks.0.attn.qkv": False}
    for index, layer in enumerate(layout.layers):
        for matrix in layer.matrices():
            fused = f"language_model.model.layers.{index}.{matrix.fused or matrix.name}"
            expected[fused] = layout.layer_prefix(index) + matrix.name in quantized
    assert not expected["language_model.model.layers.0.linear_attn.in_proj_ba"]
    assert not expected["language_model.model.layers.1.mlp.gate_up_proj"]
    assert expected["language_model.model.layers.0.linear_attn.in_proj_qkvz"]
    output = run_engine("vllm", "vllm_rules.py", directory, list(expected))
    assert {name: rule is not False for name, rule in output["rules"].items()} == expected


@pytest.mark.parametrize("name", ["smollm2", "hybrid"])
def test_vllm_reads_the_config_groups_as_meant(
    name: str, models: dict[str, Path], tmp_path: Path, run_engine: RunEngine
) -> None:
    directory = tmp_path / "quantized"
    options: dict[str, Any] = {"group_size": 128, "symmetric": False, "exclude": [r"layers\.1\.mlp"]}
    hlwq.quantize(models[name], directory, "rtn", format="compressed-tensors", **options)
    decoded = DecodedCheckpoint(directory)
    layout = describe(decoded.config, decoded.tensors)
    expected: dict[str, list[Any] | None] = {"lm_head": None, "visual.blocks.0.attn.qkv": None}
    if name == "smollm2":
        del expected["visual.blocks.0.attn.qkv"]
    for index, layer in enumerate(layout.layers):
        for matrix in layer.matrices():
            prefix = layout.layer_prefix(index)
            module = prefix.replace("model.language_model.", "language_model.model.") + (matrix.fused or matrix.name)
            scheme = decoded.scheme_of(f"{prefix}{matrix.name}.weight")
            expected[module] = [scheme.bits, scheme.group_size, scheme.symmetric] if scheme else None
    sizes = {scheme[1] for scheme in expected.values() if scheme}
    assert sizes == ({64, 128} if name == "smollm2" else {128})
    assert run_engine("vllm", "vllm_schemes.py", directory, list(expected)) == expected


def test_vllm_finds_the_group_size_of_each_module(
    models: dict[str, Path], tmp_path: Path, run_engine: RunEngine
) -> None:
    directory = tmp_path / "quantized"
    hlwq.quantize(models["smollm2"], directory, "rtn", group_size=128)
    names = ["model.layers.3.self_attn.qkv_proj", "model.layers.3.mlp.gate_up_proj", "model.layers.3.mlp.down_proj"]
    output = run_engine("vllm", "vllm_rules.py", directory, names)
    assert output["group_sizes"] == dict(zip(names, [64, 64, 128], strict=True))


@pytest.mark.parametrize("name", ["smollm2", "hybrid"])
def test_mlx_grid_is_that_of_mlx_lm_convert(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    python = engine_python("mlx")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    hlwq.quantize(models[name], ours, "rtn", format="mlx")
    command = [str(python), "-m", "mlx_lm", "convert", "--hf-path", str(models[name]), "--mlx-path", str(theirs), "-q"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    section = json.loads((theirs / "config.json").read_text())["quantization"]
    assert section == json.loads((ours / "config.json").read_text())["quantization"]
    source, mine, peer = DecodedCheckpoint(models[name]), DecodedCheckpoint(ours), DecodedCheckpoint(theirs)
    for module in mine.quantized_modules():
        weight = source.read(f"{module}.weight").float()
        errors = [float((each.read(f"{module}.weight") - weight).square().sum()) for each in (mine, peer)]
        assert errors[0] <= errors[1] * 1.0001, module


def test_transformers_loads_dense_as_it_is(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    directory = tmp_path / "dense"
    hlwq.quantize(bundled_model(), directory, "hlwq", format="dense")
    tokens = torch.arange(40, 80)[None]
    text = AutoModelForCausalLM.from_pretrained(directory)
    wrapped = AutoModelForImageTextToText.from_pretrained(directory)
    with torch.inference_mode():
        assert torch.equal(text(input_ids=tokens).logits, wrapped(input_ids=tokens).logits)
