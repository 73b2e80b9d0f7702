from __future__ import annotations

from pathlib import Path

import pytest

from hlwq.containers import Reader
from hlwq.demo import BASELINE, bundled_model, run_demo
from hlwq.errors import RequestError
from hlwq.files import read_json
from hlwq.plan import make_plan
from hlwq.recipes import RECIPES
from hlwq.usage import commands


def test_bundled_model_has_what_the_engines_ask_of_a_hybrid() -> None:
    reader = Reader(bundled_model())
    widths = {tensor.spec.shape[1] for tensor in make_plan(reader, RECIPES["rtn"]).quantized()}
    assert all(width % 64 == 0 for width in widths)
    assert any(width % 128 == 0 for width in widths)
    text = reader.config["text_config"]
    assert text["layer_types"] == 3 * ["linear_attention"] + ["full_attention"]
    assert text["linear_key_head_dim"] == text["linear_value_head_dim"] == 64
    assert any(name.startswith("model.visual.") for name in reader.tensors)
    assert sum(file.stat().st_size for file in bundled_model().iterdir()) < 12e6


def test_another_model_is_measured_and_not_taken_for_what_is_there(
    experts_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hlwq.demo.JOBS", [(RECIPES["rtn"], "mlx", False)])
    monkeypatch.setattr("hlwq.demo.CHUNKS", 4)
    base, row = run_demo(tmp_path, lambda *_: None, experts_model)
    assert read_json(tmp_path / "rtn-mlx" / "config.json")["text_config"]["num_experts"] == 16
    assert row.perplexity > base.perplexity
    (tmp_path / "link").symlink_to(experts_model)
    assert run_demo(tmp_path, lambda *_: None, tmp_path / "link")[1:] == [row]
    with pytest.raises(RequestError, match=r"rtn-mlx was made from experts\. Name another folder"):
        run_demo(tmp_path, lambda *_: None)


@pytest.mark.slow
def test_demo_measures_each_recipe_in_each_format(tmp_path: Path) -> None:
    rows = run_demo(tmp_path / "demo", lambda done, total, item: None)
    made = [(row.recipe, row.format) for row in rows]
    repeated = ("dense", "compressed-tensors")  # they would measure what the other formats do
    usual = {(name, form) for name, recipe in RECIPES.items() for form in recipe.formats if form not in repeated}
    rotated = ("best", "compressed-tensors")
    assert set(made) == {(BASELINE, "dense"), ("hlwq --calibrate", "hlwq"), rotated, *usual}
    by_name = {(row.recipe, row.format): row for row in rows}
    assert by_name["hlwq", "hlwq"].bits_per_weight == pytest.approx(5.125)
    assert by_name["rtn", "gptq"].bits_per_weight == pytest.approx(4.39, abs=0.01)
    assert by_name["rtn", "mlx"].bits_per_weight == 4.5
    for row in rows[1:]:
        assert commands(Path(row.directory), row.format)
