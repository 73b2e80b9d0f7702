from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

import hlwq
from hlwq import (
    CheckpointError,
    Hadamard,
    HlwqError,
    Identity,
    LloydGrid,
    Nearest,
    Recipe,
    Request,
    RequestError,
    Stage,
    UniformGrid,
)
from hlwq.containers import Reader, TensorSpec
from hlwq.decoded import DecodedCheckpoint
from hlwq.files import hash_file
from hlwq.pipeline import run_plan
from hlwq.quantize import convert, plan_for, quantize


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "model"
    make_checkpoint(path, "llama")
    return path


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid") / "model"
    make_checkpoint(path, "qwen3_5")
    return path


def weights_of(directory: Path) -> dict[str, str]:
    return {file.name: hash_file(file) for file in directory.glob("*.safetensors")}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_5", "qwen3_5_text"])
@pytest.mark.parametrize(
    ("recipe", "format_name"),
    [("rtn", "gptq"), ("rtn", "compressed-tensors"), ("rtn", "mlx"), ("hlwq", "hlwq"), ("hlwq", "dense")],
)
def test_every_family_in_every_format(family: str, recipe: str, format_name: str, tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    make_checkpoint(source, family)
    result = quantize(source, out, recipe, format=format_name)
    original, decoded = DecodedCheckpoint(source), DecodedCheckpoint(out)
    planned = {tensor.spec.name: tensor for tensor in result.plan.tensors}
    assert set(decoded.tensors) == {name for name, tensor in planned.items() if tensor.action != "drop"}
    for name in decoded.tensors:
        before, after = original.read(name), decoded.read(name)
        if planned[name].action == "copy":
            assert torch.equal(before, after)
        else:
            error = (before.float() - after.float()).square().sum() / before.float().square().sum()
            assert 0 < error < 0.02


def test_predicted_bytes_are_the_bytes_written(llama: Path, tmp_path: Path) -> None:
    _, plan = plan_for(Request.of(llama, "rtn"))
    quantize(llama, tmp_path / "out", "rtn")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert plan.output_bytes() == sum(tensor.nbytes for tensor in tensors.values())


def test_side_files_are_copied_byte_for_byte(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    make_checkpoint(source, "llama")
    oddities = {
        "chat_template.jinja": b"{{ '\r\n' }}\n\n",
        "merges.txt": "café\n".encode("latin-1"),
        "generation_config.json": b'{"temperature":0.60}',
        "LICENSE": b"mine",
        "additional_chat_templates/tools.jinja": b"{{ tools }}",
    }
    for name, content in oddities.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    quantize(source, tmp_path / "out", "rtn")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in oddities} == oddities


def test_manifest_says_how_it_was_made_and_how_far_off_it_is(llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "out", "hlwq", bits=4)
    manifest = json.loads((tmp_path / "out" / "hlwq.json").read_text())
    assert (manifest["recipe"], manifest["stages"][-1]["grid"]["bits"]) == ("hlwq", 4)
    assert manifest["stages"] == [
        {
            "grid": {"name": "lloyd", "bits": 4, "group_size": 128},
            "basis": {"name": "hadamard", "block_size": None},
            "solver": {"name": "nearest"},
        }
    ]
    recorded = {name: each["relative_squared_error"] for name, each in manifest["modules"].items()}
    measured = {
        tensor.name.removesuffix(".weight"): tensor.relative_error
        for tensor in hlwq.inspect(tmp_path / "out", against=llama).tensors
        if tensor.bits
    }
    assert recorded == pytest.approx(measured, rel=1e-5)


OPTIONS: list[dict[str, object]] = [
    {"bits": 8},
    {"group_size": 32},
    {"symmetric": False},
    {"scale_method": "absmax"},
    {"include": [r"in_proj_a|in_proj_b"], "format": "mlx"},
    {"exclude": [r"layers\.0\.mlp"]},
    {"include_embeddings": False, "format": "mlx"},
    {"format": "mlx"},
    {"format": "dense"},
    {"max_shard_size": 100_000},
    {"format": "dense", "basis": "hadamard"},
    {"format": "dense", "basis": "hadamard", "block_size": 32},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_option_changes_the_output(options: dict[str, object], hybrid: Path, tmp_path: Path) -> None:
    """One option is what differs: `block_size`, else what is not the format, else the format."""
    changed = min(options, key=lambda name: (name != "block_size", name == "format"))
    base = {name: value for name, value in options.items() if name != changed}
    quantize(hybrid, tmp_path / "default", "rtn", **base)
    quantize(hybrid, tmp_path / "changed", "rtn", **options)
    assert weights_of(tmp_path / "changed") != weights_of(tmp_path / "default")


def test_a_chain_rounds_what_the_stage_before_decoded(llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "chain", "hlwq-int4")
    name = "model.layers.0.mlp.down_proj.weight"
    weight = Reader(llama).read(name).float()
    first = Nearest().solve(weight, LloydGrid(5, 128), Hadamard(128)).dequantize()
    grid = UniformGrid(4, 64, storage=(torch.bfloat16, torch.float16))
    second = Nearest().solve(first, grid, Identity()).dequantize()
    assert torch.equal(DecodedCheckpoint(tmp_path / "chain").read(name), second)


def test_a_recipe_of_ones_own(llama: Path, tmp_path: Path) -> None:
    stages = (Stage(UniformGrid(8, 32)), Stage(LloydGrid(3, 64), Hadamard()), Stage(UniformGrid(4, 32)))
    result = quantize(llama, tmp_path / "out", Recipe("mine", "three roundings", stages, ("gptq",)))
    assert {scheme.group_size for scheme in result.plan.contents().quantized.values()} == {32}


@pytest.mark.parametrize("format_name", ["mlx", "gptq", "compressed-tensors"])
def test_converting_equals_the_chain_from_the_source(format_name: str, hybrid: Path, tmp_path: Path) -> None:
    quantize(hybrid, tmp_path / "hlwq", "hlwq", include_embeddings=False)
    convert(tmp_path / "hlwq", tmp_path / "converted", format_name)
    recipe = "hlwq-mlx" if format_name == "mlx" else "hlwq-int4"
    quantize(hybrid, tmp_path / "chain", recipe, format=format_name, include_embeddings=False)
    assert weights_of(tmp_path / "converted") == weights_of(tmp_path / "chain")


def test_a_conversion_can_leave_matrices_decoded(hybrid: Path, tmp_path: Path) -> None:
    quantize(hybrid, tmp_path / "made", "hlwq")
    convert(tmp_path / "made", tmp_path / "whole", "gptq")
    convert(tmp_path / "made", tmp_path / "some", "gptq", exclude=r"layers\.0\.mlp")
    kept = {f"model.language_model.layers.0.mlp.{each}_proj.weight" for each in ("gate", "up", "down")}
    assert kept == Reader(tmp_path / "some").tensors.keys() - Reader(tmp_path / "whole").tensors.keys()


@pytest.mark.parametrize(
    ("format_name", "options", "message"),
    [
        ("gptq", {"calibrate": True}, "`calibrate` is for quantizing, and a conversion only rounds"),
        ("gptq", {"damping": 0.1}, "`damping` is for quantizing, and a conversion only rounds"),
        ("gptq", {"desc_act": True}, "`desc_act` is for quantizing, and a conversion only rounds"),
        ("dense", {"bits": 4}, "`bits` changes nothing: to format dense"),
        ("dense", {"exclude": ["mlp"]}, "`exclude` changes nothing: to format dense"),
        ("gptq", {"exclude": ["nothing"]}, "`exclude` 'nothing' matches no tensor"),
        ("hlwq", {}, "is in format hlwq already"),
        (None, {}, "There is no format None"),
    ],
)
def test_a_conversion_that_cannot_be_is_refused(
    format_name: Any, options: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    quantize(llama, tmp_path / "made", "hlwq")
    with pytest.raises(HlwqError, match=message):
        convert(tmp_path / "made", tmp_path / "out", format_name, **options)
    assert not list(tmp_path.glob("out*"))


def test_converting_to_dense_equals_quantizing_to_dense(hybrid: Path, tmp_path: Path) -> None:
    quantize(hybrid, tmp_path / "hlwq", "hlwq", exclude=["out_proj"], include_embeddings=False)
    convert(tmp_path / "hlwq", tmp_path / "converted", "dense")
    quantize(hybrid, tmp_path / "dense", "hlwq", format="dense", exclude=["out_proj"])
    assert weights_of(tmp_path / "converted") == weights_of(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "converted" / "config.json").read_text())


def test_an_interrupted_run_resumes_to_identical_bytes(hybrid: Path, tmp_path: Path) -> None:
    quantize(hybrid, tmp_path / "whole", "hlwq")

    class Killed(Exception):
        pass

    def kill_halfway(done: int, total: int, item: str) -> None:
        if done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        quantize(hybrid, tmp_path / "resumed", "hlwq", progress=kill_halfway)
    assert not (tmp_path / "resumed").exists()
    worked_on: list[str] = []
    quantize(hybrid, tmp_path / "resumed", "hlwq", progress=lambda done, total, item: worked_on.append(item))
    assert not any("language_model.layers.0." in item for item in worked_on)
    files = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "resumed").iterdir()} == files


