from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import ALL_FAMILY_NAMES, make_checkpoint

import hlwq
from hlwq import HlwqError
from hlwq.demo import bundled_model, held_out_text
from hlwq.evaluate import perplexity
from hlwq.evaluate.divergence import _head, _partial_kl, divergence
from hlwq.evaluate.model import load_for_evaluation, load_model
from hlwq.evaluate.speed import speed


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rtn") / "out"
    hlwq.quantize(bundled_model(), out, "rtn")
    return out


def test_it_is_the_kl_of_the_whole_distributions(quantized: Path) -> None:
    result = divergence(quantized, bundled_model(), held_out_text(), context=128, limit=3)
    base, tokenizer = load_for_evaluation(bundled_model())
    model, _ = load_for_evaluation(quantized)
    ids = tokenizer(held_out_text().read_text(encoding="utf-8"))["input_ids"]
    kls, same = [], []
    for start in (0, 128, 256):
        chunk = torch.tensor([ids[start : start + 127]])
        with torch.inference_mode():
            p, q = (each(input_ids=chunk).logits[0].double().log_softmax(-1) for each in (base, model))
        kls.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    assert result.tokens == 3 * 127
    assert result.mean.mean == pytest.approx(float(torch.cat(kls).mean()), rel=1e-2)
    assert result.percentile_99 == pytest.approx(float(torch.cat(kls).quantile(0.99)), rel=5e-2)
    assert result.top1_agreement.mean == pytest.approx(float(torch.cat(same).double().mean()), abs=0.02)
    assert result.mean.low < result.mean.mean < result.mean.high
    assert not result.lower_bound
    alone = perplexity(quantized, held_out_text(), protocol="chunked", context=128, limit=3)
    assert result.perplexity.chunk_losses == pytest.approx(alone.chunk_losses, abs=1e-5)
    assert result.perplexity.tokens_sha256 == alone.tokens_sha256


def test_a_model_does_not_differ_from_itself() -> None:
    result = divergence(bundled_model(), bundled_model(), held_out_text(), context=64, limit=2)
    assert result.mean.mean < 1e-5
    assert result.top1_agreement.mean == 1.0


def test_the_base_runs_once(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = divergence(quantized, bundled_model(), held_out_text(), context=64, limit=2)
    loaded: list[Path] = []
    monkeypatch.setattr(
        "hlwq.evaluate.divergence.load_for_evaluation",
        lambda path, *rest: loaded.append(path) or load_for_evaluation(path, *rest),
    )
    again = divergence(quantized, bundled_model(), held_out_text(), context=64, limit=2)
    assert loaded == [quantized]
    assert again == first
    divergence(quantized, bundled_model(), held_out_text(), context=64, limit=3)
    assert loaded[1:] == [bundled_model(), quantized]
    monkeypatch.setattr("hlwq.evaluate.divergence.CACHED_RUNS", 2)
    divergence(quantized, bundled_model(), held_out_text(), context=64, limit=1)
    divergence(quantized, bundled_model(), held_out_text(), context=64, limit=3)
    divergence(quantized, bundled_model(), held_out_text(), context=64, limit=2)
    assert loaded[3:] == [bundled_model(), quantized, quantized, bundled_model(), quantized]  # that of 2 was removed


def test_another_configuration_is_another_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bundled_model(), base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for epsilon in (1e-6, 1.0):
        config.get("text_config", config)["rms_norm_eps"] = epsilon
        (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert divergence(base, base, held_out_text(), context=64, limit=2).mean.mean < 1e-5


def test_a_cache_that_is_damaged_or_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    first = divergence(bundled_model(), bundled_model(), held_out_text(), context=64, limit=2)
    [states] = (tmp_path / "cache" / "hlwq" / "hidden-states").iterdir()
    states.write_bytes(states.read_bytes()[:-100])
    assert divergence(bundled_model(), bundled_model(), held_out_text(), context=64, limit=2) == first
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert divergence(bundled_model(), bundled_model(), held_out_text(), context=64, limit=2) == first


def test_another_tokenizer_is_refused(quantized: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bundled_model(), base)
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(HlwqError, match="tokenizers cut the text differently"):
        divergence(quantized, base, held_out_text(), context=64, limit=2)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    from test_calibrated import make_model

    other = make_model(tmp_path / "other", "llama", hidden_size=128)
    base = make_model(tmp_path / "base", "llama")
    config = (other / "config.json").read_text()
    assert config
    with pytest.raises(HlwqError, match="vocabularies differ"):
        divergence(widened(other), base, held_out_text(), context=32, limit=1)


def widened(path: Path) -> Path:
    """The model with 64 more tokens."""
    import json

    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:64]])
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 64}))
    return path


def test_what_a_server_tells_bounds_the_kl_from_below() -> None:
    generator = torch.Generator().manual_seed(0)
    base, model = (torch.randn(5, 200, generator=generator).mul(3).log_softmax(-1) for _ in range(2))
    exact = (base.exp() * (base - model)).sum(-1)
    for top in (1, 20, 200):
        named = []
        for row in model:
            values, tokens = row.topk(top)
            named.append(dict(zip(tokens.tolist(), values.tolist(), strict=True)))
        partial, likeliest = _partial_kl(base, named)
        assert (partial <= exact + 1e-4).all()
        assert torch.equal(likeliest, model.argmax(-1))
    assert torch.allclose(partial, exact, atol=1e-3)


def test_speed_counts_tokens_and_spreads() -> None:
    result = speed(bundled_model(), prompt_tokens=32, new_tokens=4, runs=3)
    for middle, least, most in (result.prefill, result.decode):
        assert 0 < least <= middle <= most
    assert result.load_seconds is not None
    assert result.peak_memory is not None
    assert result.peak_memory > 1e8
    with pytest.raises(HlwqError, match="at least 2"):
        speed(bundled_model(), new_tokens=1)


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_the_bases_logits_are_the_models_own(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a model does behind its output head: bounds, scales."""
    monkeypatch.setattr("hlwq.evaluate.model.load_tokenizer", lambda path: None)  # these have none
    path = make_checkpoint(tmp_path / "model", family)
    model, _ = load_model(path, dtype=torch.float32)
    tokens = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits[0]
        hidden = model.get_decoder()(input_ids=tokens).last_hidden_state[0]
        found = _head(path, torch.device("cpu"), torch.float32)(hidden)
    assert torch.allclose(found, expected, atol=1e-4)
