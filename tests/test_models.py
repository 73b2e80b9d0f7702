"""Every family that hlwq lists: what transformers makes of its files, and the table of models itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import ALL_FAMILY_NAMES, ARCHITECTURES, save_model
from models_table import PAGE, found, page
from torch import Tensor

import hlwq
from hlwq.models import TESTED, outlook, supported_models

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
    assert (logits(packed) - expected).abs().mean() < (expected - original).abs().mean() / 10
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
    assert formats["gptq"].engines == {"vLLM": TESTED}
    hlwq.quantize(source, tmp_path / "out", "rtn", format="gptq")
    assert formats["gptq"].nbytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
