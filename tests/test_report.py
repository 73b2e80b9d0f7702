from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import hlwq
from hlwq import HlwqError
from hlwq.demo import bundled_model, held_out_text
from hlwq.evaluate.humaneval import HumanEval
from hlwq.evaluate.results import fingerprint, humaneval_setting, keep, measured, results_folder, speed_setting
from hlwq.evaluate.speed import speed
from hlwq.evaluate.statistics import Estimate, wilson
from hlwq.report.card import write_card
from hlwq.report.charts import pareto_front
from hlwq.report.compare import BASE, Protocols, Row, _run_humaneval, compare
from hlwq.report.page import write_report
from hlwq.report.push import files_to_push
from hlwq.report.tables import markdown_table

PROTOCOLS = Protocols(held_out_text(), protocol="chunked", context=128, limit=6, speed=False)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    hlwq.quantize(bundled_model(), root / "rtn", "rtn")
    hlwq.quantize(bundled_model(), root / "q5", "hlwq")
    data = hlwq.Calibration(("embedded",), 8, 128)
    hlwq.quantize(bundled_model(), root / "v7", "hlwq-v7", calibration=data)
    return [root / name for name in ("rtn", "q5", "v7")]


@pytest.fixture(scope="module")
def rows(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        return compare(checkpoints, bundled_model(), PROTOCOLS)


def test_every_number_has_its_interval_and_its_n(rows: list[Row]) -> None:
    base, *others = rows
    assert base.name == BASE
    assert base.loss_above_base is None
    assert [row.name for row in others] == ["rtn", "q5", "v7"]
    for row in others:
        for estimate in (row.loss_above_base, row.divergence, row.top1_agreement):
            assert estimate is not None
            assert estimate.low <= estimate.mean <= estimate.high
            assert estimate.n == 6
        assert row.loss_verdict in ("better", "worse", "no measurable difference")
    assert others[1].divergence is not None
    assert others[0].divergence is not None
    assert others[1].divergence.mean < others[0].divergence.mean
    assert len(others[2].layer_errors) == 4


def test_what_was_measured_is_not_measured_again(
    rows: list[Row], checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = {file.name: json.loads(file.read_text()) for file in (checkpoints[0] / "results").iterdir()}
    assert {entry["kind"] for entry in kept.values()} == {"perplexity", "divergence"}
    for entry in kept.values():
        assert entry["versions"]["transformers"]
        assert "cores" in entry["hardware"]

    def refuse() -> dict[str, Any]:
        raise AssertionError("measured again")

    entry = next(iter(kept.values()))
    again = measured(checkpoints[0], entry["kind"], entry["setting"], refuse)
    assert again["result"] == entry["result"]
    with pytest.raises(AssertionError, match="measured again"):
        measured(checkpoints[0], entry["kind"], {**entry["setting"], "limit": 7}, refuse)


def test_results_of_other_weights_do_not_count(tmp_path: Path) -> None:
    hlwq.quantize(bundled_model(), tmp_path / "out", "rtn")
    first = measured(tmp_path / "out", "speed", {}, lambda: {"value": 1})
    file = tmp_path / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint(tmp_path / "out") != first["checkpoint"]
    assert measured(tmp_path / "out", "speed", {}, lambda: {"value": 2})["result"] == {"value": 2}
    assert results_folder(tmp_path / "out") == tmp_path / "out" / "results"


def test_the_report_is_whole_and_needs_no_network(rows: list[Row], tmp_path: Path) -> None:
    files = {file.name for file in write_report(rows, PROTOCOLS, "bundled", tmp_path / "report")}
    charts = {f"{name}.{kind}" for name in ("loss", "size", "layers") for kind in ("svg", "png")}
    assert files == {"report.html", "table.md", "rows.json", *charts}
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"']?https?://", page.replace("http://www.w3.org", ""))
    assert page.count("<svg") == 3
    for row in rows:
        assert f"{row.perplexity:.3f}" in page
    table = (tmp_path / "report" / "table.md").read_text(encoding="utf-8")
    assert sum(line.startswith("|") for line in table.splitlines()) == 2 + len(rows)
    assert "chunked" in table
    assert "HumanEval" not in table  # was not measured


def row_of(name: str, nbytes: int, loss: float) -> Row:
    estimate = Estimate(loss, loss - 0.01, loss + 0.01, 8)
    return Row(
        name=name,
        checkpoint="",
        recipe=None,
        format="gptq",
        engines=(),
        nbytes=nbytes,
        bits_per_weight=4.0,
        bits_per_parameter=5.0,
        perplexity=10.0,
        standard_error=0.1,
        loss_above_base=estimate,
        loss_verdict="worse",
        divergence=None,
        kl_percentile_99=None,
        top1_agreement=None,
        humaneval=None,
        humaneval_how=None,
        humaneval_p=None,
        humaneval_verdict=None,
        speeds=(),
        layer_errors={},
    )


@pytest.mark.slow
def test_speeds_and_programs_of_several_engines_are_told_apart(
    checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    copy = tmp_path / "copy"
    shutil.copytree(checkpoints[0], copy, ignore=shutil.ignore_patterns("README.md"))
    here = asdict(speed(copy))
    for engine, decode in (("vLLM", 80.0), ("mlx-lm", 20.0)):
        there = {**here, "engine": engine, "decode": (decode, decode - 1, decode + 1)}
        keep(copy, "speed", speed_setting(512, 64, 3, engine), there)
    base_solved = {f"task {number}": int(number < 3) for number in range(40)}
    for model, gained in ((bundled_model(), 0), (copy, 12)):
        solved = {
            task: int(passed or number >= 40 - gained) for number, (task, passed) in enumerate(base_solved.items())
        }
        result = {"solved": solved, "pass_at": {"1": asdict(wilson(sum(solved.values()), 40))}}
        keep(model, "humaneval", humaneval_setting("chat", 1, 0.0, 512, None, "vLLM"), result)
    keep(copy, "humaneval", humaneval_setting("chat", 1, 0.0, 512, None, "mlx-lm"), result)  # the base has none of it
    rows = compare([copy], bundled_model(), PROTOCOLS)
    assert [each.engine for each in rows[1].speeds] == ["mlx-lm", "vLLM"]
    assert rows[1].humaneval_how == "chat, vLLM"
    assert rows[1].humaneval is not None
    assert (rows[1].humaneval.mean, rows[1].humaneval.n) == (15 / 40, 40)
    assert rows[1].humaneval_verdict == "better"
    assert rows[1].humaneval_p == pytest.approx(2 / 2**12)
    assert rows[0].humaneval_p is None
    write_report(rows, PROTOCOLS, "bundled", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "80.0 (79.0 to 81.0) (vLLM)" in page
    assert "better (McNemar p = 0.00049)" in page
    assert (tmp_path / "report" / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_the_front_holds_what_nothing_else_beats() -> None:
    rows = [row_of("a", 4, 0.3), row_of("b", 5, 0.1), row_of("c", 6, 0.2), row_of("d", 8, 0.05), row_of("e", 5, 0.15)]
    assert [row.name for row in pareto_front(rows)] == ["a", "b", "d"]


def test_bars_in_names_do_not_break_the_table() -> None:
    assert "a\\|b" in markdown_table([row_of("a|b", 4, 0.3)])


def test_a_quantized_base_is_refused_before_anything_is_measured(checkpoints: list[Path], tmp_path: Path) -> None:
    with pytest.raises(HlwqError, match="is quantized itself"):
        compare([checkpoints[1]], checkpoints[0], PROTOCOLS)
    with pytest.raises(HlwqError, match="absent is not a directory"):
        compare([tmp_path / "absent"], bundled_model(), PROTOCOLS)


def test_what_eval_measures_is_found_by_the_card(checkpoints: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoints[0], copy, ignore=shutil.ignore_patterns("results", "README.md"))
    command = [sys.executable, "-m", "hlwq.cli", "eval", "perplexity", str(copy), "--text", str(held_out_text())]
    subprocess.run([*command, "--context", "64", "--limit", "2"], check=True, capture_output=True)
    assert "| perplexity | " in write_card(copy).read_text(encoding="utf-8")


def test_programs_of_a_comparison_are_recorded_for_these_weights_alone(
    checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoints[0], copy, ignore=shutil.ignore_patterns("results"))
    calls: list[dict[str, Any]] = []

    def evaluate(generate: object, **options: Any) -> HumanEval:
        calls.append(options)
        return HumanEval("completion", 0.0, 1, 512, {1: wilson(1, 1)}, {"task": 1})

    monkeypatch.setattr("hlwq.report.compare.transformers_generate", lambda path, device: None)
    monkeypatch.setattr("hlwq.report.compare.humaneval", evaluate)
    _run_humaneval(copy, "completion", "cpu", lambda *_: None)
    config = json.loads((copy / "generation_config.json").read_text()) | {"eos_token_id": 1}
    (copy / "generation_config.json").write_text(json.dumps(config))
    _run_humaneval(copy, "completion", "cpu", lambda *_: None)
    assert len({call["model"] for call in calls}) == len({call["record"] for call in calls}) == 2
    assert calls[1]["model"] == fingerprint(copy)[:16]


def test_two_directories_of_one_name_are_refused(checkpoints: list[Path]) -> None:
    with pytest.raises(HlwqError, match="same name"):
        compare([checkpoints[0], checkpoints[0]], bundled_model(), PROTOCOLS)


def test_a_card_says_what_was_measured_and_what_was_not(rows: list[Row], checkpoints: list[Path]) -> None:
    card = write_card(checkpoints[2], "me/bundled-v7").read_text(encoding="utf-8")
    data = ModelCard.load(checkpoints[2] / "README.md").data
    [result] = data.eval_results
    assert result.metric_type == "perplexity"
    assert result.metric_value == pytest.approx(rows[3].perplexity, abs=1e-4)
    assert "vllm serve me/bundled-v7 --language-model-only" in card
    assert "foem_beta 0.2" in card
    assert "calibrated on 8 samples of 128 tokens from embedded" in card
    assert "Not measured: humaneval, speed." in card
    assert "arXiv 2507.11017" in card
    assert str(bundled_model()) not in card  # a path on this machine
    with pytest.raises(HlwqError, match="`overwrite=True` replaces it"):
        write_card(checkpoints[2])
    assert (checkpoints[2] / "README.md").read_text(encoding="utf-8") == card


def test_a_card_takes_the_table_and_the_charts_of_a_report(
    rows: list[Row], checkpoints: list[Path], tmp_path: Path
) -> None:
    write_report(rows, PROTOCOLS, "bundled", tmp_path / "report")
    plain = write_card(checkpoints[1], overwrite=True).read_text(encoding="utf-8")
    card = write_card(checkpoints[1], report=tmp_path / "report", overwrite=True).read_text(encoding="utf-8")
    assert "## Compared with others" not in plain
    assert (tmp_path / "report" / "table.md").read_text(encoding="utf-8") in card
    pictures = re.findall(r"!\[\w+\]\((charts/\w+\.png)\)", card)
    assert pictures == ["charts/layers.png", "charts/loss.png", "charts/size.png"]
    assert set(pictures) <= set(files_to_push(checkpoints[1]).files)
    with pytest.raises(HlwqError, match="is not what `hlwq compare` wrote"):
        write_card(checkpoints[1], report=tmp_path, overwrite=True)
    write_report(rows[:2], PROTOCOLS, "bundled", tmp_path / "less")
    with pytest.raises(HlwqError, match=r"does not compare .*q5 as it is"):
        write_card(checkpoints[1], report=tmp_path / "less", overwrite=True)


def test_a_card_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HlwqError, match=r"has no hlwq\.json"):
        write_card(tmp_path)


@pytest.mark.parametrize(("measured_on", "flattered"), [("a" * 16, True), ("b" * 16, False)])
def test_a_card_says_where_the_text_was_calibrated_on(measured_on: str, flattered: bool) -> None:
    from hlwq.report.card import _caveats

    manifest = {"calibration": {"sources": [{"source": "text.txt", "sha256": "a" * 64}, {"source": "hub/data"}]}}
    caveats = _caveats(manifest, {"perplexity": {"setting": {"text_sha256": measured_on}}})
    assert any("own calibration data" in each for each in caveats) == flattered
