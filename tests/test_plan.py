from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import FAMILY_NAMES, make_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from hlwq import (
    Hadamard,
    HlwqError,
    Identity,
    LloydGrid,
    Recipe,
    RequestError,
    Stage,
    UniformGrid,
    UnsupportedError,
)
from hlwq.containers import Reader, TensorSpec
from hlwq.formats import FORMATS as output_formats
from hlwq.formats import Scheme
from hlwq.grids import fit_group_size
from hlwq.plan import REST, Plan, make_plan, plan_decoding
from hlwq.recipes import changed, recipe_named
from hlwq.request import Selection

RTN, HLWQ = recipe_named("rtn"), recipe_named("hlwq")
FORMATS = {"gptq": RTN, "compressed-tensors": RTN, "mlx": RTN, "hlwq": HLWQ, "dense": HLWQ}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    folder = tmp_path_factory.mktemp("sources")
    return {family: Reader(make_checkpoint(folder / family, family)) for family in FAMILY_NAMES}


@pytest.fixture
def llama(sources: dict[str, Reader]) -> Reader:
    return sources["llama"]


@pytest.fixture
def hybrid(sources: dict[str, Reader]) -> Reader:
    return sources["qwen3_5"]


def modules_of(plan: Plan) -> set[str]:
    return {tensor.module for tensor in plan.quantized()}


def leaves_of(plan: Plan) -> set[str]:
    return {module.rpartition(".")[2] for module in modules_of(plan)}


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_tensor_is_planned_once_in_order_and_nothing_is_left_over(
    family: str, format_name: str, sources: dict[str, Reader]
) -> None:
    source = sources[family]
    plan = make_plan(source, FORMATS[format_name], format_name)
    assert [tensor.spec for tensor in plan.tensors] == list(source.tensors.values())
    assert all(tensor.outputs == (tensor.spec,) for tensor in plan.tensors if tensor.action == "copy")
    assert all(bool(tensor.reason) == (tensor.action != "quantize") for tensor in plan.tensors)
    names = [spec.name for spec in plan.outputs()]
    assert len(names) == len(set(names))
    contents = plan.contents()
    assert contents.quantized.keys() == modules_of(plan)
    assert not contents.quantized.keys() & set(contents.kept)
    embeddings = {contents.layout.embedding, "lm_head"} if format_name in ("mlx", "hlwq") else set()
    assert contents.quantized.keys() | set(contents.kept) == embeddings | {
        contents.layout.layer_prefix(index) + matrix.name
        for index, layer in enumerate(contents.layout.layers)
        for matrix in layer.matrices()
    }


def test_all_linear_layers_of_a_decoder_are_quantized(llama: Reader) -> None:
    plan = make_plan(llama, RTN)
    assert len(modules_of(plan)) == 14
    assert leaves_of(plan) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.visual.merger.linear_fc2.weight", "vision tower"),
        ("mtp.layers.0.mlp.down_proj.weight", "multi-token prediction head"),
        ("model.language_model.layers.0.linear_attn.in_proj_a.weight", "gates the recurrence"),
        ("model.language_model.layers.0.linear_attn.in_proj_b.weight", "gates the recurrence"),
        ("model.language_model.layers.0.linear_attn.conv1d.weight", "not a matrix of a linear layer"),
        ("model.language_model.layers.0.linear_attn.A_log", "not a matrix of a linear layer"),
        ("model.language_model.layers.3.self_attn.q_norm.weight", "not a matrix of a linear layer"),
        ("model.language_model.norm.weight", "not a matrix of a linear layer"),
        ("model.language_model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "output head"),
    ],
)
def test_what_is_kept_has_its_reason(name: str, reason: str, hybrid: Reader) -> None:
    (tensor,) = (each for each in make_plan(hybrid, RTN).tensors if each.spec.name == name)
    assert tensor.action == "copy"
    assert reason in tensor.reason


