"""What runs on a CUDA device, against the same on the CPU. Skipped without one."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from checkpoints import FAMILY_NAMES, make_checkpoint
from transformers import AutoModelForCausalLM

import hlwq
from hlwq import Calibration, kernels
from hlwq.demo import bundled_model, held_out_text
from hlwq.kernels import reference
from hlwq.packing import pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DATA = Calibration(("embedded",), samples=12, sequence_length=64)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
def test_products_with_packed_matrices(bits: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    packed = pack(torch.randint(2**bits, (1000, 1536), generator=generator, dtype=torch.uint8), bits).cuda()
    norms = torch.rand(1000, 12, generator=generator).half().cuda()
    inputs = torch.randn(rows, 1536, generator=generator).cuda()
    expected = reference.matmul(inputs, packed, norms, bits)
    torch.testing.assert_close(kernels.matmul(inputs, packed, norms, bits), expected, rtol=1e-3, atol=1e-2)
    assert kernels.matmul(inputs.bfloat16(), packed, norms, bits).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"expert_source": "memory"}, {"expert_prefetch": True}], ids=str)
def test_experts_in_a_cache(options: dict[str, Any], experts_model: Path, tmp_path: Path) -> None:
    hlwq.quantize(experts_model, tmp_path / "q4", "hlwq", bits=4)
    cached = hlwq.HLWQConfig(expert_cache=3, **options)
    whole, small = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "q4", trust_remote_code=False, **given).cuda()
        for given in ({}, {"quantization_config": cached})
    )
    tokens = torch.randint(6, 2000, (1, 300), generator=torch.Generator().manual_seed(0)).cuda()
    said: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    with torch.inference_mode():
        assert torch.equal(small(tokens).logits, whole(tokens).logits)
        assert torch.equal(small.generate(tokens, **said), whole.generate(tokens, **said))
    assert small.expert_cache.counters.misses > 0


def made(source: Path, out: Path, recipe: str, device: str, **options: Any) -> hlwq.QuantizeResult:
    calibrated = recipe == "hlwq-v7" or "calibrate" in options
    return hlwq.quantize(source, out, recipe, device=device, **options, **({"calibration": DATA} if calibrated else {}))


@pytest.mark.parametrize("family", [*FAMILY_NAMES, "qwen3_moe"])
@pytest.mark.parametrize(
    ("recipe", "options"), [("rtn", {}), ("hlwq", {}), ("hlwq-v7", {}), ("hlwq", {"calibrate": True})]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_checkpoints_made_there_are_as_good(
    tmp_path: Path, family: str, recipe: str, options: dict[str, Any], dtype: str
) -> None:
    source = make_checkpoint(tmp_path / "source", family, vocab_size=2048, dtype=dtype)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, source / name)
    here = made(source, tmp_path / "here", recipe, "cpu", **options)
    there = made(source, tmp_path / "there", recipe, "cuda", **options)
    for errors, others in (
        (here.relative_errors, there.relative_errors),
        (here.output_errors, there.output_errors),
    ):
        assert errors.keys() == others.keys()
        if errors:
            assert mean(others.values()) == pytest.approx(mean(errors.values()), rel=0.05)


def test_packed_and_decoded_weights_generate_alike(tmp_path: Path) -> None:
    from hlwq.evaluate.model import load_model, load_packed

    made(bundled_model(), tmp_path / "made", "hlwq", "cuda")
    decoded, tokenizer = load_model(tmp_path / "made", "cuda", torch.float32)
    packed, _ = load_packed(tmp_path / "made", "cuda")
    inputs = tokenizer("The function returns", return_tensors="pt").to("cuda")
    with torch.inference_mode():
        expected = decoded(**inputs).logits.float().log_softmax(-1)
        found = packed(**inputs).logits.float().log_softmax(-1)
    assert (found - expected).abs().max() < 0.15  # the packed model runs in bfloat16
    assert packed.generate(**inputs, max_new_tokens=8).shape[1] > inputs["input_ids"].shape[1]


def test_perplexity_there_is_that_of_here() -> None:
    options: dict[str, Any] = {"context": 256, "limit": 8, "protocol": "chunked"}
    here = hlwq.evaluate.perplexity(bundled_model(), held_out_text(), **options)
    there = hlwq.evaluate.perplexity(bundled_model(), held_out_text(), device="cuda", **options)
    assert there.perplexity == pytest.approx(here.perplexity, rel=0.01)
