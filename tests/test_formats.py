from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, model_config, some_names
from safetensors.torch import load_file, save_file
from scipy.linalg import hadamard
from torch import Tensor

import hlwq
from hlwq import Hadamard, HlwqError, Identity, LloydGrid, Nearest, UniformGrid, UnsupportedError
from hlwq.containers import Reader, Writer
from hlwq.decoded import DecodedCheckpoint
from hlwq.families import describe
from hlwq.families.qwen3_5 import QWEN3_5
from hlwq.formats import FORMATS, Contents, Scheme, detect_format, mlx
from hlwq.formats.compressed_tensors import configured_weights
from hlwq.formats.gptq import dynamic_rules
from hlwq.grids import Grid
from hlwq.lloyd import codebook
from hlwq.matrix import QuantizedMatrix
from hlwq.plan import make_plan
from hlwq.recipes import changed, recipe_named
from hlwq.request import Selection

DOWN, UP, O_PROJ = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"
ROWS, COLUMNS = 64, 256
FORMAT = "compressed-tensors"


def hard_weights() -> Tensor:
    """BF16 weights with what formats trip over: zero rows and groups, groups of one sign, outliers, tiny rows."""
    generator = torch.Generator().manual_seed(5)
    weights = 0.03 * torch.randn(ROWS, COLUMNS, generator=generator)
    weights[0] = 0
    weights[1, :128] = 0
    weights[2] = weights[2].abs() + 0.01
    weights[3] = -weights[3].abs() - 0.01
    weights[4, ::37] *= 40
    weights[5] *= 1e-5
    weights[6] = 0.02
    return weights.bfloat16().float()


def grid_for(format_name: str, bits: int, group_size: int, symmetric: bool | None, dtype: str = "BF16") -> Grid:
    hold = FORMATS[format_name].hold
    if symmetric is None:
        return hold(DOWN, (ROWS, COLUMNS), LloydGrid(bits, group_size), Hadamard(group_size), dtype)
    return hold(DOWN, (ROWS, COLUMNS), UniformGrid(bits, group_size, symmetric), Identity(), dtype)


def quantized(
    format_name: str, bits: int, group_size: int, symmetric: bool | None, dtype: str = "BF16"
) -> QuantizedMatrix:
    grid = grid_for(format_name, bits, group_size, symmetric, dtype)
    basis = Hadamard(group_size) if symmetric is None else Identity()
    return Nearest().solve(hard_weights(), grid, basis)


def save(path: Path, format_name: str, matrices: dict[str, QuantizedMatrix], dtype: str = "BF16") -> Reader:
    """Write matrices in a format as the pipeline does, and open the directory."""
    chosen, config = FORMATS[format_name], model_config("llama")
    specs = [
        spec
        for module, matrix in matrices.items()
        for spec in chosen.outputs(module, (ROWS, COLUMNS), matrix.grid, dtype)
    ]
    schemes = {
        module: Scheme(matrix.grid.bits, matrix.grid.group_size, getattr(matrix.grid, "symmetric", None))
        for module, matrix in matrices.items()
    }
    layout = describe(config, some_names(config))
    writer = Writer(path, specs, {})
    for module, matrix in matrices.items():
        for name, part in chosen.encode(module, matrix, dtype).items():
            writer.write(name, part)
    writer.finish({}, chosen.json_files(config, Contents(layout, schemes, [], dtype)))
    writer.publish()
    return Reader(path)


