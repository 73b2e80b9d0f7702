from __future__ import annotations

import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

from hlwq import HlwqError, convert, quantize
from hlwq.decoded import DecodedCheckpoint
from hlwq.demo import bundled_model, held_out_text
from hlwq.devices import compute_dtype
from hlwq.errors import CheckpointError, RequestError
from hlwq.evaluate import paired_difference, perplexity
from hlwq.evaluate.model import load_model


def plain_perplexity(context: int, stride: int, windows: int, scored: int) -> float:
    """The protocols in ten lines, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.bfloat16)
    model = model.to(compute_dtype(torch.device("cpu")))
    tokens = AutoTokenizer.from_pretrained(bundled_model())(held_out_text().read_text(encoding="utf-8"))["input_ids"]
    losses = []
    for start in range(0, windows * stride, stride):
        window = torch.tensor([tokens[start : start + context]])
        with torch.no_grad():
            logprobs = model(window[:, :-1]).logits[0].float().log_softmax(-1)
        losses += [-float(logprobs[i - 1, window[0, i]]) for i in range(context - scored, context)]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(
    ("protocol", "stride", "scored"), [("windowed", 32, 32), ("chunked", 128, 127)], ids=["windowed", "chunked"]
)
def test_perplexity_is_that_of_a_plain_loop(protocol: str, stride: int, scored: int) -> None:
    measured = perplexity(bundled_model(), held_out_text(), protocol=protocol, context=128, stride=32, limit=6)
    assert measured.tokens == 6 * scored
    assert measured.perplexity == pytest.approx(plain_perplexity(128, stride, 6, scored), abs=1e-3)


def test_standard_error_is_that_of_the_mean_over_chunks() -> None:
    measured = perplexity(bundled_model(), held_out_text(), protocol="chunked", context=64, limit=5)
    losses = torch.tensor(measured.chunk_losses, dtype=torch.float64)
    assert measured.perplexity == pytest.approx(math.exp(losses.mean()))
    assert measured.standard_error == pytest.approx(float(math.exp(losses.mean()) * losses.std() / math.sqrt(5)))
    assert perplexity(bundled_model(), held_out_text(), context=64, stride=32, limit=1).standard_error is None


def test_paired_difference_is_a_t_interval_over_chunks() -> None:
    from scipy.stats import ttest_rel

    short = perplexity(bundled_model(), held_out_text(), protocol="chunked", context=64, limit=8)
    other = type(short)(
        **{**vars(short), "chunk_losses": tuple(x + 0.1 + 0.01 * i for i, x in enumerate(short.chunk_losses))}
    )
    mean, low, high = paired_difference(short, other)
    interval = ttest_rel(other.chunk_losses, short.chunk_losses).confidence_interval(0.95)
    assert mean == pytest.approx(0.135)
    assert (low, high) == pytest.approx((interval.low, interval.high))


def test_protocols_are_never_compared_with_each_other() -> None:
    windowed = perplexity(bundled_model(), held_out_text(), protocol="windowed", context=64, stride=63, limit=3)
    chunked = perplexity(bundled_model(), held_out_text(), protocol="chunked", context=64, limit=3)
    with pytest.raises(HlwqError, match="same protocol"):
        paired_difference(windowed, chunked)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": 10**6}, "fewer than one window"),
        ({"context": 64, "stride": 64}, "`stride=64` must be"),
        ({"context": 64, "stride": 0}, "`stride=0` must be"),
        ({"context": 1, "protocol": "chunked"}, "`context` .*must be at least 2"),
        ({"context": 64, "stride": 32, "limit": 0}, "`limit` at least 1"),
        ({"context": 64, "stride": 32, "limit": -1}, "`limit` at least 1"),
    ],
)
def test_windows_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        perplexity(bundled_model(), held_out_text(), **options)


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"`text='.*absent\.txt'` does not exist") as caught:
        perplexity(bundled_model(), tmp_path / "absent.txt")
    assert (caught.value.argument, caught.value.path) == ("text", tmp_path / "absent.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="is not a UTF-8 text file"):
        perplexity(bundled_model(), tmp_path / "binary")


@pytest.mark.parametrize(
    ("recipe", "format_name"), [("rtn", "gptq"), ("rtn", "mlx"), ("hlwq", "hlwq"), ("rtn", "dense")]
)
def test_models_of_every_format_load_with_their_decoded_weights(recipe: str, format_name: str, tmp_path: Path) -> None:
    quantize(bundled_model(), tmp_path / "out", recipe, format=format_name)
    model, _ = load_model(tmp_path / "out")
    decoded = DecodedCheckpoint(tmp_path / "out")
    weight = decoded.read("model.language_model.layers.2.linear_attn.in_proj_qkv.weight")
    assert torch.equal(model.model.layers[2].linear_attn.in_proj_qkv.weight, weight.to(torch.bfloat16))


def with_tokenizer(path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, path / name)
    return path


def test_a_text_only_hybrid_comes_back_from_mlx(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = with_tokenizer(make_checkpoint(tmp_path / "model", "qwen3_5_text"))
    quantize(source, tmp_path / "mlx", "rtn", format="mlx")
    model, _ = load_model(tmp_path / "mlx")
    convert(tmp_path / "mlx", tmp_path / "dense", "dense")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for name, weight in reloaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_head_is_the_embedding_just_where_it_is_tied(tied: bool, tmp_path: Path) -> None:
    source = with_tokenizer(make_checkpoint(tmp_path / "model", "qwen3_5", tie_word_embeddings=tied))
    model, _ = load_model(source)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == tied


def test_a_missing_tensor_is_never_filled_at_random(tmp_path: Path) -> None:
    source = with_tokenizer(make_checkpoint(tmp_path / "model", "llama"))
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(HlwqError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(source)


@pytest.mark.slow
def test_methods_rank_on_the_bundled_model(tmp_path: Path) -> None:
    measured = [perplexity(bundled_model(), held_out_text(), protocol="chunked", context=512)]
    for recipe in ("hlwq", "rtn"):
        quantize(bundled_model(), tmp_path / recipe, recipe)
        measured.append(perplexity(tmp_path / recipe, held_out_text(), protocol="chunked", context=512))
    for better, worse in pairwise(measured):
        _, low, _ = paired_difference(better, worse)
        assert low > 0
