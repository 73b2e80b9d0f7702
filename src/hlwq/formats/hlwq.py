"""HLWQ's own packed checkpoints, 2 to 8 bits.

For a linear of shape (out, in): `weight_packed` uint8 (out, in·bits/8), codes packed along `in`, least significant
bits first; `weight_norms` float16 (out, groups). A group decodes to norm/√group_size · H · centroid[code], H being the
Walsh–Hadamard matrix of that order and the centroids those of Lloyd and Max for N(0,1).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hlwq.bases import Basis, Hadamard, rotates_groups
from hlwq.containers import DTYPES, EXPERT, PACKED, Part, Reader, TensorSpec, stack_of_bytes
from hlwq.errors import CheckpointError, UnsupportedError
from hlwq.families import ModelLayout
from hlwq.files import is_file
from hlwq.formats import reading
from hlwq.formats.base import (
    HLWQ_PIPELINE_COMMAND,
    Contents,
    Demand,
    Engine,
    Format,
    Scheme,
    StoredModule,
    check_bits,
    common_scheme,
    demand,
)
from hlwq.formats.vllm import mixed_fusions
from hlwq.grids import Grid, LloydGrid, Parameters
from hlwq.matrix import QuantizedMatrix
from hlwq.packing import pack, unpack

NAME = "hlwq"
BITS = (2, 3, 4, 5, 6, 7, 8)
VERSION = 1


def hold(module: str, shape: tuple[int, int], grid: Grid, basis: Basis, dtype: str) -> Grid:
    """Lloyd–Max codes of groups that are rotated each by itself; norms in float16.

    Raises:
        UnsupportedError: other codes, another rotation, bits outside 2 to 8, or groups too small to pack.
    """
    if not isinstance(grid, LloydGrid):
        raise UnsupportedError(
            f"format {NAME} stores Lloyd–Max codes, not uniform ones. Use `recipe='hlwq'`, or format gptq, mlx or "
            "dense.",
            argument="format",
        )
    if not rotates_groups(basis, grid.group_size):
        raise UnsupportedError(
            f"format {NAME} stores groups that are Hadamard-rotated each by itself. Leave `basis` and `block_size` "
            "out, or use format dense."
        )
    if grid.group_size < 8:
        raise UnsupportedError(f"format {NAME} has groups of at least 8, not {grid.group_size}. Set `group_size`.")
    check_bits(NAME, grid.bits, BITS)
    return replace(grid, storage=(torch.float16,))


PARTS = ("weight_packed", "weight_norms")
"""The tensors of a module."""
MATRICES = ("gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")
"""The matrices of an expert in the order of evaluation, by the names of all families."""


def outputs(module: str, shape: tuple[int, int], grid: Grid, dtype: str) -> list[TensorSpec]:
    """The two tensors of a module."""
    rows, columns = shape
    return [
        TensorSpec(f"{module}.weight_packed", "U8", (rows, columns * grid.bits // 8)),
        TensorSpec(f"{module}.weight_norms", "F16", (rows, columns // grid.group_size)),
    ]


def encode(module: str, matrix: QuantizedMatrix, dtype: str) -> dict[str, Tensor]:
    """Codes and norms, packed."""
    return {
        f"{module}.weight_packed": pack(matrix.codes, matrix.grid.bits),
        f"{module}.weight_norms": matrix.parameters.scale.to(torch.float16),
    }


def json_files(config: dict[str, Any], contents: Contents) -> dict[str, dict[str, Any]]:
    """`config.json` with its `quantization_config`.

    It says the model's dtype, in the text model's configuration too: engines would take that of the first tensor, and
    norms have one of their own.
    """
    config = _with_dtype(config, contents.dtype)
    if "text_config" in config:
        config["text_config"] = _with_dtype(config["text_config"], contents.dtype)
    section = section_for(contents.quantized)
    if of_one := _of_one_expert(contents):
        section["experts"] = of_one
    return {"config.json": {**config, "quantization_config": section}}


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    stated = config.get("dtype") or config.get("torch_dtype")
    return dict(config) if stated else {**config, "dtype": str(DTYPES[dtype]).removeprefix("torch.")}


def section_for(quantized: dict[str, Scheme]) -> dict[str, Any]:
    """The `quantization_config` for these modules; those that differ from the common scheme are listed in it."""
    common = common_scheme(quantized)
    return {
        "quant_method": NAME,
        "version": VERSION,
        "bits": common.bits,
        "group_size": common.group_size,
        "modules": {
            module: {"bits": scheme.bits, "group_size": scheme.group_size}
            for module, scheme in quantized.items()
            if scheme != common
        },
    }


def parts(tensors: Iterable[TensorSpec]) -> list[Part]:
    """The experts of a layer in one stack, so that an expert is one contiguous read: its codes, then its norms."""
    stacks: dict[str, dict[int, list[TensorSpec]]] = {}
    for spec in tensors:
        if (found := EXPERT.match(spec.name)) and found[4] in PARTS:
            stacks.setdefault(f"{found[1]}{PACKED}", {}).setdefault(int(found[2]), []).append(spec)
    placed = []
    for name, of_layer in stacks.items():
        ordered = [sorted(of_layer[index], key=lambda spec: _place_in_expert(spec.name)) for index in sorted(of_layer)]
        placed += stack_of_bytes(name, ordered)
    return placed


def _place_in_expert(name: str) -> tuple[int, int]:
    """The place of a tensor among those of its expert: codes of gate, up and down, then their norms."""
    matrix, part = name.split(".")[-2:]
    return PARTS.index(part), MATRICES.index(matrix)


def _of_one_expert(contents: Contents) -> list[list[Any]]:
    """What `parts` puts into a stack for each expert: names, dtypes and shapes.

    Raises:
        UnsupportedError: they differ from layer to layer.
    """
    described: dict[str, list[list[Any]]] = {}
    for module, matrix in contents.layout.matrices().items():
        if matrix.experts and module in contents.quantized:
            scheme = contents.quantized[module]
            grid = LloydGrid(scheme.bits, scheme.group_size)
            for spec in outputs(matrix.name.rpartition(".")[2], matrix.shape, grid, ""):
                expert = f"{module.removesuffix(matrix.name)}{matrix.expert}"
                described.setdefault(expert, []).append([spec.name, spec.dtype, list(spec.shape)])
    alike = {json.dumps(sorted(each, key=lambda part: _place_in_expert(part[0]))) for each in described.values()}
    if len(alike) > 1:
        raise UnsupportedError(f"format {NAME} holds experts of one shape, with one width of codes and one group size.")
    return list(json.loads(alike.pop())) if alike else []


def check_version(section: dict[str, Any], where: str) -> None:
    """Raise UnsupportedError, which names the place, unless this is the version that is read here."""
    if section.get("version") != VERSION:
        raise UnsupportedError(f"{where}: HLWQ format version {section.get('version')} is unknown. Upgrade hlwq.")


def scheme_for(section: dict[str, Any], module: str, where: str) -> Scheme:
    """How a module is stored, by the `quantization_config`.

    Args:
        section: the `quantization_config`, of this version.
        module: by its name in the files.
        where: what an error calls the section.

    Raises:
        CheckpointError: an entry is missing, or is none that a file of this format has.
    """
    modules = reading.entry(section, "modules", dict, where)
    if module in modules:
        section, where = reading.entry(modules, module, dict, f"{where}.modules"), f"{where}.modules.{module}"
    bits, group_size = reading.entry(section, "bits", int, where), reading.entry(section, "group_size", int, where)
    if bits not in BITS or group_size < 8 or group_size & (group_size - 1):
        raise CheckpointError(
            f"{where} does not have the bits and group size of any HLWQ file: bits is {bits}, of {min(BITS)} to "
            f"{max(BITS)}; group_size is {group_size}, of powers of two from 8. {reading.AGAIN}"
        )
    return Scheme(bits, group_size)


def stored_modules(reader: Reader) -> dict[str, StoredModule]:
    """Modules that have `weight_packed`.

    Raises:
        CheckpointError: `config.json` is damaged, or the tensors of a module are missing or disagree.
        UnsupportedError: a later version wrote the directory.
    """
    section, where = reading.section_of(reader)
    check_version(section, str(reader.path))
    modules = {}
    for module in reading.modules_with(reader, "weight_packed"):
        parts = reading.require_parts(reader, module, "weight_packed", "weight_norms")
        scheme = scheme_for(section, module, where)
        (rows, _), (_, groups) = (reading.matrix_shape(reader, part) for part in parts)
        columns = groups * scheme.group_size
        expected = outputs(module, (rows, columns), LloydGrid(scheme.bits, scheme.group_size), "")
        if [reader.tensors[part] for part in parts] != expected or columns * scheme.bits % 8:
            raise reading.not_as_configured(reader, module)
        modules[module] = StoredModule(scheme, (rows, columns), parts)
    return modules


def dequantize(reader: Reader, module: str, scheme: Scheme) -> Tensor:
    """See `decode`."""
    return decode(reader.read(f"{module}.weight_packed"), reader.read(f"{module}.weight_norms"), scheme.bits)


def decode(packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    """Any rows of a matrix: norm/√group_size · H · centroid[code].

    Args:
        packed: uint8 (rows, in·bits/8).
        norms: float16 (rows, groups).
        bits: width of a code.

    Returns:
        float32 (rows, in).
    """
    codes = unpack(packed, bits)
    grid = LloydGrid(bits, codes.shape[1] // norms.shape[1])
    return QuantizedMatrix(codes, Parameters(norms.to(torch.float32)), grid, Hadamard(grid.group_size)).dequantize()


def demands(reader: Reader, layout: ModelLayout, modules: dict[str, StoredModule]) -> list[Demand]:
    """What transformers and vLLM want, each with hlwq beside it."""
    again = "Quantize again with `recipe='hlwq'`."
    transformers, vllm = "transformers", "vLLM with hlwq"
    whole, index = "model.safetensors", "model.safetensors.index.json"
    unnamed = [] if any(is_file(reader.path / name) for name in (whole, index)) else [f"neither {whole} nor {index}"]
    untyped = [] if reader.config.get("model_type") else ["model_type"]
    family = layout.family
    packed = [layout.embedding] if layout.embedding in modules and not family.vllm_packs_embedding else []
    unpacked = f"the embedding of {family.name.partition(' (')[0]} is as it was"
    lines = [
        demand(transformers, f"weights are in {whole}, or named by {index}", unnamed, again),
        demand(transformers, "config.json says the model's type", untyped, "Copy it from the original's config.json."),
        demand(vllm, "fused matrices have one scheme", mixed_fusions(layout, modules), again),
    ]
    if layout.has_experts and not family.vllm_packs_experts:
        experts = [name for layer in layout.layers for name in layer.experts()][:1]
        lines.append(demand(vllm, "no packed experts", experts, "For vLLM, use `format='gptq'`."))
    if not family.vllm_packs_embedding:
        lines.append(demand(vllm, unpacked, packed, "Quantize again with `include_embeddings=False`."))
    return lines


ENGINES = (
    Engine(
        "transformers",
        BITS,
        "Lloyd–Max codes",
        HLWQ_PIPELINE_COMMAND,
    ),
    Engine("vLLM with hlwq", BITS, "Lloyd–Max codes", "vllm serve {path}{text_only}"),
    Engine("hlwq", BITS, "Lloyd–Max codes", "hlwq convert {path} {path}-dense --format dense"),
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
    parts=parts,
    holds_embeddings=True,
    includes_embeddings=True,
)
