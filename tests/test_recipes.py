from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint

from hlwq import (
    Gptq,
    Hadamard,
    Identity,
    LloydGrid,
    Nearest,
    RequestError,
    Stage,
    UniformGrid,
    UnsupportedError,
)
from hlwq.containers import Reader
from hlwq.formats import FORMATS
from hlwq.plan import make_plan
from hlwq.recipes import RECIPES, changed, recipe_named

RTN, HLWQ = RECIPES["rtn"], RECIPES["hlwq"]
HLWQ_STAGE = Stage(LloydGrid(5, 128), Hadamard(), Nearest())
INT4_STAGE = Stage(UniformGrid(4, 64), Identity(), Nearest())
INT4_128 = UniformGrid(4, 128)


@pytest.mark.parametrize(
    ("name", "stages", "default_format"),
    [
        ("rtn", (INT4_STAGE,), "gptq"),
        ("gptq", (Stage(INT4_128, Identity(), Gptq()),), "gptq"),
        ("foem", (Stage(INT4_128, Identity(), Gptq(foem_beta=0.2)),), "gptq"),
        ("hlwq-v7", (replace(INT4_STAGE, solver=Gptq(foem_beta=0.2)),), "gptq"),
        ("hlwq", (HLWQ_STAGE,), "hlwq"),
        ("hlwq-mlx", (HLWQ_STAGE, INT4_STAGE), "mlx"),
        ("hlwq-int4", (HLWQ_STAGE, INT4_STAGE), "gptq"),
        ("hlwq-torchao", (HLWQ_STAGE,), "dense"),
    ],
)
def test_named_recipes_are_what_they_are_called(name: str, stages: tuple[Stage, ...], default_format: str) -> None:
    recipe = recipe_named(name)
    assert (recipe.name, recipe.stages, recipe.formats[0]) == (name, stages, default_format)


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        RequestError,
        match=r"no recipe awq\. Recipes are: rtn, gptq, foem, hlwq-v7, hlwq, hlwq-mlx, hlwq-int4, hlwq-torchao\.",
    ):
        recipe_named("awq")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_written_in_each_of_its_formats_and_in_no_other(name: str, tmp_path: Path) -> None:
    source = Reader(make_checkpoint(tmp_path / "model", "qwen3_5"))
    possible = []
    for format_name in FORMATS:
        try:
            make_plan(source, RECIPES[name], format_name)
        except UnsupportedError:
            continue
        possible.append(format_name)
    # A chain that ends in uniform codes fits whatever holds them; its formats are those it is meant for.
    assert set(RECIPES[name].formats) <= set(possible)
    assert ("hlwq" in possible) == isinstance(RECIPES[name].stages[-1].grid, LloydGrid)
    assert make_plan(source, RECIPES[name]).format is FORMATS[RECIPES[name].formats[0]]


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"group_size": 32},
        {"symmetric": False},
        {"symmetric": True},
        {"scale_method": "absmax"},
        {"bits": 8, "group_size": 128, "symmetric": True, "scale_method": "absmax"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["rtn", "hlwq-mlx", "hlwq-int4"])
def test_an_override_changes_the_last_stage_and_nothing_else(name: str, options: dict[str, Any]) -> None:
    before, after = RECIPES[name], changed(RECIPES[name], options)
    last = replace(before.stages[-1], grid=replace(before.stages[-1].grid, **options))
    assert after == replace(before, stages=(*before.stages[:-1], last))
    assert after != before


def test_bits_and_group_size_of_hlwq_can_be_overridden() -> None:
    assert changed(HLWQ, {"bits": 3, "group_size": 64}).stages == (Stage(LloydGrid(3, 64), Hadamard()),)


def test_without_overrides_the_recipe_is_the_same() -> None:
    assert changed(RTN, {}) == changed(RTN, {"bits": None}) == RTN
