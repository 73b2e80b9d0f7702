"""What stands between an interrupted run and a wrong checkpoint: locks, checksums, and places that cannot hold one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

import hlwq
from hlwq import CheckpointError, HlwqError, RequestError, ResourceError
from hlwq.check import check_directory
from hlwq.demo import bundled_model
from hlwq.errors import HlwqWarning
from hlwq.files import hash_file, locked, read_json

CALIBRATED: dict[str, Any] = {"calibration": "embedded", "samples": 4, "sequence_length": 64}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = make_checkpoint(tmp_path / "source", "llama", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, made / name)
    return made


def options_of(recipe: str) -> dict[str, Any]:
    return {} if recipe == "rtn" else CALIBRATED


def interrupt(source: Path, out: Path, recipe: str, item: str = "lm_head") -> Path:
    """Begin a run, and stop it where it reaches some tensor, after the layers. Returns what it left."""

    def stop(done: int, total: int, what: str) -> None:
        if item in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hlwq.quantize(source, out, recipe, progress=stop, **options_of(recipe))
    return out.with_name(out.name + ".partial")


def hashes(directory: Path) -> dict[str, str]:
    return {file.name: hash_file(file) for file in sorted(directory.iterdir())}


def cut_shard(partial: Path) -> None:
    file = partial / "model" / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flip_bit(partial: Path) -> None:
    file = partial / "model" / "model.safetensors"
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        stream.seek(8 + length + 1000)
        byte = stream.read(1)[0]
        stream.seek(8 + length + 1000)
        stream.write(bytes([byte ^ 1]))


def zero_data(partial: Path) -> None:
    file = partial / "model" / "model.safetensors"
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        stream.seek(8 + length)
        stream.write(bytes(100_000))


def spoil_header(partial: Path) -> None:
    with (partial / "model" / "model.safetensors").open("r+b") as stream:
        stream.seek(20)
        stream.write(b"???")


def delete_shard(partial: Path) -> None:
    (partial / "model" / "model.safetensors").unlink()


def spoil_config(partial: Path) -> None:
    (partial / "model" / "config.json").write_text("{}")


def spoil_journal(partial: Path) -> None:
    journal = partial / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0].replace(b"error", b"terror") + b"".join(lines[1:]))


def swap_digests(partial: Path) -> None:
    """A journal whose last line is of another run."""
    journal = partial / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b"0" * 64 + b' {"unit": "x"}\n')


@pytest.mark.parametrize("recipe", ["rtn", "hlwq-v7"])
@pytest.mark.parametrize(
    "damage",
    [cut_shard, flip_bit, zero_data, spoil_header, delete_shard, spoil_config, spoil_journal, swap_digests],
)
def test_damage_is_found_and_done_again(tmp_path: Path, source: Path, recipe: str, damage: Any) -> None:
    hlwq.quantize(source, tmp_path / "whole", recipe, **options_of(recipe))
    damage(interrupt(source, tmp_path / "out", recipe))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", HlwqWarning)
        hlwq.quantize(source, tmp_path / "out", recipe, **options_of(recipe))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    told = [str(each.message) for each in said if "damaged" in str(each.message)]
    assert len(told) == (0 if damage in (spoil_config, spoil_header) else 1), told


@pytest.mark.parametrize("recipe", ["rtn", "hlwq-v7"])
def test_a_source_that_was_only_touched_goes_on(tmp_path: Path, source: Path, recipe: str) -> None:
    hlwq.quantize(source, tmp_path / "whole", recipe, **options_of(recipe))
    interrupt(source, tmp_path / "out", recipe)
    (source / "model.safetensors").touch()
    hlwq.quantize(source, tmp_path / "out", recipe, **options_of(recipe))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("recipe", ["rtn", "hlwq-v7"])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight"])
def test_a_source_that_changed_in_secret_is_refused(tmp_path: Path, source: Path, recipe: str, name: str) -> None:
    partial = interrupt(source, tmp_path / "out", recipe)
    file = source / "model.safetensors"
    before = file.stat()
    tensors = load_file(file)
    tensors[name] = tensors[name] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    with pytest.raises(CheckpointError, match=f"{name} has changed since the run began") as caught:
        hlwq.quantize(source, tmp_path / "out", recipe, **options_of(recipe))
    assert caught.value.tensor == name
    assert partial.exists()
    assert not (tmp_path / "out").exists()


def test_a_source_of_another_size_is_named(tmp_path: Path, source: Path) -> None:
    interrupt(source, tmp_path / "out", "rtn")
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "model.extra": torch.zeros(3)}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"files\.model\.safetensors was .* bytes"):
        hlwq.quantize(source, tmp_path / "out", "rtn")


def test_another_number_of_threads_is_another_run_where_sums_depend_on_it(tmp_path: Path, source: Path) -> None:
    before = torch.get_num_threads()
    for recipe in ("rtn", "hlwq-v7"):
        interrupt(source, tmp_path / recipe, recipe)
    try:
        torch.set_num_threads(before + 1)
        hlwq.quantize(source, tmp_path / "rtn", "rtn")
        with pytest.raises(RequestError, match=rf"machine\.threads was {before}, now it is {before + 1}"):
            hlwq.quantize(source, tmp_path / "hlwq-v7", "hlwq-v7", **CALIBRATED)
    finally:
        torch.set_num_threads(before)


def test_a_changed_tokenizer_is_another_run(tmp_path: Path, source: Path) -> None:
    interrupt(source, tmp_path / "out", "hlwq-v7")
    text = json.loads((source / "tokenizer.json").read_text())
    text["model"]["merges"] = text["model"]["merges"][:-50]
    (source / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(RequestError, match="tokens_sha256"):
        hlwq.quantize(source, tmp_path / "out", "hlwq-v7", **CALIBRATED)


RUN = "import hlwq_command; hlwq_command.main()"


def test_two_runs_into_one_output(tmp_path: Path, source: Path) -> None:
    hlwq.quantize(source, tmp_path / "whole", "hlwq-v7", **CALIBRATED)
    flags = ["--recipe", "hlwq-v7", "--calibration", "embedded", "--samples", "4", "--sequence-length", "64"]
    command = [sys.executable, "-c", RUN, "quantize", str(source), str(tmp_path / "out"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    said = [run.communicate(timeout=120)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert sorted(codes) == [0, 1], said
    refused = said[codes.index(1)].splitlines()
    assert len([line for line in refused if line.startswith("error:")]) == 1
    assert "is being made by another process" in refused[-1] or "finished checkpoint" in refused[-1]
    assert hashes(tmp_path / "out").keys() == hashes(tmp_path / "whole").keys()
    assert hash_file(tmp_path / "out" / "model.safetensors") == hash_file(tmp_path / "whole" / "model.safetensors")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "source", "whole"]


@pytest.mark.parametrize("recipe", ["rtn", "hlwq-v7"])
def test_a_locked_output_is_left_alone(tmp_path: Path, source: Path, recipe: str) -> None:
    partial = interrupt(source, tmp_path / "out", recipe)
    before = {file: file.read_bytes() for file in partial.rglob("*") if file.is_file()}
    with locked(partial), pytest.raises(ResourceError, match="is being made by another process"):
        hlwq.quantize(source, tmp_path / "out", recipe, **options_of(recipe))
    assert before == {file: file.read_bytes() for file in partial.rglob("*") if file.is_file()}
    hlwq.quantize(source, tmp_path / "out", recipe, **options_of(recipe))
    assert not partial.with_name("out.partial.lock").exists()


def test_a_link_that_leads_nowhere_is_followed(tmp_path: Path, source: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "model")
    hlwq.quantize(source, tmp_path / "link", "rtn")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "model" / "config.json").is_file()


def test_a_link_to_an_empty_directory_is_followed(tmp_path: Path, source: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    hlwq.quantize(source, tmp_path / "link", "rtn")
    assert (tmp_path / "elsewhere" / "config.json").is_file()


def test_home_is_followed(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = hlwq.quantize("~/source", "~/made", "rtn")
    assert (tmp_path / "made" / "config.json").is_file()
    assert result.out == tmp_path / "made"
    hlwq.convert("~/made", "~/dense", "dense")
    assert (tmp_path / "dense" / "config.json").is_file()


def file_above(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "out"


def current_directory(folder: Path) -> Path:
    (folder / "empty").mkdir()
    os.chdir(folder / "empty")
    return Path()


def no_such_user(folder: Path) -> Path:
    return Path("~no-such-user-at-all/out")


def loop_of_links(folder: Path) -> Path:
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return folder / "a"


def very_long_name(folder: Path) -> Path:
    return folder / ("x" * 250)


def mount_point(folder: Path) -> Path:
    return Path("/dev/shm")


def the_source(folder: Path) -> Path:
    return folder / "source"


def above_the_source(folder: Path) -> Path:
    return folder


def read_only(folder: Path) -> Path:
    return Path("/proc/out")


@pytest.mark.parametrize(
    "place",
    [
        *(file_above, current_directory, no_such_user, loop_of_links, very_long_name),
        *(mount_point, the_source, above_the_source, read_only),
    ],
)
@pytest.mark.parametrize("recipe", ["rtn", "hlwq-v7"])
def test_a_place_that_cannot_be_an_output_is_refused_at_once(
    tmp_path: Path, source: Path, place: Any, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = place(tmp_path)
    told: list[str] = []
    with pytest.raises(HlwqError) as caught:
        hlwq.quantize(source, out, recipe, progress=lambda d, t, item: told.append(item), **options_of(recipe))
    assert len(str(caught.value).splitlines()) == 1
    assert told == []
    assert caught.value.argument == "out"


def spoil(directory: Path, name: str, value: float) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("recipe", "format_name", "part"),
    [
        ("rtn", "gptq", "model.layers.0.mlp.up_proj.scales"),
        ("rtn", "mlx", "model.layers.0.mlp.up_proj.biases"),
        ("rtn", "compressed-tensors", "model.layers.0.mlp.up_proj.weight_scale"),
        ("rtn", "dense", "model.norm.weight"),
        ("hlwq", "hlwq", "model.layers.0.mlp.up_proj.weight_norms"),
        ("hlwq", "hlwq", "model.norm.weight"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_check_finds_what_is_not_a_number(
    tmp_path: Path, source: Path, recipe: str, format_name: str, part: str, value: float, recorded: bool
) -> None:
    hlwq.quantize(source, tmp_path / "out", recipe, format=format_name)
    spoil(tmp_path / "out", part, value)
    if not recorded:
        (tmp_path / "out" / "hlwq.json").unlink()
    failed = [line for line in check_directory(tmp_path / "out") if not line.passed]
    assert any(part in line.detail and "finite" in line.requirement for line in failed)
    assert any("as it was written" in line.requirement for line in failed) is recorded


@pytest.mark.parametrize("format_name", ["gptq", "mlx", "dense"])
def test_check_finds_a_single_changed_bit(tmp_path: Path, source: Path, format_name: str) -> None:
    hlwq.quantize(source, tmp_path / "out", "rtn", format=format_name)
    assert all(line.passed for line in check_directory(tmp_path / "out"))
    assert read_json(tmp_path / "out" / "hlwq.json")["sha256"]
    with (tmp_path / "out" / "model.safetensors").open("r+b") as stream:
        stream.seek(-9, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-9, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))
    failed = [line for line in check_directory(tmp_path / "out") if not line.passed]
    assert {line.requirement for line in failed} == {"every tensor is as it was written"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_numbers_that_are_copied(tmp_path: Path, source: Path, dtype: torch.dtype) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.visual.extra.weight"] = torch.ones(4, 4).to(dtype)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HlwqWarning)
        hlwq.quantize(source, tmp_path / "out", "rtn")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.visual.extra.weight"].dtype == dtype
