"""Every family that hlwq lists: what transformers makes of its files, and the table of models itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import ALL_FAMILY_NAMES, ARCHITECTURES, save_model
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from models_table import PAGE, found, page
from torch import Tensor
from typer.testing import CliRunner

import hlwq
from hlwq.cli import app
from hlwq.models import TESTED, outlook, supported_models
from hlwq.quantize import plan_for
from hlwq.request import Request

TOKENS = torch.arange(3, 60)[None]


def loaded(directory: Path) -> tuple[Any, dict[str, Any]]:
    auto = transformers.AutoModelForCausalLM
    if type(transformers.AutoConfig.from_pretrained(directory)) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        auto = transformers.AutoModelForImageTextToText
    return auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits[0].float()


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_transformers_loads_what_is_written(family: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", family)
    hlwq.quantize(source, tmp_path / "hlwq", "hlwq")
    hlwq.quantize(tmp_path / "source", tmp_path / "dense", "hlwq", format="dense", include_embeddings=True)
    dense, info = loaded(tmp_path / "dense")
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found(ARCHITECTURES[family], "transformers", transformers.__version__, "dense", TESTED)
    packed, info = loaded(tmp_path / "hlwq")
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, original = logits(dense), logits(loaded(source)[0])
    assert (logits(packed) - expected).abs().mean() < (expected - original).abs().mean() / 4
    found(ARCHITECTURES[family], "transformers", transformers.__version__, "hlwq", TESTED)


def test_the_page_is_what_the_tests_found() -> None:
    assert PAGE.read_text() == page()


def test_every_architecture_is_tested_in_every_engine() -> None:
    models = supported_models()
    places = set(models[0].engines)
    assert {place.partition(",")[0] for place in places} == {"transformers", "vLLM", "mlx-lm"}
    for each in models:
        assert set(each.engines) == places, each.architecture
    assert len(models) >= 20


def test_an_outlook_says_what_quantizing_would(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "falcon_h1")
    formats = {each.format: each for each in outlook(source)}
    assert "mlx-lm multiplies weights" in formats["mlx"].refusal
    known = next(each.engines for each in supported_models() if each.architecture == "FalconH1ForCausalLM")
    assert formats["gptq"].engines == {"vLLM": known["vLLM, gptq"]}
    _, plan = plan_for(Request(source, "rtn", format="gptq"))
    assert formats["gptq"].nbytes == plan.output_bytes()


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5_moe"])
def test_of_a_model_on_the_hub_only_headers_are_read(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_model(tmp_path / "source", family)
    with (source / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    described = {
        name: TensorInfo(each["dtype"], each["shape"], tuple(each["data_offsets"]))
        for name, each in header.items()
        if name != "__metadata__"
    }
    of_file = SafetensorsFileMetadata({}, described)
    weights = SafetensorsRepoMetadata(None, False, dict.fromkeys(described, "f"), {"f": of_file})
    monkeypatch.setattr("hlwq.sources.HfApi.get_safetensors_metadata", lambda *_, **__: weights)
    monkeypatch.setattr("hlwq.sources.hf_hub_download", lambda *_, **__: str(source / "config.json"))
    assert outlook("some/model") == outlook(source)


def test_the_command_prints_the_table_and_the_outlook(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["models", "--json"])
    assert [row["architecture"] for row in json.loads(printed.stdout)] == [m.architecture for m in supported_models()]
    assert CliRunner().invoke(app, ["models"]).exit_code == 0
    source = save_model(tmp_path / "source", "starcoder2")
    printed = CliRunner().invoke(app, ["models", str(source), "--json"])
    assert {each["format"]: each["engines"] for each in json.loads(printed.stdout)}["gptq"] == {"vLLM": TESTED}
    assert CliRunner().invoke(app, ["models", str(source)]).exit_code == 0
    refused = CliRunner().invoke(app, ["models", "--revision", "main"])
    assert refused.exit_code != 0