def test_a_tensor_that_the_family_does_not_know_is_copied_and_said_to_be_unknown(llama: Reader) -> None:
    strange = TensorSpec("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (16,))
    plan = make_plan(Source(llama, {**llama.tensors, strange.name: strange}), RTN)
    (tensor,) = (each for each in plan.tensors if each.spec == strange)
    assert (tensor.action, tensor.reason, tensor.unit) == ("copy", "unknown to this family", "layer 0")


def test_bias_vectors_are_copied(sources: dict[str, Reader]) -> None:
    plan = make_plan(sources["qwen2"], RTN)
    biases = [tensor for tensor in plan.tensors if tensor.spec.name.endswith("_proj.bias")]
    assert len(biases) == 6
    assert {tensor.action for tensor in biases} == {"copy"}


def test_units_are_the_layers_and_the_rest(hybrid: Reader) -> None:
    plan = make_plan(hybrid, RTN)
    assert sorted(plan.units()) == sorted([REST, *(f"layer {index}" for index in range(4))])
    for tensor in plan.tensors:
        inside = tensor.spec.name.startswith("model.language_model.layers.")
        assert tensor.unit == (f"layer {tensor.spec.name.split('.')[3]}" if inside else REST)


class Source:
    """A checkpoint's configuration and tensors, changed."""

    def __init__(self, reader: Reader, tensors: dict[str, TensorSpec], **entries: Any) -> None:
        self.config, self.tensors = {**reader.config, **entries}, tensors


def test_a_tied_head_is_dropped_and_the_user_told(llama: Reader) -> None:
    plan = make_plan(Source(llama, llama.tensors, tie_word_embeddings=True), RTN)
    assert [tensor.spec.name for tensor in plan.tensors if tensor.action == "drop"] == ["lm_head.weight"]
    assert plan.remarks == ("lm_head.weight is dropped: config.json ties it to the embedding",)
    assert "lm_head.weight" not in [spec.name for spec in plan.outputs()]


# Embeddings, include, exclude


@pytest.mark.parametrize(("tied", "more"), [(False, {"model.embed_tokens", "lm_head"}), (True, {"model.embed_tokens"})])
def test_embeddings_are_quantized_where_expected_or_on_request(tied: bool, more: set[str], llama: Reader) -> None:
    source = Source(llama, llama.tensors, tie_word_embeddings=tied)
    without = modules_of(make_plan(source, RTN, "mlx", Selection(include_embeddings=False)))
    assert modules_of(make_plan(source, RTN, "mlx", Selection(include_embeddings=True))) == without | more
    assert modules_of(make_plan(source, RTN, "mlx")) == without | more
    assert modules_of(make_plan(source, HLWQ)) == without | more
    assert modules_of(make_plan(source, RTN, "gptq")) == without
    assert modules_of(make_plan(source, RTN, "dense")) == without


def test_a_tied_head_cannot_be_quantized(llama: Reader) -> None:
    with pytest.raises(HlwqError, match=r"`include` 'lm_head' changes nothing: .*is never quantized"):
        make_plan(Source(llama, llama.tensors, tie_word_embeddings=True), RTN, "mlx", Selection(include=("lm_head",)))


@pytest.mark.parametrize("options", [{"include_embeddings": True}, {"include": ["lm_head"]}])
def test_gptq_refuses_embeddings(options: dict[str, Any], llama: Reader) -> None:
    with pytest.raises(UnsupportedError, match="format gptq cannot hold a quantized embedding"):
        make_plan(llama, RTN, "gptq", Selection(**options))


def test_include_adds_exactly_what_matches(hybrid: Reader) -> None:
    default = modules_of(make_plan(hybrid, RTN, "mlx", Selection(include_embeddings=False)))
    selection = Selection(include_embeddings=False, include=(r"layers\.1\..*in_proj_[ab]$", "lm_head"))
    included = modules_of(make_plan(hybrid, RTN, "mlx", selection))
    prefix = "model.language_model.layers.1.linear_attn.in_proj_"
    assert included - default == {prefix + "a", prefix + "b", "lm_head"}
    assert default <= included


def test_exclude_removes_exactly_what_matches_and_says_so(llama: Reader) -> None:
    default = modules_of(make_plan(llama, RTN))
    plan = make_plan(llama, RTN, None, Selection(exclude=("down_proj", r"layers\.0\.self_attn")))
    removed = default - modules_of(plan)
    attention = {f"model.layers.0.self_attn.{each}_proj" for each in "qkvo"}
    assert removed == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"} | attention
    reasons = {tensor.module: tensor.reason for tensor in plan.tensors if tensor.spec.name.endswith("_proj.weight")}
    assert {module for module, reason in reasons.items() if reason == "excluded"} == removed
    assert set(plan.contents().kept) == removed


def test_exclude_can_take_back_what_include_or_the_embeddings_option_adds(llama: Reader) -> None:
    plan = make_plan(llama, RTN, "mlx", Selection(include_embeddings=True, exclude=("lm_head",)))
    assert "model.embed_tokens" in modules_of(plan)
    assert "lm_head" not in modules_of(plan)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"include": ["q_proj"]}, "`include` 'q_proj' changes nothing: .*is quantized already"),
        ({"include": ["layernorm"]}, "`include` 'layernorm' changes nothing: .*is never quantized"),
        ({"include": ["visual"]}, "`include` 'visual' changes nothing: .*is never quantized"),
        ({"include": ["q_porj"]}, "`include` 'q_porj' matches no tensor"),
        ({"include": ["in_proj_a", "in_proj_a"]}, "`include` 'in_proj_a' changes nothing: .*is quantized already"),
        ({"include": ["("]}, r"`include` '\(' is not a regular expression"),
        ({"exclude": ["lm_head"]}, "`exclude` 'lm_head' changes nothing: .*is kept already"),
        ({"exclude": ["in_proj_b"]}, "`exclude` 'in_proj_b' changes nothing: .*is kept already"),
        ({"exclude": ["q_porj"]}, "`exclude` 'q_porj' matches no tensor"),
        ({"exclude": ["mlp", r"mlp\.up"]}, "`exclude` .*changes nothing: .*is kept already"),
        ({"exclude": ["[z-a]"]}, "is not a regular expression"),
        ({"exclude": ["proj"]}, "Nothing is left to quantize"),
    ],
)
def test_a_pattern_that_changes_nothing_is_an_error(options: dict[str, Any], said: str, hybrid: Reader) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        make_plan(hybrid, RTN, "mlx", Selection(include_embeddings=False, **options))
    assert refused.value.argument == next(iter(options))


