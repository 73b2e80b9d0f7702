from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint

import hlwq
from hlwq import (
    Calibration,
    CheckpointError,
    Gptq,
    Hadamard,
    Identity,
    LloydGrid,
    Nearest,
    Recipe,
    Request,
    RequestError,
    Stage,
    UniformGrid,
    UnsupportedError,
)
from hlwq.bases import Basis
from hlwq.containers import Reader
from hlwq.formats import FORMATS
from hlwq.plan import make_plan
from hlwq.quantize import plan_for
from hlwq.recipes import CALIBRATED, RECIPES, changed, recipe_named
from hlwq.request import Selection

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
        match=r"no recipe awq\. Recipes are: best, rtn, gptq, foem, hlwq-v7, hlwq, hlwq-mlx, hlwq-int4, hlwq-torchao\.",
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
    assert ("hlwq" in possible) == isinstance(RECIPES[name].in_format("hlwq").stages[-1].grid, LloydGrid)
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


# What is wrong is said at once, by its name


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: UniformGrid(4, 64, scale_method="bogus"), "scale_method"),
        (lambda: UniformGrid(4, 64, symmetric=False, scale_method="absmax"), "scale_method"),
        *((lambda bits=bits: UniformGrid(bits, 64), "bits") for bits in (9, 1, 0, -4, 4.0, "4", True, None)),
        *((lambda bits=bits: LloydGrid(bits, 64), "bits") for bits in (9, 0, -4, 4.0, "4", True, None)),
        *(
            (lambda size=size, grid=grid: grid(4, size), "group_size")
            for grid in (UniformGrid, LloydGrid)
            for size in (0, -64, 64.0, "64", None)
        ),
        (lambda: Hadamard(96), "block_size"),
        *(
            (lambda name=name: Gptq(**{name: 1.5}), name)
            for name in ("foem_beta", "gptaq_alpha", "mismatch", "stream_change", "damping")
        ),
        (lambda: changed(RTN, {"bits": 9}), "bits"),
        (lambda: changed(HLWQ, {"bits": 9}), "bits"),
        (lambda: changed(RTN, {"group_size": 0}), "group_size"),
        (lambda: changed(RTN, {"scale_method": "bogus"}), "scale_method"),
        (lambda: changed(RTN, {"symmetric": False, "scale_method": "absmax"}), "scale_method"),
        (lambda: changed(RTN, {"basis": "hadamrd"}), "basis"),
        (lambda: changed(RTN, {"basis": "hadamard", "block_size": 96}), "block_size"),
        (lambda: changed(RTN, {"calibrate": True, "damping": 0}), "damping"),
        (lambda: recipe_named("rnt"), "recipe"),
    ],
)
def test_what_is_out_of_range_is_refused_where_it_is_made(make: Callable[[], object], argument: str) -> None:
    with pytest.raises(RequestError) as refused:
        make()
    assert refused.value.argument == argument
    assert argument in ("recipe", "basis") or f"`{argument}`" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        (HLWQ, {"symmetric": True}, "`symmetric` changes nothing in recipe hlwq: Lloyd–Max levels have no such option"),
        (HLWQ, {"symmetric": False}, "`symmetric` changes nothing in recipe hlwq"),
        (HLWQ, {"scale_method": "absmax"}, "`scale_method` changes nothing in recipe hlwq"),
        (RTN, {"block_size": 64}, "`block_size` changes nothing in recipe rtn: its columns are not rotated"),
        (HLWQ, {"basis": "identity", "block_size": 64}, "`block_size` changes nothing in recipe hlwq"),
        (RTN, {"damping": 0.1}, "`damping` changes nothing in recipe rtn: it is not calibrated"),
    ],
)
def test_a_change_that_would_change_nothing_is_refused(recipe: Recipe, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        changed(recipe, changes)
    assert refused.value.argument == [*changes][-1]


@pytest.mark.parametrize(
    ("recipe", "changes", "basis"),
    [
        (HLWQ, {"basis": "identity"}, Identity()),
        (HLWQ, {"basis": "hadamard"}, Hadamard()),
        (HLWQ, {"block_size": 32}, Hadamard(32)),
        (RTN, {"basis": "hadamard"}, Hadamard()),
        (RTN, {"basis": "hadamard", "block_size": 256}, Hadamard(256)),
    ],
)
def test_the_basis_can_be_changed(recipe: Recipe, changes: dict[str, Any], basis: Basis) -> None:
    found = changed(recipe, changes)
    assert found == replace(recipe, stages=(replace(recipe.stages[0], basis=basis),))
    assert changed(found, {"basis": basis.name}) == found  # the same basis keeps its block


def test_calibrating_takes_gptqs_loop_with_gptaq() -> None:
    assert changed(RTN, {"calibrate": True}).solver == CALIBRATED
    assert changed(HLWQ, {"calibrate": True, "foem_beta": 0.2}).solver == replace(CALIBRATED, foem_beta=0.2)
    assert changed(RTN, {"calibrate": False}) == RTN
    assert [RECIPES[name].calibrated for name in ("rtn", "hlwq", "gptq")] == [False, False, True]


@pytest.mark.parametrize("name", ["bit", "groupsize", "symetric", "includes", "formt", "gptq", "stages", "selection"])
def test_a_misspelled_argument_is_a_type_error_that_names_it(name: str, tmp_path: Path) -> None:
    source, out = make_checkpoint(tmp_path / "model", "llama"), tmp_path / "out"
    with pytest.raises(TypeError, match=rf"unknown argument '{name}'; arguments are .*group_size"):
        Request.of(source, **{name: 8})
    with pytest.raises(TypeError, match=f"'{name}'"):
        hlwq.quantize(source, out, recipe="rtn", **{name: 8})
    with pytest.raises(TypeError, match=f"unknown option '{name}'"):
        changed(RTN, {name: 8})
    assert not out.exists()


def test_several_misspelled_arguments_are_a_type_error(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "llama")
    with pytest.raises(TypeError, match="'bit'"):
        hlwq.quantize(source, tmp_path / "out", recipe="rtn", groupsize=32, bit=8)
    hlwq.quantize(source, tmp_path / "made", "hlwq")
    with pytest.raises(TypeError, match="'bit'"):
        hlwq.convert(tmp_path / "made", tmp_path / "out", "gptq", bit=8)
    assert not list(tmp_path.glob("out*"))


def test_a_single_pattern_is_one_pattern(tmp_path: Path) -> None:
    assert Selection(include="a|b", exclude=["c", "d"]) == Selection(include=("a|b",), exclude=("c", "d"))
    source = make_checkpoint(tmp_path / "model", "llama")
    result = hlwq.quantize(source, tmp_path / "out", "rtn", exclude="o_proj")
    kept = {module.rpartition(".")[2] for module in result.plan.contents().kept}
    assert kept == {"o_proj"}
    manifest = json.loads((tmp_path / "out" / "hlwq.json").read_text())
    assert manifest["origin"]["exclude"] == ["o_proj"]
    assert Request.of(source, "rtn", exclude="o_proj", format="mlx", include="lm_head").selection == Selection(
        include=("lm_head",), exclude=("o_proj",)
    )


def test_a_request_says_what_was_asked_for(tmp_path: Path) -> None:
    request = Request.of("model", "rtn", bits=8, group_size=None, basis="hadamard", format="dense", exclude=["a"])
    assert request == Request("model", "rtn", "dense", Selection(exclude=("a",)), {"bits": 8, "basis": "hadamard"})
    assert request.changed_recipe().stages == (Stage(UniformGrid(8, 64), Hadamard()),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"symmetric": 0}, "`symmetric` is 0; it must be True or False or None."),
        ({"symmetric": "no"}, "`symmetric` is 'no'; it must be True or False or None."),
        ({"bits": "4"}, "`bits` is '4'; it must be a number."),
        ({"bits": True}, "`bits` is True; it must be a number."),
        ({"scale_method": "bogus"}, "`scale_method` is 'bogus'; it must be signed or absmax or None."),
        ({"calibrate": "no"}, "`calibrate` is 'no'; it must be True or False."),
        ({"calibrate": True, "damping": "1"}, "`damping` is '1'; it must be a number."),
        ({"calibrate": True, "gptaq_alpha": True}, "`gptaq_alpha` is True; it must be a number."),
        ({"calibrate": True, "desc_act": 1}, "`desc_act` is 1; it must be True or False."),
        ({"basis": "hadamard", "block_size": "64"}, "`block_size` is '64'; it must be an integer or None."),
        ({"basis": []}, r"There is no basis \[\]"),
        ({"include_embeddings": "no"}, "`include_embeddings` is 'no'; it must be True or False."),
        ({"exclude": 5}, "`exclude` is .*5.*; it must be several of a string."),
        ({"recipe": 5}, "`recipe` is 5; it must be a string or a Recipe."),
        ({"recipe": []}, r"`recipe` is \[\]; it must be a string or a Recipe."),
        ({"format": 5}, "`format` is 5; it must be a string or None."),
        ({"format": ""}, "There is no format ."),
        ({"device": 5}, "`device` is 5; it must be a string."),
        ({"max_shard_size": "5 things"}, "`max_shard_size` 5 things is not a size. Write it like 5GB or 500MB."),
        ({"max_shard_size": 0}, "`max_shard_size` is 0; it must be positive."),
        ({"max_shard_size": 0.5}, "`max_shard_size` is 0.5; it must be an integer or a string."),
        ({"calibration": "wiki.txt"}, "`sources` wiki.txt does not exist."),
        ({"calibration": 5}, "`sources` is .*5.*; it must be several of a string."),
        ({"samples": 8}, "Calibration data changes nothing: recipe rtn rounds to nearest."),
    ],
    ids=str,
)
def test_an_argument_of_a_wrong_type_is_refused_in_a_sentence(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "model", "llama")
    with pytest.raises(RequestError, match=message):
        hlwq.quantize(source, tmp_path / "out", **{"recipe": "rtn", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": "10"}, "`samples` is '10'; it must be an integer."),
        ({"offload_activations": "no"}, "`offload_activations` is 'no'; it must be True or False."),
        ({"sources": 5}, "`sources` is .*5.*; it must be several of a string."),
        ({"sources": Path("absent.txt")}, "`sources` absent.txt does not exist."),
    ],
    ids=str,
)
def test_calibration_data_have_types(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Calibration(**options)


def test_what_is_no_recipe_is_refused() -> None:
    # Two of these a type checker would refuse: they are refused, or understood, without one too.
    with pytest.raises(RequestError, match="Recipe mine names no format"):
        Recipe("mine", "", (Stage(UniformGrid(4, 64)),), ())
    with pytest.raises(RequestError, match="`grid` is 'uniform'; it must be an object such as UniformGrid, LloydGrid"):
        Stage("uniform")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="`bits` changes nothing: recipe mine rounds nothing"):
        changed(Recipe("mine", "", (), ("dense",)), {"bits": 4})
    assert Recipe("mine", "", (), "dense").formats == ("dense",)  # type: ignore[arg-type]


