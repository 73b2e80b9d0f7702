"""Calibrated quantization as a whole: every family, format and option, and runs that were killed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILY_NAMES, make_checkpoint
from safetensors.torch import load_file, save_file

import hlwq
from hlwq import (
    Calibration,
    CheckpointError,
    Gptq,
    Hadamard,
    HlwqError,
    LloydGrid,
    Recipe,
    Request,
    RequestError,
    Stage,
    UniformGrid,
    UnsupportedError,
)
from hlwq.containers import Reader
from hlwq.decoded import DecodedCheckpoint
from hlwq.demo import bundled_model, held_out_text
from hlwq.errors import HlwqWarning
from hlwq.evaluate.model import load_model
from hlwq.files import hash_file, read_json
from hlwq.quantize import QuantizeResult, plan_for, quantize

DATA = Calibration(("embedded",), samples=12, sequence_length=64)


CHAIN = Recipe(
    "mine",
    "HLWQ and then GPTQ",
    (Stage(LloydGrid(2, 64), Hadamard()), Stage(UniformGrid(4, 64), solver=Gptq())),
    ("gptq",),
)


def make_model(path: Path, family: str, **overrides: Any) -> Path:
    """A random checkpoint with the bundled model's tokenizer, so that text can be run through it."""
    make_checkpoint(path, family, vocab_size=2048, **overrides)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, path / name)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama") / "model", "llama")


def weights_of(directory: Path) -> dict[str, str]:
    return {file.name: hash_file(file) for file in directory.glob("*.safetensors")}


def mean(errors: dict[str, float]) -> float:
    return sum(errors.values()) / len(errors)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    ("recipe", "format_name", "options"),
    [
        ("gptq", "gptq", {}),
        ("foem", "dense", {}),
        ("hlwq-v7", "mlx", {}),
        ("hlwq", "hlwq", {"calibrate": True, "bits": 4}),
    ],
)
def test_every_family_in_every_format(
    family: str, recipe: str, format_name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    source, out = make_model(tmp_path / "model", family), tmp_path / "out"
    result = quantize(source, out, recipe, format=format_name, calibration=DATA, **options)
    original, decoded = DecodedCheckpoint(source), DecodedCheckpoint(out)
    assert set(result.output_errors) == {tensor.module for tensor in result.plan.quantized() if tensor.calibrated}
    for tensor in result.plan.tensors:
        before, after = original.read(tensor.spec.name), decoded.read(tensor.spec.name)
        if tensor.action == "copy":
            assert torch.equal(before, after)
        else:
            squared = (before.float() - after.float()).square().sum() / before.float().square().sum()
            assert float(squared) == pytest.approx(result.relative_errors[tensor.module], rel=1e-3)
            assert not tensor.calibrated or 0 < result.output_errors[tensor.module] < 0.1
    manifest = read_json(out / "hlwq.json")
    assert manifest["calibration"]["tokens_sha256"]
    assert manifest["modules"].keys() == result.relative_errors.keys()
    assert not list(out.glob("*activations*"))


def output_error_on(source: Path, directory: Path, module: str, inputs: torch.Tensor) -> float:
    before, after = (DecodedCheckpoint(each).read(f"{module}.weight").float() for each in (source, directory))
    return float((inputs @ (before - after).T).square().sum() / (inputs @ before.T).square().sum())


def test_it_is_worth_the_trouble(tmp_path: Path) -> None:
    """On the bundled model: the outputs of the first matrices, on other text, change less than after rounding."""
    source = bundled_model()
    quantize(source, tmp_path / "nearest", "rtn")
    quantize(source, tmp_path / "calibrated", "gptq", group_size=64, calibration=Calibration(("embedded",), 32, 256))
    model, tokenizer = load_model(source, dtype=torch.float32)
    tokens = torch.tensor(tokenizer(held_out_text().read_text(encoding="utf-8")[:20000])["input_ids"])[:2048]
    seen: list[torch.Tensor] = []
    name = "linear_attn.in_proj_qkv"
    module = model.get_decoder().layers[0].get_submodule(name)
    module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=tokens[None])
    path = f"model.language_model.layers.0.{name}"
    calibrated, nearest = (
        output_error_on(source, tmp_path / each, path, seen[0]) for each in ("calibrated", "nearest")
    )
    assert calibrated < 0.8 * nearest