@pytest.mark.parametrize(
    ("options", "fused", "outside"),
    [
        ({"exclude": [r"layers\.3\.self_attn\.q_proj"]}, "qkv_proj", "k_proj"),
        ({"exclude": ["up_proj"]}, "gate_up_proj", "gate_proj"),
        ({"exclude": ["in_proj_z"]}, "in_proj_qkvz", "in_proj_qkv"),
        ({"include": ["in_proj_b"]}, "in_proj_ba", "in_proj_a"),
    ],
)
@pytest.mark.parametrize("format_name", ["gptq", "compressed-tensors", "hlwq"])
def test_part_of_a_fused_matrix_is_refused_where_engines_fuse(
    format_name: str, options: dict[str, Any], fused: str, outside: str, hybrid: Reader
) -> None:
    with pytest.raises(UnsupportedError, match=rf"as one matrix \(.*{fused}\)") as caught:
        make_plan(hybrid, FORMATS[format_name], format_name, Selection(**options))
    assert outside in str(caught.value)


@pytest.mark.parametrize("format_name", ["mlx", "dense"])
def test_part_of_a_fused_matrix_is_accepted_elsewhere(format_name: str, llama: Reader) -> None:
    assert "q_proj" not in leaves_of(make_plan(llama, RTN, format_name, Selection(exclude=("q_proj",))))