def test_options_of_several_parts_are_changed_at_once() -> None:
    (stage,) = changed(RECIPES["hlwq"], {"group_size": 48, "block_size": 16}).stages
    assert stage == Stage(LloydGrid(5, 48), Hadamard(16))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recorded_stage_is_read_again(name: str) -> None:
    for stage in RECIPES[name].stages:
        assert Stage.recorded(json.loads(json.dumps(stage.record()))) == stage
    unusual = Stage(LloydGrid(4, 64, least_squares=False), Hadamard(32), Gptq(desc_act=True, damping=0.1))
    assert Stage.recorded(json.loads(json.dumps(unusual.record()))) == unusual


@pytest.mark.parametrize("record", [{}, {"grid": "uniform", "basis": "identity"}, {"grid": {"name": "new"}}])
def test_a_stage_of_another_version_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="made by another version of hlwq"):
        Stage.recorded(record)


def test_a_block_that_does_not_divide_is_told(tmp_path: Path) -> None:
    sizes: dict[str, Any] = dict(hidden_size=192, num_attention_heads=3, num_key_value_heads=3)
    source = Reader(make_checkpoint(tmp_path / "model", "llama", **sizes))
    recipe = changed(RTN, {"basis": "hadamard", "block_size": 128})
    plan = make_plan(source, recipe, "dense")
    assert plan.remarks == ("columns rotated in blocks of 64 where in_features is 192",)
    assert {stage.summary for each in plan.quantized() for stage in each.stages} == {
        "4 bits, group 64, rotated in blocks of 64",
        "4 bits, group 64, rotated in blocks of 128",
    }


