"""`config.json` as it should not be, entry by entry; and the tying of heads, as files and engines have it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILY_NAMES, make_checkpoint, model_config
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner

import hlwq
from hlwq import HlwqError
from hlwq.check import check_directory
from hlwq.cli import app
from hlwq.containers import Reader
from hlwq.decoded import DecodedCheckpoint
from hlwq.demo import bundled_model
from hlwq.families import describe
from hlwq.quantize import plan_for
from hlwq.request import Request

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
HYBRID_SIZES = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    "linear_conv_kernel_dim",
)
FLAGS = ("tie_word_embeddings", "attention_bias", "use_cache")
NO_SIZES: tuple[Any, ...] = (0, -1, True, False, "4", "many", 2.0, 2.5, 1e30, 10**30, 2**63, [], [4], {}, {"a": 4})
NO_FLAGS: tuple[Any, ...] = (0, 1, "true", "false", 1.0, [], [True], {}, None)
OTHERS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("nonsense", "", "SILU", 5, None, [], ["silu"], {}, True),
    "rms_norm_eps": (0, 1, -1e-6, "1e-6", None, [], True, {}),
    "rope_parameters": (
        *(5, "yarn", [], True, {"rope_type": "nonsense"}, {"rope_type": 5}, {"type": []}),
        *({"rope_type": "default", "rope_theta": "1e4"}, {"rope_type": "linear", "factor": "2"}),
        *({"rope_theta": -1.0}, {"rope_theta": 0}, {"rope_type": "yarn", "factor": -4.0}, {"rope_theta": 1e400}),
    ),
    "layer_types": (5, "full_attention", [5], ["full_attention"], ["nonsense"] * 4, [[]] * 4, {}, True, 10**30),
    "dtype": ("float8", "bf16", 5, [], {}, True, "int8"),
}
STRUCTURE: dict[str, dict[str, Any]] = {
    "architectures a name": {"architectures": "LlamaForCausalLM"},
    "architectures a number": {"architectures": 5},
    "architectures true": {"architectures": True},
    "architectures an object": {"architectures": {"0": "LlamaForCausalLM"}},
    "architectures of numbers": {"architectures": [5]},
    "architectures of null": {"architectures": [None]},
    "architectures of lists": {"architectures": [["LlamaForCausalLM"]]},
    "architectures empty": {"architectures": []},
    "architectures null": {"architectures": None},
    "architectures unknown": {"architectures": ["NonsenseForCausalLM"]},
    "architecture of another family": {"architectures": ["Qwen3ForCausalLM"]},
    "model_type a number": {"model_type": 5},
    "model_type null": {"model_type": None},
    "model_type a list": {"model_type": ["llama"]},
    "model_type of another family": {"model_type": "qwen3"},
    "model_type unknown": {"model_type": "nonsense"},
    "heads not divided": {"num_attention_heads": 4, "num_key_value_heads": 3},
    "width not divided": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None},
    "more layers than there are": {"num_hidden_layers": 3},
    "a million layers": {"num_hidden_layers": 1_000_000},
    "2**31 layers": {"num_hidden_layers": 2**31},
    "another width": {"hidden_size": 256},
    "another vocabulary": {"vocab_size": 97},
    "another head": {"head_dim": 64},
}
TEXT_CONFIGS: tuple[Any, ...] = (None, 5, "text", [], [{}], True, {}, {"hidden_size": 128})
ENDLESS = r"(?:.|.|.|.){1,60}[^a-z._0-9]"
"""A pattern of which it takes ages to find out that a name does not match."""
READERS: dict[str, Callable[[Path, Path], Any]] = {
    "quantize": lambda path, out: plan_for(Request(path, "rtn")),
    "inspect": lambda path, out: hlwq.inspect(path),
    "check": lambda path, out: check_directory(path),
}


def cases() -> list[tuple[str, str, Any]]:
    """Family, entry and value, for each value that an entry cannot have."""
    found: list[tuple[str, str, Any]] = []
    for family in ("llama", "qwen3", "qwen3_5"):
        names = SIZES + (HYBRID_SIZES if family == "qwen3_5" else ())
        found += [(family, name, value) for name in names for value in NO_SIZES]
        found += [(family, name, value) for name in FLAGS for value in NO_FLAGS]
        found += [(family, name, value) for name, values in OTHERS.items() for value in values]
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("configurations")
    return {family: make_checkpoint(root / family, family) for family in FAMILY_NAMES}


def with_config(model: Path, path: Path, config: Any) -> Path:
    path.mkdir()
    for file in model.iterdir():
        if file.name != "config.json":
            os.link(file, path / file.name)
    (path / "config.json").write_text(json.dumps(config))
    return path


def refused(path: Path, *phrases: str) -> None:
    for name, read in READERS.items():
        with pytest.raises(HlwqError) as caught:
            read(path, path.parent / "out")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
        for phrase in phrases:
            assert phrase in str(caught.value), (name, str(caught.value))


@pytest.mark.parametrize(("family", "name", "value"), cases(), ids=lambda each: json.dumps(each)[:40])
def test_an_entry_that_cannot_be_is_refused_by_name(
    models: dict[str, Path], tmp_path: Path, family: str, name: str, value: Any
) -> None:
    config = model_config(family)
    config.get("text_config", config)[name] = value
    refused(with_config(models[family], tmp_path / "model", config), name)


@pytest.mark.parametrize("name", STRUCTURE)
def test_a_configuration_that_contradicts_itself_or_the_tensors_is_refused(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    path = with_config(models["llama"], tmp_path / "model", {**model_config("llama"), **STRUCTURE[name]})
    for reader in ("quantize", "check"):
        with contextlib.suppress(HlwqError):
            lines = READERS[reader](path, tmp_path / "out")
            # What is wrong with a directory may be told by demand.
            assert reader == "check"
            assert not all(line.passed for line in lines)


@pytest.mark.parametrize("value", TEXT_CONFIGS, ids=json.dumps)
def test_a_text_configuration_that_is_none_is_refused(models: dict[str, Path], tmp_path: Path, value: Any) -> None:
    config = {**model_config("qwen3_5"), "text_config": value}
    refused(with_config(models["qwen3_5"], tmp_path / "model", config))


def test_a_text_configuration_where_none_belongs_is_not_read(models: dict[str, Path], tmp_path: Path) -> None:
    """Transformers does not read it either."""
    config = {**model_config("llama"), "text_config": {**model_config("llama"), "hidden_size": 999}}
    _, plan = plan_for(Request(with_config(models["llama"], tmp_path / "model", config), "rtn"))
    assert plan.layout.text_config["hidden_size"] == 128


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_5_text"])
def test_what_transformers_refuses_is_refused(models: dict[str, Path], family: str) -> None:
    base = model_config(family)
    kind, names = CONFIG_MAPPING[base["model_type"]], Reader(models[family]).tensors
    values = {**dict.fromkeys(SIZES, NO_SIZES), **dict.fromkeys(FLAGS, NO_FLAGS), **OTHERS}
    for name, wrong in values.items():
        for value in wrong:
            if name == "num_hidden_layers" and isinstance(value, int) and value > 1000:
                continue  # transformers makes a list of as many
            try:
                kind.from_dict(copy.deepcopy({**base, name: value}))
            except Exception:
                with pytest.raises(HlwqError):
                    describe({**base, name: value}, names)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"max_position_embeddings": 10**6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_parameters": None},
        {"sliding_window": None},
        {"dtype": "float16"},
        {"unknown_entry": [1, {"a": None}]},
        {"transformers_version": "99.0"},
    ],
    ids=str,
)
def test_what_models_have_is_accepted(
    models: dict[str, Path], tmp_path: Path, family: str, entries: dict[str, Any]
) -> None:
    path = with_config(models[family], tmp_path / "model", model_config(family, **entries))
    _, plan = plan_for(Request(path, "rtn"))
    assert plan.quantized()


@pytest.mark.parametrize(("name", "value"), [("num_hidden_layers", True), ("hidden_act", "x"), ("head_dim", "4")])
@pytest.mark.parametrize("command", [["inspect"], ["check"], ["quantize", "out", "--recipe", "rtn", "--dry-run"]])
def test_the_command_line_says_so_in_a_line(
    models: dict[str, Path], tmp_path: Path, command: list[str], name: str, value: Any
) -> None:
    path = with_config(models["llama"], tmp_path / "model", {**model_config("llama"), name: value})
    result = CliRunner().invoke(app, [command[0], str(path), *command[1:]])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert name in result.stderr


# Sections of formats

SECTION_VALUES: tuple[Any, ...] = (None, True, "4", 4.5, -1, 0, 10**30, [], {})


@pytest.fixture(scope="module")
def quantized(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sections")
    source = Path(shutil.copytree(models["llama"], root / "source"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, source / name)
    for name in ("gptq", "compressed-tensors", "mlx"):
        hlwq.quantize(source, root / name, "rtn", format=name)
    hlwq.quantize(source, root / "hlwq", "hlwq")
    return {name: root / name for name in ("gptq", "compressed-tensors", "mlx", "hlwq")}


def places(section: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values of a section."""
    keys = section.keys() if isinstance(section, dict) else range(len(section)) if isinstance(section, list) else ()
    return [way for key in keys for way in [(*path, key), *places(section[key], (*path, key))]]