@pytest.mark.parametrize(
    "change",
    [
        {"foem_beta": 0.0},
        {"gptaq_alpha": 0.25},
        {"mismatch": 0.5},
        {"stream_change": 0.5},
        {"damping": 0.05},
        {"scale_candidates": 2},
        {"sweeps": 1},
        {"desc_act": True},
        {"symmetric": False},
        {"scale_method": "absmax"},
        {"group_size": 32},
        {"bits": 8},
        {"calibration": Calibration(("embedded",), 12, 64, seed=1)},
        {"calibration": Calibration(("embedded",), 13, 64)},
        {"calibration": Calibration(("embedded",), 12, 65)},
    ],
    ids=lambda change: "-".join(map(str, change)),
)
def test_each_option_changes_the_file(change: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "plain", "hlwq-v7", calibration=DATA)
    quantize(llama, tmp_path / "changed", "hlwq-v7", **{"calibration": DATA, **change})
    assert weights_of(tmp_path / "plain") != weights_of(tmp_path / "changed")


def test_offloading_changes_nothing_but_memory(llama: Path, tmp_path: Path) -> None:
    spilling = Calibration(DATA.sources, DATA.samples, DATA.sequence_length, offload_activations=True)
    quantize(llama, tmp_path / "memory", "hlwq-v7", gptaq_alpha=0.25, calibration=DATA)
    quantize(llama, tmp_path / "disk", "hlwq-v7", gptaq_alpha=0.25, calibration=spilling)
    assert weights_of(tmp_path / "memory") == weights_of(tmp_path / "disk")


def test_batches_give_the_same_model_but_for_rounding(llama: Path, tmp_path: Path) -> None:
    batched = Calibration(DATA.sources, DATA.samples, DATA.sequence_length, batch_size=5)
    together = quantize(llama, tmp_path / "together", "gptq", calibration=DATA)
    apart = quantize(llama, tmp_path / "apart", "gptq", calibration=batched)
    for module, error in together.output_errors.items():
        assert apart.output_errors[module] == pytest.approx(error, rel=0.05)
    assert read_json(tmp_path / "apart" / "hlwq.json")["calibration"]["batch_size"] == 5


def test_desc_act_is_said_in_the_file_and_to_the_user(llama: Path, tmp_path: Path) -> None:
    with pytest.warns(HlwqWarning, match="vLLM 0.32 and later refuse `desc_act`"):
        result = quantize(llama, tmp_path / "out", "gptq", desc_act=True, calibration=DATA)
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["desc_act"] is True
    assert {line.engine for line in result.checks if not line.passed} == {"vLLM"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("recipe", "format_name"), [("hlwq-v7", "mlx"), ("best", "hlwq")])
def test_the_head_is_calibrated_and_the_layers_see_the_embedding_as_it_is_written(
    tied: bool, recipe: str, format_name: str, tmp_path: Path
) -> None:
    source = make_model(tmp_path / "model", "llama", tie_word_embeddings=tied)
    options: dict[str, Any] = {"format": format_name, "calibration": DATA}
    plain = quantize(source, tmp_path / "plain", recipe, include_embeddings=False, **options)
    coarse = quantize(source, tmp_path / "coarse", recipe, **options)
    head = "model.embed_tokens" if tied else "lm_head"
    assert head in coarse.output_errors
    assert coarse.output_errors.keys() - plain.output_errors.keys() == {head}
    assert any("embedding is rounded to nearest" in remark for remark in coarse.plan.remarks) is not tied
    first = "model.layers.0.self_attn.q_proj"
    assert coarse.output_errors[first] != plain.output_errors[first]