CASES = [
    *(("gptq", bits, group, symmetric) for bits in (4, 8) for group in (32, 64, 128) for symmetric in (True, False)),
    *((FORMAT, bits, group, sign) for bits in range(2, 9) for group in (32, 128) for sign in (True, False)),
    *(("mlx", bits, group, False) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    *(("mlx", bits, 64, True) for bits in (2, 3, 4, 5, 6, 8)),
    *(("hlwq", bits, group, None) for bits in range(2, 9) for group in (32, 128)),
]
every_case = pytest.mark.parametrize(("format_name", "bits", "group_size", "symmetric"), CASES)


@every_case
def test_a_file_decodes_to_the_very_weights_that_were_quantized(
    format_name: str, bits: int, group_size: int, symmetric: bool | None, tmp_path: Path
) -> None:
    matrix = quantized(format_name, bits, group_size, symmetric)
    reader = save(tmp_path / "out", format_name, {DOWN: matrix})
    stored_format = detect_format(reader)
    assert stored_format is FORMATS[format_name]
    ((module, stored),) = stored_format.stored_modules(reader).items()
    assert (module, stored.shape) == (DOWN, (ROWS, COLUMNS))
    assert (stored.scheme.bits, stored.scheme.group_size) == (bits, group_size)
    assert set(stored.tensors) == set(reader.tensors)
    decoded = stored_format.dequantize(reader, DOWN, stored.scheme)
    assert torch.equal(decoded, matrix.dequantize())
    assert (decoded[0] == 0).all()
    assert (decoded[1, :128] == 0).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("symmetric", [True, None])
def test_dense_files_hold_the_decoded_weights_in_the_models_dtype(
    symmetric: bool | None, dtype: str, tmp_path: Path
) -> None:
    matrix = quantized("dense", 5, 64, symmetric, dtype)
    reader = save(tmp_path / "out", "dense", {DOWN: matrix}, dtype)
    wanted = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    assert torch.equal(reader.read(f"{DOWN}.weight"), matrix.dequantize().to(wanted))
    assert reader.config == model_config("llama")
    assert detect_format(reader) is FORMATS["dense"]
    assert detect_format(reader).stored_modules(reader) == {}


def numpy_tensors(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if tensor.dtype in (torch.int32, torch.uint32):
            arrays[name.removeprefix(f"{DOWN}.")] = tensor.view(torch.int32).numpy().view(np.uint32)
        else:
            arrays[name.removeprefix(f"{DOWN}.")] = tensor.to(torch.float64).numpy()
    return arrays


def words_to_fields(words: np.ndarray, bits: int) -> np.ndarray:
    """The fields of uint32 words along the last axis, each word's lowest bits first; none may straddle two words."""
    fields = words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)
    return (fields & (2**bits - 1)).reshape(*words.shape[:-1], -1).astype(np.int64)


def stream_to_fields(octets: np.ndarray, bits: int) -> np.ndarray:
    """The fields of a little-endian bit stream along the last axis."""
    stream = np.unpackbits(np.ascontiguousarray(octets).view(np.uint8), axis=-1, bitorder="little")
    return stream.reshape(*octets.shape[:-1], -1, bits).astype(np.int64) @ (1 << np.arange(bits))


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [case[1:] for case in CASES if case[0] == "gptq"])
def test_gptq_layout(bits: int, group_size: int, symmetric: bool, tmp_path: Path) -> None:
    matrix = quantized("gptq", bits, group_size, symmetric)
    reader = save(tmp_path / "out", "gptq", {DOWN: matrix})
    parts, groups = numpy_tensors(tmp_path / "out"), COLUMNS // group_size
    assert {name: each.shape for name, each in parts.items()} == {
        "qweight": (COLUMNS * bits // 32, ROWS),
        "qzeros": (groups, ROWS * bits // 32),
        "scales": (groups, ROWS),
        "g_idx": (COLUMNS,),
    }
    codes = words_to_fields(parts["qweight"].T, bits).T
    version = reader.config["quantization_config"]["checkpoint_format"]
    zeros = words_to_fields(parts["qzeros"], bits) + {"gptq": 1, "gptq_v2": 0}[version]
    group_of = parts["g_idx"].astype(np.int64)
    np.testing.assert_array_equal(group_of, np.arange(COLUMNS) // group_size)
    decoded = parts["scales"][group_of] * (codes - zeros[group_of])
    np.testing.assert_array_equal(decoded.T, matrix.dequantize().double().numpy())
    # Tools disagree on what version 1 makes of a zero of 0, so files that may have one are of version 2.
    assert version == ("gptq" if symmetric else "gptq_v2")
    assert (zeros.min(), zeros.max()) == ((2 ** (bits - 1),) * 2 if symmetric else (0, 2**bits - 1))


def test_gptq_stores_four_bit_symmetric_zeros_as_sevens(tmp_path: Path) -> None:
    save(tmp_path / "out", "gptq", {DOWN: quantized("gptq", 4, 64, True)})
    assert (numpy_tensors(tmp_path / "out")["qzeros"] == 0x77777777).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_scales_of_a_bfloat16_model_are_the_same_in_bfloat16(symmetric: bool, tmp_path: Path) -> None:
    reader = save(tmp_path / "out", "gptq", {DOWN: quantized("gptq", 4, 64, symmetric)})
    scales = reader.read(f"{DOWN}.scales")
    assert scales.dtype == torch.float16
    assert torch.equal(scales.bfloat16().half(), scales)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [case[1:] for case in CASES if case[0] == FORMAT])
def test_compressed_tensors_layout(bits: int, group_size: int, symmetric: bool, tmp_path: Path) -> None:
    matrix = quantized(FORMAT, bits, group_size, symmetric)
    save(tmp_path / "out", FORMAT, {DOWN: matrix})
    parts, groups = numpy_tensors(tmp_path / "out"), COLUMNS // group_size
    zeros = {} if symmetric else {"weight_zero_point": (ROWS * bits // 32, groups)}
    assert {name: each.shape for name, each in parts.items()} == {
        "weight_packed": (ROWS, COLUMNS * bits // 32),
        "weight_scale": (ROWS, groups),
        "weight_shape": (2,),
        **zeros,
    }
    codes = stream_to_fields(parts["weight_packed"], bits).reshape(ROWS, groups, group_size)
    zero = 2 ** (bits - 1) if symmetric else stream_to_fields(parts["weight_zero_point"].T, bits).T[..., None]
    decoded = parts["weight_scale"][..., None] * (codes - zero)
    np.testing.assert_array_equal(decoded.reshape(ROWS, -1), matrix.dequantize().double().numpy())


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [case[1:] for case in CASES if case[0] == FORMAT and case[1] in (2, 4, 8)]
)
def test_compressed_tensors_itself_decodes_the_same_weights(
    bits: int, group_size: int, symmetric: bool, tmp_path: Path
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationConfig

    reader = save(tmp_path / "out", FORMAT, {DOWN: quantized(FORMAT, bits, group_size, symmetric)})
    config = QuantizationConfig.model_validate(reader.config["quantization_config"])
    (scheme,) = config.config_groups.values()
    parts = {name.rpartition(".")[2]: reader.read(name) for name in reader.tensors}
    theirs = compressors.PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    stored = FORMATS[FORMAT].stored_modules(reader)[DOWN]
    ours = FORMATS[FORMAT].dequantize(reader, DOWN, stored.scheme)
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs, ours.bfloat16())


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_codes_with_gaps_between_them_are_refused(bits: int, tmp_path: Path) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
    )
    matrix = quantized(FORMAT, bits, 64, True)
    save(tmp_path / "out", FORMAT, {DOWN: matrix})
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    codes = (matrix.codes.int() - 2 ** (bits - 1)).to(torch.int8)
    tensors[f"{DOWN}.weight_packed"] = helpers.pack_to_int32(codes, bits)
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="with gaps between them"):
        FORMATS[FORMAT].stored_modules(Reader(tmp_path / "out"))


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [case[1:] for case in CASES if case[0] == "mlx"])
def test_mlx_layout(bits: int, group_size: int, symmetric: bool, tmp_path: Path) -> None:
    matrix = quantized("mlx", bits, group_size, symmetric)
    reader = save(tmp_path / "out", "mlx", {DOWN: matrix})
    assert {spec.dtype for spec in reader.tensors.values()} == {"U32", "BF16"}
    parts, groups = numpy_tensors(tmp_path / "out"), COLUMNS // group_size
    assert {name: each.shape for name, each in parts.items()} == {
        "weight": (ROWS, COLUMNS * bits // 32),
        "scales": (ROWS, groups),
        "biases": (ROWS, groups),
    }
    codes = stream_to_fields(parts["weight"], bits).reshape(ROWS, groups, group_size)
    if 32 % bits == 0:
        np.testing.assert_array_equal(codes.reshape(ROWS, -1), words_to_fields(parts["weight"], bits))
    decoded = parts["scales"][..., None] * codes + parts["biases"][..., None]
    expected = matrix.dequantize().double().numpy()
    np.testing.assert_allclose(decoded.reshape(ROWS, -1), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("bits", "group_size"), [case[1:3] for case in CASES if case[0] == "hlwq"])
def test_hlwq_layout(bits: int, group_size: int, tmp_path: Path) -> None:
    matrix = quantized("hlwq", bits, group_size, None)
    reader = save(tmp_path / "out", "hlwq", {DOWN: matrix})
    packed, norms = reader.read(f"{DOWN}.weight_packed"), reader.read(f"{DOWN}.weight_norms")
    groups = COLUMNS // group_size
    assert (packed.dtype, packed.shape) == (torch.uint8, (ROWS, COLUMNS * bits // 8))
    assert (norms.dtype, norms.shape) == (torch.float16, (ROWS, groups))
    codes = stream_to_fields(packed.numpy(), bits).reshape(ROWS, groups, group_size)
    levels = codebook(bits).centroids.double().numpy()[codes]
    blocks = norms.double().numpy()[..., None] / np.sqrt(group_size) * levels @ (hadamard(group_size) / group_size**0.5)
    np.testing.assert_allclose(blocks.reshape(ROWS, -1), matrix.dequantize().numpy(), atol=1e-6)


@pytest.mark.parametrize("format_name", ["gptq", FORMAT, "mlx", "hlwq"])
def test_modules_with_other_groups_than_most_are_found_and_decoded(format_name: str, tmp_path: Path) -> None:
    symmetric = None if format_name == "hlwq" else False
    sizes = {DOWN: 64, UP: 64, O_PROJ: 32}
    matrices = {module: quantized(format_name, 4, size, symmetric) for module, size in sizes.items()}
    assert_found_and_decoded(format_name, save(tmp_path / "out", format_name, matrices), matrices)


@pytest.mark.parametrize("format_name", ["gptq", FORMAT, "mlx", "hlwq"])
def test_modules_of_as_many_bytes_but_another_scheme_are_told_apart(format_name: str, tmp_path: Path) -> None:
    symmetric = None if format_name == "hlwq" else False
    schemes = {DOWN: (4, 64), UP: (4, 64), O_PROJ: (8, 32)}
    matrices = {module: quantized(format_name, *scheme, symmetric) for module, scheme in schemes.items()}
    assert_found_and_decoded(format_name, save(tmp_path / "out", format_name, matrices), matrices)


def assert_found_and_decoded(format_name: str, reader: Reader, matrices: dict[str, QuantizedMatrix]) -> None:
    stored = FORMATS[format_name].stored_modules(reader)
    found = {module: (each.scheme.bits, each.scheme.group_size) for module, each in stored.items()}
    assert found == {module: (each.grid.bits, each.grid.group_size) for module, each in matrices.items()}
    for module, matrix in matrices.items():
        assert torch.equal(FORMATS[format_name].dequantize(reader, module, stored[module].scheme), matrix.dequantize())


# GPTQ files of other tools


def foreign_gptq(path: Path, bits: int, **section: Any) -> tuple[Reader, np.ndarray]:
    """A file packed here by hand, with each column in a group of its own choosing, and what it decodes to."""
    generator, group_size = np.random.default_rng(bits), 32
    codes = generator.integers(0, 2**bits, (COLUMNS, ROWS))
    zeros = generator.integers(0, 2**bits, (COLUMNS // group_size, ROWS))
    scales = generator.uniform(0.5, 2, zeros.shape).astype(np.float16)
    group_of = generator.permutation(COLUMNS) // group_size
    version_1 = section.get("checkpoint_format", "gptq") == "gptq"
    parts = {
        "qweight": pack_words(codes.T, bits).T,
        "qzeros": pack_words((zeros - version_1) % 2**bits, bits),
        "scales": scales,
        "g_idx": group_of.astype(np.int32),
    }
    path.mkdir()
    tensors = {f"{DOWN}.{name}": torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}
    save_file(tensors, path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": group_size, **section}}
    (path / "config.json").write_text(json.dumps(config))
    return Reader(path), (scales.astype(np.float64)[group_of] * (codes - zeros[group_of])).T


def pack_words(fields: np.ndarray, bits: int) -> np.ndarray:
    each_word = fields.reshape(*fields.shape[:-1], -1, 32 // bits).astype(np.uint64)
    words = (each_word << np.arange(0, 32, bits, dtype=np.uint64)).sum(-1)
    return words.astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_desc_act_and_both_spellings_of_the_zero_are_decoded(bits: int, checkpoint_format: str, tmp_path: Path) -> None:
    reader, expected = foreign_gptq(tmp_path / "foreign", bits, desc_act=True, checkpoint_format=checkpoint_format)
    stored = FORMATS["gptq"].stored_modules(reader)[DOWN]
    assert (stored.shape, stored.scheme.bits, stored.scheme.group_size) == ((ROWS, COLUMNS), bits, 32)
    np.testing.assert_array_equal(FORMATS["gptq"].dequantize(reader, DOWN, stored.scheme).numpy(), expected)


def test_a_gptq_file_without_g_idx_or_format_name_has_groups_in_order_and_version_1_zeros(tmp_path: Path) -> None:
    matrix = quantized("gptq", 4, 64, True)
    reader = edited(save(tmp_path / "out", "gptq", {DOWN: matrix}), drop=f"{DOWN}.g_idx")
    del reader.config["quantization_config"]["checkpoint_format"]
    stored = FORMATS["gptq"].stored_modules(reader)[DOWN]
    assert torch.equal(FORMATS["gptq"].dequantize(reader, DOWN, stored.scheme), matrix.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("format_name", "part"), [("gptq", "scales"), (FORMAT, "weight_scale"), ("mlx", "scales")])
def test_scales_may_be_of_any_floating_dtype(format_name: str, part: str, dtype: torch.dtype, tmp_path: Path) -> None:
    matrix = quantized(format_name, 4, 64, True)
    reader = save(tmp_path / "out", format_name, {DOWN: matrix})
    reader = with_parts(reader, {part: reader.read(f"{DOWN}.{part}").to(dtype)})
    stored = FORMATS[format_name].stored_modules(reader)[DOWN]
    decoded = FORMATS[format_name].dequantize(reader, DOWN, stored.scheme)
    torch.testing.assert_close(decoded, matrix.dequantize(), atol=1e-6, rtol=1e-2)


@pytest.mark.parametrize("group_size", [None, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_whose_rows_are_single_groups_are_read(
    symmetric: bool, group_size: int | None, tmp_path: Path
) -> None:
    matrix = Nearest().solve(hard_weights(), UniformGrid(4, COLUMNS, symmetric, storage=(torch.bfloat16,)), Identity())
    reader = save(tmp_path / "out", FORMAT, {DOWN: matrix})
    reader = edited(reader, change=regrouped(strategy="channel", group_size=group_size))
    stored = FORMATS[FORMAT].stored_modules(reader)[DOWN]
    assert stored.scheme == Scheme(4, COLUMNS, symmetric)
    assert torch.equal(FORMATS[FORMAT].dequantize(reader, DOWN, stored.scheme), matrix.dequantize())


@pytest.mark.parametrize("group_size", [None, -1, 128])
def test_a_check_knows_that_a_row_without_a_group_size_is_one_group(group_size: int | None, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama", intermediate_size=128)
    hlwq.quantize(model, tmp_path / "out", changed(recipe_named("rtn"), {"group_size": 128}), format=FORMAT)
    edited(Reader(tmp_path / "out"), change=regrouped(group_size=group_size))
    assert all(line.passed for line in hlwq.check(tmp_path / "out"))


def test_a_gptq_file_whose_last_group_is_short_is_read(tmp_path: Path) -> None:
    matrix = quantized("gptq", 4, 128, True)
    reader, shorter = save(tmp_path / "out", "gptq", {DOWN: matrix}), 192
    parts = {"qweight": reader.read(f"{DOWN}.qweight")[: shorter // 8], "g_idx": reader.read(f"{DOWN}.g_idx")[:shorter]}
    reader = with_parts(reader, parts)
    stored = FORMATS["gptq"].stored_modules(reader)[DOWN]
    decoded = FORMATS["gptq"].dequantize(reader, DOWN, stored.scheme)
    assert torch.equal(decoded, matrix.dequantize()[:, :shorter])


# What config.json says


def hybrid_contents(path: Path, format_name: str, family: str = "qwen3_5", **overrides: Any) -> Contents:
    """A hybrid with layers of two group sizes and two kinds of exclusion."""
    source = Reader(make_checkpoint(path, family, intermediate_size=320, **overrides))
    recipe = recipe_named("hlwq" if format_name == "hlwq" else "rtn")
    exclude = (r"layers\.1\.mlp\.down_proj", r"layers\.2\.linear_attn\.in_proj_")
    return make_plan(source, changed(recipe, {"group_size": 128}), format_name, Selection(exclude=exclude)).contents()


def first_hit(rules: dict[str, dict[str, int]], name: str) -> dict[str, int] | str | None:
    """What GPTQModel and vLLM make of `dynamic`: rules in order, `re.match`, the first hit wins."""
    for rule, values in rules.items():
        if re.match(rule.removeprefix("-:").removeprefix("+:"), name):
            return "excluded" if rule.startswith("-:") else values
    return None


def spellings(module: str, contents: Contents) -> list[str]:
    """The checkpoint's name, and the names that vLLM asks with: its own prefix, and the fused matrix."""
    matrices = {
        contents.layout.layer_prefix(index) + matrix.name: matrix
        for index, layer in enumerate(contents.layout.layers)
        for matrix in layer.matrices()
    }
    matrix = matrices[module]
    names = [module, module.removesuffix(matrix.name) + matrix.fused] if matrix.fused else [module]
    return [*names, *(name.replace("model.language_model.", "language_model.model.") for name in names)]


def test_gptq_dynamic_rules_match_every_spelling_of_a_module_and_nothing_else(tmp_path: Path) -> None:
    contents = hybrid_contents(tmp_path / "model", "gptq")
    rules = dynamic_rules(contents, Scheme(4, 128, True))
    checked = 0
    for module, scheme in contents.quantized.items():
        expected = None if scheme.group_size == 128 else {"bits": 4, "group_size": 64}
        assert (scheme.group_size == 64) == module.endswith("down_proj")
        for name in spellings(module, contents):
            assert first_hit(rules, name) == expected, name
            checked += 1
    for module in contents.kept:
        for name in spellings(module, contents):
            assert first_hit(rules, name) == "excluded", name
            checked += 1
    assert checked > 60
    assert "language_model.model.layers.0.linear_attn.in_proj_ba" in spellings(contents.kept[0], contents)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "language_model.lm_head",
        "model.visual.blocks.0.attn.qkv",
        "visual.blocks.0.mlp.linear_fc1",
        "model.visual.merger.linear_fc2",
        "mtp.layers.0.mlp.down_proj",
        "mtp.layers.0.self_attn.qkv_proj",
        "mtp.fc",
    ],
)
def test_gptq_dynamic_rules_exclude_what_is_outside_the_decoder(name: str, tmp_path: Path) -> None:
    contents = hybrid_contents(tmp_path / "model", "gptq")
    assert first_hit(dynamic_rules(contents, Scheme(4, 128, True)), name) == "excluded"


def test_gptq_dynamic_rules_exclude_first(tmp_path: Path) -> None:
    signs = [rule[:2] for rule in dynamic_rules(hybrid_contents(tmp_path / "model", "gptq"), Scheme(4, 128, True))]
    assert set(signs) == {"-:", "+:"}
    assert signs == sorted(signs, key="-:+:".index)


def test_gptq_dynamic_rules_tell_layer_1_from_layers_10_and_11(tmp_path: Path) -> None:
    source = Reader(make_checkpoint(tmp_path / "model", "llama", num_hidden_layers=12))
    plan = make_plan(source, recipe_named("rtn"), None, Selection(exclude=(r"layers\.1\.mlp\.down_proj",)))
    rules = dynamic_rules(plan.contents(), Scheme(4, 64, True))
    hits = {index: first_hit(rules, f"model.layers.{index}.mlp.down_proj") for index in range(12)}
    assert hits == {index: "excluded" if index == 1 else None for index in range(12)}
    assert first_hit(rules, "model.layers.1.mlp.gate_up_proj") is None


def test_gptq_configuration_says_what_the_file_holds(tmp_path: Path) -> None:
    contents, config = hybrid_contents(tmp_path / "model", "gptq"), model_config("qwen3_5")
    files = FORMATS["gptq"].json_files(config, contents)
    section = files["config.json"]["quantization_config"]
    assert files["quantize_config.json"] == section
    assert {key: value for key, value in files["config.json"].items() if key != "quantization_config"} == config
    said = ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "lm_head")
    assert tuple(section[key] for key in said) == ("gptq", 4, 128, True, False, "gptq", False)
    assert section["dynamic"] == dynamic_rules(contents, Scheme(4, 128, True))


def section_of(contents: Contents) -> dict[str, Any]:
    section: dict[str, Any] = FORMATS[FORMAT].json_files({}, contents)["config.json"]["quantization_config"]
    return section


def test_compressed_tensors_names_every_spelling_of_a_module_and_nothing_else(tmp_path: Path) -> None:
    contents = hybrid_contents(tmp_path / "model", FORMAT)
    section = section_of(contents)
    assert [group["targets"] == ["Linear"] for group in section["config_groups"].values()] == [False, True]
    for module, scheme in contents.quantized.items():
        assert (scheme.group_size == 64) == module.endswith("down_proj")
        for name in spellings(module, contents):
            weights = configured_weights(section, name)
            assert weights is not None, name
            assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, scheme.group_size, True)
    outside = [
        "lm_head",
        "language_model.lm_head",
        "model.visual.blocks.0.attn.qkv",
        "visual.merger.linear_fc2",
        "mtp.fc",
    ]
    for name in [*outside, *(name for module in contents.kept for name in spellings(module, contents))]:
        assert configured_weights(section, name) is None, name


def test_compressed_tensors_names_are_matched_by_the_package_itself_alike(tmp_path: Path) -> None:
    match = pytest.importorskip("compressed_tensors.utils.match", reason="compressed-tensors is not installed")
    contents = hybrid_contents(tmp_path / "model", FORMAT)
    section = section_of(contents)
    scheme_of = {target: group for group in section["config_groups"].values() for target in group["targets"]}
    linear = torch.nn.Linear(1, 1)
    for module in [*contents.quantized, *contents.kept]:
        ignored = bool(match.match_targets(module, linear, section["ignore"]))
        assert ignored == (module in contents.kept), module
        if not ignored:
            first = match.match_targets(module, linear, scheme_of)[0]
            assert scheme_of[first]["weights"] == configured_weights(section, module), module


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_text"])
def test_mlx_configuration_has_what_mlx_lm_asks_of_the_hybrid(family: str, tied: bool, tmp_path: Path) -> None:
    contents = hybrid_contents(tmp_path / "model", "mlx", family, tie_word_embeddings=tied)
    config = FORMATS["mlx"].json_files(model_config(family), contents)["config.json"]
    assert config["model_type"] == "qwen3_5"
    if family == "qwen3_5":
        assert config["text_config"]["model_type"] == "qwen3_5_text"
    section = config["quantization"]
    assert config["quantization_config"] == section
    assert (section.pop("group_size"), section.pop("bits"), section.pop("mode")) == (128, 4, "affine")
    assert section == {
        f"language_model.model.layers.{index}.mlp.down_proj": {"group_size": 64, "bits": 4} for index in (0, 2, 3)
    }


def test_mlx_overrides_of_other_families_keep_the_checkpoints_names(tmp_path: Path) -> None:
    source = Reader(make_checkpoint(tmp_path / "model", "llama", intermediate_size=320))
    contents = make_plan(source, changed(recipe_named("rtn"), {"group_size": 128}), "mlx").contents()
    config = FORMATS["mlx"].json_files(source.config, contents)["config.json"]
    assert config["model_type"] == "llama"
    assert config["quantization"]["model.layers.1.mlp.down_proj"] == {"group_size": 64, "bits": 4}


def test_hlwq_configuration_lists_the_modules_that_differ(tmp_path: Path) -> None:
    contents, config = hybrid_contents(tmp_path / "model", "hlwq"), model_config("qwen3_5")
    found = FORMATS["hlwq"].json_files(config, contents)["config.json"]
    section = found.pop("quantization_config")
    config["text_config"]["dtype"] = "bfloat16"  # transformers would guess that of the norms
    assert found == config
    assert section.pop("modules") == {
        f"model.language_model.layers.{index}.mlp.down_proj": {"bits": 5, "group_size": 64} for index in (0, 2, 3)
    }
    assert section == {"quant_method": "hlwq", "version": 1, "bits": 5, "group_size": 128}


# mlx-lm's own conversion of Qwen3.5


@pytest.mark.parametrize(
    "module", ["lm_head", "model.language_model.embed_tokens", "model.language_model.layers.3.self_attn.q_proj"]
)
def test_mlx_names_of_the_hybrid_lead_back_to_hugging_faces(module: str) -> None:
    layout = describe(model_config("qwen3_5"), some_names(model_config("qwen3_5"), "model.language_model."))
    theirs = layout.family.mlx.path(module)
    assert theirs != module
    assert layout.family.mlx.restoration.name(theirs) == module


def test_what_mlx_lm_does_to_the_hybrids_tensors_is_undone(tmp_path: Path) -> None:
    prefix = "language_model.model.layers.0."
    kernel, norm = torch.arange(24.0).reshape(6, 1, 4), torch.arange(8.0)
    converted = {
        f"{prefix}linear_attn.conv1d.weight": kernel.movedim(2, 1).contiguous(),
        f"{prefix}input_layernorm.weight": norm + 1,
        f"{prefix}linear_attn.norm.weight": norm.clone(),
    }
    save_file(converted, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5"}')
    reader = Reader(tmp_path)
    assert QWEN3_5.mlx.converted(reader.tensors)
    restoration = mlx.restoration(reader)
    for (name, spec), expected in zip(sorted(reader.tensors.items()), [norm, kernel, norm], strict=True):
        assert torch.equal(restoration.tensor(name, reader.read(name)), expected)
        assert restoration.shape(spec) == expected.shape


# What is refused


def edited(reader: Reader, drop: str = "", change: Callable[[dict[str, Any]], None] | None = None) -> Reader:
    """The same directory without one tensor, or with a changed configuration."""
    tensors = load_file(reader.path / "model.safetensors")
    tensors.pop(drop, None)
    save_file(tensors, reader.path / "model.safetensors")
    if change:
        change(reader.config)
        (reader.path / "config.json").write_text(json.dumps(reader.config))
    return Reader(reader.path)


def with_parts(reader: Reader, parts: dict[str, Tensor]) -> Reader:
    """The same directory with other tensors for one module."""
    tensors = load_file(reader.path / "model.safetensors")
    tensors |= {f"{DOWN}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, reader.path / "model.safetensors")
    return Reader(reader.path)


@pytest.mark.parametrize(
    ("format_name", "part"),
    [
        ("gptq", "qzeros"),
        ("gptq", "scales"),
        (FORMAT, "weight_scale"),
        ("mlx", "weight"),
        ("mlx", "biases"),
        ("hlwq", "weight_norms"),
    ],
)
def test_a_module_that_lacks_a_part_is_refused_by_name(format_name: str, part: str, tmp_path: Path) -> None:
    matrix = quantized(format_name, 4, 64, None if format_name == "hlwq" else True)
    reader = edited(save(tmp_path / "out", format_name, {DOWN: matrix}), drop=f"{DOWN}.{part}")
    with pytest.raises(HlwqError, match=rf"tensor {re.escape(DOWN)}\.{part} is missing"):
        FORMATS[format_name].stored_modules(reader)


def setting(section: str, **entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config[section].update(entries)


def regrouped(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(entries)


@pytest.mark.parametrize(
    ("format_name", "change", "said"),
    [
        ("hlwq", setting("quantization_config", version=2), "format version 2 is unknown. Upgrade"),
        ("hlwq", setting("quantization_config", bits=5), "does not have the bits and group size"),
        ("hlwq", setting("quantization_config", group_size=32), "does not have the bits and group size"),
        (FORMAT, setting("quantization_config", format="int-quantized"), "format int-quantized cannot be read"),
        (FORMAT, setting("quantization_config", ignore=["re:.*down_proj"]), "config.json has no scheme for it"),
        (FORMAT, regrouped(group_size=32), "does not have the bits and group size"),
        (FORMAT, regrouped(num_bits=3), "has 3-bit codes with gaps between them, or another group size"),
        (FORMAT, regrouped(num_bits=1), "has 1-bit codes or scattered groups"),
        ("mlx", setting("quantization", mode="mxfp4"), "MLX mode mxfp4 cannot be read"),
        ("mlx", setting("quantization", bits=5), "does not have the bits and group size"),
    ],
)
def test_a_directory_that_is_not_as_its_configuration_says_is_refused(
    format_name: str, change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    matrix = quantized(format_name, 4, 64, None if format_name == "hlwq" else False)
    reader = edited(save(tmp_path / "out", format_name, {DOWN: matrix}), change=change)
    with pytest.raises(HlwqError, match=said):
        FORMATS[format_name].stored_modules(reader)


def without(key: str) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        del config["quantization_config"][key]

    return change


SECTION = "quantization_config"
GROUP_0 = "quantization_config.config_groups.group_0"


@pytest.mark.parametrize(
    ("format_name", "change", "said"),
    [
        *(
            (each, lambda config: config.update(quantization_config=[1]), f"{SECTION} is [1]")
            for each in ("hlwq", "gptq")
        ),
        ("gptq", setting(SECTION, quant_method=["gptq"]), "quantized by ['gptq'] cannot be read"),
        ("hlwq", setting(SECTION, bits="5"), f'{SECTION}: bits is "5", not an integer'),
        ("hlwq", setting(SECTION, bits=None), f"{SECTION}: bits is null, not an integer"),
        ("hlwq", setting(SECTION, bits=4.0), f"{SECTION}: bits is 4.0, not an integer"),
        ("hlwq", setting(SECTION, bits=True), f"{SECTION}: bits is true, not an integer"),
        ("hlwq", setting(SECTION, bits=9), "HLWQ file: bits is 9, of 2 to 8"),
        ("hlwq", without("bits"), f"{SECTION} lacks bits"),
        ("hlwq", setting(SECTION, group_size=64.0), f"{SECTION}: group_size is 64.0, not an integer"),
        ("hlwq", setting(SECTION, group_size=0), "group_size is 0, of powers of two"),
        ("hlwq", setting(SECTION, group_size=-64), "group_size is -64, of powers of two"),
        ("hlwq", setting(SECTION, group_size=96), "group_size is 96, of powers of two"),
        ("hlwq", without("modules"), f"{SECTION} lacks modules"),
        ("hlwq", setting(SECTION, modules=[]), f"{SECTION}: modules is [], not an object"),
        ("hlwq", setting(SECTION, modules=None), f"{SECTION}: modules is null, not an object"),
        ("hlwq", setting(SECTION, modules={DOWN: "x"}), f'{SECTION}.modules: {DOWN} is "x", not an object'),
        ("hlwq", setting(SECTION, modules={DOWN: {"bits": 4}}), f"{SECTION}.modules.{DOWN} lacks group_size"),
        ("gptq", setting(SECTION, bits="4"), f'{SECTION}: bits is "4", not an integer'),
        ("gptq", setting(SECTION, group_size=64.0), f"{SECTION}: group_size is 64.0, not an integer"),
        ("gptq", without("group_size"), f"{SECTION} lacks group_size"),
        ("gptq", setting(SECTION, dynamic=["-:lm_head"]), f'{SECTION}: dynamic is ["-:lm_head"], not an object'),
        ("gptq", setting(SECTION, dynamic={"-:(": {}}), f'{SECTION}.dynamic: "(" is not a regular expression'),
        ("gptq", setting(SECTION, dynamic={"+:x": 3}), f"{SECTION}.dynamic: +:x is 3, not an object"),
        (FORMAT, without("format"), "compressed-tensors format None cannot be read"),
        (FORMAT, without("config_groups"), f"{SECTION} lacks config_groups"),
        (FORMAT, setting(SECTION, config_groups=[]), f"{SECTION}: config_groups is [], not an object"),
        (FORMAT, setting(SECTION, config_groups={"a": 1}), f"{SECTION}.config_groups: a is 1, not an object"),
        (FORMAT, setting(SECTION, config_groups={"a": {}}), f"{SECTION}.config_groups.a lacks targets"),
        (FORMAT, setting(SECTION, ignore="lm_head"), f'{SECTION}: ignore is "lm_head", not a list'),
        (FORMAT, setting(SECTION, ignore=["re:("]), 'ignore or targets: "(" is not a regular expression'),
        (FORMAT, setting(SECTION, ignore=[3]), "ignore or targets: 3 is not a regular expression"),
        (FORMAT, regrouped(num_bits="4"), f'{GROUP_0}.weights: num_bits is "4", not an integer'),
        (FORMAT, regrouped(num_bits=-4), f"{DOWN} has -4-bit codes"),
        (FORMAT, regrouped(group_size="64"), f'{GROUP_0}.weights: group_size is "64", not an integer'),
        (FORMAT, regrouped(group_size=0), f"{DOWN} does not have the bits and group size"),
        (FORMAT, regrouped(group_size=-1), f"{DOWN} does not have the bits and group size"),
        (FORMAT, regrouped(symmetric="false"), f'{GROUP_0}.weights: symmetric is "false", not true or false'),
        (FORMAT, regrouped(type="float"), f"{GROUP_0}.weights: codes of type float cannot be read"),
        ("mlx", setting("quantization", bits="4"), 'quantization: bits is "4", not an integer'),
        ("mlx", setting("quantization", bits=0), "quantization: bits is 0; MLX files have 2, 3"),
        ("mlx", setting("quantization", group_size=0), f"{DOWN} does not have the bits and group size"),
        ("mlx", setting("quantization", **{DOWN: {"bits": 4}}), f"quantization.{DOWN} lacks group_size"),
    ],
)
def test_a_damaged_configuration_is_refused_by_its_entry(
    format_name: str, change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    matrix = quantized(format_name, 4, 64, None if format_name == "hlwq" else True)
    edited(save(tmp_path / "out", format_name, {DOWN: matrix}), change=change)
    with pytest.raises(HlwqError) as refused:
        DecodedCheckpoint(tmp_path / "out")
    assert said in str(refused.value)


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "of no axes": lambda tensor: tensor.reshape(-1)[0],
    "flat": lambda tensor: tensor.flatten().repeat(2),
    "of three axes": lambda tensor: tensor.reshape(1, 1, -1),
    "empty": lambda tensor: tensor[:0],
    "half": lambda tensor: tensor[: len(tensor) // 2],
    "one column": lambda tensor: tensor[..., :1],
    "of another dtype": lambda tensor: tensor.to(torch.int64 if tensor.is_floating_point() else torch.float32),
    "of bytes": lambda tensor: tensor.to(torch.int8),
}
PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    FORMAT: ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
    "mlx": ("weight", "scales", "biases"),
    "hlwq": ("weight_packed", "weight_norms"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("format_name", "part"), [(name, part) for name, parts in PARTS.items() for part in parts])
def test_a_part_of_another_shape_or_dtype_is_refused_by_name(
    format_name: str, part: str, damage: str, tmp_path: Path
) -> None:
    matrix = quantized(format_name, 4, 64, None if format_name == "hlwq" else False)
    reader = save(tmp_path / "out", format_name, {DOWN: matrix})
    reader = with_parts(reader, {part: DAMAGE[damage](reader.read(f"{DOWN}.{part}"))})
    with pytest.raises(HlwqError, match=re.escape(DOWN)):
        FORMATS[format_name].stored_modules(reader)


@pytest.mark.parametrize("group", [-1, 4, 1000])
def test_a_gptq_column_in_a_group_that_is_not_there_is_refused(group: int, tmp_path: Path) -> None:
    reader = save(tmp_path / "out", "gptq", {DOWN: quantized("gptq", 4, 64, True)})
    index = reader.read(f"{DOWN}.g_idx")
    index[7] = group
    reader = with_parts(reader, {"g_idx": index})
    scheme = FORMATS["gptq"].stored_modules(reader)[DOWN].scheme
    with pytest.raises(HlwqError, match=rf"{re.escape(DOWN)}\.g_idx holds groups from .* are 0 to 3"):
        FORMATS["gptq"].dequantize(reader, DOWN, scheme)


def test_gptq_groups_that_do_not_divide_a_row_need_g_idx(tmp_path: Path) -> None:
    reader = save(tmp_path / "out", "gptq", {DOWN: quantized("gptq", 4, 64, True)})
    reader = with_parts(reader, {part: reader.read(f"{DOWN}.{part}")[:3] for part in ("qzeros", "scales")})
    with pytest.raises(HlwqError, match=f"{re.escape(DOWN)} has 3 groups for 256 columns, and no g_idx"):
        FORMATS["gptq"].stored_modules(edited(reader, drop=f"{DOWN}.g_idx"))


def test_a_compressed_tensor_whose_shape_is_another_is_refused(tmp_path: Path) -> None:
    reader = save(tmp_path / "out", FORMAT, {DOWN: quantized(FORMAT, 4, 64, True)})
    reader = with_parts(reader, {"weight_shape": torch.tensor([64, 200])})
    scheme = FORMATS[FORMAT].stored_modules(reader)[DOWN].scheme
    with pytest.raises(HlwqError, match=rf"{re.escape(DOWN)}\.weight_shape says \[64, 200\] of \[64, 256\]"):
        FORMATS[FORMAT].dequantize(reader, DOWN, scheme)


@pytest.mark.parametrize("command", ["inspect", "check"])
@pytest.mark.parametrize(
    ("format_name", "change"),
    [
        ("hlwq", setting(SECTION, group_size=0)),
        ("gptq", setting(SECTION, dynamic={"+:(": {}})),
        (FORMAT, setting(SECTION, ignore=["re:("])),
    ],
)
def test_the_command_line_says_what_is_damaged_in_one_line(
    format_name: str,
    change: Callable[[dict[str, Any]], None],
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hlwq.cli import main

    matrix = quantized(format_name, 4, 64, None if format_name == "hlwq" else True)
    edited(save(tmp_path / "out", format_name, {DOWN: matrix}), change=change)
    monkeypatch.setattr(sys, "argv", ["hlwq", command, str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert "config.json: quantization_config" in message
    assert "Traceback" not in message


def test_gptq_files_of_three_bits_are_refused(tmp_path: Path) -> None:
    shapes = {"qweight": (COLUMNS * 3 // 32, ROWS), "qzeros": (4, ROWS * 3 // 32), "scales": (4, ROWS)}
    tensors = {f"{DOWN}.{part}": torch.zeros(shape, dtype=torch.int32) for part, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    section = {"quant_method": "gptq", "bits": 3, "group_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    with pytest.raises(HlwqError, match=f"{re.escape(DOWN)} has 3-bit codes"):
        FORMATS["gptq"].stored_modules(Reader(tmp_path))


@pytest.mark.parametrize("shape", [(48, 256), (64, 80)])
@pytest.mark.parametrize("format_name", ["gptq", FORMAT])
def test_shapes_that_engines_refuse_are_refused(format_name: str, shape: tuple[int, int]) -> None:
    said = f"{DOWN} has shape {shape}; format {format_name} needs multiples of 32"
    with pytest.raises(UnsupportedError, match=re.escape(said)):
        FORMATS[format_name].hold(DOWN, shape, UniformGrid(4, 32), Identity(), "BF16")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "weights quantized by awq cannot be read"),
        ({"quantization_config": {"bits": 4}}, "quantized by an unnamed method"),
    ],
)
def test_a_format_of_others_is_refused_by_name(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HlwqError, match=said):
        detect_format(Reader(tmp_path))


def test_mlx_is_told_the_rotary_base_of_transformers_5_configurations(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    source = make_checkpoint(tmp_path / "model", "llama", rope_parameters={**scaling, "rope_theta": 500000.0})
    reader = Reader(source)
    plan = make_plan(reader, recipe_named("rtn"), "mlx")
    written = mlx.json_files(reader.config, plan.contents())["config.json"]
    assert (written["rope_theta"], written["rope_scaling"]) == (500000.0, scaling)
