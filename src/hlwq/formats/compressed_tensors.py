"""compressed-tensors (`pack-quantized`): INT4 or INT8 that vLLM and transformers load, symmetric or not.

For a linear of shape (out, in): `weight_packed` int32 (out, in·bits/32), codes packed along `in`; `weight_scale`
(out, groups) in the model's dtype; `weight_zero_point` int32 (out·bits/32, groups), packed along `out`, in asymmetric
files only; `weight_shape` int64 (2,). Everything is packed lowest bits first. w = scale · (code − zero), the zero of
symmetric files being 2^(bits−1).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hlwq.checkpoint import DTYPES, Reader, TensorSpec
from hlwq.errors import HlwqError
from hlwq.formats.base import (
    Contents,
    Engine,
    Scheme,
    StoredModule,
    check_bits,
    check_group_size,
    check_multiples_of_32,
    integer_zeros,
    require_parts,
)
from hlwq.formats.patterns import module_patterns, outside_the_decoder
from hlwq.grids import Grid, Parameters, QuantizedMatrix, ScaleMethod, UniformGrid
from hlwq.packing import pack, unpack

NAME = "compressed-tensors"
BITS: tuple[int, ...] = (4, 8)
ENGINES: tuple[Engine, ...] = (
    Engine("vLLM", BITS, "symmetric or asymmetric", "vllm serve {path}{text_only}"),
    Engine(
        "transformers",
        BITS,
        "symmetric or asymmetric",
        """python -c "from transformers import pipeline; print(pipeline('text-generation', '{path}')('Hello'))\"""",
    ),
)
DEFAULT_SYMMETRIC = True
FUSED_ALIKE = True
HOLDS_EMBEDDINGS = False
HOLDS_DESC_ACT = False
STORES_DECODED = False
FORMAT = "pack-quantized"


def lloyd_grid(bits: int, group_size: int) -> Grid:
    """compressed-tensors files hold uniform codes only: always raises HlwqError."""
    raise HlwqError(
        "format compressed-tensors stores uniform codes, not Lloyd–Max codes. Use --recipe hlwq-int4 for HLWQ followed "
        "by INT4, or --format hlwq or dense."
    )


def uniform_grid(bits: int, group_size: int, symmetric: bool, scale_method: ScaleMethod, dtype: str) -> Grid:
    """Integer zeros; scales in the model's dtype.

    Raises:
        HlwqError: bits other than 4 or 8, or a group size that Marlin does not have.
    """
    check_bits(NAME, bits, BITS)
    check_group_size(NAME, group_size)
    return UniformGrid(bits, group_size, symmetric, True, scale_method, (DTYPES[dtype],))