@pytest.mark.parametrize("tied", [True, False])
def test_the_outputs_of_a_calibrated_head_change_less(tied: bool, tmp_path: Path) -> None:
    """On text that the model was not calibrated on, given the original's last hidden states."""
    source = make_model(tmp_path / "model", "qwen3", tie_word_embeddings=tied)
    data = Calibration(("embedded",), 64, 64)
    quantize(source, tmp_path / "calibrated", "hlwq-v7", format="mlx", bits=2, calibration=data)
    quantize(source, tmp_path / "nearest", "rtn", format="mlx", bits=2, group_size=64)
    model, tokenizer = load_model(source, dtype=torch.float32)
    text = held_out_text().read_text(encoding="utf-8")[:20000]
    tokens = torch.tensor(tokenizer(text)["input_ids"])[:2048]
    with torch.no_grad():
        states = model.get_decoder()(input_ids=tokens[None, :512]).last_hidden_state[0]
    head = "model.embed_tokens" if tied else "lm_head"
    calibrated, nearest = (output_error_on(source, tmp_path / each, head, states) for each in ("calibrated", "nearest"))
    assert calibrated < 0.9 * nearest


@pytest.mark.parametrize("tied", [True, False])
def test_the_original_s_own_embedding_is_what_the_layers_are_to_make_up_for(tied: bool, tmp_path: Path) -> None:
    """With an embedding of few bits, the first layers' inputs differ from the original's, and so do their codes."""
    source = make_model(tmp_path / "model", "llama", tie_word_embeddings=tied)
    options: dict[str, Any] = {"format": "mlx", "calibration": DATA, "bits": 3}
    quantize(source, tmp_path / "without", "hlwq-v7", **options)
    quantize(source, tmp_path / "with", "hlwq-v7", mismatch=1.0, **options)
    first = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(*(Reader(tmp_path / each).read(first) for each in ("without", "with")))


def test_heads_are_solved_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    whole = quantize(source, tmp_path / "whole", "hlwq-v7", format="mlx", calibration=DATA)
    monkeypatch.setattr(sys.modules["hlwq.plan"], "HEAD_WEIGHTS", 100 * 128)
    parts = quantize(source, tmp_path / "parts", "hlwq-v7", format="mlx", calibration=DATA)
    name = "model.embed_tokens"
    for errors in ("relative_errors", "output_errors"):
        assert getattr(parts, errors)[name] == pytest.approx(getattr(whole, errors)[name], rel=0.01)


def test_excluded_matrices_stay_and_the_rest_is_calibrated(llama: Path, tmp_path: Path) -> None:
    result = quantize(llama, tmp_path / "out", "gptq", exclude=[r"layers\.0\.mlp", "o_proj"], calibration=DATA)
    kept = set(result.plan.contents().kept)
    assert {"model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"} <= kept
    assert not kept & set(result.output_errors)


