"""What every format provides. A format knows codes and engines, and neither solvers nor recipes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from hlwq.bases import Basis
from hlwq.containers import Reader, TensorSpec, Writer
from hlwq.errors import CheckpointError, UnsupportedError
from hlwq.families import ModelLayout, Restoration
from hlwq.grids import Grid
from hlwq.matrix import QuantizedMatrix

T = TypeVar("T")

AGAIN = "The directory is damaged; make or download it again."
"""What to do about a damaged directory."""
FLOATS = ("F16", "BF16", "F32")
"""The dtypes in which tools write the parameters of groups."""

ENGINE_SECTIONS = ("quantization_config", "quantization")
"""The keys of `config.json` that say how weights are stored."""

PIPELINE_COMMAND = (
    """python -c "from transformers import pipeline; print(pipeline('text-generation', '{path}')('Hello'))\""""
)
"""Runs a directory that plain transformers loads."""

_JSON_TYPES: dict[type, str] = {int: "an integer", bool: "true or false", dict: "an object", list: "a list"}


@dataclass(frozen=True)
class Scheme:
    """How one module is stored.

    Attributes:
        bits: width of a code.
        group_size: weights that share parameters.
        symmetric: for uniform grids; None where the word has no meaning.
        desc_act: groups are formed of columns anywhere in the matrix.
    """

    bits: int
    group_size: int
    symmetric: bool | None = None
    desc_act: bool = False


@dataclass(frozen=True)
class StoredModule:
    """A module found as codes in a directory.

    Attributes:
        scheme: how it is stored.
        shape: (out, in) of the matrix that the codes stand for.
        tensors: the names of its parts, bias vectors of the layer apart.
    """

    scheme: Scheme
    shape: tuple[int, int]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint in some format holds.

    Attributes:
        layout: the model.
        quantized: the modules stored as codes.
        kept: the decoder's other linear modules, in their own dtype.
        dtype: the model's own dtype, as safetensors spells it.
    """

    layout: ModelLayout
    quantized: dict[str, Scheme]
    kept: list[str]
    dtype: str


@dataclass(frozen=True)
class Engine:
    """A program that loads a format.

    Attributes:
        name: as people write it.
        bits: widths it loads.
        symmetry: which codes it loads, in words.
        command: how to run a directory, with {path} for it, and {text_only} for the option that leaves out the vision
            tower; empty where there is no command.
    """

    name: str
    bits: tuple[int, ...]
    symmetry: str
    command: str = ""


@dataclass(frozen=True)
class Demand:
    """One demand of one engine on a directory, and whether it is met.

    Attributes:
        engine: who demands it.
        requirement: what is demanded.
        passed: whether the directory meets it.
        detail: what is there instead, where it does not.
        remedy: what to do about it.
    """

    engine: str
    requirement: str
    passed: bool
    detail: str = ""
    remedy: str = ""


def demand(engine: str, requirement: str, offenders: Iterable[str], remedy: str) -> Demand:
    """A demand that is met unless something offends it; of the offenders the first three are named."""
    offending = list(offenders)
    shown = ", ".join(offending[:3]) + (f" and {len(offending) - 3} more" if len(offending) > 3 else "")
    return Demand(engine, requirement, not offending, f"{shown}." if offending else "", remedy if offending else "")


@dataclass(frozen=True)
class ReadableFormat:
    """A way in which quantized matrices are stored. Each module of this package describes one.

    Attributes:
        name: as users write it; its `quant_method` in `config.json`.
        engines: the programs that load it.
        stored_modules: the modules that a directory stores as codes. Raises CheckpointError if it is inconsistent.
        dequantize: decodes one module: float32 (out, in).
        demands: what the engines want of a directory, and whether it is met.
        restoration: what undoes the changes that a directory's maker made beside storing codes.
    """

    name: str
    engines: tuple[Engine, ...]
    stored_modules: Callable[[Reader], dict[str, StoredModule]]
    dequantize: Callable[[Reader, str, Scheme], Tensor]
    demands: Callable[[Reader, ModelLayout, dict[str, StoredModule]], list[Demand]]
    restoration: Callable[[Reader], Restoration] = field(default=lambda reader: Restoration(), kw_only=True)


@dataclass(frozen=True)
class Format(ReadableFormat):
    """A way to store quantized matrices that some engine loads: what is written as well as read.

    Attributes:
        bits: widths of codes.
        hold: for a module of some shape (out, in), the grid with its parameters as the file stores them, given the
            model's dtype. Raises UnsupportedError unless the format can hold these codes in this basis.
        outputs: the tensors that `encode` will return for a module on a grid that `hold` gave.
        encode: a quantized matrix as the tensors of the file, by name, given the model's dtype.
        json_files: `config.json`, and whatever else engines read beside it.
        kept: a tensor that is not quantized as the file has it: its name and its dtype may be others.
        container: what writes the files.
        cautions: what users should know before the work, one line each.
        default_symmetric: whether uniform codes are symmetric where the user does not say.
        fused_alike: engines run some matrices as one, whose members must have one scheme.
        holds_embeddings: the embedding and the output head can be stored as codes.
        holds_scattered_groups: groups can be formed of columns anywhere in the matrix.
        stores_decoded: the file holds decoded weights, in the model's dtype.
    """

    bits: tuple[int, ...]
    hold: Callable[[str, tuple[int, int], Grid, Basis, str], Grid]
    outputs: Callable[[str, tuple[int, int], Grid, str], list[TensorSpec]]
    encode: Callable[[str, QuantizedMatrix, str], dict[str, Tensor]]
    json_files: Callable[[dict[str, Any], Contents], dict[str, dict[str, Any]]]
    _: KW_ONLY
    kept: Callable[[TensorSpec], TensorSpec] = lambda spec: spec
    container: type[Writer] = Writer
    cautions: Callable[[Contents], list[str]] = lambda contents: []
    default_symmetric: bool = True
    fused_alike: bool = True
    holds_embeddings: bool = False
    holds_scattered_groups: bool = False
    stores_decoded: bool = False


def engine_storage(dtype: str) -> tuple[torch.dtype, ...]:
    """The dtypes that scales of a GPTQ file end up in: float16 in the file, the model's bfloat16 in the engine."""
    return (torch.bfloat16, torch.float16) if dtype == "BF16" else (torch.float16,)