def test_an_interrupted_run_refuses_other_arguments(hybrid: Path, tmp_path: Path) -> None:
    def kill(done: int, total: int, item: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(hybrid, tmp_path / "out", "hlwq", progress=kill)
    with pytest.raises(RequestError, match=r"stages\[0\]\.grid\.bits was 5, now it is 3"):
        quantize(hybrid, tmp_path / "out", "hlwq", bits=3, progress=kill)


def test_a_group_size_that_does_not_divide_falls_back_and_is_recorded(tmp_path: Path) -> None:
    source = tmp_path / "model"
    make_checkpoint(source, "llama", hidden_size=192, num_attention_heads=3, num_key_value_heads=3)
    result = quantize(source, tmp_path / "out", "hlwq")
    sizes = {module: scheme.group_size for module, scheme in result.plan.contents().quantized.items()}
    assert sizes["model.layers.0.self_attn.q_proj"] == 64
    assert sizes["model.layers.0.mlp.down_proj"] == 128
    assert result.plan.remarks == ("group 64 where in_features is 192, which 128 does not divide",)
    decoded = DecodedCheckpoint(tmp_path / "out")
    stored = {module: decoded.scheme_of(f"{module}.weight") for module in decoded.quantized_modules()}
    reread = {module: scheme.group_size for module, scheme in stored.items() if scheme}
    assert reread == sizes


def tie(source: Path, head: str) -> None:
    """Say that the head is the embedding, and store `head` as it."""
    make_checkpoint(source, "llama", tie_word_embeddings=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors[head].clone()}, source / "model.safetensors")


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    tie(tmp_path / "model", "lm_head.weight")
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to the embedding, but the two differ") as refused:
        quantize(tmp_path / "model", tmp_path / "out", "rtn")
    assert refused.value.tensor == "lm_head.weight"
    assert [each.name for each in tmp_path.iterdir()] == ["model"]  # neither OUT nor OUT.partial


