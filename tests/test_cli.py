"""The command line as a person meets it: above all, one clear line for each mistake."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from checkpoints import make_checkpoint
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hlwq.cli import app, main
from hlwq.demo import bundled_model


class Ended(NamedTuple):
    """What a command printed, and its exit status."""

    returncode: int
    stdout: str
    stderr: str


def hlwq(*arguments: object) -> Ended:
    """Run what the installed command runs, in this process, for speed."""
    printed, said = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", ["hlwq", *map(str, arguments)])
        patch.setattr("hlwq.cli.printing.console", Console(width=200))
        with redirect_stdout(printed), redirect_stderr(said), pytest.raises(SystemExit) as stopped:
            main()
    return Ended(int(stopped.value.code or 0), printed.getvalue(), said.getvalue())


def process(*arguments: object, preexec: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hlwq.cli", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, preexec_fn=preexec, check=False
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    make_checkpoint(path, "llama")
    return path


def shard(model: Path) -> None:
    """Split the one file into two with an index."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, model / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "model.safetensors").unlink()


def truncate_shard(model: Path) -> None:
    shard(model)
    file = model / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lose_shard(model: Path) -> None:
    shard(model)
    (model / "model-00001-of-00002.safetensors").unlink()


def poison(name: str, value: float) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        tensors[name].view(-1)[7] = value
        save_file(tensors, model / "model.safetensors")

    return change


def configure(**entries: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **entries}))

    return change


