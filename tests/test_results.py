"""A measurement is only ever attributed to the files that it is of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import save_file

from hlwq.errors import CheckpointError, HlwqWarning, ResourceError
from hlwq.evaluate import results
from hlwq.evaluate.results import fingerprint, keep, kept, measured, record_of_programs, results_folder
from hlwq.files import hash_file, read_json, write_json

WEIGHTS = "model.safetensors"
SETTING = {"limit": None}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(results, "_digests", {})
    return tmp_path / "cache" / "hlwq"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are cached although they were only just made."""
    monkeypatch.setattr(results, "SETTLED_SECONDS", -1.0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint with more than a megabyte of weights."""
    path = make_checkpoint(tmp_path / "model", "llama")
    save_file({f"{index}": torch.full((1 << 18,), 1.0 + index) for index in range(4)}, path / WEIGHTS)
    return path


def set_byte(file: Path, place: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(b"\xff")


def replace_whole(file: Path, place: int) -> None:
    copy = file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    set_byte(copy, place)
    copy.replace(file)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", [set_byte, replace_whole])
def test_every_byte_of_the_weights_counts_whatever_the_times_say(
    change: Callable[[Path, int], None], model: Path
) -> None:
    file = model / WEIGHTS
    fingerprints = {fingerprint(model)}
    size, times = file.stat().st_size, (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    for part in range(1, 33):
        change(file, part * size // 33)
        os.utime(file, ns=times)
        fingerprints.add(fingerprint(model))
    assert file.stat().st_size == size
    assert len(fingerprints) == 33


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "quantize_config.json",
        "polar_config.json",
        "hlwq_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "spiece.model",
        "vocab.txt",
        "merges.txt",
        "qwen.tiktoken",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "model-00002-of-00002.safetensors",
    ],
)
def test_what_determines_a_measurement_counts(name: str, model: Path) -> None:
    before = fingerprint(model)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text('{"another": 1}')
    assert fingerprint(model) != before


def test_what_determines_no_measurement_does_not_count(model: Path) -> None:
    before = fingerprint(model)
    for name in ("README.md", "hlwq.json", "results/speed-0.json", "charts/loss.png", "LICENSE"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    assert fingerprint(model) == before
    assert fingerprint(model.rename(model.with_name("moved"))) == before


@pytest.mark.usefixtures("settled")
def test_a_file_is_hashed_once_while_it_stays_as_it_is(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(results, "hash_file", lambda file: hashed.append(file.name) or hash_file(file))
    first = fingerprint(model)
    assert WEIGHTS in hashed
    hashed.clear()
    assert fingerprint(model) == first
    assert hashed == []
    monkeypatch.setattr(results, "_digests", {})  # as in another process
    assert fingerprint(model) == first
    assert WEIGHTS not in hashed
    [record] = (cache / "digests").iterdir()
    for damaged in (b"", b"\0" * 64, b"\xff" * 64):
        record.write_bytes(damaged)
        monkeypatch.setattr(results, "_digests", {})
        hashed.clear()
        assert fingerprint(model) == first
        assert WEIGHTS in hashed


def test_a_file_that_just_changed_is_not_cached(model: Path, cache: Path) -> None:
    fingerprint(model)
    assert not results._digests
    assert not (cache / "digests").exists()


@pytest.mark.usefixtures("settled")
def test_a_cache_that_cannot_be_written_does_no_harm(model: Path, tmp_path: Path) -> None:
    first = fingerprint(model)
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    (tmp_path / "cache").write_text("a file where the folder should be")
    results._digests.clear()
    assert fingerprint(model) == first
    with pytest.warns(HlwqWarning, match="the result is not kept"):
        assert keep(model, "speed", SETTING, {"value": 1})["result"] == {"value": 1}
    with pytest.raises(ResourceError, match="HF_HOME"):
        record_of_programs(model, SETTING)


def test_progress_counts_bytes(model: Path) -> None:
    reports: list[tuple[int, int, str]] = []
    fingerprint(model, lambda *report: reports.append(report))
    total = sum(file.stat().st_size for file in model.iterdir())
    assert reports[-1] == (total, total, "hashing model")
    assert [done for done, _, _ in reports] == sorted(done for done, _, _ in reports)


def test_a_checkpoint_that_changes_while_it_is_measured_gets_no_result(model: Path) -> None:
    def measure() -> dict[str, Any]:
        set_byte(model / WEIGHTS, 5000)
        return {"value": 1}

    with pytest.raises(CheckpointError, match="changed while it was measured"):
        measured(model, "speed", SETTING, measure)
    assert kept(model, "speed") == []


def test_a_result_with_the_hash_of_an_earlier_version_is_measured_again(model: Path) -> None:
    write_json(model / "hlwq.json", {})
    measured(model, "speed", SETTING, lambda: {"value": 1})
    [file] = results_folder(model).glob("speed-*.json")
    write_json(file, {**read_json(file), "checkpoint": "0" * 64})
    assert kept(model, "speed") == []
    assert measured(model, "speed", SETTING, lambda: {"value": 2})["result"] == {"value": 2}


def test_programs_of_other_weights_are_in_another_record(model: Path) -> None:
    write_json(model / "hlwq.json", {})
    before = record_of_programs(model, SETTING)
    assert record_of_programs(model, SETTING) == before
    set_byte(model / WEIGHTS, 5000)
    after = record_of_programs(model, SETTING)
    assert after != before
    assert after.parent == before.parent == model / "results"


def test_hardware_names_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["NVIDIA H100", "NVIDIA T4", "NVIDIA H100"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: names[device or 0])
    assert results.hardware().endswith(f", {os.cpu_count()} cores, 2 × NVIDIA H100, NVIDIA T4")