@pytest.mark.parametrize(
    ("recipe", "options", "argument", "said"),
    [
        ("rtn", {"calibration": DATA}, "calibration", "Calibration data changes nothing: recipe rtn rounds to nearest"),
        ("rtn", {"foem_beta": 0.1}, "foem_beta", "`foem_beta` changes nothing in recipe rtn"),
        ("rtn", {"desc_act": True}, "desc_act", "`desc_act` changes nothing in recipe rtn"),
        ("gptq", {"calibrate": True}, "calibrate", "`calibrate=True` changes nothing: recipe gptq is calibrated"),
        ("hlwq-mlx", {"calibrate": True}, "calibrate", "hlwq-mlx rounds twice"),
        ("gptq", {"calibrate": False}, "calibrate", "Recipe gptq is calibrated"),
        (CHAIN, {}, "recipe", "Only a single rounding can be calibrated"),
        (
            "gptq",
            {"calibration": Calibration(("embedded",), 2, 10_000)},
            "sequence_length",
            "exceeds the model's own limit of 512",
        ),
        ("gptq", {"foem_beta": 1.5}, "foem_beta", "`foem_beta` 1.5 must be between 0 and 1"),
        ("gptq", {"damping": 0.0}, "damping", "`damping` 0.0 must be between 1e-06 and 1"),
        ("gptq", {"desc_act": True, "format": "mlx"}, "desc_act", "format mlx has no place for `desc_act`"),
        ("hlwq", {"calibrate": True, "desc_act": True}, "desc_act", "format hlwq has no place for `desc_act`"),
    ],
)
def test_what_would_change_nothing_or_cannot_be_is_refused(
    recipe: str | Recipe, options: dict[str, Any], argument: str, said: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(HlwqError, match=said) as refused:
        quantize(llama, tmp_path / "out", recipe, **options)
    assert type(refused.value) is (UnsupportedError if "has no place" in said else RequestError)
    assert refused.value.argument == argument
    assert not list(tmp_path.iterdir())


def test_scattered_groups_of_a_rotated_basis_are_written_decoded(llama: Path, tmp_path: Path) -> None:
    """Format dense is the one that can: each column is decoded by its own group, and the row then rotated back."""
    options: dict[str, Any] = {"calibrate": True, "format": "dense", "bits": 4, "calibration": DATA}
    scattered = quantize(llama, tmp_path / "scattered", "hlwq", desc_act=True, **options)
    runs = quantize(llama, tmp_path / "runs", "hlwq", **options)
    assert weights_of(tmp_path / "scattered") != weights_of(tmp_path / "runs")
    measured = {
        tensor.name.removesuffix(".weight"): tensor.relative_error
        for tensor in hlwq.inspect(tmp_path / "scattered", against=llama).tensors
    }
    for module, error in scattered.relative_errors.items():
        assert error == pytest.approx(measured[module], rel=1e-3)
        assert scattered.output_errors[module] < 1.5 * runs.output_errors[module]


@pytest.mark.parametrize(
    "stage",
    [
        Stage(UniformGrid(4, 64), Hadamard(32), Gptq(foem_beta=0.2)),
        Stage(UniformGrid(4, 32, symmetric=False), Hadamard(256), Gptq(desc_act=True)),
        Stage(LloydGrid(4, 64), solver=Gptq(gptaq_alpha=0.25)),
        Stage(LloydGrid(4, 32), Hadamard(128), Gptq()),
    ],
    ids=["uniform, rotated", "scattered and rotated", "lloyd, plain", "lloyd, larger blocks"],
)
def test_any_grid_in_any_basis_is_calibrated_right(stage: Stage, llama: Path, tmp_path: Path) -> None:
    """In format dense, which says nothing of grids and bases, and so holds them all."""
    recipe = Recipe("mine", "", (stage,), ("dense",))
    result = quantize(llama, tmp_path / "out", recipe, calibration=DATA)
    rounded = Recipe("mine", "", (Stage(stage.grid, stage.basis),), ("dense",))
    nearest = quantize(llama, tmp_path / "nearest", rounded)
    measured = {
        tensor.name.removesuffix(".weight"): tensor.relative_error
        for tensor in hlwq.inspect(tmp_path / "out", against=llama).tensors
    }
    for module, error in result.relative_errors.items():
        assert error == pytest.approx(measured[module], rel=1e-3)
        assert error < 4 * nearest.relative_errors[module]
        assert result.output_errors[module] < nearest.relative_errors[module]


def test_a_plan_estimates_the_memory_of_the_calibration(llama: Path) -> None:
    _, plan = plan_for(Request.of(llama, "hlwq-v7"))
    few, many = (plan.peak_memory(Calibration(samples=n, sequence_length=512, batch_size=1)) for n in (10, 10_000))
    offloaded = plan.peak_memory(
        Calibration(samples=10_000, sequence_length=512, batch_size=1, offload_activations=True)
    )
    assert many - few == 9_990 * 512 * 128 * 2
    assert offloaded < few + 1


def test_too_little_memory_is_said_before_the_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["hlwq.pipeline"], "available_memory", lambda: 10**8)
    with pytest.warns(HlwqWarning, match=r"may need .* GB of memory, and 0\.1 GB are available\. Lower `batch_size`"):
        quantize(llama, tmp_path / "out", "gptq", calibration=DATA)


