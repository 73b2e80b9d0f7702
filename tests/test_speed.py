"""Which speeds tell of a format, when they are kept, and what is said of the time that work takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hlwq
from hlwq.cli import printing
from hlwq.cli.printing import progress
from hlwq.containers import Reader
from hlwq.demo import bundled_model, held_out_text
from hlwq.errors import HlwqWarning
from hlwq.evaluate import speed as speeds
from hlwq.evaluate.generation import PACKED, TRANSFORMERS
from hlwq.evaluate.results import keep, kept, speed_setting
from hlwq.evaluate.speed import Run, Speed, engine_here, in_turn, tells_of_format
from hlwq.formats import READABLE_FORMATS
from hlwq.plan import make_plan
from hlwq.recipes import recipe_named
from hlwq.report import compare
from hlwq.report.compare import Protocols, speeds_of
from hlwq.request import Selection
from hlwq.sources import locate
from hlwq.work import cost


def a_speed(decode: tuple[float, float, float] = (10.0, 9.0, 11.0), **changes: Any) -> Speed:
    values: dict[str, Any] = dict(
        engine=TRANSFORMERS,
        prompt_tokens=512,
        new_tokens=64,
        runs=3,
        prefill=(100.0, 95.0, 105.0),
        decode=decode,
        load_seconds=1.0,
        peak_memory=10**9,
        device_memory=None,
    )
    return Speed(**{**values, **changes})


@pytest.mark.parametrize("name", READABLE_FORMATS)
@pytest.mark.parametrize("engine", ["transformers, cpu", "transformers, packed, cpu", "vLLM 0.32", "mlx-lm"])
def test_a_speed_in_transformers_tells_of_two_formats_only(engine: str, name: str) -> None:
    expected = not engine.startswith("transformers") or (engine, name) in {
        ("transformers, cpu", "dense"),
        ("transformers, packed, cpu", "hlwq"),
    }
    assert tells_of_format(engine, name) is expected
    here = engine_here(name)
    assert here is None or tells_of_format(f"{here}, cpu", name)


@pytest.mark.parametrize("name", ["gptq", "mlx", "compressed-tensors", "hlwq", "dense"])
def test_old_figures_of_decoded_weights_are_not_shown(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    hlwq.quantize(bundled_model(), out, "hlwq" if name == "hlwq" else "rtn", format=name)
    for engine in ("transformers, cpu", "transformers, packed, cpu", "vLLM"):
        keep(out, "speed", speed_setting(512, 64, 3, engine), asdict(a_speed(engine=engine)))
    own = {"hlwq": ["transformers, packed, cpu"], "dense": ["transformers, cpu"]}.get(name, [])
    assert [each.engine for each in speeds_of(out, name)] == sorted([*own, "vLLM"])


@pytest.mark.parametrize(
    ("decode", "steady"),
    [((10, 10, 10), True), ((10, 8, 11.9), True), ((10, 7, 11), False), ((3.6, 3.5, 35), False)],
)
def test_rounds_that_differ_are_told_from_rounds_that_agree(decode: tuple[float, float, float], steady: bool) -> None:
    assert (a_speed(decode).unsteadiness <= speeds.STEADY) is steady


@pytest.mark.parametrize("busy", [True, False])
def test_the_figures_of_a_busy_machine_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    out = tmp_path / "out"
    hlwq.quantize(bundled_model(), out, "rtn", format="dense")
    found = a_speed((10, 5, 20) if busy else (10, 9, 11))
    monkeypatch.setattr(compare, "in_turn", lambda models, device, report: dict.fromkeys(models, found))
    if busy:
        with pytest.warns(HlwqWarning, match=r"4\.0 times as fast"):
            compare._measure_speeds([out], "cpu", lambda *_: None)
    else:
        compare._measure_speeds([out], "cpu", lambda *_: None)
    assert len(kept(out, "speed")) == (0 if busy else 1)


def test_it_warms_up_until_runs_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = iter([1.0, 5.0, 9.0, 10.0, 10.1])
    seen = []

    def measure(run: int) -> Run:
        seen.append(run)
        return Run(100.0, next(decodes))

    speeds._warm_up(measure, lambda: None)
    assert len(seen) == 4  # 9 and 10 agree within a fifth


@pytest.mark.slow
def test_models_are_timed_in_turn_each_in_a_process_of_its_own(tmp_path: Path) -> None:
    hlwq.quantize(bundled_model(), tmp_path / "packed", "hlwq")
    items: list[str] = []
    models = {locate(bundled_model()): False, tmp_path / "packed": True}
    found = in_turn(models, "cpu", lambda done, total, item: items.append(f"{done}/{total} {item}"), rounds=2)
    names = [path.name for path in models]
    assert items == [
        f"0/4 {names[0]}: speed, round 1",
        f"1/4 {names[1]}: speed, round 1",
        f"2/4 {names[0]}: speed, round 2",
        f"3/4 {names[1]}: speed, round 2",
        "4/4 speed",
    ]
    assert [each.engine for each in found.values()] == [TRANSFORMERS, PACKED]
    assert all(each.runs == 2 and each.decode[1] <= each.decode[0] <= each.decode[2] for each in found.values())


@pytest.mark.parametrize("protocol", ["chunked", "windowed"])
@pytest.mark.parametrize("humaneval", [None, "chat"])
@pytest.mark.parametrize("speed", [True, False])
def test_the_parts_of_a_comparison_fill_its_progress(protocol: Any, humaneval: Any, speed: bool) -> None:
    protocols = Protocols(held_out_text(), protocol, context=128, stride=64, humaneval=humaneval, speed=speed)
    share = compare._shares(protocols, 3)
    told: list[tuple[int, int]] = []
    order = [("hash", 3), *([("programs", 3)] if humaneval else []), *([("speed", 1)] if speed else []), ("quality", 3)]
    for kind, count in order:
        for number in range(count):
            part = share(lambda done, total, item: told.append((done, total)), kind, number)
            for done in range(11):
                part(done, 10, "x")
    assert told == sorted(told)
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1]
    assert len({total for _, total in told}) == 1


@pytest.mark.parametrize("recipe", ["rtn", "hlwq", "hlwq-int4", "gptq"])
def test_copies_are_a_small_part_of_the_work(recipe: str) -> None:
    """By their number of weights they were a third of it, and the time left was wrong by as much."""
    selection = Selection(include_embeddings=False)
    plan = make_plan(Reader(locate(bundled_model())), recipe_named(recipe), None, selection)
    copied = sum(cost(tensor) for tensor in plan.tensors if tensor.action == "copy")
    weights = sum(tensor.spec.parameters for tensor in plan.tensors if tensor.action == "copy")
    everything = sum(tensor.spec.parameters for tensor in plan.tensors)
    assert weights / everything > 0.1
    assert copied / sum(map(cost, plan.tensors)) < 0.05


def test_long_work_is_announced_with_what_makes_it_shorter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(printing, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with progress("measuring", "--limit makes it shorter.") as report:
        for done in range(20):
            report(done, 100, f"x[/v2] chunk {done}")
    said = capsys.readouterr().err
    assert said.count("in all") == 1
    assert "min in all. --limit makes it shorter." in said
    assert "x[/v2] chunk" in said  # every half minute, without a terminal


@pytest.mark.parametrize("item", ["x[/v2]", "[bold]", "[/]", "[red", "\\[x]", "layers.0[1]"])
def test_names_in_progress_are_no_markup(monkeypatch: pytest.MonkeyPatch, item: str) -> None:
    console = printing.Console(force_terminal=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    monkeypatch.setattr(printing, "messages", console)
    with console.capture() as shown, progress("reading") as report:
        report(1, 2, item)
    assert item in shown.get()


def test_a_measurement_is_printed_before_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from hlwq.cli import app

    (tmp_path / "text.txt").write_text(held_out_text().read_text()[:3000])
    monkeypatch.setenv("HF_HOME", "/proc/nothing/here")
    arguments = ["eval", "perplexity", str(bundled_model()), "--text", str(tmp_path / "text.txt"), "--context", "128"]
    result = CliRunner().invoke(app, [*arguments, "--protocol", "chunked", "--limit", "1", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["perplexity"] > 1
    assert "not kept" in result.stderr
