"""What every format provides. A format knows codes and engines, and neither solvers nor recipes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hlwq.checkpoint import Reader, TensorSpec
from hlwq.errors import HlwqError
from hlwq.grids import Grid, QuantizedMatrix, ScaleMethod
from hlwq.models import ModelLayout

T = TypeVar("T")

AGAIN = "The directory is damaged; make or download it again."
"""What to do about a damaged directory."""
FLOATS = ("F16", "BF16", "F32")
"""The dtypes in which tools write the parameters of groups."""

_JSON_TYPES: dict[type, str] = {int: "an integer", bool: "true or false", dict: "an object", list: "a list"}


@dataclass(frozen=True)
class Scheme:
    """How one module is stored.

    Attributes:
        bits: of a code.
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
        symmetry: of the codes that it loads, in words.
        command: how to run a directory, with {path} for it, and {text_only} for the option that leaves out the vision
            tower; empty where there is no command.
    """

    name: str
    bits: tuple[int, ...]
    symmetry: str
    command: str = ""


class ReadableFormat(Protocol):
    """A way in which quantized matrices are found stored. Each module of this package is one."""

    NAME: str
    ENGINES: tuple[Engine, ...]

    def stored_modules(self, reader: Reader) -> dict[str, StoredModule]:
        """The modules that a directory of this format stores as codes. Raises HlwqError if it is inconsistent."""

    def dequantize(self, reader: Reader, module: str, scheme: Scheme) -> Tensor:
        """Decode one module: float32 (out, in)."""


class Format(ReadableFormat, Protocol):
    """A way to store quantized matrices that some engine loads: what is written as well as read."""

    BITS: tuple[int, ...]
    DEFAULT_SYMMETRIC: bool  # of uniform codes, where the user does not say
    FUSED_ALIKE: bool  # engines run some matrices as one, whose members must have one scheme
    HOLDS_EMBEDDINGS: bool  # the embedding and the output head can be stored as codes
    HOLDS_DESC_ACT: bool  # groups can be formed of columns anywhere in the matrix
    STORES_DECODED: bool  # the file holds decoded weights, in the model's dtype

    def lloyd_grid(self, bits: int, group_size: int) -> Grid:
        """The grid of Lloyd–Max codes as this format stores them. Raises HlwqError if it cannot."""

    def uniform_grid(self, bits: int, group_size: int, symmetric: bool, scale_method: ScaleMethod, dtype: str) -> Grid:
        """The grid of uniform codes as this format stores them. Raises HlwqError if it cannot."""

    def outputs(self, module: str, shape: tuple[int, int], grid: Grid, dtype: str) -> list[TensorSpec]:
        """The tensors that `encode` will return for a matrix of this shape (out, in)."""

    def encode(self, module: str, matrix: QuantizedMatrix, dtype: str) -> dict[str, Tensor]:
        """A quantized matrix as the tensors of the file, by name. `dtype` is the model's own."""

    def json_files(self, config: dict[str, Any], contents: Contents) -> dict[str, dict[str, Any]]:
        """`config.json`, and whatever else engines read beside it."""


def engine_storage(dtype: str) -> tuple[torch.dtype, ...]:
    """Where the scales of a GPTQ file end up: float16 in the file, and the model's bfloat16 in the engine."""
    return (torch.bfloat16, torch.float16) if dtype == "BF16" else (torch.float16,)


def check_bits(format_name: str, bits: int, allowed: tuple[int, ...]) -> None:
    """Raise HlwqError unless a format has codes of this many bits."""
    if bits not in allowed:
        raise HlwqError(
            f"format {format_name} has {', '.join(map(str, allowed))} bits, not {bits}. See `hlwq formats`."
        )


def common_scheme(quantized: dict[str, Scheme]) -> Scheme:
    """The scheme that most modules have."""
    return Counter(quantized.values()).most_common(1)[0][0]


def require_parts(reader: Reader, module: str, *parts: str) -> tuple[str, ...]:
    """The names of a module's parts, all of which must be there.

    Raises:
        HlwqError: one is missing.
    """
    names = tuple(f"{module}.{part}" for part in parts)
    for name in names:
        if name not in reader.tensors:
            raise HlwqError(f"{reader.path}: tensor {name} is missing. {AGAIN}")
    return names


def matrix_shape(reader: Reader, name: str) -> tuple[int, int]:
    """The two sizes of a tensor. Raises HlwqError if it has more or fewer axes, or no elements."""
    shape = reader.tensors[name].shape
    if len(shape) != 2 or 0 in shape:
        raise HlwqError(f"{reader.path}: tensor {name} has shape {shape}, which is no matrix. {AGAIN}")
    return shape[0], shape[1]


def check_parts(reader: Reader, expected: Iterable[TensorSpec]) -> None:
    """Compare the headers of a module's parts with what its format writes for its scheme.

    Raises:
        HlwqError: a dtype or a shape is another. Floating dtypes may stand for each other.
    """
    for spec in expected:
        found = reader.tensors[spec.name]
        alike = found.dtype == spec.dtype or (found.dtype in FLOATS and spec.dtype in FLOATS)
        if not alike or found.shape != spec.shape:
            raise HlwqError(
                f"{reader.path}: tensor {spec.name} is {found.dtype} {found.shape}, where {spec.dtype} {spec.shape} "
                f"belongs beside the other tensors of its module. {AGAIN}"
            )


def entry(values: dict[str, Any], key: str, kind: type[T], where: str, default: T | None = None) -> T:
    """An entry of a JSON object.

    Args:
        values: the object.
        key: of the entry.
        kind: int, bool, dict or list.
        where: what an error calls the object: a file, and the way to the object in it.
        default: what a missing entry, or null, stands for. Without one it must be there.

    Raises:
        HlwqError: it is missing, or of another type. JSON's 4.0 and true are no integers here.
    """
    if values.get(key) is None and default is not None:
        return default
    if key not in values:
        raise HlwqError(f"{where} lacks {key}. {AGAIN}")
    value: T = values[key]
    if type(value) is not kind:
        raise HlwqError(f"{where}: {key} is {json.dumps(value)}, not {_JSON_TYPES[kind]}. {AGAIN}")
    return value


def section_of(reader: Reader, key: str = "quantization_config") -> tuple[dict[str, Any], str]:
    """The section of `config.json` that says how weights are stored, and what errors call it.

    Raises:
        HlwqError: there is none, or it is not a JSON object.
    """
    file = str(reader.path / "config.json")
    return entry(reader.config, key, dict, file), f"{file}: {key}"
