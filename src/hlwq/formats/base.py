"""What every format provides. A format knows codes and engines, and neither solvers nor recipes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hlwq.checkpoint import Reader, TensorSpec
from hlwq.errors import HlwqError
from hlwq.grids import Grid, QuantizedMatrix, ScaleMethod
from hlwq.models import ModelLayout

GROUP_SIZES = (32, 64, 128)
"""What engines run uniform codes in."""


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


def check_group_size(format_name: str, group_size: int) -> None:
    """Raise HlwqError unless engines that run uniform codes have groups of this size."""
    if group_size not in GROUP_SIZES:
        raise HlwqError(f"format {format_name} has groups of 32, 64 or 128, not {group_size}. Set --group-size.")


def check_multiples_of_32(format_name: str, module: str, shape: tuple[int, int]) -> None:
    """Raise HlwqError unless both sides of a matrix are multiples of 32, as packing and engines need them."""
    if shape[0] % 32 or shape[1] % 32:
        raise HlwqError(
            f"{module} has shape {shape}; format {format_name} needs multiples of 32. Keep it in its own dtype: "
            f"--exclude '{re.escape(module.rsplit('.', 1)[-1])}$'."
        )


def integer_zeros(matrix: QuantizedMatrix) -> Tensor:
    """The codes that stand for 0 in each group of a matrix on a grid with integer zeros: uint8 (out, groups)."""
    scale, bias = matrix.parameters.scale, matrix.parameters.bias
    assert bias is not None
    # A group of scale 0 is all zeros whatever its zero says.
    empty = scale == 0
    zeros = torch.where(empty, 2 ** (matrix.grid.bits - 1), -bias / torch.where(empty, 1, scale))
    return zeros.round().to(torch.uint8)


def require_parts(reader: Reader, module: str, *parts: str) -> tuple[str, ...]:
    """The names of a module's parts, all of which must be there.

    Raises:
        HlwqError: one is missing.
    """
    names = tuple(f"{module}.{part}" for part in parts)
    for name in names:
        if name not in reader.tensors:
            raise HlwqError(
                f"{reader.path}: tensor {name} is missing. The directory is damaged; make or download it again."
            )
    return names