def test_calibration_data_are_named_as_on_the_command_line(tmp_path: Path) -> None:
    text = tmp_path / "wiki.txt"
    text.write_text("a b c")
    expected = Calibration((str(text),), samples=8, seed=1)
    assert Request.of("model", "gptq", calibration=text, samples=8, seed=1).calibration == expected
    assert Request.of("model", "gptq", calibration=[str(text)], samples=8, seed=1).calibration == expected
    assert Request.of("model", "gptq", calibration=Calibration((str(text),)), samples=8, seed=1).calibration == expected
    assert Request.of("model", "gptq").calibration is None
    assert Request.of("model", "rtn", max_shard_size="500MB").shard_bytes == 500 * 10**6


# The recipe that is used unless another is named


def test_best_takes_the_codes_that_lose_least_in_each_format() -> None:
    best = RECIPES["best"]
    bases = {name: best.in_format(name).stages[-1].basis for name in best.formats}
    assert {name for name, basis in bases.items() if basis != Identity()} == {"compressed-tensors", "hlwq"}
    assert best.in_format(None) == best.in_format("gptq")
    assert all(best.in_format(name).calibrated for name in best.formats)
    changes = {"bits": 8}
    assert Request.of("model", "best", format="hlwq", **changes).changed_recipe().stages[-1].grid == LloydGrid(8, 128)
    assert Request.of("model", "best", **changes).changed_recipe().stages[-1].grid == UniformGrid(8, 64)


def test_the_best_recipe_is_usual_and_the_choice_is_told(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "llama")
    _, plan = plan_for(Request(source))
    assert plan.recipe.name == "best"
    assert plan.remarks[0] == "recipe best, since none was named; `recipe='rtn'` takes seconds"
    assert not any("none was named" in remark for remark in plan_for(Request(source, "rtn"))[1].remarks)
