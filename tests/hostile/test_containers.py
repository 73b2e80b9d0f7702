"""Folders and files as they should not be: refused in one line by whatever reads them, or read as they should be."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import hlwq
from hlwq import CheckpointError, HlwqError, UnsupportedError
from hlwq.check import check_directory
from hlwq.cli import app
from hlwq.containers import Reader, read_gguf_header
from hlwq.decoded import DecodedCheckpoint
from hlwq.demo import bundled_model
from hlwq.errors import HlwqWarning
from hlwq.files import read_json

NAME = "model.layers.0.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
READERS: dict[str, Callable[[Path, Path], Any]] = {
    "quantize": lambda path, out: hlwq.quantize(path, out, "rtn"),
    "inspect": lambda path, out: hlwq.inspect(path),
    "check": lambda path, out: check_directory(path),
    "convert": lambda path, out: hlwq.convert(path, out, "mlx"),
    "read": lambda path, out: DecodedCheckpoint(path),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(make_checkpoint(tmp_path_factory.mktemp("containers") / "plain", "llama", vocab_size=256))


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    """A checkpoint in a single file."""
    return Path(shutil.copytree(plain, tmp_path / "model"))


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same in two shards with an index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for number, (name, tensor) in enumerate(tensors.items()):
        list(shards.values())[number % 2][name] = tensor
    for file, part in shards.items():
        save_file(part, model / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    write_index(model, weight_map)
    return model


def with_tokenizer(path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, path / name)
    return path


def write_index(path: Path, weight_map: Any) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight_map_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / INDEX).read_text())["weight_map"]
    return found


def refused(path: Path, out: Path, *phrases: str, readers: Any = READERS) -> None:
    """Every reader refuses a directory in one line with these words, and leaves nothing."""
    for name in readers:
        with pytest.raises(HlwqError) as caught:
            READERS[name](path, out)
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 1000
        for phrase in phrases:
            assert phrase in message, (name, message)
        assert not out.exists()
        assert not out.with_name("out.partial").exists()


# Which file a tensor comes from


def test_the_index_decides_tensor_by_tensor(sharded: Path) -> None:
    """A shard may hold a tensor that the index takes from another one, or does not name at all."""
    weight_map = weight_map_of(sharded)
    other = next(file for file in set(weight_map.values()) if file != weight_map[NAME])
    tensors = load_file(sharded / other)
    right = load_file(sharded / weight_map[NAME])[NAME]
    save_file({**tensors, NAME: torch.zeros_like(right), "extra.weight": torch.ones(2, 2)}, sharded / other)
    reader = Reader(sharded)
    assert torch.equal(reader.read(NAME), right)
    assert "extra.weight" not in reader.tensors
    assert reader.tensors.keys() == weight_map.keys()


@pytest.mark.parametrize("name", ["model-00003-of-00003.safetensors", "more.safetensors", "zz.safetensors"])
def test_a_name_in_two_files_without_an_index_is_an_error(model: Path, tmp_path: Path, name: str) -> None:
    single = model / "model.safetensors"
    save_file({NAME: load_file(single)[NAME]}, model / name)
    refused(model, tmp_path / "out", NAME, "model.safetensors", name)


def test_shards_without_an_index_that_share_a_name_are_an_error(sharded: Path, tmp_path: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))
    (sharded / INDEX).unlink()
    assert Reader(sharded).tensors.keys() == load_file(first).keys() | load_file(second).keys()
    save_file({**load_file(first), **dict(list(load_file(second).items())[:1])}, first)
    refused(sharded, tmp_path / "out", first.name, second.name)


def test_a_single_file_beside_an_index_without_its_shards_is_the_checkpoint(sharded: Path, plain: Path) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copy(plain / "model.safetensors", sharded)
    for shard in sharded.glob("model-*.safetensors"):
        shard.unlink()
    AutoModelForCausalLM.from_pretrained(sharded)
    assert Reader(sharded).tensors == Reader(plain).tensors


def test_a_single_file_beside_whole_shards_is_refused(sharded: Path, plain: Path, tmp_path: Path) -> None:
    shutil.copy(plain / "model.safetensors", sharded)
    refused(sharded, tmp_path / "out", "model.safetensors", INDEX)


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.safetensors",
        "consolidated.00.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "adapter_model.safetensors",
        "adapter.safetensors",
        "optimizer.safetensors",
        "optimizer_0.safetensors",
        "scheduler.safetensors",
        "rng_state_0.safetensors",
    ],
)
@pytest.mark.parametrize("kind", ["single", "shards"])
def test_what_is_not_the_model_is_not_read(sharded: Path, plain: Path, name: str, kind: str) -> None:
    if kind == "shards":
        (sharded / INDEX).unlink()
    path = sharded if kind == "shards" else plain.parent / "other"
    if kind == "single":
        shutil.copytree(plain, path, dirs_exist_ok=True)
    save_file({NAME: torch.zeros(1), "state": torch.zeros(3)}, path / name)
    try:
        assert Reader(path).tensors.keys() == Reader(plain).tensors.keys()
    finally:
        (path / name).unlink()


def test_unknown_tensors_are_told_at_quantize(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.extra.weight": torch.ones(4, 4).bfloat16()}, file)
    with pytest.warns(HlwqWarning, match=r"model\.layers\.0\.extra\.weight"):
        hlwq.quantize(model, tmp_path / "out", "rtn")


# Headers


def raw(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def header_of(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    return raw(json.dumps(entries).encode(), data, length)


def tensor_entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "length alone": raw(b"", length=10),
    "length of 2**63": raw(b"{}", length=1 << 63),
    "length of 2**64 - 1": raw(b"{}", length=(1 << 64) - 1),
    "length of 1 GB": raw(b"{}", length=1 << 30),
    "length beyond the file": raw(b"{}", length=1000),
    "no JSON": raw(b"x" * 50),
    "JSON of another kind": raw(b"[1, 2]"),
    "null": raw(b"null"),
    "not UTF-8": raw(b'{"\xff\xfe": 1}'),
    "deep": raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "text": b"<html><body>404 Not Found</body></html>" * 10,
    "zip": b"PK\x03\x04" + b"\0" * 200,
    "gguf": b"GGUF" + b"\0" * 200,
    "offsets backwards": header_of({NAME: tensor_entry(offsets=(4, 0))}, b"\0" * 4),
    "offsets beyond": header_of({NAME: tensor_entry(shape=(10,), offsets=(0, 40))}, b"\0" * 4),
    "offsets of 2**60": header_of({NAME: tensor_entry(offsets=(1 << 60, (1 << 60) + 4))}, b"\0" * 4),
    "offsets negative": header_of({NAME: tensor_entry(offsets=(-4, 0))}, b"\0" * 4),
    "offsets of strings": header_of({NAME: tensor_entry(offsets=("0", "4"))}, b"\0" * 4),
    "offsets of floats": header_of({NAME: tensor_entry(offsets=(0.0, 4.0))}, b"\0" * 4),
    "one offset": header_of({NAME: tensor_entry(offsets=(0,))}, b"\0" * 4),
    "no offsets": header_of({NAME: {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
    "overlapping": header_of({"a": tensor_entry(), "b": tensor_entry()}, b"\0" * 4),
    "a gap": header_of({"a": tensor_entry(), "b": tensor_entry(offsets=(8, 12))}, b"\0" * 12),
    "data left over": header_of({"a": tensor_entry()}, b"\0" * 100),
    "shape of 2**40 squared": header_of({NAME: tensor_entry(shape=(1 << 40, 1 << 40))}, b"\0" * 4),
    "shape of 2**62": header_of({NAME: tensor_entry(shape=(1 << 62,))}, b"\0" * 4),
    "shape negative": header_of({NAME: tensor_entry(shape=(-1,))}, b"\0" * 4),
    "shape of a float": header_of({NAME: tensor_entry(shape=(1.5,))}, b"\0" * 4),
    "shape of null": header_of({NAME: tensor_entry(shape=None)}, b"\0" * 4),
    "shape too large": header_of({NAME: tensor_entry(shape=(2,))}, b"\0" * 4),
    "shape too small": header_of({NAME: tensor_entry(shape=(), offsets=(0, 8))}, b"\0" * 8),
    "unknown dtype": header_of({NAME: tensor_entry(dtype="F3")}, b"\0" * 4),
    "dtype of a number": header_of({NAME: tensor_entry(dtype=32)}, b"\0" * 4),
    "dtype in small letters": header_of({NAME: tensor_entry(dtype="f32")}, b"\0" * 4),
    "entry of a number": header_of({NAME: 5}),
    "entry of a list": header_of({NAME: []}),
    "metadata of a list": header_of({"__metadata__": [], NAME: tensor_entry()}, b"\0" * 4),
    "metadata of numbers": header_of({"__metadata__": {"a": 1}, NAME: tensor_entry()}, b"\0" * 4),
    "empty name": header_of({"": tensor_entry()}, b"\0" * 4),
    "name with a newline": header_of({"a\nb": tensor_entry()}, b"\0" * 4),
    "name with an escape": header_of({"\x1b[31mred": tensor_entry()}, b"\0" * 4),
    "name with NUL": header_of({"a\0b": tensor_entry()}, b"\0" * 4),
    "name of half a surrogate": raw(b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"\0" * 4),
    "no tensor": header_of({}),
    "a placeholder of Git LFS": LFS,
    "a million tensors": header_of({f"{i:08}": tensor_entry(shape=[0], offsets=[0, 0]) for i in range(1_000_000)}),
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_is_wrong_is_refused(model: Path, tmp_path: Path, header: str) -> None:
    (model / "model.safetensors").write_bytes(HEADERS[header])
    refused(model, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("header", ["a million tensors", "deep", "length of 1 GB", "a placeholder of Git LFS"])
def test_the_command_line_says_so_in_bounded_memory(model: Path, header: str) -> None:
    (model / "model.safetensors").write_bytes(HEADERS[header])

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    command = [sys.executable, "-m", "hlwq.cli", "inspect", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, preexec_fn=limit)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "model.safetensors" in "".join(done.stderr.split())


def test_tensors_of_something_else_are_refused(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(header_of({"a": tensor_entry()}, b"\0" * 4))
    refused(model, tmp_path / "out", readers=("quantize", "check", "convert"))


@pytest.mark.parametrize("cut", [1, 100, 1000, 100_000])
@pytest.mark.parametrize("kind", ["end", "whole"])
def test_a_file_that_was_cut_off_is_refused(model: Path, tmp_path: Path, cut: int, kind: str) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - cut if kind == "end" else cut)
    refused(model, tmp_path / "out", "model.safetensors")


# Indices

WRONG_FILES: dict[str, Any] = {
    "above": "../model-00001-of-00002.safetensors",
    "below": "a/model-00001-of-00002.safetensors",
    "absolute": "/etc/passwd",
    "absolute shard": "/model-00001-of-00002.safetensors",
    "empty": "",
    "dot": ".",
    "two dots": "..",
    "backslashes": "..\\model.safetensors",
    "a number": 5,
    "null": None,
    "a list": ["model-00001-of-00002.safetensors"],
    "an object": {},
    "a pickle": "pytorch_model-00001-of-00002.bin",
    "a program": "model.py",
    "config.json": "config.json",
    "a newline": "model\n.safetensors",
    "NUL": "model\0.safetensors",
    "missing": "model-00009-of-00009.safetensors",
    "very long": "x" * 5000 + ".safetensors",
    "half a surrogate": "\ud800.safetensors",
}


@pytest.mark.parametrize("file", WRONG_FILES)
def test_an_index_that_leads_elsewhere_is_refused(sharded: Path, tmp_path: Path, file: str) -> None:
    outside = sharded.parent / "model-00001-of-00002.safetensors"
    shutil.copy(sharded / outside.name, outside)
    write_index(sharded, {**weight_map_of(sharded), NAME: WRONG_FILES[file]})
    refused(sharded, tmp_path / "out")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 5, [["a", "b"]]], ids=json.dumps)
def test_an_index_without_a_map_is_refused(sharded: Path, tmp_path: Path, weight_map: Any) -> None:
    write_index(sharded, weight_map)
    refused(sharded, tmp_path / "out", INDEX)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"weight_map":', "\udcff", '{"weight_map": 1e999}', "{" * 10_000, '{"a":' * 5000]
)
def test_an_index_that_is_no_object_is_refused(sharded: Path, tmp_path: Path, text: str) -> None:
    (sharded / INDEX).write_text(text, errors="surrogateescape")
    refused(sharded, tmp_path / "out", INDEX)


def test_a_tensor_that_its_file_does_not_hold_is_refused(sharded: Path, tmp_path: Path) -> None:
    weight_map = weight_map_of(sharded)
    other = next(file for file in set(weight_map.values()) if file != weight_map[NAME])
    write_index(sharded, {**weight_map, NAME: other})
    refused(sharded, tmp_path / "out", NAME, other)
    write_index(sharded, {**weight_map, "model.ghost.weight": other})
    refused(sharded, tmp_path / "out", "model.ghost.weight", other)


# Things that are no files


def as_pipe(file: Path) -> None:
    os.mkfifo(file)


def as_directory(file: Path) -> None:
    file.mkdir()


def as_device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def as_loop(file: Path) -> None:
    file.symlink_to(file)


def as_dangling(file: Path) -> None:
    file.symlink_to("nothing")


@pytest.mark.parametrize("make", [as_pipe, as_directory, as_device, as_loop, as_dangling])
@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", INDEX])
def test_what_is_no_file_is_not_read(sharded: Path, tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    (sharded / name).unlink()
    make(sharded / name)
    if name == INDEX and make in (as_loop, as_dangling):  # for transformers there is no index then, and for us
        assert Reader(sharded).tensors
        return
    refused(sharded, tmp_path / "out", name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        '"text"',
        "{",
        "{'a': 1}",
        "\ufeff{}",
        "\udcff",
        '{"a": ' + "[" * 5000,
        '{"a": ' + "[" * 100 + "]" * 100 + "}",
        '{"a": ' + "9" * 5000 + "}",
        '{"a": "\\ud800"}',
        '{"\\udc00": 1}',
        "\0" * 100,
        "<html>",
        LFS.decode(),
        " " * 200_000_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_json_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError) as caught:
        read_json(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "config.json" in str(caught.value)


# What to do about it


def folder(tmp_path: Path, *files: str, contents: bytes = b"{}") -> Path:
    path = tmp_path / "model"
    path.mkdir(exist_ok=True)
    for name in files:
        (path / name).write_bytes(contents)
    return path


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", INDEX])
def test_placeholders_of_git_lfs_name_the_command(sharded: Path, tmp_path: Path, name: str) -> None:
    (sharded / name).write_bytes(LFS)
    refused(sharded, tmp_path / "out", name, "`git lfs pull`")


@pytest.mark.parametrize(
    ("files", "phrases"),
    [
        (("model.Q4_K_M.gguf",), ("GGUF", "model.Q4_K_M.gguf")),
        (("MODEL.GGUF", "README.md"), ("GGUF", "MODEL.GGUF")),
        (("a b.gguf", "config.json"), ("GGUF", "'")),
        (("pytorch_model.bin", "config.json"), ("pickled", "save_pretrained")),
        (("consolidated.00.pth",), ("pickled",)),
        (("model.ckpt",), ("pickled",)),
        (("model_index.json",), ("diffusers",)),
        (("config.json",), ("no *.safetensors file",)),
        (("config.json", INDEX), ("no *.safetensors file", "Download")),
        (("README.md",), ("config.json is missing",)),
        ((), ("config.json is missing",)),
        (("adapter_config.json", "adapter_model.safetensors"), ("an adapter and no model", "Merge it", "peft")),
        (("adapter_config.json", "adapter_model.bin"), ("an adapter and no model", "Merge it", "peft")),
    ],
    ids=lambda each: " ".join(each)[:40],
)
def test_a_folder_without_a_model_says_what_it_is(tmp_path: Path, files: Any, phrases: Any) -> None:
    refused(folder(tmp_path, *files), tmp_path / "out", *phrases)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", None])
def test_an_adapter_beside_a_model_is_refused(model: Path, tmp_path: Path, weights: str | None) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    if weights:
        (model / weights).write_bytes(b"x")
    refused(model, tmp_path / "out", "beside the model", "org/base", "Merge it first", "merge_and_unload", str(model))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "model._orig_mod."])
def test_names_from_around_a_model_are_explained(model: Path, tmp_path: Path, prefix: str) -> None:
    file = model / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    refused(model, tmp_path / "out", prefix, "save the model itself", readers=("quantize", "check"))


@pytest.mark.parametrize(("kept", "phrase"), [("lm_head", "output head"), ("norm", "decoder layer")])
def test_a_missing_embedding_is_explained(model: Path, tmp_path: Path, kept: str, phrase: str) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    wanted = {"lm_head": ("lm_head", ".layers."), "norm": ("model.norm",)}[kept]
    save_file({name: each for name, each in tensors.items() if any(part in name for part in wanted)}, file)
    refused(model, tmp_path / "out", phrase, readers=("quantize", "check"))


@pytest.mark.parametrize("key", ["quantization_config", "quantization", "compression_config"])
@pytest.mark.parametrize("section", [{"quant_method": "gptq", "bits": 4, "group_size": 64}, {"bits": 4}, {}, 0, "x"])
def test_a_section_left_over_is_to_be_removed(model: Path, tmp_path: Path, key: str, section: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: section}))
    refused(model, tmp_path / "out", key, "Remove that section", readers=("quantize",))
    refused(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ("model/model.safetensors", "Name its directory"),
        ("model/config.json", "Name its directory"),
        ("model/tokenizer.json", "Name its directory"),
        ("https://huggingface.co/org/name", "org/name"),
        ("https://huggingface.co/org/name/tree/main", "org/name"),
        ("nothing/here.gguf", "here.gguf"),
        ("model/none.GGUF", "none.GGUF"),
    ],
)
def test_a_source_that_is_no_directory_is_explained(
    model: Path, monkeypatch: pytest.MonkeyPatch, source: str, phrase: str
) -> None:
    monkeypatch.chdir(model.parent)
    result = CliRunner().invoke(app, ["quantize", source, "out", "--recipe", "rtn"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert phrase in " ".join(result.stderr.split())


# Codes and weights of one module


@pytest.mark.parametrize(
    ("recipe", "format_name"),
    [("rtn", "gptq"), ("rtn", "compressed-tensors"), ("hlwq", "hlwq")],
)
@pytest.mark.parametrize("where", ["same file", "file of its own"])
def test_weights_beside_codes_are_refused(
    model: Path, tmp_path: Path, recipe: str, format_name: str, where: str
) -> None:
    made = tmp_path / "made"
    hlwq.quantize(model, made, recipe, format=format_name)
    tensors, weights = load_file(made / "model.safetensors"), load_file(model / "model.safetensors")
    if where == "same file":
        save_file({**tensors, NAME: weights[NAME]}, made / "model.safetensors")
    else:
        (made / "model.safetensors").rename(made / "model-00001-of-00002.safetensors")
        save_file({NAME: weights[NAME]}, made / "model-00002-of-00002.safetensors")
    refused(made, tmp_path / "out", NAME, "twice", readers=("inspect", "check", "read"))
    with pytest.raises(HlwqError):
        hlwq.convert(made, tmp_path / "out", "dense")


# GGUF


def gguf_header(
    version: int = 3, tensors: int = 0, entries: bytes = b"", count: int = 0, magic: bytes = b"GGUF"
) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, count) + entries


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def tensor_info(name: bytes = b"t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


PADDING = b"\0" * 256
GGUFS: dict[str, bytes] = {
    "nothing": b"",
    "magic alone": b"GGUF",
    "another magic": gguf_header(magic=b"GGML") + PADDING,
    "version 0": gguf_header(0) + PADDING,
    "version 1": gguf_header(1) + PADDING,
    "version 99": gguf_header(99) + PADDING,
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + PADDING,
    "2**60 tensors": gguf_header(tensors=1 << 60) + PADDING,
    "2**60 entries": gguf_header(count=1 << 60) + PADDING,
    "2**63 entries": gguf_header(count=1 << 63) + PADDING,
    "long key": gguf_header(count=1, entries=text(b"a", 1 << 60)) + PADDING,
    "long string": gguf_header(count=1, entries=text(b"a") + struct.pack("<I", 8) + text(b"x", 1 << 40)) + PADDING,
    "long list": gguf_header(count=1, entries=text(b"a") + struct.pack("<IIQ", 9, 0, 1 << 60)) + PADDING,
    "long list of strings": gguf_header(count=1, entries=text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 50)) + PADDING,
    "list of lists": gguf_header(count=1, entries=text(b"a") + struct.pack("<IIQ", 9, 9, 2)) + PADDING,
    "unknown type": gguf_header(count=1, entries=text(b"a") + struct.pack("<I", 77)) + PADDING,
    "key twice": gguf_header(count=2, entries=(text(b"a") + struct.pack("<IB", 0, 1)) * 2) + PADDING,
    "key of no text": gguf_header(count=1, entries=text(b"\xff\xfe") + struct.pack("<IB", 0, 1)) + PADDING,
    "alignment 0": gguf_header(count=1, entries=text(b"general.alignment") + struct.pack("<II", 4, 0)) + PADDING,
    "five axes": gguf_header(tensors=1, entries=tensor_info(shape=(2, 2, 2, 2, 2))) + PADDING,
    "no axes": gguf_header(tensors=1, entries=tensor_info(shape=())) + PADDING,
    "2**31 axes": gguf_header(tensors=1, entries=text(b"t") + struct.pack("<I", 1 << 31)) + PADDING,
    "size of 2**60": gguf_header(tensors=1, entries=tensor_info(shape=(1 << 60,))) + PADDING,
    "size of 0": gguf_header(tensors=1, entries=tensor_info(shape=(0,))) + PADDING,
    "sizes that overflow": gguf_header(tensors=1, entries=tensor_info(shape=(1 << 32, 1 << 32))) + PADDING,
    "no whole block": gguf_header(tensors=1, entries=tensor_info(shape=(33,), kind=2)) + PADDING,
    "unknown tensor type": gguf_header(tensors=1, entries=tensor_info(kind=999)) + PADDING,
    "offset beyond": gguf_header(tensors=1, entries=tensor_info(offset=1 << 20)) + PADDING,
    "offset of 2**64 - 32": gguf_header(tensors=1, entries=tensor_info(offset=(1 << 64) - 32)) + PADDING,
    "offset not aligned": gguf_header(tensors=1, entries=tensor_info(offset=7)) + PADDING * 2,
    "overlapping": gguf_header(tensors=2, entries=tensor_info(b"a") + tensor_info(b"b")) + PADDING * 2,
    "name twice": gguf_header(tensors=2, entries=tensor_info(b"a") + tensor_info(b"a", offset=128)) + PADDING * 2,
    "name with a newline": gguf_header(tensors=1, entries=tensor_info(b"a\nb")) + PADDING * 2,
    "cut off": gguf_header(tensors=1, entries=tensor_info(shape=(32,))) + b"\0" * 64,
    "a placeholder of Git LFS": LFS,
    "a part": gguf_header(count=1, entries=text(b"split.count") + struct.pack("<IH", 2, 3)) + PADDING,
}


@pytest.mark.parametrize("name", GGUFS)
def test_a_gguf_file_that_is_wrong_is_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(GGUFS[name])
    with pytest.raises(HlwqError) as caught:
        read_gguf_header(file)
    assert "\n" not in str(caught.value)
    assert "model.gguf" in str(caught.value)
    with pytest.raises(HlwqError, match=r"model\.gguf"):
        hlwq.quantize(file, tmp_path / "out", "rtn")


@pytest.mark.parametrize(
    ("key", "value"), [("general.architecture", b"clip"), ("general.type", b"mmproj"), ("general.type", b"adapter")]
)
def test_a_gguf_file_of_something_else_is_named(tmp_path: Path, key: str, value: bytes) -> None:
    file = tmp_path / "mmproj.gguf"
    entries = text(key.encode()) + struct.pack("<I", 8) + text(value)
    file.write_bytes(gguf_header(count=1, entries=entries) + PADDING)
    with pytest.raises(UnsupportedError, match="no language model"):
        hlwq.quantize(file, tmp_path / "out", "rtn")


def make_gguf(file: Path, left_out: str = "", value: float | None = None) -> None:
    """A small Llama with the tokenizer of the bundled model, perhaps without a tensor."""
    import gguf
    import numpy as np

    tokenizer = json.loads((bundled_model() / "tokenizer.json").read_text())["model"]
    tokens = [token for token, _ in sorted(tokenizer["vocab"].items(), key=lambda each: each[1])]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 64), "output": (len(tokens), 64), "output_norm": (64,)}
    shapes |= {f"blk.0.attn_{part}": (64, 64) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (128, 64), "blk.0.ffn_up": (128, 64), "blk.0.ffn_down": (64, 128)}
    shapes |= {"blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    for name, shape in shapes.items():
        if name != left_out:
            weights = generator.standard_normal(shape, dtype=np.float32) * 0.05
            if value is not None and name == "blk.0.ffn_up":
                weights[3, 5] = value
            writer.add_tensor(f"{name}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hlwq"


@pytest.mark.parametrize("suffix", [".gguf", ".GGUF", ".GgUf"])
def test_a_gguf_file_is_dequantized_once(tmp_path: Path, cache: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    make_gguf(file)
    hlwq.quantize(file, tmp_path / "first", "rtn")
    (kept,) = [each for each in cache.iterdir() if each.is_dir()]
    before = (kept / "model.safetensors").stat().st_mtime_ns
    hlwq.quantize(file, tmp_path / "second", "rtn")
    assert (kept / "model.safetensors").stat().st_mtime_ns == before
    assert not list(cache.glob("*.partial*"))
    weights = [load_file(tmp_path / each / "model.safetensors") for each in ("first", "second")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("name", ["blk.0.ffn_up", "blk.0.attn_q", "token_embd", "output_norm"])
def test_a_gguf_file_that_lacks_a_tensor_is_refused_and_not_kept(tmp_path: Path, cache: Path, name: str) -> None:
    make_gguf(tmp_path / "model.gguf", left_out=name)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="missing"):
            hlwq.quantize(tmp_path / "model.gguf", tmp_path / "out", "rtn")
        assert not [each for each in cache.glob("*") if each.is_dir()]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gguf_file_with_values_that_are_no_numbers_is_refused(tmp_path: Path, cache: Path, value: float) -> None:
    make_gguf(tmp_path / "model.gguf", value=value)
    with pytest.raises(CheckpointError, match="up_proj"):
        hlwq.quantize(tmp_path / "model.gguf", tmp_path / "out", "rtn")


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "below"))
    make_gguf(tmp_path / "model.gguf")
    with pytest.raises(hlwq.ResourceError, match="HF_HOME"):
        hlwq.quantize(tmp_path / "model.gguf", tmp_path / "out", "rtn")
