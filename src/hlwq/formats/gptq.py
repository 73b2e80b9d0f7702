"""GPTQ: INT4 or INT8 that vLLM and GPTQModel load.

For a linear of shape (out, in): `qweight` int32 (in·bits/32, out), codes packed along `in`; `qzeros` int32
(groups, out·bits/32), packed along `out`; `scales` float16 (groups, out); `g_idx` int32 (in), each column's group.
Symmetric files are v1, whose `qzeros` store zero − 1. Asymmetric files are v2, which stores the zero itself: vLLM
refuses those anyway, and GPTQModel trusts v1 only with symmetric codes, since tools disagree on what a zero of 0
becomes there.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from hlwq.bases import Basis
from hlwq.containers import Reader, TensorSpec
from hlwq.errors import CheckpointError, UnsupportedError
from hlwq.families import ModelLayout
from hlwq.formats import reading
from hlwq.formats.base import Contents, Demand, Engine, Format, Scheme, StoredModule, common_scheme, demand
from hlwq.formats.patterns import check_pattern, kept_patterns, matches_start, patterns_by_scheme
from hlwq.formats.uniform import (
    READABLE_BITS,
    WORD_BITS,
    check_multiples_of_32,
    decode,
    engine_storage,
    integer_zeros,
    uniform_grid,
)
from hlwq.formats.vllm import VLLM, uniform_demands, vllm_name
from hlwq.grids import Grid
from hlwq.matrix import QuantizedMatrix
from hlwq.packing import pack, unpack
from hlwq.version import __version__

NAME = "gptq"
GPTQMODEL = "GPTQModel"


def hold(module: str, shape: tuple[int, int], grid: Grid, basis: Basis, dtype: str) -> Grid:
    """Integer zeros; scales that float16 (the file) and bfloat16 (the engines) both represent.

    Raises:
        UnsupportedError: other than uniform codes of 4 or 8 bits in columns as they are, a group size that Marlin does
            not have, or a side of the matrix that is no multiple of 32.
    """
    held = uniform_grid(NAME, WORD_BITS, "hlwq-int4", grid, basis, integer_zero=True, storage=engine_storage(dtype))
    check_multiples_of_32(NAME, module, shape)
    return held


def outputs(module: str, shape: tuple[int, int], grid: Grid, dtype: str) -> list[TensorSpec]:
    """The four tensors of a module."""
    return _parts(module, shape, grid.bits, shape[1] // grid.group_size)


def _parts(module: str, shape: tuple[int, int], bits: int, groups: int) -> list[TensorSpec]:
    (rows, columns), per_word = shape, 32 // bits
    return [
        TensorSpec(f"{module}.qweight", "I32", (columns // per_word, rows)),
        TensorSpec(f"{module}.qzeros", "I32", (groups, rows // per_word)),
        TensorSpec(f"{module}.scales", "F16", (groups, rows)),
        TensorSpec(f"{module}.g_idx", "I32", (columns,)),
    ]


def encode(module: str, matrix: QuantizedMatrix, dtype: str) -> dict[str, Tensor]:
    """Codes, zeros and scales, packed."""
    bits = matrix.grid.bits
    symmetric = matrix.grid.symmetry
    stored = integer_zeros(matrix) - (1 if symmetric else 0)
    group_of_column = matrix.group_of_column
    if group_of_column is None:
        group_of_column = torch.arange(matrix.codes.shape[1]) // matrix.grid.group_size
    return {
        f"{module}.qweight": pack(matrix.codes, bits).view(torch.int32).T.contiguous(),
        f"{module}.qzeros": pack(stored.T.contiguous(), bits).view(torch.int32),
        f"{module}.scales": matrix.parameters.scale.T.to(torch.float16).contiguous(),
        f"{module}.g_idx": group_of_column.to(torch.int32),
    }


def json_files(config: dict[str, Any], contents: Contents) -> dict[str, dict[str, Any]]:
    """`config.json` with its `quantization_config`, and the same section as `quantize_config.json`."""
    common = common_scheme(contents.quantized)
    section = {
        "quant_method": "gptq",
        "bits": common.bits,
        "group_size": common.group_size,
        "desc_act": common.desc_act,
        "sym": common.symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq" if common.symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "dynamic": dynamic_rules(contents, common),
        "meta": {"quantizer": [f"hlwq:{__version__}"]},
    }
    return {"config.json": {**config, "quantization_config": section}, "quantize_config.json": section}


def dynamic_rules(contents: Contents, common: Scheme) -> dict[str, dict[str, int]]:
    """The modules that differ from the common scheme, as `dynamic` rules.

    Rules are tried in order with `re.match` and the first hit wins, so exclusions (`-:`) stand first. vLLM asks with
    its own prefixes and fused names, GPTQModel with the checkpoint's: each rule matches both spellings.
    """
    rules: dict[str, dict[str, int]] = {f"-:{pattern}": {} for pattern in kept_patterns(contents)}
    for scheme, patterns in patterns_by_scheme(contents, common).items():
        rules |= {f"+:{pattern}": {"bits": scheme.bits, "group_size": scheme.group_size} for pattern in patterns}
    return rules


def stored_modules(reader: Reader) -> dict[str, StoredModule]:
    """Modules that have a `qweight`.

    Raises:
        CheckpointError: `config.json` is damaged, or tensors of a module are missing or disagree.
        UnsupportedError: codes have a width that cannot be read.
    """
    section, where = reading.section_of(reader)
    _check_section(section, where)
    modules = {}
    for module in reading.modules_with(reader, "qweight"):
        parts = reading.require_parts(reader, module, "qweight", "qzeros", "scales")
        words, rows = reading.matrix_shape(reader, f"{module}.qweight")
        groups, zero_words = reading.matrix_shape(reader, f"{module}.qzeros")
        width = 32 * zero_words / rows
        if width not in READABLE_BITS:
            raise UnsupportedError(
                f"{reader.path}: {module} has {width:g}-bit codes; GPTQ files of 2, 4 and 8 bits can be read."
            )
        bits = int(width)
        columns = words * 32 // bits
        if f"{module}.g_idx" in reader.tensors:
            parts += (f"{module}.g_idx",)
        elif columns % groups:
            raise CheckpointError(
                f"{reader.path}: {module} has {groups} groups for {columns} columns, and no g_idx. {reading.AGAIN}"
            )
        reading.check_parts(
            reader, (spec for spec in _parts(module, (rows, columns), bits, groups) if spec.name in parts)
        )
        scheme = Scheme(bits, columns // groups, bool(section.get("sym", True)))
        modules[module] = StoredModule(scheme, (rows, columns), parts)
    return modules


def _check_section(section: dict[str, Any], where: str) -> None:
    """Raise CheckpointError unless engines can make something of the `quantization_config`."""
    for key in ("bits", "group_size"):
        reading.entry(section, key, int, where)
    rules = reading.entry(section, "dynamic", dict, where, default={})
    for pattern in rules:
        check_pattern(pattern.removeprefix("-:").removeprefix("+:"), f"{where}.dynamic")
        reading.entry(rules, pattern, dict, f"{where}.dynamic")


def dequantize(reader: Reader, module: str, scheme: Scheme) -> Tensor:
    """scales · (code − zero), with `qzeros` and `g_idx` honoured, and both spellings of the zero (v1 and v2).

    Raises:
        CheckpointError: a column is in a group that is not there.
    """
    bits = scheme.bits
    codes = unpack(reader.read(f"{module}.qweight").T.contiguous().view(torch.uint8), bits)
    zeros = unpack(reader.read(f"{module}.qzeros").view(torch.uint8), bits).to(torch.int16)
    if reader.config["quantization_config"].get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) % 2**bits
    group_of_column = None
    if f"{module}.g_idx" in reader.tensors:
        stored = reader.read(f"{module}.g_idx").long()
        least, most = int(stored.min()), int(stored.max())
        if least < 0 or most >= len(zeros):
            raise CheckpointError(
                f"{reader.path}: tensor {module}.g_idx holds groups from {least} to {most}, but those that are there "
                f"are 0 to {len(zeros) - 1}. {reading.AGAIN}"
            )
        if not torch.equal(stored, torch.arange(codes.shape[1]) // scheme.group_size):
            group_of_column = stored
    return decode(codes, reader.read(f"{module}.scales").T, zeros.T, scheme, group_of_column)


def cautions(contents: Contents) -> list[str]:
    """Scattered groups are not for every engine."""
    if not any(scheme.desc_act for scheme in contents.quantized.values()):
        return []
    return ["vLLM 0.32 and later refuse `desc_act`: run the result in GPTQModel, or leave it out"]


def demands(reader: Reader, layout: ModelLayout, modules: dict[str, StoredModule]) -> list[Demand]:
    """What vLLM and GPTQModel want."""
    section = reader.config["quantization_config"]
    again = "Quantize again with the defaults of format gptq."
    asymmetric = [] if section.get("sym") else ["sym is false"]
    ordered = ["desc_act is true"] if section.get("desc_act") else []
    unindexed = [module for module in modules if f"{module}.g_idx" not in reader.tensors]
    wrong = {engine: _wrong_rules(section, layout, modules, engine) for engine in (VLLM, GPTQMODEL)}
    remedy = "Quantize again with `symmetric=True`, or serve it with GPTQModel."
    return [
        demand(VLLM, "symmetric", asymmetric, remedy),
        demand(VLLM, "desc_act is false", ordered, again),
        *uniform_demands(layout, modules, WORD_BITS, again),
        demand(VLLM, "dynamic rules agree with the tensors, by fused names", wrong[VLLM], again),
        demand(GPTQMODEL, "dynamic rules agree with the tensors, by own names", wrong[GPTQMODEL], again),
        demand(GPTQMODEL, "zeros, scales and group indices for every module", unindexed, again),
    ]


def _wrong_rules(
    section: dict[str, Any], layout: ModelLayout, modules: dict[str, StoredModule], engine: str
) -> list[str]:
    """Modules, as an engine names them, for which the `dynamic` rules say something else than the tensors do."""
    rules, vllm = section.get("dynamic") or {}, engine == VLLM
    wrong = []
    for module, matrix in layout.matrices().items():
        fused = module.removesuffix(matrix.name) + (matrix.fused or matrix.name)
        name = vllm_name(layout, fused) if vllm else module
        stored, rule = modules.get(module), _first_rule(rules, name)
        if stored is None:
            agrees = rule is False
        else:
            chosen = {**section, **rule} if isinstance(rule, dict) else section
            size = chosen["group_size"] if chosen["group_size"] != -1 else stored.shape[1]
            agrees = rule is not False and (chosen["bits"], size) == (stored.scheme.bits, stored.scheme.group_size)
        if not agrees:
            wrong.append(name)
    outside = [layout.output_head, *(f"{prefix}any.linear" for prefix in layout.beside)]
    if vllm:
        outside = [vllm_name(layout, name) for name in outside]
    return wrong + [name for name in outside if name not in modules and _first_rule(rules, name) is not False]


def _first_rule(dynamic: dict[str, Any], name: str) -> dict[str, Any] | bool | None:
    """The first rule that matches, False for an exclusion: as vLLM and GPTQModel read them."""
    for pattern, rule in dynamic.items():
        if matches_start(re.sub(r"^[-+]:", "", pattern), name, "config.json: quantization_config.dynamic"):
            return False if pattern.startswith("-:") else dict(rule)
    return None


ENGINES = (
    Engine("vLLM", WORD_BITS, "symmetric", "vllm serve {path}{text_only}"),
    Engine("GPTQModel", WORD_BITS, "symmetric or asymmetric"),
)
FORMAT = Format(
    name=NAME,
    engines=ENGINES,
    stored_modules=stored_modules,
    dequantize=dequantize,
    demands=demands,
    bits=WORD_BITS,
    hold=hold,
    outputs=outputs,
    encode=encode,
    json_files=json_files,
    multiples=(32, 32),
    cautions=cautions,
    holds_scattered_groups=True,
)