@pytest.mark.parametrize("advice", ["Set tie_word_embeddings to false there", "delete the tensor"])
def test_what_the_refusal_of_a_tied_head_advises_works(advice: str, tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    tie(source, "lm_head.weight")
    with pytest.raises(CheckpointError, match=advice):
        quantize(source, out, "rtn")
    original = load_file(source / "model.safetensors")
    if advice == "delete the tensor":
        save_file({k: v for k, v in original.items() if k != "lm_head.weight"}, source / "model.safetensors")
    else:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert all(line.passed for line in quantize(source, out, "rtn").checks)
    written = load_file(out / "model.safetensors")
    assert ("lm_head.weight" in written) == (advice != "delete the tensor")
    if "lm_head.weight" in written:
        assert torch.equal(written["lm_head.weight"], original["lm_head.weight"])


def test_a_tied_head_is_dropped_with_a_reason(tmp_path: Path) -> None:
    source = tmp_path / "model"
    tie(source, "model.embed_tokens.weight")
    result = quantize(source, tmp_path / "out", "rtn")
    dropped = [tensor for tensor in result.plan.tensors if tensor.action == "drop"]
    assert [tensor.spec.name for tensor in dropped] == ["lm_head.weight"]
    assert "tied" in dropped[0].reason
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


# The model's dtype


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize(
    ("recipe", "format_name", "part"),
    [
        ("rtn", "mlx", "scales"),
        ("rtn", "mlx", "biases"),
        ("rtn", "compressed-tensors", "weight_scale"),
        ("hlwq", "dense", "weight"),
    ],
)
def test_an_embedding_in_float32_does_not_make_the_model_so(
    recipe: str, format_name: str, part: str, stated: bool, tmp_path: Path
) -> None:
    source, out, embedding = make_checkpoint(tmp_path / "model", "llama"), tmp_path / "out", "model.embed_tokens.weight"
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors[embedding] = tensors[embedding].float() + 1e-5 * torch.rand(tensors[embedding].shape, generator=generator)
    save_file(dict(sorted(tensors.items(), key=lambda item: item[0] != embedding)), source / "model.safetensors")
    if not stated:
        config = json.loads((source / "config.json").read_text())
        del config["dtype"]
        (source / "config.json").write_text(json.dumps(config))
    result = quantize(source, out, recipe, format=format_name, include_embeddings=False)
    assert result.plan.dtype == "BF16"
    reader = Reader(out)
    kinds = {spec.dtype for name, spec in reader.tensors.items() if name.endswith(f"_proj.{part}")}
    assert kinds == {"BF16"}
    assert reader.tensors[embedding].dtype == "F32"
    assert torch.equal(reader.read(embedding), tensors[embedding])
    assert {spec.dtype for spec in DecodedCheckpoint(out).tensors.values() if "_proj" in spec.name} == {"BF16"}


def test_a_copy_goes_by_the_name_and_dtype_that_the_plan_gives_it(tmp_path: Path) -> None:
    """A family may store its odds and ends otherwise than a format does."""
    source, out = make_checkpoint(tmp_path / "model", "llama"), tmp_path / "out"
    tensors, old, new = load_file(source / "model.safetensors"), "model.extra.weight", "model.renamed.values"
    tensors[old] = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file(tensors, source / "model.safetensors")
    reader, plan = plan_for(Request.of(source, "rtn"))
    (extra,) = (tensor for tensor in plan.tensors if tensor.spec.name == old)
    moved = replace(extra, outputs=(TensorSpec(new, "F32", (6, 8)),))
    plan = replace(plan, tensors=tuple(moved if tensor is extra else tensor for tensor in plan.tensors))
    result = run_plan(reader, plan, out, origin={})
    written = load_file(out / "model.safetensors")
    assert old not in written
    assert written[new].dtype == torch.float32
    assert torch.equal(written[new], tensors[old].float())
    assert all(line.passed for line in result.checks)
    for tensor in plan.tensors:
        if tensor.action == "copy" and tensor is not moved:
            assert torch.equal(written[tensor.spec.name], tensors[tensor.spec.name])