@pytest.mark.parametrize("format_name", ["gptq", "compressed-tensors", "mlx", "hlwq"])
def test_sections_of_formats_are_read_by_types(quantized: dict[str, Path], tmp_path: Path, format_name: str) -> None:
    """Each value of the section becomes each of several others, which is refused or changes no weight."""
    model = quantized[format_name]
    original = json.loads((model / "config.json").read_text())
    right = DecodedCheckpoint(model)
    name = right.quantized_modules()[0] + ".weight"
    weights, tried = right.read(name), 0
    for way in places(original["quantization_config"]):
        for value in SECTION_VALUES:
            config = copy.deepcopy(original)
            section = config["quantization_config"]
            for key in way[:-1]:
                section = section[key]
            if section[way[-1]] == value:
                continue
            section[way[-1]] = value
            if format_name == "mlx":
                config["quantization"] = config["quantization_config"]
            path = with_config(model, tmp_path / f"{tried}", config)
            tried += 1
            with contextlib.suppress(HlwqError):
                read = DecodedCheckpoint(path).read(name)
                assert torch.equal(read, weights), (way, value)
                check_directory(path)
                hlwq.inspect(path)
    assert tried > 20


@pytest.mark.parametrize("pattern", [ENDLESS, "(", "(?P<a>", "*", "(" * 3000, 5, None, []])
@pytest.mark.parametrize("format_name", ["gptq", "compressed-tensors"])
def test_patterns_of_files_that_cannot_be_used_are_refused(
    quantized: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str, pattern: Any
) -> None:
    monkeypatch.setattr("hlwq.patterns.SECONDS", 0.2)
    if format_name == "gptq" and not isinstance(pattern, str):
        pytest.skip("keys of JSON are strings")
    config = json.loads((quantized[format_name] / "config.json").read_text())
    section = config["quantization_config"]
    if format_name == "gptq":
        section["dynamic"] = {f"-:{pattern}": {}, **section["dynamic"]}
    else:
        section["ignore"].insert(0, f"re:{pattern}" if isinstance(pattern, str) else pattern)
    path = with_config(quantized[format_name], tmp_path / "model", config)
    with pytest.raises(HlwqError, match=r"regular expression|takes too long|not a"):
        check_directory(path)


