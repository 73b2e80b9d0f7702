"""Calibration samples that a model writes itself."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILY_NAMES, make_checkpoint
from safetensors.torch import save_file

from hlwq import Calibration, CheckpointError, HlwqError, Request, RequestError, ResourceError
from hlwq.calibration import MOST_GENERATED, continued, kv_bytes_per_token, prompts_from
from hlwq.demo import bundled_model
from hlwq.devices import compute_dtype
from hlwq.errors import HlwqWarning
from hlwq.evaluate.model import load_model
from hlwq.files import cache_folder, hash_file, read_json
from hlwq.plan import Plan
from hlwq.quantize import plan_for, quantize

CPU = torch.device("cpu")
DTYPE = compute_dtype(CPU)
EFFORTS = ("fast", "normal", "max")
DATA: dict[str, Any] = {"calibration": "embedded", "samples": 6, "sequence_length": 48}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(bundled_model(), dtype=torch.float32)[0]


def make_model(path: Path, family: str) -> Path:
    make_checkpoint(path, family, vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, path / name)
    return path


def weights_of(directory: Path) -> str:
    return hash_file(directory / "model.safetensors")


def test_samples_begin_as_the_texts_do_and_each_otherwise() -> None:
    tokens = torch.arange(4 * 70).reshape(4, 70)
    prompts = prompts_from(tokens, 10)
    assert prompts.shape == (10, 16)
    assert torch.equal(prompts[:4], tokens[:, :16])
    assert torch.equal(prompts[4:8], tokens[:, 16:32])
    assert len({tuple(prompt) for prompt in prompts_from(tokens, 16).tolist()}) == 16
    assert prompts_from(torch.zeros(3, 8, dtype=torch.long), 6).shape == (6, 4)
    assert prompts_from(tokens, 17).shape == (17, 14)
    for short, count in ((tokens, 281), (tokens[:, :1], 1)):
        with pytest.raises(RequestError, match=r"`generated_samples` \d+ need as many beginnings"):
            prompts_from(short, count)


def test_tokens_are_drawn_from_the_model_s_own_distribution(model: Any) -> None:
    """What the model thinks of its samples, read whole: on average they are as likely as its entropy says."""
    prompts = torch.randint(0, 2048, (64, 4), generator=torch.Generator().manual_seed(0))
    done: list[int] = []
    samples = continued(model, prompts, 40, 0, done.append)
    assert samples.shape == (64, 40)
    assert torch.equal(samples[:, :4], prompts)
    assert done == list(range(5, 41))
    with torch.inference_mode():
        predictions = model(input_ids=samples).logits[:, 3:-1].log_softmax(-1)
    losses = -predictions.gather(-1, samples[:, 4:, None])[..., 0]
    entropies = -(predictions.exp() * predictions).sum(-1)
    error = (losses - entropies).std() / losses.numel() ** 0.5
    assert abs(losses.mean() - entropies.mean()) < 4 * error
    assert error < 0.05


def test_the_seed_decides(model: Any) -> None:
    prompts = torch.ones(2, 4, dtype=torch.long)
    first, again, other = (continued(model, prompts, 20, seed, lambda done: None) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_predictions_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = load_model(make_model(tmp_path / "model", "llama"), dtype=torch.float32)[0]
    with torch.no_grad():
        broken.get_decoder().norm.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="predictions are not finite"):
        continued(broken, torch.ones(1, 4, dtype=torch.long), 8, 0, lambda done: None)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_writes_samples_and_they_change_the_codes(family: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", family)
    for name, count in (("none", 0), ("own", None), ("few", 2)):
        quantize(source, tmp_path / name, "best", generated_samples=count, **DATA)
    none, own, few = (tmp_path / name for name in ("none", "own", "few"))
    assert len({weights_of(out) for out in (none, own, few)}) == 3
    recorded = [read_json(out / "hlwq.json")["calibration"].get("generated_samples") for out in (none, own, few)]
    assert recorded == [None, 12, 2]


def test_samples_are_kept_and_what_is_kept_is_what_would_be_written(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", "llama")
    quantize(source, tmp_path / "first", "best", **DATA)
    folder = cache_folder() / "generated-samples"
    (kept,) = folder.iterdir()
    inode = kept.stat().st_ino
    quantize(source, tmp_path / "second", "best", **DATA)
    assert [file.stat().st_ino for file in folder.iterdir()] == [inode]
    kept.write_bytes(b"damaged")
    quantize(source, tmp_path / "third", "best", **DATA)
    save_file({"hidden": torch.zeros(1)}, kept)  # as another version may have named it
    quantize(source, tmp_path / "fourth", "best", **DATA)
    assert len({weights_of(tmp_path / name) for name in ("first", "second", "third", "fourth")}) == 1


def test_batches_are_as_large_as_the_keys_and_values_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "model", "llama")
    _, plan = plan_for(Request(source))
    held = 4 * 48 * kv_bytes_per_token(plan.layout, DTYPE)
    monkeypatch.setattr(sys.modules["hlwq.pipeline"], "GENERATION_BYTES", held)
    quantize(source, tmp_path / "out", "best", **DATA)
    assert len(list((cache_folder() / "generated-samples").iterdir())) == 3


def test_how_many_unless_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "model", "llama")
    _, best = plan_for(Request(source))
    _, other = plan_for(Request(source, "gptq"))

    def count(plan: Plan, **options: Any) -> int | None:
        return plan.with_generated_samples(Calibration(**options), CPU).generated_samples

    assert count(best, samples=5) == 10
    assert count(best, samples=500) == MOST_GENERATED
    assert count(best, generated_samples=3) == 3
    assert count(best, sequence_length=1) == 0
    assert count(other) == 0
    monkeypatch.setattr(sys.modules["hlwq.plan"], "available_memory", lambda device: 10**6)
    assert count(best) == 0
    assert count(best, generated_samples=3) == 3
    with pytest.warns(HlwqWarning, match="the whole model does not fit in the memory"):
        quantize(source, tmp_path / "out", **DATA)
    assert "generated_samples" not in read_json(tmp_path / "out" / "hlwq.json")["calibration"]


def test_both_the_machine_and_the_gpu_must_hold_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = plan_for(Request(make_model(tmp_path / "model", "llama")))
    gpu = torch.device("cuda")
    needed = plan.generation_memory(Calibration(samples=5, generated_samples=10), gpu)
    assert needed < plan.generation_memory(Calibration(samples=5, generated_samples=11), gpu)
    for on_gpu, on_machine, count in ((needed, needed, 10), (needed - 1, 10**12, 0), (10**12, needed - 1, 0)):
        found = {gpu: on_gpu, None: on_machine}
        monkeypatch.setattr(sys.modules["hlwq.plan"], "available_memory", found.get)
        assert plan.with_generated_samples(Calibration(samples=5), gpu).generated_samples == count


def test_a_run_that_goes_on_has_as_many_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "model", "llama")
    quantize(source, tmp_path / "whole", "best", **DATA)

    def stop(done: int, total: int, item: str) -> None:
        if "layers.1" in item:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", "best", progress=stop, **DATA)
    monkeypatch.setattr(sys.modules["hlwq.plan"], "available_memory", lambda device: 10**6)
    quantize(source, tmp_path / "out", "best", **DATA)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_model_that_does_not_fit_after_all_is_one_line(
    kind: type[RuntimeError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(sys.modules["hlwq.pipeline"], "load_model", fail)
    with pytest.raises(ResourceError, match=r"too little memory for the whole model.*`generated_samples=0`"):
        quantize(make_model(tmp_path / "model", "llama"), tmp_path / "out", "best", **DATA)


def test_effort_decides_how_many_and_how_long(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", "llama")
    for effort in (None, "fast", "normal", "max"):
        quantize(source, tmp_path / str(effort), "best", effort=effort, **DATA)
    assert weights_of(tmp_path / "None") == weights_of(tmp_path / "normal")
    assert len({weights_of(tmp_path / effort) for effort in ("fast", "normal", "max")}) == 3
    counts = [read_json(tmp_path / effort / "hlwq.json")["calibration"].get("generated_samples") for effort in EFFORTS]
    assert counts == [None, 12, 24]
    for effort in ("fast", "normal"):
        with pytest.raises(RequestError, match=f"`effort='{effort}'` changes nothing in recipe gptq; it is for best"):
            quantize(source, tmp_path / "out", "gptq", effort=effort, **DATA)


def test_other_recipes_have_them_when_they_are_asked_for(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", "llama")
    quantize(source, tmp_path / "texts", "gptq", **DATA)
    quantize(source, tmp_path / "both", "gptq", generated_samples=4, **DATA)
    assert weights_of(tmp_path / "texts") != weights_of(tmp_path / "both")
    with pytest.raises(HlwqError, match="Calibration data changes nothing"):
        quantize(source, tmp_path / "nearest", "rtn", generated_samples=4)