def pickle(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    torch.save(tensors, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def lose_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")


def unchanged(model: Path) -> None:
    pass


def with_tokenizer(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, model / name)


UP = "model.layers.1.mlp.up_proj.weight"
MISTAKES = [
    ("truncated shard", truncate_shard, [], ["model-00002-of-00002.safetensors", "Download it again"]),
    ("missing shard", lose_shard, [], ["model-00001-of-00002.safetensors", "Download it again"]),
    ("missing tensor", lose_tensor, [], [UP, "missing"]),
    ("NaN", poison(UP, float("nan")), [], [UP, "NaN"]),
    ("infinity in a kept tensor", poison("model.norm.weight", float("inf")), [], ["model.norm.weight", "infinite"]),
    (
        "unknown architecture",
        configure(architectures=["FooForCausalLM"]),
        [],
        ["FooForCausalLM", "no causal language model"],
    ),
    ("wrong shape", configure(intermediate_size=512), [], ["mlp.gate_proj.weight", "config.json"]),
    (
        "quantized source",
        configure(quantization_config={"quant_method": "gptq"}),
        [],
        ["quantization_config", "Remove that section"],
    ),
    ("section that is none", configure(quantization_config=["gptq"]), [], ["quantization_config", "Remove"]),
    ("pickled checkpoint", pickle, [], ["pytorch_model.bin", "safetensors"]),
    ("group size dividing nothing", unchanged, ["--group-size", "24"], ["in_features", "--group-size"]),
    ("group size of zero", unchanged, ["--group-size", "0"], ["--group-size"]),
    ("bits GPTQ lacks", unchanged, ["--bits", "5"], ["format gptq has 4, 8 bits, not 5"]),
    ("format the recipe does not fit", unchanged, ["--format", "hlwq"], ["--recipe hlwq"]),
    ("unknown format", unchanged, ["--format", "gguf"], ["gptq, compressed-tensors, mlx, hlwq, dense"]),
    ("idle include", unchanged, ["--include", "q_proj"], ["--include 'q_proj'", "quantized already"]),
    ("idle exclude", unchanged, ["--exclude", "norm"], ["--exclude 'norm'", "kept already"]),
    ("pattern that matches nothing", unchanged, ["--exclude", "q_porj"], ["matches no tensor"]),
    ("pattern that is none", unchanged, ["--exclude", "("], ["not a regular expression"]),
    ("half of a fused matrix", unchanged, ["--exclude", "gate_proj"], ["up_proj", "one matrix"]),
    ("everything excluded", unchanged, ["--exclude", "proj"], ["Nothing is left"]),
    ("GPTQ embedding", unchanged, ["--include-embeddings"], ["Use format mlx"]),
    ("idle scale", unchanged, ["--asymmetric", "--scale", "absmax"], ["changes nothing"]),
    ("idle revision", unchanged, ["--revision", "main"], ["--revision main changes nothing"]),
    ("unknown device", unchanged, ["--device", "tpu9"], ["--device tpu9", "--device cpu"]),
    ("idle calibration", unchanged, ["--samples", "8"], ["Calibration data changes nothing", "rtn"]),
    ("idle term", unchanged, ["--foem-beta", "0.1"], ["--foem-beta changes nothing in recipe rtn", "--calibrate"]),
    ("no samples", unchanged, ["--calibrate", "--samples", "0"], ["--samples 0 must be at least 1"]),
    (
        "calibration file that is not there",
        with_tokenizer,
        ["--calibrate", "--calibration", "absent.txt"],
        ["absent.txt does not exist"],
    ),
    ("bad shard size", unchanged, ["--max-shard-size", "big"], ["--max-shard-size big", "5GB"]),
]


@pytest.mark.parametrize(("change", "options", "said"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_a_mistake_gets_one_clear_line(
    change: Callable[[Path], None],
    options: list[str],
    said: list[str],
    model: Path,
    tmp_path: Path,
) -> None:
    change(model)
    out = tmp_path / "out"
    ended = hlwq("quantize", model, out, "--recipe", "rtn", *options)
    assert ended.returncode == 1
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for words in said:
        assert words in lines[0]
    assert not out.exists()


def test_an_output_directory_that_is_not_empty_is_left_alone(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    ended = hlwq("quantize", model, out, "--recipe", "rtn")
    assert ended.returncode == 1
    assert f"{out} is not empty" in ended.stderr
    assert [file.name for file in out.iterdir()] == ["precious.txt"]


def test_a_full_disk_leaves_nothing_that_looks_finished_and_can_be_resumed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def small_files() -> None:  # what a full disk does, for this process alone
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    ended = process("quantize", model, out, "--recipe", "rtn", preexec=small_files)
    assert ended.returncode == 1
    assert "disk" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not out.exists()
    assert hlwq("quantize", model, out, "--recipe", "rtn").returncode == 0
    assert (out / "model.safetensors").is_file()


def test_too_small_a_disk_is_refused_before_the_work(tmp_path: Path) -> None:
    from hlwq import HlwqError
    from hlwq.files import check_disk

    with pytest.raises(HlwqError, match="GB free, but the output needs"):
        check_disk(tmp_path, 10**18)


def test_a_name_that_is_nowhere(tmp_path: Path) -> None:
    ended = process("quantize", "no/such-model", tmp_path / "out", "--recipe", "rtn")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: no/such-model is no directory here")


def test_quantize_inspect_check_convert(model: Path, tmp_path: Path) -> None:
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    made = json.loads(hlwq("quantize", model, packed, "--recipe", "hlwq", "--bits", "3", "--json").stdout)
    assert made["bits_per_quantized_weight"] == pytest.approx(3.125, abs=0.01)
    found = json.loads(hlwq("inspect", packed, "--json").stdout)
    assert found["format"] == "hlwq"
    assert {tensor["bits"] for tensor in found["tensors"]} == {3, None}
    assert "3 bits" in hlwq("inspect", packed, "--against", model).stdout
    assert hlwq("check", packed).returncode == 0
    assert hlwq("convert", packed, dense, "--format", "dense").returncode == 0
    assert json.loads(hlwq("inspect", dense, "--json").stdout)["bits_per_quantized_weight"] is None
    again = tmp_path / "again"
    ended = hlwq("convert", packed, again, "--format", "gptq")
    assert ended.returncode == 0
    assert "warning: the weights of packed are rounded a second time" in ended.stderr
    refused = hlwq("check", again).stdout
    assert "--symmetric" in hlwq("check", _asymmetric(model, tmp_path)).stdout
    assert "`" not in refused
    hlwq("card", again)
    assert "rounded twice: by recipe `hlwq`" in (again / "README.md").read_text(encoding="utf-8")


def _asymmetric(model: Path, folder: Path) -> Path:
    """A directory that vLLM refuses, with advice in the words of `quantize`."""
    hlwq("quantize", model, folder / "asymmetric", "--recipe", "rtn", "--asymmetric")
    return folder / "asymmetric"


@pytest.mark.slow
def test_a_calibrated_run_reports_its_layers_and_warns(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    make_checkpoint(model, "llama", vocab_size=2048)
    with_tokenizer(model)
    options = ["--recipe", "hlwq-v7", "--samples", "8", "--sequence-length", "64", "--batch-size", "3", "--desc-act"]
    planned = hlwq("quantize", model, out, *options, "--dry-run")
    assert "vLLM 0.32 and later refuse --desc-act" in planned.stdout
    ended = hlwq("quantize", model, out, *options, "--offload-activations")
    assert ended.returncode == 0
    assert "warning: calibrating on 8 samples of Python's reference documentation" in ended.stderr
    assert "warning: vLLM 0.32 and later refuse --desc-act" in ended.stderr
    assert "largest relative output error" in ended.stdout
    manifest = json.loads((out / "hlwq.json").read_text())
    assert manifest["calibration"]["sources"][0]["source"] == "embedded"
    assert manifest["calibration"]["batch_size"] == 3


def test_dry_run_prints_the_plan_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = hlwq("quantize", model, out, "--recipe", "rtn", "--dry-run", "--json")
    plan = json.loads(ended.stdout)
    assert {tensor["action"] for tensor in plan["tensors"]} == {"quantize", "copy"}
    assert len(plan["tensors"]) == len(load_file(model / "model.safetensors"))
    assert "mlp.down_proj" in hlwq("quantize", model, out, "--recipe", "rtn", "--dry-run").stdout
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("listing", ["models", "recipes", "formats"])
def test_what_is_supported_can_be_listed(listing: str) -> None:
    rows = json.loads(hlwq(listing, "--json").stdout)
    table = hlwq(listing).stdout
    assert all(str(next(iter(row.values()))) in table for row in rows)
    assert rows


def test_check_fails_where_no_engine_would_load_it(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hlwq("quantize", model, out, "--recipe", "rtn")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {"-:.*mlp.*": {}}
    (out / "config.json").write_text(json.dumps(config))
    ended = hlwq("check", out)
    assert ended.returncode == 1
    assert "mlp.down_proj" in ended.stdout


def test_an_interrupted_command_says_that_it_goes_on(model: Path, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["hlwq.quantize"], "run_request", interrupt)
        ended = hlwq("quantize", model, tmp_path / "out", "--recipe", "rtn")
    assert ended.returncode == 130
    assert "goes on where it stopped" in ended.stderr


@pytest.mark.parametrize("option", ["--text", "DIRECTORY"])
def test_a_tilde_is_the_home_directory_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("some words " * 200)
    shutil.copytree(bundled_model(), tmp_path / "model")
    if option == "--text":
        arguments = ["eval", "perplexity", "~/model", "--text=~/text.txt", "--context", "64", "--limit", "1"]
    else:
        arguments = ["check", "~/model"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
