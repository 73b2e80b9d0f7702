"""compressed-tensors (`pack-quantized`): integer codes that vLLM and transformers load, rotated or not.

For a linear of shape (out, in): `weight_packed` int32 (out, in·bits/32), codes packed along `in`; `weight_scale`
(out, groups) in the model's dtype; `weight_zero_point` int32 (out·bits/32, groups), packed along `out`, in asymmetric
files only; `weight_shape` int64 (2,). Everything is packed lowest bits first. w = scale · (code − zero), the zero of
symmetric files being 2^(bits−1).
What is rotated says so in `transform_config`, see `hlwq.formats.transforms`.

Codes of 3, 5, 6 and 7 bits are one stream, as vLLM 0.32 has them (its Humming kernels: read in its source, not run).
compressed-tensors 0.17 leaves gaps in each word, so that neither package loads what is packed for the other.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hlwq.bases import Basis, Hadamard
from hlwq.containers import DTYPES, Reader, TensorSpec
from hlwq.errors import CheckpointError, UnsupportedError
from hlwq.families import FUSED, Matrix, ModelLayout
from hlwq.formats import reading
from hlwq.formats.base import (
    PIPELINE_COMMAND,
    Contents,
    Demand,
    Engine,
    Format,
    Scheme,
    StoredModule,
    common_scheme,
    demand,
)
from hlwq.formats.patterns import (
    check_pattern,
    head_pattern,
    kept_patterns,
    matches_start,
    patterns_by_scheme,
    targets,
)
from hlwq.formats.transforms import LARGEST_BLOCK, REFUSAL, read_transforms, shared_tensors, transform_config
from hlwq.formats.uniform import (
    READABLE_BITS,
    check_multiples_of_32,
    decode,
    integer_zeros,
    symmetric_zero,
    uniform_grid,
)
from hlwq.formats.vllm import VLLM, uniform_demands, vllm_name
from hlwq.grids import Grid
from hlwq.hadamard import rotate_blocks
from hlwq.matrix import QuantizedMatrix
from hlwq.packing import pack, unpack

NAME = "compressed-tensors"
PACKING = "pack-quantized"
BITS = (2, 3, 4, 5, 6, 7, 8)


def hold(module: str, shape: tuple[int, int], grid: Grid, basis: Basis, dtype: str) -> Grid:
    """Integer zeros; scales in the model's dtype.

    Raises:
        UnsupportedError: other than uniform codes, a group size that Marlin does not have, blocks that
            vLLM does not rotate, or a side of the matrix that is no multiple of 32.
    """
    stored = {"integer_zero": True, "storage": (DTYPES[dtype],)}
    held = uniform_grid(NAME, BITS, "hlwq-int4", grid, basis, rotated=True, **stored)
    if isinstance(basis, Hadamard) and (basis.block_size or 0) > LARGEST_BLOCK:
        message = f"`block_size` {basis.block_size} exceeds the {LARGEST_BLOCK} columns that vLLM rotates together."
        raise UnsupportedError(message, argument="block_size")
    check_multiples_of_32(NAME, module, shape)
    return held


def outputs(module: str, shape: tuple[int, int], grid: Grid, dtype: str) -> list[TensorSpec]:
    """The three or four tensors of a module."""
    return _parts(module, shape, Scheme(grid.bits, grid.group_size, grid.symmetry), dtype)


def _parts(module: str, shape: tuple[int, int], scheme: Scheme, dtype: str) -> list[TensorSpec]:
    (rows, columns), bits = shape, scheme.bits
    groups = columns // scheme.group_size
    specs = [
        TensorSpec(f"{module}.weight_packed", "I32", (rows, columns * bits // 32)),
        TensorSpec(f"{module}.weight_scale", dtype, (rows, groups)),
        TensorSpec(f"{module}.weight_shape", "I64", (2,)),
    ]
    if not scheme.symmetric:
        specs.append(TensorSpec(f"{module}.weight_zero_point", "I32", (rows * bits // 32, groups)))
    return specs


def encode(module: str, matrix: QuantizedMatrix, dtype: str) -> dict[str, Tensor]:
    """Codes, zeros and scales, packed."""
    bits = matrix.grid.bits
    parts = {
        f"{module}.weight_packed": pack(matrix.codes, bits).view(torch.int32),
        f"{module}.weight_scale": matrix.parameters.scale.to(DTYPES[dtype]),
        f"{module}.weight_shape": torch.tensor(matrix.codes.shape),
    }
    if not matrix.grid.symmetry:
        zeros = pack(integer_zeros(matrix).T.contiguous(), bits).view(torch.int32)
        parts[f"{module}.weight_zero_point"] = zeros.T.contiguous()
    return parts


def json_files(config: dict[str, Any], contents: Contents) -> dict[str, dict[str, Any]]:
    """`config.json` with its `quantization_config`: a group for each scheme, the common one for all other linears.

    Both engines look for a module's name before its class, vLLM for fused names too.
    """
    common = common_scheme(contents.quantized)
    others = {scheme: targets(patterns) for scheme, patterns in patterns_by_scheme(contents, common).items()}
    groups = {**others, common: ["Linear"]}
    head = contents.layout.output_head
    if head in contents.quantized:
        groups[contents.quantized[head]] += targets([head_pattern(contents.layout)])
    section = {
        "quant_method": NAME,
        "format": PACKING,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                **({REFUSAL: True} if scheme.block_size else {}),
                "targets": names,
                "weights": {
                    "num_bits": scheme.bits,
                    "type": "int",
                    "symmetric": scheme.symmetric,
                    "strategy": "group",
                    "group_size": scheme.group_size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for index, (scheme, names) in enumerate(groups.items())
        },
        "ignore": targets(kept_patterns(contents)),
        "kv_cache_scheme": None,
        **transform_config(contents),
    }
    return {"config.json": {**config, "quantization_config": section}}


def configured_weights(section: dict[str, Any], name: str) -> dict[str, Any] | None:
    """What `config_groups` say of the weights of a linear module, or None if it is ignored or in no group."""

    where = "config.json: quantization_config"

    def matches(target: str) -> bool:
        return matches_start(target[3:], name, where) if target.startswith("re:") else target == name

    if any(map(matches, section.get("ignore") or ())):
        return None
    groups = section["config_groups"].values()
    named = (group for group in groups if any(map(matches, group["targets"])))
    others = (group for group in groups if "Linear" in group["targets"])
    weights: dict[str, Any] | None = next((group.get("weights") for group in chain(named, others)), None)
    return weights


def scheme_in(weights: dict[str, Any], columns: int) -> Scheme:
    """The scheme of a module of that width by the `weights` of its group: without a group size, a row is one group."""
    size = weights.get("group_size")
    return Scheme(weights["num_bits"], columns if size in (None, -1) else size, weights.get("symmetric", True))


def stored_modules(reader: Reader) -> dict[str, StoredModule]:
    """Modules that have `weight_packed`.

    Raises:
        CheckpointError: `config.json` is damaged, or tensors of a module are missing or do not have the scheme that it
            gives the module.
        UnsupportedError: it is another format of compressed-tensors, or a width that cannot be read.
    """
    section, where = reading.section_of(reader)
    if section.get("format") != PACKING:
        raise UnsupportedError(
            f"{reader.path}: compressed-tensors format {section.get('format')} cannot be read, only {PACKING}."
        )
    _check_section(section, where)
    transforms = read_transforms(reader, section, where)
    modules = {}
    for module in reading.modules_with(reader, "weight_packed"):
        weights = configured_weights(section, module)
        if weights is None:
            raise CheckpointError(f"{reader.path}: {module} is stored as codes, but config.json has no scheme for it.")
        bits = weights["num_bits"]
        if bits not in BITS or f"{module}.weight_g_idx" in reader.tensors:
            raise UnsupportedError(
                f"{reader.path}: {module} has {bits}-bit codes or scattered groups; files of 2 to 8 bits with "
                "groups of neighbouring columns can be read."
            )
        rows, words = reading.matrix_shape(reader, f"{module}.weight_packed")
        columns = words * 32 // bits
        scheme = scheme_in(weights, columns)
        zeros = () if scheme.symmetric else ("weight_zero_point",)
        parts = reading.require_parts(reader, module, "weight_packed", "weight_scale", "weight_shape", *zeros)
        if columns != reading.matrix_shape(reader, f"{module}.weight_scale")[1] * scheme.group_size:
            if bits not in READABLE_BITS:
                raise UnsupportedError(
                    f"{reader.path}: {module} has {bits}-bit codes with gaps between them, or another group size than "
                    "config.json says; codes of this width can be read as vLLM reads them, without gaps."
                )
            raise reading.not_as_configured(reader, module)
        reading.check_parts(reader, _parts(module, (rows, columns), scheme, "BF16"))
        rotations = [each for each in transforms if each.applies(module, where)]
        if len(rotations) > 1 or any(columns % each.block_size for each in rotations):
            raise reading.damaged(f"{where}: the transforms of {module} do not fit it.")
        for each in rotations:
            scheme = replace(scheme, block_size=each.block_size)
            parts += (each.tensor_of(module),) * (each.tensor_of(module) in reader.tensors)
        modules[module] = StoredModule(scheme, (rows, columns), parts)
    return modules


def _check_section(section: dict[str, Any], where: str) -> None:
    """Raise CheckpointError unless the `quantization_config` can be understood."""
    targets = list(reading.entry(section, "ignore", list, where, default=[]))
    groups = reading.entry(section, "config_groups", dict, where)
    for name in groups:
        group, here = reading.entry(groups, name, dict, f"{where}.config_groups"), f"{where}.config_groups.{name}"
        targets += reading.entry(group, "targets", list, here)
        if group.get("weights") is None:
            continue
        weights, here = reading.entry(group, "weights", dict, here), f"{here}.weights"
        reading.entry(weights, "num_bits", int, here)
        reading.entry(weights, "group_size", int, here, default=-1)
        reading.entry(weights, "symmetric", bool, here, default=True)
        if weights.get("type", "int") != "int":
            raise UnsupportedError(f"{here}: codes of type {weights['type']} cannot be read, only int.")
    for target in targets:
        check_pattern(target.removeprefix("re:") if isinstance(target, str) else target, f"{where}, ignore or targets")


def dequantize(reader: Reader, module: str, scheme: Scheme) -> Tensor:
    """scale · (code − zero), rotated back.

    Raises:
        CheckpointError: `weight_shape` is not the shape of the codes.
    """
    bits = scheme.bits
    codes = unpack(reader.read(f"{module}.weight_packed").view(torch.uint8), bits)
    stated = reader.read(f"{module}.weight_shape").tolist()
    if stated != list(codes.shape):
        raise CheckpointError(
            f"{reader.path}: tensor {module}.weight_shape says {stated} of {list(codes.shape)}. {reading.AGAIN}"
        )
    zeros: Tensor | int = symmetric_zero(bits)
    if not scheme.symmetric:
        packed = reader.read(f"{module}.weight_zero_point").T.contiguous()
        zeros = unpack(packed.view(torch.uint8), bits).T
    decoded = decode(codes, reader.read(f"{module}.weight_scale"), zeros, scheme)
    return rotate_blocks(decoded, scheme.block_size) if scheme.block_size else decoded


def demands(reader: Reader, layout: ModelLayout, modules: dict[str, StoredModule]) -> list[Demand]:
    """What vLLM and transformers want."""
    section = reader.config["quantization_config"]
    again = "Quantize again with the defaults of format compressed-tensors."
    rule = "config_groups and ignore agree with the tensors"
    widths = {stored.scheme.bits for stored in modules.values()}.difference(READABLE_BITS)
    rotated = {module for module, stored in modules.items() if stored.scheme.block_size}
    wrong = [module for module, matrix in layout.matrices().items() if module in rotated and unrotated(layout, matrix)]
    wrong += [layout.output_head] if layout.output_head in rotated else []
    rotation = [
        demand(VLLM, "rotated are only inputs that it can rotate", wrong, again),
        demand(VLLM, "type of transform hadamard, which needs a GPU, and no tensor parallelism", [], ""),
        demand("transformers", "`import hlwq` before it is loaded, which rotates the inputs", [], ""),
    ]
    return [
        *(rotation if rotated else []),
        *uniform_demands(layout, modules, BITS, again),
        demand("transformers", "2, 4 or 8 bits", sorted({f"{bits} bits" for bits in widths}), again),
        demand(VLLM, f"{rule}, by its names", _wrong_groups(section, layout, modules, True), again),
        demand("transformers", f"{rule}, by own names", _wrong_groups(section, layout, modules, False), again),
    ]


def _wrong_groups(
    section: dict[str, Any], layout: ModelLayout, modules: dict[str, StoredModule], vllm: bool
) -> list[str]:
    """Modules for which `config_groups` and `ignore` say something else than the tensors do."""
    wrong = []
    for module in layout.matrices():
        name = vllm_name(layout, module) if vllm else module  # vLLM asks for the members of a fused matrix
        stored, weights = modules.get(module), configured_weights(section, name)
        if weights and stored:
            agrees = scheme_in(weights, stored.shape[1]) == replace(stored.scheme, block_size=None)
        else:
            agrees = weights is None and stored is None
        if not agrees:
            wrong.append(name)
    outside = [layout.output_head, *(f"{prefix}any.linear" for prefix in layout.beside)]
    if vllm:
        outside = [vllm_name(layout, name) for name in outside]
    return wrong + [name for name in outside if (configured_weights(section, name) is not None) != (name in modules)]


def unrotated(layout: ModelLayout, matrix: Matrix | None) -> str:
    """Which inputs vLLM 0.32 does not rotate: its transforms assert that there is no bias, and count parts wrongly.

    A fused matrix with more parts than names, as Qwen3.5's `in_proj_qkvz`, ends in a KeyError.
    """
    if matrix is None:
        return "the output head"
    if matrix.bias:
        return "layers with a bias"
    if matrix.name.rpartition(".")[2] in FUSED:  # a whole, whose parts vLLM counts too
        return matrix.name
    whole = matrix.fused or matrix.name
    return whole if whole in layout.family.vllm_unrotated else ""


def cautions(contents: Contents) -> list[str]:
    """Who runs a rotated file."""
    if not any(scheme.block_size for scheme in contents.quantized.values()):
        return []
    return [
        "the inputs of rotated layers are rotated at run time: by vLLM on one GPU, without tensor parallelism, or by "
        "transformers after `import hlwq`. transformers without hlwq refuses the result."
    ]


ENGINES = (
    Engine("vLLM", BITS, "symmetric or asymmetric", "vllm serve {path}{text_only}"),
    Engine("transformers", READABLE_BITS, "symmetric or asymmetric", PIPELINE_COMMAND),
)
FORMAT = Format(
    name=NAME,
    engines=ENGINES,
    stored_modules=stored_modules,
    dequantize=dequantize,
    demands=demands,
    bits=BITS,
    hold=hold,
    outputs=outputs,
    encode=encode,
    json_files=json_files,
    multiples=(32, 32),
    cautions=cautions,
    shared_tensors=shared_tensors,
    unrotated=unrotated,
    holds_head=True,
)
