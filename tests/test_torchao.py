"""HLWQ before torchao's INT4, and what torchao and transformers make of it on a CPU."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from torch import nn

import hlwq
from hlwq import Hadamard, HlwqError, LloydGrid, Stage
from hlwq.demo import bundled_model
from hlwq.errors import HlwqWarning
from hlwq.evaluate.model import load_model
from hlwq.usage import commands
from hlwq.work import quantize_matrix

IDS = torch.arange(40, 90)[None]


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install 'hlwq[torchao]'")


def loaded() -> Any:
    """The bundled model, in bfloat16."""
    return load_model(bundled_model())[0]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def group_sizes(model: nn.Module) -> dict[str, int | None]:
    """The weights that share a scale, for each linear layer, or None if torchao has left it alone."""
    return {
        name: getattr(module.weight, "block_size", (None, None))[1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def test_the_matrices_that_hlwq_quantizes_are_quantized_as_torchao_would_hlwqs(torchao: Any) -> None:
    model, name = loaded(), "model.layers.0.mlp.down_proj"
    weight = model.get_parameter(f"{name}.weight").detach().clone()
    hlwq.torchao.quantize_(model)
    sizes = group_sizes(model)
    assert {module.rpartition(".")[2] for module, size in sizes.items() if size is None} == {
        "in_proj_a",
        "in_proj_b",
        "lm_head",
    }
    assert set(sizes.values()) == {None, 128}
    # The same weight in a layer of its own, by hlwq and torchao themselves.
    matrix, _ = quantize_matrix(weight, [Stage(LloydGrid(5, 128), Hadamard(128))], torch.device("cpu"))
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    linear.weight.data = matrix.dequantize(torch.bfloat16)
    config = torchao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=torchao.PerGroup(128), mapping_type=torchao.MappingType.ASYMMETRIC
    )
    torchao.quantize_(linear, config)
    assert torch.equal(model.get_parameter(f"{name}.weight").dequantize(), linear.weight.dequantize())


@pytest.mark.parametrize("options", [{"bits": None}, {"bits": 3}, {"block_size": 64}, {"group_size": 32}], ids=str)
def test_each_option_changes_the_result(options: dict[str, Any], torchao: Any) -> None:
    usual, other = loaded(), loaded()
    hlwq.torchao.quantize_(usual)
    hlwq.torchao.quantize_(other, **options)
    assert not torch.equal(logits(usual), logits(other))


def test_a_smaller_group_stands_in_where_the_wanted_one_does_not_divide(torchao: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=192, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4, vocab_size=96
    )
    model = LlamaForCausalLM(config)
    with pytest.warns(HlwqWarning) as caught:
        hlwq.torchao.quantize_(model)
    assert sorted(str(warning.message) for warning in caught if warning.category is HlwqWarning) == [
        f"{option} 64 where in_features is {width}, which 128 does not divide"
        for option in ("block_size", "group_size")
        for width in (192, 320)
    ]
    assert {name.rpartition(".")[2]: size for name, size in group_sizes(model).items()} == {
        **dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 64),
        "lm_head": None,
    }


def test_the_recipe_is_loaded_saved_and_loaded_again_by_transformers(torchao: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dense, saved = tmp_path / "dense", tmp_path / "saved"
    result = hlwq.quantize(bundled_model(), dense, "hlwq-torchao")
    assert result.plan.format.name == "dense"
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    config = hlwq.torchao.transformers_config(dense, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16, quantization_config=config)
    in_place = loaded()
    hlwq.torchao.quantize_(in_place)
    assert torch.equal(logits(model), logits(in_place))
    model.save_pretrained(saved)
    assert [file.suffix for file in saved.glob("model*")] == [".safetensors"]  # nothing pickled
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(logits(again), logits(model))
    plain = hlwq.torchao.transformers_config(dense, device="cpu", group_size=32)
    finer = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16, quantization_config=plain)
    assert not torch.equal(logits(finer), logits(model))


@pytest.mark.slow
def test_the_recipe_says_how_to_run_it(torchao: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hlwq.quantize(bundled_model(), out, "hlwq-torchao")
    ((engine, command),) = commands(out, "dense")
    assert engine == "torchao"
    python, *arguments = shlex.split(command)
    assert python == "python"
    assert str(out) in arguments
    made = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    assert made.stdout.strip()


def test_the_recipe_writes_hlwqs_decoded_weights(tmp_path: Path) -> None:
    hlwq.quantize(bundled_model(), tmp_path / "torchao", "hlwq-torchao")
    hlwq.quantize(bundled_model(), tmp_path / "hlwq", "hlwq", format="dense")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("torchao", "hlwq")]
    assert files[0] == files[1]
    assert [engine for engine, _ in commands(tmp_path / "hlwq", "dense")] == ["transformers", "vLLM"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda path: hlwq.torchao.quantize_(nn.Linear(4, 4)), "Linear has no configuration"),
        (lambda path: hlwq.torchao.transformers_config(path / "hlwq"), "quantized already"),
        (
            lambda path: hlwq.torchao.transformers_config(path / "odd"),
            r"down_proj: in_features is 72, which neither 128 nor a smaller one of 128, 64 and 32 divides",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(call: Callable[[Path], None], said: str, torchao: Any, tmp_path: Path) -> None:
    hlwq.quantize(bundled_model(), tmp_path / "hlwq", "hlwq")
    make_checkpoint(tmp_path / "odd", "llama", intermediate_size=72)
    with pytest.raises(HlwqError, match=said):
        call(tmp_path)


def nothing(model: nn.Module) -> None:
    """Leaves a model as it was loaded."""


def spoil(model: nn.Module) -> None:
    """Put a NaN into the last matrix."""
    model.get_parameter("model.layers.3.mlp.down_proj.weight").data[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("prepare", "options", "said"),
    [
        (nothing, {"group_size": 0}, "`group_size` is 0. It must be positive"),
        (nothing, {"block_size": 0}, "`block_size` is 0, which is no power of two"),
        (nothing, {"block_size": 96}, "`block_size` is 96, which is no power of two"),
        (nothing, {"bits": None, "block_size": 64}, "`block_size` changes nothing"),
        (nothing, {"bits": 40}, "bits"),
        (lambda model: hlwq.torchao.quantize_(model), {}, "is quantized already"),
        (lambda model: model.to("meta"), {}, "is not in memory"),
        (spoil, {}, "down_proj: it holds a value that is NaN"),
    ],
)
def test_a_model_that_is_refused_stays_as_it_is(
    prepare: Callable[[nn.Module], None], options: dict[str, Any], said: str, torchao: Any
) -> None:
    model = loaded()
    prepare(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(HlwqError, match=said):
        hlwq.torchao.quantize_(model, **options)
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and not parameter.is_meta:
            torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0, equal_nan=True)


def test_packed_models_are_refused(torchao: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hlwq.quantize(bundled_model(), tmp_path / "made", "hlwq")
    with pytest.raises(HlwqError, match="is quantized already"):
        hlwq.torchao.quantize_(AutoModelForCausalLM.from_pretrained(tmp_path / "made"))


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(HlwqError, match=r"pip install 'hlwq\[torchao\]'"):
        hlwq.torchao.transformers_config(bundled_model())