def test_a_matrix_that_gptq_cannot_pack_is_refused_by_name(hybrid: Reader) -> None:
    with pytest.raises(UnsupportedError, match=r"in_proj_[ab] has shape \(4, 128\); format gptq needs multiples of 32"):
        make_plan(hybrid, RTN, "gptq", Selection(include=("in_proj_a|in_proj_b",)))


# Group sizes


@pytest.mark.parametrize(
    ("wanted", "in_features", "size"),
    [
        (128, 4096, 128),
        (128, 576, 64),
        (128, 96, 32),
        (64, 96, 32),
        (64, 128, 64),
        (256, 512, 256),
        (256, 384, 128),
        (48, 96, 48),
        (48, 64, 32),
        (128, 4304, None),
        (64, 72, None),
        (16, 72, None),
        (24, 32, None),
    ],
)
def test_group_size_falls_back_to_the_largest_that_divides(wanted: int, in_features: int, size: int | None) -> None:
    if size is not None:
        assert fit_group_size(wanted, in_features) == size
        return
    with pytest.raises(UnsupportedError, match=f"in_features is {in_features}, which neither {wanted}") as refused:
        fit_group_size(wanted, in_features)
    assert refused.value.argument == "group_size"


@given(st.integers(1, 512), st.integers(1, 20000))
def test_a_fitted_group_size_is_the_first_that_is_not_above_the_wanted_one_and_divides(
    wanted: int, in_features: int
) -> None:
    fitting = [size for size in (128, 64, 32) if size <= wanted and in_features % size == 0]
    expected = wanted if in_features % wanted == 0 else max(fitting, default=None)
    if expected is None:
        with pytest.raises(UnsupportedError):
            fit_group_size(wanted, in_features)
    else:
        assert fit_group_size(wanted, in_features) == expected