def outputs(module: str, shape: tuple[int, int], grid: Grid, dtype: str) -> list[TensorSpec]:
    """The three or four tensors of a module.

    Raises:
        HlwqError: `out` or `in` is not a multiple of 32, which packing and engines need.
    """
    check_multiples_of_32(NAME, module, shape)
    rows, columns = shape
    per_word, groups = 32 // grid.bits, columns // grid.group_size
    specs = [
        TensorSpec(f"{module}.weight_packed", "I32", (rows, columns // per_word)),
        TensorSpec(f"{module}.weight_scale", dtype, (rows, groups)),
        TensorSpec(f"{module}.weight_shape", "I64", (2,)),
    ]
    if isinstance(grid, UniformGrid) and not grid.symmetric:
        specs.append(TensorSpec(f"{module}.weight_zero_point", "I32", (rows // per_word, groups)))
    return specs


def encode(module: str, matrix: QuantizedMatrix, dtype: str) -> dict[str, Tensor]:
    """Pack codes, zeros and scales as the module's docstring says."""
    bits = matrix.grid.bits
    parts = {
        f"{module}.weight_packed": pack(matrix.codes, bits).view(torch.int32),
        f"{module}.weight_scale": matrix.parameters.scale.to(DTYPES[dtype]),
        f"{module}.weight_shape": torch.tensor(matrix.codes.shape),
    }
    if isinstance(matrix.grid, UniformGrid) and not matrix.grid.symmetric:
        zeros = pack(integer_zeros(matrix).T.contiguous(), bits).view(torch.int32)
        parts[f"{module}.weight_zero_point"] = zeros.T.contiguous()
    return parts


def json_files(config: dict[str, Any], contents: Contents) -> dict[str, dict[str, Any]]:
    """`config.json` with its `quantization_config`: a group for each scheme, the common one for all other linears.

    Both engines look for a module's name before its class, vLLM for fused names too.
    """
    common = Counter(contents.quantized.values()).most_common(1)[0][0]
    modules_of: dict[Scheme, set[str]] = defaultdict(set)
    for module, scheme in contents.quantized.items():
        if scheme != common:
            modules_of[scheme].add(module)
    targets = {scheme: _patterns(module_patterns(modules, contents.layout)) for scheme, modules in modules_of.items()}
    groups = {**targets, common: ["Linear"]}
    section = {
        "quant_method": NAME,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
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
        "ignore": _patterns(
            [*outside_the_decoder(contents.layout), *module_patterns(set(contents.kept), contents.layout)]
        ),
        "kv_cache_scheme": None,
    }
    return {"config.json": {**config, "quantization_config": section}}


def _patterns(expressions: list[str]) -> list[str]:
    return [f"re:{expression}" for expression in expressions]


def configured_weights(section: dict[str, Any], name: str) -> dict[str, Any] | None:
    """What `config_groups` say of the weights of a linear module, or None if it is ignored or in no group."""

    def matches(target: str) -> bool:
        return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name

    if any(map(matches, section.get("ignore") or ())):
        return None
    groups = section["config_groups"].values()
    named = (group for group in groups if any(map(matches, group["targets"])))
    others = (group for group in groups if "Linear" in group["targets"])
    found: dict[str, Any] | None = next((group["weights"] for group in chain(named, others)), None)
    return found


def stored_modules(reader: Reader) -> dict[str, StoredModule]:
    """Modules that have `weight_packed`.

    Raises:
        HlwqError: it is another format of compressed-tensors, tensors of a module are missing or do not have the scheme
            that `config.json` gives it, or its width cannot be read.
    """
    section = reader.config["quantization_config"]
    if section["format"] != FORMAT:
        raise HlwqError(f"{reader.path}: compressed-tensors format {section['format']} cannot be read, only {FORMAT}.")
    modules = {}
    for name, spec in reader.tensors.items():
        if not name.endswith(".weight_packed"):
            continue
        module = name.removesuffix(".weight_packed")
        weights = configured_weights(section, module)
        if weights is None:
            raise HlwqError(f"{reader.path}: {module} is stored as codes, but config.json has no scheme for it.")
        bits, symmetric = weights["num_bits"], weights["symmetric"]
        zeros = () if symmetric else ("weight_zero_point",)
        parts = require_parts(reader, module, "weight_packed", "weight_scale", "weight_shape", *zeros)
        if bits not in (2, 4, 8) or f"{module}.weight_g_idx" in reader.tensors:
            raise HlwqError(
                f"{reader.path}: {module} has {bits}-bit codes or scattered groups; files of 2, 4 and 8 bits with "
                "groups of neighbouring columns can be read."
            )
        columns = spec.shape[1] * 32 // bits
        group_size = weights.get("group_size") or columns  # none: one group for a row
        if columns != reader.tensors[f"{module}.weight_scale"].shape[1] * group_size:
            raise HlwqError(f"{reader.path}: {module} does not have the bits and group size that config.json gives it.")
        modules[module] = StoredModule(Scheme(bits, group_size, symmetric), (spec.shape[0], columns), parts)
    return modules


def dequantize(reader: Reader, module: str, scheme: Scheme) -> Tensor:
    """scale · (code − zero)."""
    bits = scheme.bits
    codes = unpack(reader.read(f"{module}.weight_packed").view(torch.uint8), bits)
    scale = reader.read(f"{module}.weight_scale").to(torch.float32)
    zeros: Tensor | int = 2 ** (bits - 1)
    if not scheme.symmetric:
        packed = reader.read(f"{module}.weight_zero_point").T.contiguous()
        zeros = unpack(packed.view(torch.uint8), bits).T
    parameters = Parameters(scale, -(zeros * scale))
    return QuantizedMatrix(codes, parameters, UniformGrid(bits, scheme.group_size, bool(scheme.symmetric))).dequantize()
