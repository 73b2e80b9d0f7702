"""The same damaged directories before every command that reads one, and before transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import hlwq
from hlwq.cli import app
from hlwq.demo import bundled_model, held_out_text

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
MODULE = "model.language_model.layers.0.mlp.down_proj"


def change_config(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def nan(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("layers.0.input_layernorm.weight"))
    tensors[name][0] = float("nan")


def in_text(**entries: Any) -> Callable[[Path], None]:
    """Entries of the decoder's configuration."""
    return lambda path: change_config(path, lambda config: config["text_config"].update(entries))


def in_config(**entries: Any) -> Callable[[Path], None]:
    return lambda path: change_config(path, lambda config: config.update(entries))


def in_weights(**tensors: torch.Tensor) -> Callable[[Path], None]:
    """Tensors of a module, by the last part of their names."""
    named = {f"{MODULE}.{part}": tensor for part, tensor in tensors.items()}
    return lambda path: change_weights(path, lambda stored: stored.update(named))


def lead_out(path: Path) -> None:
    (path / "model.safetensors").rename(path.parent / "x.safetensors")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')


def make_a_pipe(path: Path) -> None:
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")


def put(name: str, contents: bytes) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_bytes(contents)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "weights cut off": lambda path: os.truncate(path / "model.safetensors", 100_000),
    "weights a placeholder": put("model.safetensors", LFS),
    "weights missing": lambda path: (path / "model.safetensors").unlink(),
    "a header of 2**63": put("model.safetensors", b"\0" * 7 + b"\x80" + b"{}"),
    "an index that leads out": lead_out,
    "a configuration that is deep": put("config.json", b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "a configuration that is a pipe": make_a_pipe,
    "no layers": in_text(num_hidden_layers=0),
    "layers of words": in_text(num_hidden_layers="4"),
    "an unknown activation": in_text(hidden_act="x"),
    "a text configuration that is a list": in_config(text_config=[]),
    "a tensor missing": lambda path: change_weights(path, lambda stored: stored.pop(f"{MODULE}.weight_norms")),
    "a tensor twice": in_weights(weight=torch.zeros(256, 512).bfloat16()),
    "a tensor of another shape": in_weights(weight_norms=torch.zeros(3, 3).half()),
    "an adapter beside it": put("adapter_config.json", b'{"base_model_name_or_path": "a/b"}'),
    "a value that is no number": lambda path: change_weights(path, nan),
}
COMMANDS: dict[str, list[str]] = {
    "inspect": ["inspect", "PATH"],
    "check": ["check", "PATH"],
    "convert": ["convert", "PATH", "OUT", "--format", "dense"],
    "eval perplexity": ["eval", "perplexity", "PATH", "--text", "TEXT", "--context", "64", "--limit", "1"],
    "eval divergence": [
        *("eval", "divergence", "PATH", "--against", "BASE", "--text", "TEXT", "--context", "64", "--limit", "1"),
    ],
    "eval speed": ["eval", "speed", "PATH", "--packed", "--prompt-tokens", "4", "--new-tokens", "2", "--runs", "1"],
    "push": ["push", "PATH", "me/model", "--dry-run"],
    "compare": [
        *("compare", "PATH", "--base", "BASE", "--text", "TEXT", "--protocol", "chunked", "--context", "64"),
        *("--limit", "1", "--no-speed", "--out", "OUT"),
    ],
}
HARMLESS = {
    # Its weights are not looked at for what a directory holds, nor for how fast it is.
    ("a value that is no number", "inspect"),
    ("a value that is no number", "eval speed"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("readers") / "made"
    hlwq.quantize(bundled_model(), out, "hlwq")
    result = CliRunner().invoke(app, ["card", str(out), "--repository", "me/model"])
    assert result.exit_code == 0
    (out.parent / "text.txt").write_text(held_out_text().read_text()[:2000])
    return out


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_in_every_command(made: Path, tmp_path: Path, damage: str, command: str) -> None:
    path = Path(shutil.copytree(made, tmp_path / "model"))
    DAMAGES[damage](path)
    words = {"PATH": path, "OUT": tmp_path / "out", "BASE": bundled_model(), "TEXT": made.parent / "text.txt"}
    result = CliRunner().invoke(app, [str(words.get(word, word)) for word in COMMANDS[command]])
    if (damage, command) in HARMLESS:
        return
    failing = result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert failing, (result.exit_code, result.exception, result.stdout[-300:])
    if command != "check":  # which prints a table of demands
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "a configuration that is a pipe"])
def test_transformers_does_not_load_it_in_silence(made: Path, tmp_path: Path, damage: str) -> None:
    from transformers import AutoModelForCausalLM

    path = Path(shutil.copytree(made, tmp_path / "model"))
    DAMAGES[damage](path)
    if damage in ("a value that is no number", "an unknown activation", "an adapter beside it", "no layers"):
        pytest.skip("what transformers itself accepts, or tries to download")
    with pytest.raises(Exception):  # noqa: B017, PT011 - of hlwq or of transformers, whoever looks first
        AutoModelForCausalLM.from_pretrained(path)