def test_a_run_with_other_samples_is_refused_and_the_difference_named(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt_after(1, llama, out)
    for change, said in (
        (
            {"calibration": Calibration(DATA.sources, DATA.samples, DATA.sequence_length, seed=3)},
            "calibration.seed was 0, now it is 3",
        ),
        ({"calibration": DATA, "foem_beta": 0.1}, r"stages\[0\].solver.foem_beta was 0.2, now it is 0.1"),
        ({"calibration": DATA, "group_size": 32}, r"stages\[0\].grid.group_size was 64, now it is 32"),
    ):
        with pytest.raises(RequestError, match=said):
            quantize(llama, out, "hlwq-v7", **change)
    quantize(llama, out, "hlwq-v7", calibration=DATA)


def test_an_edited_configuration_is_noticed(tmp_path: Path) -> None:
    source, out = make_model(tmp_path / "model", "llama"), tmp_path / "out"
    interrupt_after(1, source, out)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(RequestError, match=r"config\.rms_norm_eps was 1e-06, now it is 0.001"):
        quantize(source, out, "hlwq-v7", calibration=DATA)


def test_a_damaged_matrix_is_named_among_its_siblings(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", "llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.self_attn\.v_proj\.weight: .* NaN"):
        quantize(source, tmp_path / "out", "gptq", calibration=DATA)


@pytest.mark.parametrize(
    "options",
    [{}, {"gptaq_alpha": 0.25}, {"format": "mlx"}, {"format": "compressed-tensors", "basis": "hadamard"}],
    ids=str,
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "whole", "hlwq-v7", calibration=DATA, **options)
    interrupt_after(1, llama, tmp_path / "resumed", **options)
    said: list[str] = []
    quantize(
        llama,
        tmp_path / "resumed",
        "hlwq-v7",
        calibration=DATA,
        progress=lambda done, total, item: said.append(item),
        **options,
    )
    assert "catching up: layer 0" in said
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "resumed")
    assert read_json(tmp_path / "whole" / "hlwq.json") == read_json(tmp_path / "resumed" / "hlwq.json")


class Interrupted(Exception):
    pass


def interrupt_after(layers: int, source: Path, out: Path, **options: Any) -> QuantizeResult | None:
    def stop(done: int, total: int, item: str) -> None:
        if item.startswith(f"model.layers.{layers}."):
            raise Interrupted

    with pytest.raises(Interrupted):
        quantize(source, out, "hlwq-v7", calibration=DATA, progress=stop, **options)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [["hlwq-v7"], ["hlwq", "--calibrate", "--bits", "4"]], ids=lambda words: words[0])
def test_a_killed_run_goes_on_to_the_same_bytes(recipe: Sequence[str], tmp_path: Path) -> None:
    """SIGKILL: once before the work, and then whenever one more layer is recorded, until nothing is left to kill."""
    source = make_model(tmp_path / "model", "qwen3_5")
    command = [sys.executable, "-m", "hlwq.cli", "quantize", str(source)]
    options = ["--recipe", *recipe, "--calibration", "embedded", "--samples", "12", "--sequence-length", "64"]
    subprocess.run([*command, str(tmp_path / "whole"), *options], check=True, capture_output=True)
    out = tmp_path / "killed"
    journal = tmp_path / "killed.partial" / "journal.jsonl"
    kills = 0
    for layers in range(6):
        process = subprocess.Popen([*command, str(out), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            recorded = len(journal.read_text().splitlines()) if journal.is_file() else -1
            if recorded >= layers or (layers == 0 and (tmp_path / "killed.partial").exists()):
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.wait()
    if not out.exists():
        subprocess.run([*command, str(out), *options], check=True, capture_output=True)
    assert kills >= 3
    assert weights_of(tmp_path / "whole") == weights_of(out)
    same = [json.loads((each / "hlwq.json").read_text()) for each in (tmp_path / "whole", out)]
    assert same[0] == same[1]
    files = [{file.name for file in each.iterdir()} for each in (tmp_path / "whole", out)]
    assert files[0] == files[1]
