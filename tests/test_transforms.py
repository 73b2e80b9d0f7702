"""Rotated compressed-tensors files: what they say, how they are read, and what transformers makes of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILY_NAMES, make_checkpoint
from safetensors.torch import load_file, save_file

import hlwq
from hlwq.check import check_directory
from hlwq.decoded import DecodedCheckpoint
from hlwq.demo import bundled_model
from hlwq.errors import CheckpointError, HlwqWarning, UnsupportedError
from hlwq.formats.transforms import REFUSAL, SGLANG_REFUSAL
from hlwq.hadamard import hadamard_matrix
from hlwq.usage import commands

pytestmark = pytest.mark.filterwarnings("ignore::hlwq.errors.HlwqWarning")
FORMAT = "compressed-tensors"


def rotated(path: Path, family: str = "llama", **options: Any) -> Path:
    source = make_checkpoint(path / "source", family)
    hlwq.quantize(source, path / "out", "rtn", format=FORMAT, basis="hadamard", **options)
    return path / "out"


def section(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return found


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((path / "config.json").read_text())
    edit(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("block_size", [None, 32, 256])
def test_what_is_read_is_what_was_rounded(family: str, block_size: int | None, tmp_path: Path) -> None:
    options = {"basis": "hadamard", "block_size": block_size, "group_size": 64}
    out = rotated(tmp_path, family, block_size=block_size, group_size=64)
    hlwq.quantize(tmp_path / "source", tmp_path / "dense", "rtn", format="dense", symmetric=True, **options)
    ours, dense = DecodedCheckpoint(out), DecodedCheckpoint(tmp_path / "dense")
    leaves = {"qwen2": ("q_proj", "k_proj", "v_proj"), "qwen3_5": ("in_proj_qkv", "in_proj_z")}
    kept = leaves.get(family.removesuffix("_text"), ())
    for module in ours.quantized_modules():
        scheme = ours.scheme_of(f"{module}.weight")
        assert scheme is not None
        assert (scheme.block_size is None) == module.endswith(kept or "nothing"), module
        if scheme.block_size is not None:
            # Scales are rounded to other dtypes for a dense file, by a 500th at most.
            expected = dense.read(f"{module}.weight").float()
            error = (ours.read(f"{module}.weight") - expected).norm() / expected.norm()
            assert error < 0.02, module


def test_each_size_of_blocks_has_a_group_and_one_matrix(tmp_path: Path) -> None:
    out = rotated(tmp_path, block_size=256)  # the widths are 128 and 256
    groups = section(out)["transform_config"]["config_groups"]
    assert {name: group["head_dim"] for name, group in groups.items()} == {"R128": 128, "R256": 256}
    assert all(group["type"] == "hadamard" for group in groups.values())
    matrices = {name: each for name, each in load_file(out / "model.safetensors").items() if "_input" in name}
    assert set(matrices) == {
        "model.layers.0.mlp.gate_proj.R128_input.weight",
        "model.layers.0.mlp.down_proj.R256_input.weight",
    }
    for matrix in matrices.values():
        assert matrix.dtype == torch.bfloat16
        assert torch.equal(matrix.float() / len(matrix) ** 0.5, hadamard_matrix(len(matrix)))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_package_itself_finds_the_rotated_modules_and_no_others(family: str, tmp_path: Path) -> None:
    match = pytest.importorskip("compressed_tensors.utils.match", reason="compressed-tensors is not installed")
    from compressed_tensors.transform import TransformConfig

    out = rotated(tmp_path, family)
    config = TransformConfig.model_validate(section(out)["transform_config"])
    decoded = DecodedCheckpoint(out)
    quantized = {name: decoded.scheme_of(f"{name}.weight") for name in decoded.quantized_modules()}
    (scheme,) = config.config_groups.values()
    (args,) = scheme.apply
    layer = torch.nn.Linear(1, 1)
    for name in (name.removesuffix(".weight") for name in decoded.tensors if name.endswith(".weight")):
        stored = quantized.get(name)
        expected = stored is not None and stored.block_size is not None
        kept = stored is None and match.is_match(name, layer, args.targets, args.ignore)
        assert kept or match.is_match(name, layer, args.targets, args.ignore) == expected, name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_5", "qwen3_5_text"])
def test_transformers_with_hlwq_computes_what_the_codes_say(family: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    out = rotated(tmp_path, family, block_size=256)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    decoded, tokens = DecodedCheckpoint(out), torch.arange(4, 40)[None]
    own = dense.state_dict()
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=tokens).logits
        for module in decoded.quantized_modules():
            own[f"{module.replace('.language_model', '')}.weight"].copy_(decoded.read(f"{module}.weight"))
        expected = dense(input_ids=tokens).logits
    assert (loaded - expected).norm() / expected.norm() < 1e-4


def test_transformers_with_hlwq_takes_the_matrices_of_the_file(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    out, tokens = rotated(tmp_path), torch.arange(4, 40)[None]
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=tokens).logits

        def set_type(section: dict[str, Any]) -> None:
            for group in section["transform_config"]["config_groups"].values():
                group["type"] = "random-hadamard"  # whose matrix cannot be made anew

        change(out, set_type)
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=tokens).logits
        assert torch.equal(loaded, expected)
        file = out / "model.safetensors"
        tensors = load_file(file)
        (name,) = (name for name in tensors if "_input" in name)
        tensors[name] = torch.eye(len(tensors[name])).bfloat16()
        save_file(tensors, file, metadata={"format": "pt"})
        assert not torch.allclose(
            AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=tokens).logits, expected
        )


def test_loading_options_of_transformers_go_along(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    out, tokens = rotated(tmp_path), torch.arange(4, 40)[None]
    hlwq.quantize(tmp_path / "source", tmp_path / "plain", "rtn", format=FORMAT)
    for path in (out, tmp_path / "plain"):
        given = CompressedTensorsConfig(dequantize=True)
        with torch.inference_mode():
            packed, dense = (
                AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)(input_ids=tokens).logits
                for options in ({}, {"quantization_config": given})
            )
        # Dequantized weights are rounded to bfloat16 on the way.
        assert (packed - dense).norm() / packed.norm() < 0.01


def test_the_command_for_transformers_imports_hlwq(tmp_path: Path) -> None:
    out = rotated(tmp_path)
    assert "import sys, hlwq;" in dict(commands(out, FORMAT))["transformers"]
    hlwq.quantize(tmp_path / "source", tmp_path / "plain", "rtn", format=FORMAT)
    assert "hlwq;" not in dict(commands(tmp_path / "plain", FORMAT))["transformers"]


def test_rotated_files_alone_have_what_sglang_refuses(tmp_path: Path) -> None:
    out = rotated(tmp_path)
    hlwq.quantize(tmp_path / "source", tmp_path / "plain", "rtn", format=FORMAT)
    for directory, refused in ((tmp_path / "plain", False), (out, True)):
        section = json.loads((directory / "config.json").read_text())["quantization_config"]
        assert (SGLANG_REFUSAL.items() <= section.items()) == refused


def test_transformers_without_hlwq_refuses(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    out = rotated(tmp_path)
    code = "import sys; from transformers import AutoModelForCausalLM as M; M.from_pretrained(sys.argv[1])"
    refused = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert REFUSAL in refused.stderr
    with_hlwq = subprocess.run([sys.executable, "-c", f"import hlwq; {code}", str(out)], check=False)
    assert with_hlwq.returncode == 0


def test_who_runs_a_rotated_file_is_told(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama")
    with pytest.warns(HlwqWarning, match="transformers after `import hlwq`"):
        hlwq.quantize(source, tmp_path / "out", "rtn", format=FORMAT, basis="hadamard")
    checks = check_directory(tmp_path / "out")
    assert all(each.passed for each in checks)
    assert {each.engine for each in checks if "rotate" in each.requirement} == {"vLLM", "transformers"}
    hlwq.quantize(source, tmp_path / "plain", "rtn", format=FORMAT)
    assert not any("rotate" in each.requirement for each in check_directory(tmp_path / "plain"))


def test_a_bias_on_a_rotated_layer_fails_the_check(tmp_path: Path) -> None:
    out = rotated(tmp_path, "qwen2")
    assert all(each.passed for each in check_directory(out))

    def rotate_all(section: dict[str, Any]) -> None:
        for group in section["transform_config"]["config_groups"].values():
            group["apply"][0]["targets"] = ["Linear"]

    change(out, rotate_all)
    (failing,) = {each.requirement for each in check_directory(out) if not each.passed}
    assert failing == "rotated are only inputs that it can rotate"


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(section: dict[str, Any]) -> None:
        *before, last = ("transform_config", *path)
        for key in before:
            section = section[key]
        section[last] = value

    return edit


GROUP = ("config_groups", "R128")


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda section: section.update(transform_config=[]), CheckpointError, "transform_config is .*not an object"),
        (_set("config_groups", value=3), CheckpointError, "config_groups is 3"),
        (_set(*GROUP, value="R"), CheckpointError, "R128 is"),
        (_set(*GROUP, "head_dim", value=12.5), CheckpointError, "head_dim is 12.5"),
        (_set(*GROUP, "head_dim", value=96), UnsupportedError, "blocks of a power of two"),
        (_set(*GROUP, "head_dim", value=0), UnsupportedError, "blocks of a power of two"),
        (_set(*GROUP, "head_dim", value=1 << 40), UnsupportedError, "blocks of a power of two"),
        (_set(*GROUP, "head_dim", value=64), UnsupportedError, "not Sylvester's"),
        (_set(*GROUP, "type", value=7), CheckpointError, "type is 7"),
        (_set(*GROUP, "randomize", value=True), UnsupportedError, "only rotations of inputs"),
        (_set(*GROUP, "apply", value={}), CheckpointError, "apply is"),
        (_set(*GROUP, "apply", value=[3]), CheckpointError, "list of objects"),
        (_set(*GROUP, "apply", value=[{"location": "output", "targets": []}]), UnsupportedError, "not output"),
        (_set(*GROUP, "apply", value=[{"location": "input", "targets": 3}]), CheckpointError, "targets is 3"),
        (_set(*GROUP, "apply", value=[{"location": "input", "targets": ["re:("]}]), CheckpointError, "not a regular"),
        (
            _set(*GROUP, "apply", value=2 * [{"location": "input", "targets": ["Linear"]}]),
            CheckpointError,
            "do not fit",
        ),
    ],
)
def test_transforms_that_make_no_sense_are_one_line(
    edit: Callable[[dict[str, Any]], None], error: type[Exception], message: str, tmp_path: Path
) -> None:
    out = rotated(tmp_path, group_size=128)
    change(out, edit)
    with pytest.raises(error, match=message) as raised:
        DecodedCheckpoint(out)
    assert "\n" not in str(raised.value)


def test_weights_that_are_rotated_in_the_file_are_read_as_they_are(tmp_path: Path) -> None:
    out = rotated(tmp_path)
    before = DecodedCheckpoint(out).read("model.layers.0.mlp.up_proj.weight")

    def add(section: dict[str, Any]) -> None:
        fused = {"type": "hadamard", "apply": [{"location": "weight_output", "targets": ["Linear"]}]}
        section["transform_config"]["config_groups"]["fused"] = fused

    change(out, add)
    assert torch.equal(DecodedCheckpoint(out).read("model.layers.0.mlp.up_proj.weight"), before)


def test_what_a_run_cannot_rotate_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", intermediate_size=65536)
    with pytest.raises(UnsupportedError, match="exceeds the 32768 columns"):
        hlwq.quantize(source, tmp_path / "out", "rtn", format=FORMAT, basis="hadamard", block_size=65536)


@pytest.mark.parametrize("basis", ["identity", "hadamard"])
def test_an_output_head_is_stored_as_it_is_and_never_rotated(basis: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "llama")
    options: dict[str, Any] = {"format": FORMAT, "basis": basis}
    hlwq.quantize(source, tmp_path / "kept", "rtn", **options)
    result = hlwq.quantize(source, tmp_path / "out", "rtn", include="lm_head", **options)
    assert all(check.passed for check in result.checks)
    assert result.nbytes < hlwq.inspect(tmp_path / "kept").nbytes
    scheme = DecodedCheckpoint(tmp_path / "out").scheme_of("lm_head.weight")
    assert scheme is not None
    assert scheme.block_size is None
    assert 0 < result.relative_errors["lm_head"] < 0.02
    config = section(tmp_path / "out")
    assert not any("lm_head" in pattern for pattern in config["ignore"])
    assert any("lm_head" in target for group in config["config_groups"].values() for target in group["targets"])


def test_an_output_head_is_calibrated(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "llama", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, source / name)
    options: dict[str, Any] = {"calibration": "embedded", "samples": 4, "sequence_length": 64, "generated_samples": 0}
    result = hlwq.quantize(source, tmp_path / "out", "best", format=FORMAT, include="lm_head", **options)
    assert all(check.passed for check in result.checks)
    assert 0 < result.output_errors["lm_head"] < result.relative_errors["lm_head"]


def test_an_output_head_that_is_the_embedding_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "llama", tie_word_embeddings=True)
    with pytest.raises(UnsupportedError, match="compressed-tensors cannot hold a quantized embedding or output head"):
        hlwq.quantize(source, tmp_path / "out", "rtn", format=FORMAT, include_embeddings=True)
    untied = make_checkpoint(tmp_path / "untied", "llama")
    with pytest.raises(UnsupportedError, match=r"cannot hold a quantized embedding that .* or `include='lm_head'`"):
        hlwq.quantize(untied, tmp_path / "out", "rtn", format=FORMAT, include_embeddings=True)
