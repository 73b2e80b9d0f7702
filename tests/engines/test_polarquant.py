"""Real files of the package polarquant 0.6.0 decode to the weights that the package's own functions decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from engines import RunEngine
from safetensors.torch import load_file

import hlwq
from hlwq.decoded import DecodedCheckpoint
from hlwq.demo import bundled_model, held_out_text

BITS = {"q_proj": 2, "k_proj": 3, "v_proj": 4, "o_proj": 5, "mlp": 6, "embed": 5, "lm_head": 6}


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A model whose widths no block divides."""
    return make_checkpoint(tmp_path / "narrow", "llama", hidden_size=192, intermediate_size=320)


def made(run_engine: RunEngine, model: Path, to: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Run the package; what it decodes."""
    script = "polarquant_weights.py"
    return load_file(run_engine("polarquant", script, model, {"to": str(to), **options}, suffix=".safetensors"))


def assert_decoded_alike(directory: Path, theirs: dict[str, torch.Tensor]) -> DecodedCheckpoint:
    ours = DecodedCheckpoint(directory)
    assert ours.format.name == "polar"
    assert {f"{module}.weight" for module in ours.quantized_modules()} == set(theirs)
    for name, weight in theirs.items():
        assert ours.read(name).shape == weight.shape, name
        assert float((ours.read(name) - weight).abs().max()) < 1e-6, name
    return ours


@pytest.mark.parametrize("options", [{"block_size": 64}, {"pack": False}], ids=str)
def test_engine_files_of_every_width(
    options: dict[str, Any], narrow: Path, tmp_path: Path, run_engine: RunEngine
) -> None:
    theirs = made(run_engine, narrow, tmp_path / "polar", bit_assignment=BITS, **options)
    version = json.loads((tmp_path / "polar" / "polar_config.json").read_text())["format"]
    assert version == ("polar_engine_v5" if options.get("pack", True) else "polar_engine_v4")
    ours = assert_decoded_alike(tmp_path / "polar", theirs)
    schemes = [ours.scheme_of(f"model.layers.0.self_attn.{name}.weight") for name in ("q_proj", "o_proj")]
    assert [(scheme.bits, scheme.group_size) for scheme in schemes if scheme] == [
        (bits, options.get("block_size", 128)) for bits in (2, 5)
    ]


def test_bit_packed_files(narrow: Path, tmp_path: Path, run_engine: RunEngine) -> None:
    bits = dict.fromkeys(BITS, 5)
    # Without polar_config.json, as many were published: the model knows the widths.
    theirs = made(run_engine, narrow, tmp_path / "polar", bit_assignment=bits, stream="counted", forget=True)
    assert_decoded_alike(tmp_path / "polar", theirs)


def test_bit_packed_files_as_the_package_reads_them(narrow: Path, tmp_path: Path, run_engine: RunEngine) -> None:
    bits = {"q_proj": 2, "k_proj": 3, "v_proj": 4, "o_proj": 4, "mlp": 3, "embed": 4, "lm_head": 6}
    theirs = made(run_engine, narrow, tmp_path / "polar", bit_assignment=bits, stream="plain")
    assert_decoded_alike(tmp_path / "polar", theirs)


def test_a_converted_hybrid_is_as_good_as_the_file_it_came_from(tmp_path: Path, run_engine: RunEngine) -> None:
    assert_decoded_alike(tmp_path / "polar", made(run_engine, bundled_model(), tmp_path / "polar"))
    text, limit = held_out_text(), 8
    measured = {
        directory: hlwq.evaluate.perplexity(directory, text, protocol="chunked", context=512, limit=limit).perplexity
        for directory in (bundled_model(), tmp_path / "polar")
    }
    assert 1 < measured[tmp_path / "polar"] / measured[bundled_model()] < 1.05
    for format_name, most in (("dense", 1.002), ("gptq", 1.05), ("mlx", 1.05)):
        out = tmp_path / format_name
        hlwq.convert(tmp_path / "polar", out, format_name)
        assert not (out / "polar_config.json").exists()
        again = hlwq.evaluate.perplexity(out, text, protocol="chunked", context=512, limit=limit).perplexity
        assert again / measured[tmp_path / "polar"] < most
        stored = DecodedCheckpoint(out).quantized_modules()
        assert not [module for module in stored if module.endswith(("in_proj_a", "in_proj_b"))]