def test_a_fallback_is_remarked_once_and_is_the_same_for_fused_matrices(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", "llama", hidden_size=192, num_attention_heads=3, num_key_value_heads=3)
    plan = make_plan(Reader(path), HLWQ)
    sizes = {module.rpartition(".")[2]: scheme.group_size for module, scheme in plan.contents().quantized.items()}
    assert sizes.pop("down_proj") == 128
    assert set(sizes.values()) == {64}
    assert plan.remarks == ("group 64 where in_features is 192, which 128 does not divide",)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_width_that_no_group_divides_is_refused_by_name(format_name: str, tmp_path: Path) -> None:
    source = Reader(make_checkpoint(tmp_path / "model", "llama", intermediate_size=4304))
    if output_formats[format_name].multiples != (1, 1):  # it stays as it is, and those that engines fuse with it
        plan = make_plan(source, FORMATS[format_name], format_name)
        kept = {t.module.rpartition(".")[2] for t in plan.tensors if "needs multiples of 32" in t.reason}
        assert kept == ({"down_proj"} if format_name == "mlx" else {"down_proj", "gate_proj", "up_proj"})
        return
    with pytest.raises(UnsupportedError, match="in_features is 4304, which neither") as refused:
        make_plan(source, FORMATS[format_name], format_name)
    assert (refused.value.argument, refused.value.tensor) == ("group_size", "model.layers.0.mlp.down_proj.weight")
    possible = "mlx" if FORMATS[format_name] is RTN else format_name  # 32 does not divide the rows of others, either
    plan = make_plan(source, FORMATS[format_name], possible, Selection(exclude=("down_proj",)))
    assert "down_proj" not in leaves_of(plan)


@pytest.mark.parametrize("group_size", [0, -1, -64])
@pytest.mark.parametrize("recipe", [RTN, HLWQ], ids=lambda recipe: recipe.name)
def test_a_group_size_that_is_no_size_is_refused(recipe: Recipe, group_size: int) -> None:
    with pytest.raises(RequestError, match="must be positive") as refused:
        changed(recipe, {"group_size": group_size})
    assert refused.value.argument == "group_size"


@pytest.mark.parametrize("format_name", ["hlwq", "dense"])
def test_a_hadamard_block_that_is_no_power_of_two_is_refused_before_the_work(format_name: str, tmp_path: Path) -> None:
    source = Reader(make_checkpoint(tmp_path / "model", "llama", hidden_size=192, intermediate_size=384))
    with pytest.raises(RequestError, match="power of two"):
        make_plan(source, changed(HLWQ, {"group_size": 96}), format_name)


# Sources that cannot be planned


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (
            TensorSpec("", "BF16", (256, 64)),
            r"up_proj\.weight has shape \(256, 64\), but config.json says \(256, 128\)",
        ),
        (TensorSpec("", "I32", (256, 128)), r"up_proj\.weight has dtype I32: the source is quantized already"),
        (TensorSpec("", "F8_E4M3", (256, 128)), r"up_proj\.weight has dtype F8_E4M3: the source is quantized"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(
    change: TensorSpec | None, said: str, llama: Reader
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {key: spec for key, spec in llama.tensors.items() if key != name}
    if change:
        tensors[name] = TensorSpec(name, change.dtype, change.shape)
    for plan in (lambda source: make_plan(source, RTN), plan_decoding):
        with pytest.raises(HlwqError, match=said):
            plan(Source(llama, tensors))


@pytest.mark.parametrize(
    ("recipe", "format_name", "said"),
    [
        (RTN, "gguf", "no format gguf. Formats are: gptq, compressed-tensors, mlx, hlwq, dense"),
        (HLWQ, "gptq", "gptq stores uniform codes"),
        (HLWQ, "mlx", "mlx stores uniform codes"),
        (RTN, "hlwq", "hlwq stores Lloyd–Max codes"),
        (changed(RTN, {"bits": 5}), "gptq", "gptq has 4, 8 bits, not 5"),
        (changed(RTN, {"bits": 7}), "mlx", "mlx has 2, 3, 4, 5, 6, 8 bits, not 7"),
        (changed(HLWQ, {"bits": 1}), "hlwq", "hlwq has 2, 3, 4, 5, 6, 7, 8 bits, not 1"),
        (changed(HLWQ, {"bits": 1}), "dense", "dense has 2, 3, 4, 5, 6, 7, 8 bits, not 1"),
        (changed(RTN, {"group_size": 16}), "mlx", "groups of 32, 64 or 128, not 16"),
        (changed(RTN, {"scale_method": "absmax"}), "mlx", "`scale_method` changes nothing"),
    ],
)
def test_a_recipe_that_the_format_cannot_hold_is_refused(
    recipe: Recipe, format_name: str, said: str, llama: Reader
) -> None:
    with pytest.raises(HlwqError, match=said):
        make_plan(llama, recipe, format_name)


# What is planned for each matrix, and what it costs


def test_a_chain_ends_in_the_formats_own_grid(llama: Reader) -> None:
    plan = make_plan(llama, recipe_named("hlwq-mlx"))
    assert plan.format.name == "mlx"
    (tensor,) = (each for each in plan.quantized() if each.module == "model.layers.0.mlp.down_proj")
    first, last = tensor.stages
    assert (first, last.basis) == (Stage(LloydGrid(5, 128), Hadamard(128)), Identity())
    assert isinstance(last.grid, UniformGrid)
    assert (last.grid.bits, last.grid.group_size, last.grid.symmetric, last.grid.integer_zero) == (4, 64, False, False)
    assert tensor.scheme == Scheme(4, 64, False)


def test_each_stage_of_a_chain_has_a_group_size_that_divides(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", "llama", hidden_size=192, num_attention_heads=3, num_key_value_heads=3)
    plan = make_plan(Reader(path), recipe_named("hlwq-mlx"))
    sizes = {tuple(stage.grid.group_size for stage in each.stages): each.spec.shape[1] for each in plan.quantized()}
    assert sizes == {(64, 64): 192, (128, 64): 256}


@pytest.mark.parametrize(("format_name", "symmetric"), [("gptq", True), ("mlx", False), ("dense", True)])
def test_symmetry_is_the_formats_unless_the_recipe_has_one(format_name: str, symmetric: bool, llama: Reader) -> None:
    def found(recipe: Recipe) -> set[bool | None]:
        return {scheme.symmetric for scheme in make_plan(llama, recipe, format_name).contents().quantized.values()}

    assert found(RTN) == {symmetric}
    assert found(changed(RTN, {"symmetric": not symmetric})) == {not symmetric}


@pytest.mark.parametrize(
    ("recipe", "format_name", "bits"),
    [
        (HLWQ, "hlwq", 5 + 16 / 128),
        (changed(HLWQ, {"bits": 3, "group_size": 64}), "hlwq", 3 + 16 / 64),
        (RTN, "mlx", 4 + 32 / 64),
        (changed(RTN, {"bits": 8, "group_size": 32}), "mlx", 8 + 32 / 32),
        (HLWQ, "dense", 16.0),
    ],
)
def test_bits_per_weight_count_all_overhead(recipe: Recipe, format_name: str, bits: float, llama: Reader) -> None:
    assert make_plan(llama, recipe, format_name).bits_per_weight()[0] == pytest.approx(bits, rel=1e-12)


def test_bytes_are_those_of_the_shapes(llama: Reader) -> None:
    plan = make_plan(llama, RTN, "gptq")
    expected = 0
    for tensor in plan.tensors:
        if tensor.action == "quantize":
            rows, columns = tensor.spec.shape
            groups = columns // 64
            expected += rows * columns // 2 + groups * rows // 2 + 2 * groups * rows + 4 * columns
        else:
            expected += 2 * tensor.spec.parameters
    assert plan.output_bytes() == expected
    everything = sum(tensor.spec.parameters for tensor in plan.tensors)
    assert plan.bits_per_weight()[1] == pytest.approx(8 * expected / everything)


def test_memory_grows_with_the_largest_matrix_and_not_with_the_layers(tmp_path: Path) -> None:
    sizes = [{}, {"num_hidden_layers": 6}, {"intermediate_size": 4096}]
    small, deep, wide = (
        make_plan(Reader(make_checkpoint(tmp_path / str(index), "llama", **each)), HLWQ).peak_memory()
        for index, each in enumerate(sizes)
    )
    assert small == deep < wide


def test_modules_can_be_given_instead_of_chosen(llama: Reader) -> None:
    wanted = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    assert modules_of(make_plan(llama, RTN, modules=wanted)) == set(wanted)


def test_a_decoding_plan_copies_everything(hybrid: Reader) -> None:
    plan = plan_decoding(hybrid)
    assert list(plan.outputs()) == list(hybrid.tensors.values())
    assert plan.bits_per_weight() == (None, 16.0)


def test_a_stage_before_the_last_may_be_uniform(llama: Reader) -> None:
    recipe = Recipe("mine", "", (Stage(UniformGrid(8, 32)), Stage(LloydGrid(3, 64), Hadamard())), ("hlwq",))
    for tensor in make_plan(llama, recipe).quantized():
        assert tensor.stages == (Stage(UniformGrid(8, 32, symmetric=True)), Stage(LloydGrid(3, 64), Hadamard(64)))


def test_a_model_of_which_no_matrix_fits_is_refused_with_the_formats_that_do(tmp_path: Path) -> None:
    sizes = {"hidden_size": 72, "intermediate_size": 144, "head_dim": 18}
    source = Reader(make_checkpoint(tmp_path / "model", "llama", **sizes))
    with pytest.raises(UnsupportedError, match=r"gptq needs multiples of 32, and no matrix.* Use format .*hlwq"):
        make_plan(source, recipe_named("rtn"), "gptq")
