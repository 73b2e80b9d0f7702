"""Measuring a model in the server that people would run, and finding the results again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import serve
from typer.testing import CliRunner

import hlwq
from hlwq.cli import app
from hlwq.demo import bundled_model, held_out_text
from hlwq.evaluate import perplexity
from hlwq.evaluate.divergence import divergence
from hlwq.evaluate.results import kept
from hlwq.evaluate.server import Endpoint
from hlwq.report.compare import Protocols, compare

CHUNKS = {"context": 256, "limit": 4}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HLWQ's decoded weights: a checkpoint that vLLM serves on any CPU."""
    directory = tmp_path_factory.mktemp("served") / "q5"
    hlwq.quantize(bundled_model(), directory, "hlwq", format="dense")
    return directory


@pytest.fixture(scope="module")
def vllm(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    module, options = "vllm.entrypoints.openai.api_server", ["--language-model-only", "--enforce-eager"]
    options += ["--max-model-len", "1024", "--host", "127.0.0.1"]
    log = tmp_path_factory.mktemp("vllm") / "log"
    with serve("vllm", lambda port: ["-m", module, "--model", str(dense), *options, "--port", str(port)], log) as url:
        yield url


def test_perplexity_through_vllm_is_that_of_transformers(vllm: str, dense: Path) -> None:
    server = Endpoint(vllm)
    assert (server.engine, server.version) == ("vLLM", "0.32.0")
    theirs = perplexity(server, held_out_text(), tokenizer_of=dense, protocol="chunked", **CHUNKS)
    ours = perplexity(dense, held_out_text(), protocol="chunked", **CHUNKS)
    assert theirs.tokens_sha256 == ours.tokens_sha256
    assert theirs.perplexity == pytest.approx(
        ours.perplexity,
        rel=5e-3,  # it computes in bfloat16
    )


def test_divergence_through_vllm_is_bounded_by_the_exact_one(vllm: str, dense: Path) -> None:
    theirs = divergence(Endpoint(vllm), bundled_model(), held_out_text(), **CHUNKS)
    ours = divergence(dense, bundled_model(), held_out_text(), **CHUNKS)
    assert theirs.lower_bound
    assert 0 < theirs.mean.mean < ours.mean.mean * 1.02
    assert theirs.top1_agreement.mean == pytest.approx(ours.top1_agreement.mean, abs=0.02)


def test_what_was_measured_through_vllm_is_in_the_comparison(
    vllm: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("hlwq.evaluate.speed.STEADY", 100)  # other tests may run beside
    options = ["--endpoint", vllm, "--json"]
    for model in (dense, bundled_model()):  # the server stands for both; what it serves is not the point
        programs = ["--prompting", "completion", "--limit", "4", "--max-tokens", "24"]
        ended = CliRunner().invoke(app, ["eval", "humaneval", str(model), *options, *programs])
        assert ended.exit_code == 0, ended.output
    [record] = (dense / "results").glob("humaneval-*.jsonl")
    assert len(record.read_text().split("\n")) == 5
    ended = CliRunner().invoke(app, ["eval", "speed", str(dense), *options])
    assert ended.exit_code == 0, ended.output
    measured = json.loads(ended.stdout)
    assert measured["engine"] == "vLLM"
    assert measured["peak_memory"] > 10**8
    assert measured["decode"][1] > 1
    assert kept(dense, "speed")[0]["versions"]["vLLM"] == "0.32.0"
    rows = compare([dense], bundled_model(), Protocols(held_out_text(), "chunked", **CHUNKS, speed=False))
    assert [each.engine for each in rows[1].speeds] == ["vLLM"]
    assert rows[1].humaneval is not None
    assert rows[1].humaneval.n == 4
    assert rows[1].humaneval_how == "completion, vLLM"
    assert rows[1].humaneval_verdict == "no measurable difference"


def test_mlx_lm_server_is_measured_too(tmp_path: Path) -> None:
    directory = tmp_path / "mlx"
    hlwq.quantize(bundled_model(), directory, "rtn", format="mlx")
    command = ["-m", "mlx_lm.server", "--model", str(directory), "--host", "127.0.0.1"]
    with serve("mlx", lambda port: [*command, "--port", str(port)], tmp_path / "log") as url:
        assert Endpoint(url).engine == "mlx-lm"
        short = ["--prompt-tokens", "32", "--new-tokens", "8", "--runs", "1", "--json"]
        ended = CliRunner().invoke(app, ["eval", "speed", str(directory), "--endpoint", url, *short])
        assert ended.exit_code == 0, ended.output
        text = ["eval", "perplexity", str(directory), "--endpoint", url, "--text", str(held_out_text())]
        refused = CliRunner().invoke(app, text)
        assert refused.exit_code == 1
        assert "log-probabilities of" in refused.output
        assert "vLLM" in refused.output
