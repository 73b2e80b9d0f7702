"""The command line on terminals, pipes and disks as they are, and what people paste from it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from hlwq.demo import bundled_model
from hlwq.formats import READABLE_FORMATS
from hlwq.usage import commands

RUN = [sys.executable, "-c", "import hlwq_command; hlwq_command.main()"]
FULL = Path("/dev/full")


def run(
    *arguments: str, stdout: str | None = None, stderr: str | None = None, **environment: str
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command, with redirections in the shell's words."""
    redirected = " ".join([shlex.join([*RUN, *arguments]), *(each for each in (stdout, stderr) if each)])
    done = subprocess.run(redirected, shell=True, capture_output=True, env={**os.environ, **environment}, check=False)
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "--json"], ["--help"], ["--version"]])
def test_a_full_standard_output_is_one_line(arguments: list[str]) -> None:
    status, _, errors = run(*arguments, stdout=f">{FULL}")
    assert status == 1
    assert errors == "error: the output cannot be written: No space left on device\n"


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_standard_error_leaves_the_exit_status() -> None:
    assert run("check", "nowhere", stderr=f"2>{FULL}")[0] == 1


@pytest.mark.parametrize(
    ("stdout", "stderr", "arguments", "status"),
    [(">&-", None, ["recipes"], 0), (None, "2>&-", ["check", "nowhere"], 1), (">&-", "2>&-", ["formats"], 0)],
)
def test_closed_streams(stdout: str | None, stderr: str | None, arguments: list[str], status: int) -> None:
    found, _, errors = run(*arguments, stdout=stdout, stderr=stderr)
    assert found == status
    assert "Traceback" not in errors


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    plan = ["quantize", str(bundled_model()), "out", "--recipe", "rtn", "--dry-run", "--json"]
    _, output, errors = run(*plan, stdout="| head -c 1")
    assert output == "{"
    assert errors == ""


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_terminal_without_unicode(form: list[str], environment: dict[str, str]) -> None:
    plan = ["quantize", str(bundled_model()), "out", "--recipe", "rtn", "--dry-run", *form]
    status, output, errors = run(*plan, **environment)
    assert (status, errors) == (0, "")
    assert "512" in output


@pytest.mark.parametrize(
    "columns", [pytest.param(20, marks=pytest.mark.slow), 40, pytest.param(60, marks=pytest.mark.slow)]
)
def test_a_narrow_terminal_gets_a_line_for_each_cell(columns: int) -> None:
    plan = ["quantize", str(bundled_model()), "out", "--recipe", "rtn", "--dry-run"]
    _, output, _ = run(*plan, COLUMNS=str(columns))
    lines = output.splitlines()
    assert "action: quantize" in lines
    assert "model.language_model.layers.*.linear_attn.in_proj_qkv.weight" in output.replace("\n", "")


@pytest.mark.parametrize("seconds", [0.1, 0.4, 1.0, 3.5])
def test_control_c_is_one_line(tmp_path: Path, seconds: float) -> None:
    arguments = ["--recipe", "gptq", "--calibration", "embedded", "--samples", "280"]
    up = "print('up', flush=True); " + RUN[2]
    process = subprocess.Popen(
        [*RUN[:2], up, "quantize", str(bundled_model()), str(tmp_path / "out"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell gives background jobs, and a test runner may have been one, a signal that is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"  # before that, an interrupt is Python's
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert output == ""
    said = [line for line in errors.splitlines() if not line.startswith("warning:")]
    assert process.returncode == 130
    assert len(said) == 1
    assert said[0].startswith("interrupted")


NAMES = ["a b", "it's", 'say "hi"', "-rf", "--help", "x[/v2]", "[red]", "{path}", "$HOME", "`bits`", "a;b", "ü*?"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format_name", [name for name, each in READABLE_FORMATS.items() if each.engines])
def test_commands_can_be_pasted(tmp_path: Path, name: str, format_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(Path(name), "llama")
    for _, command in commands(Path(name), format_name):
        words = shlex.split(command)
        paths = [word for word in words if Path(word).is_dir()]
        assert paths, command
        assert not any(word == name and word.startswith("-") for word in words), command


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_an_output_is_printed_as_it_is(tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        [*RUN, "quantize", "--recipe", "rtn", str(bundled_model()), "--", name],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{name}: format gptq" in done.stdout
    command = next(line for line in done.stdout.splitlines() if "vllm serve" in line)
    assert Path(tmp_path, shlex.split(command)[3]).is_dir()