@pytest.mark.parametrize("pattern", [r"(", "*", "(?P<a>", "[", "(" * 3000, ENDLESS])
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_patterns_of_users_that_cannot_be_used_are_refused(models: dict[str, Path], option: str, pattern: str) -> None:
    with pytest.raises(hlwq.RequestError, match=option):
        plan_for(Request.of(models["llama"], "rtn", **{option: pattern}))


# Tied heads


@pytest.mark.parametrize("where", ["absent", "top", "text"])
@pytest.mark.parametrize("stored", ["no head", "its own head"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    "format_name",
    ["hlwq", "mlx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "gptq", "compressed-tensors"))],
)
def test_tying_is_written_as_the_file_is(
    models: dict[str, Path], tmp_path: Path, format_name: str, family: str, stored: str, where: str
) -> None:
    tied = stored == "no head"
    config = model_config(family)
    text = config.get("text_config", config)
    for section in (config, text):
        section.pop("tie_word_embeddings", None)
    if where == "top":
        config["tie_word_embeddings"] = tied
    elif where == "text":
        text["tie_word_embeddings"] = tied
    path = with_config(models[family], tmp_path / "model", config)
    if tied:
        tensors = load_file(path / "model.safetensors")
        del tensors["lm_head.weight"]
        (path / "model.safetensors").unlink()
        save_file(tensors, path / "model.safetensors")
    out = tmp_path / "out"
    hlwq.quantize(path, out, "hlwq" if format_name == "hlwq" else "rtn", format=format_name)
    written = json.loads((out / "config.json").read_text())
    assert written["tie_word_embeddings"] is tied
    assert written.get("text_config", written)["tie_word_embeddings"] is tied
    assert any(name.startswith("lm_head.") for name in Reader(out).tensors) is not tied
    if format_name in ("dense", "hlwq") and family != "qwen3_5":
        from transformers import AutoModelForCausalLM

        how = {"quantization_config": hlwq.HLWQConfig(dequantize=True)} if format_name == "hlwq" else {}
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, **how)
        assert not info["missing_keys"]
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert (head is embedding or torch.equal(head, embedding)) is tied


@pytest.mark.parametrize(("top", "text"), [(True, False), (False, True)])
@pytest.mark.parametrize("stored", [True, False])
def test_where_the_two_levels_disagree_the_file_decides(
    models: dict[str, Path], top: bool, text: bool, stored: bool
) -> None:
    config = model_config("qwen3_5", tie_word_embeddings=top)
    config["text_config"]["tie_word_embeddings"] = text
    names = [name for name in Reader(models["qwen3_5"]).tensors if stored or name != "lm_head.weight"]
    assert describe(config, names).tied is not stored