def check_bits(format_name: str, bits: int, allowed: tuple[int, ...]) -> None:
    """Raise UnsupportedError unless a format has codes of this width."""
    if bits not in allowed:
        raise UnsupportedError(
            f"format {format_name} has {', '.join(map(str, allowed))} bits, not {bits}. See `hlwq formats`.",
            argument="bits",
        )


def common_scheme(quantized: dict[str, Scheme]) -> Scheme:
    """The scheme that most modules have."""
    return Counter(quantized.values()).most_common(1)[0][0]


def modules_with(reader: Reader, part: str) -> list[str]:
    """The modules that have a part of this name."""
    return [name.removesuffix(f".{part}") for name in reader.tensors if name.endswith(f".{part}")]


def not_as_configured(reader: Reader, module: str) -> CheckpointError:
    """The error of a module whose tensors and configuration disagree."""
    message = f"{reader.path}: {module} does not have the bits and group size that config.json gives it."
    return CheckpointError(message, path=reader.path, tensor=module)


def require_parts(reader: Reader, module: str, *parts: str) -> tuple[str, ...]:
    """The names of a module's parts, all of which must be there.

    Raises:
        CheckpointError: one is missing.
    """
    names = tuple(f"{module}.{part}" for part in parts)
    for name in names:
        if name not in reader.tensors:
            raise CheckpointError(f"{reader.path}: tensor {name} is missing. {AGAIN}")
    return names


def matrix_shape(reader: Reader, name: str) -> tuple[int, int]:
    """The two sizes of a tensor. Raises CheckpointError if it has more or fewer axes, or no elements."""
    shape = reader.tensors[name].shape
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{reader.path}: tensor {name} has shape {shape}, which is no matrix. {AGAIN}")
    return shape[0], shape[1]


def check_parts(reader: Reader, expected: Iterable[TensorSpec]) -> None:
    """Compare the headers of a module's parts with what its format writes for its scheme.

    Raises:
        CheckpointError: a dtype or a shape is another. Floating dtypes may stand for each other.
    """
    for spec in expected:
        stored = reader.tensors[spec.name]
        alike = stored.dtype == spec.dtype or (stored.dtype in FLOATS and spec.dtype in FLOATS)
        if not alike or stored.shape != spec.shape:
            raise CheckpointError(
                f"{reader.path}: tensor {spec.name} is {stored.dtype} {stored.shape}, where {spec.dtype} {spec.shape} "
                f"belongs beside the other tensors of its module. {AGAIN}"
            )


def entry(values: dict[str, Any], key: str, kind: type[T], where: str, default: T | None = None) -> T:
    """An entry of a JSON object.

    Args:
        values: the object.
        key: the entry's.
        kind: int, bool, dict or list.
        where: what an error calls the object: a file, and the way to the object in it.
        default: what a missing entry, or null, stands for. Without one it must be there.

    Raises:
        CheckpointError: it is missing, or of another type. JSON's 4.0 and true are no integers here.
    """
    if values.get(key) is None and default is not None:
        return default
    if key not in values:
        raise CheckpointError(f"{where} lacks {key}. {AGAIN}")
    value: T = values[key]
    if type(value) is not kind:
        raise CheckpointError(f"{where}: {key} is {json.dumps(value)}, not {_JSON_TYPES[kind]}. {AGAIN}")
    return value


def section_of(reader: Reader, key: str = "quantization_config") -> tuple[dict[str, Any], str]:
    """The section of `config.json` that says how weights are stored, and what errors call it.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    file = str(reader.path / "config.json")
    return entry(reader.config, key, dict, file), f"{file}: {key}"
