"""Tensors that hold others one after another: the matrices of all experts of a layer.

Each expert's matrices are read and written alone, by names as if each were a tensor of its own, so that nothing else
knows of stacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hlwq.containers.tensors import DTYPES, TensorSpec
from hlwq.errors import CheckpointError, UnsupportedError

STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)$")
"""Experts as transformers' modules hold them: (experts, out, in), of which gate and up share one."""
SWITCHED = re.compile(r"(.*\.)switch_mlp\.(gate_proj|up_proj|down_proj)\.(weight|scales|biases)$")
"""Experts as mlx-lm holds them: (experts, out, words or groups)."""
EXPERT = re.compile(r"(.*\.)experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.(\w+)$")
"""A tensor of a single expert."""
OF_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""The names that an expert's matrices have in Mixtral's files."""
WITH_MIXTRAL_NAMES = ("block_sparse_moe.", "feed_forward.")
"""What experts that have them are in: Mixtral's and LFM2's."""
PACKED = "experts.packed"
"""Experts as HLWQ checkpoints hold them: uint8 (experts, bytes); the configuration says what the bytes are."""


@dataclass(frozen=True)
class Part:
    """A tensor inside a stack.

    Attributes:
        spec: the tensor, by a name of its own.
        stack: the tensor of the file that holds it.
        offset: where it begins in the stack, in bytes.
    """

    spec: TensorSpec
    stack: TensorSpec
    offset: int


def parts_of(spec: TensorSpec, config: dict[str, Any]) -> list[Part]:
    """The tensors of single experts in a stack; none if a tensor is no stack.

    Args:
        spec: a tensor of a file.
        config: the checkpoint's `config.json`.

    Raises:
        CheckpointError: it is a stack by its name, and not by its shape.
    """
    if spec.name.endswith(f".{PACKED}"):
        section = config.get("quantization_config")
        return _packed(spec, section.get("experts") if isinstance(section, dict) else None)
    if len(spec.shape) != 3 or not spec.parameters:
        return []
    rows = spec.shape[1]
    if fused := STACKED.match(spec.name):
        names = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
        if rows % len(names):
            raise CheckpointError(f"tensor {spec.name} has shape {spec.shape}: its rows are not those of two matrices.")
        return _rows(spec, [f"{fused[1]}.{{}}.{name}.weight" for name in names])
    if switched := SWITCHED.match(spec.name):
        matrix = OF_MIXTRAL[switched[2]] if switched[1].endswith(WITH_MIXTRAL_NAMES) else switched[2]
        return _rows(spec, [f"{switched[1]}experts.{{}}.{matrix}.{switched[3]}"])
    return []


def _rows(stack: TensorSpec, names: list[str]) -> list[Part]:
    """The parts of a stack of matrices: for each expert those of these names, one below the other."""
    experts, rows, columns = stack.shape
    parts: list[Part] = []
    for index in range(experts):
        for name in names:
            spec = TensorSpec(name.format(index), stack.dtype, (rows // len(names), columns))
            parts.append(Part(spec, stack, len(parts) * spec.nbytes))
    return parts


def _packed(stack: TensorSpec, described: Any) -> list[Part]:
    """The parts of a stack of which the configuration describes one expert: names, dtypes and shapes, in order."""
    where = "config.json: quantization_config.experts"
    try:
        of_one = [TensorSpec(str(name), dtype, tuple(map(int, shape))) for name, dtype, shape in described]
        starts = [sum(spec.nbytes for spec in of_one[:place]) for place in range(len(of_one) + 1)]
        aligned = all(not start % DTYPES[spec.dtype].itemsize for start, spec in zip(starts, of_one, strict=False))
        if not aligned or min(size for spec in of_one for size in spec.shape) < 1:
            raise ValueError
        nbytes = starts[-1]
    except (TypeError, ValueError, KeyError):
        message = f"{where} does not describe the tensors of an expert. Make the checkpoint again."
        raise CheckpointError(message) from None
    if stack.dtype != "U8" or len(stack.shape) != 2 or stack.shape[1] != nbytes:
        raise CheckpointError(
            f"tensor {stack.name} has shape {stack.shape}, but an expert has {nbytes} bytes by {where}. Make the "
            "checkpoint again.",
            tensor=stack.name,
        )
    parent, parts, offset = stack.name.removesuffix(".packed"), [], 0
    for index in range(stack.shape[0]):
        for spec in of_one:
            own = TensorSpec(f"{parent}.{index}.{spec.name}", spec.dtype, spec.shape)
            parts.append(Part(own, stack, offset))
            offset += spec.nbytes
    return parts


def stack_of_matrices(name: str, parts: list[TensorSpec]) -> list[Part]:
    """A stack (experts, rows, columns) of matrices, in this order.

    Raises:
        UnsupportedError: they are not of one shape and dtype.
    """
    if len({(spec.dtype, spec.shape) for spec in parts}) > 1:
        raise UnsupportedError(f"{name} would hold matrices of different shapes or dtypes. Keep all experts, or none.")
    rows, columns = parts[0].shape
    stack = TensorSpec(name, parts[0].dtype, (len(parts), rows, columns))
    return [Part(spec, stack, index * spec.nbytes) for index, spec in enumerate(parts)]


def stack_of_bytes(name: str, parts: list[list[TensorSpec]]) -> list[Part]:
    """A stack uint8 (experts, bytes) of each expert's tensors, one after another."""
    nbytes = sum(spec.nbytes for spec in parts[0])
    stack, placed, offset = TensorSpec(name, "U8", (len(parts), nbytes)), [], 0
    for spec in (spec for of_one in parts for spec in of_one):
        placed.append(Part(spec, stack, offset))
        offset += spec.nbytes
    return placed


def with_stacks(tensors: Iterable[TensorSpec], parts: Iterable[Part]) -> list[TensorSpec]:
    """The tensors of a file in their order, stacks in the place of their first parts."""
    stack_of = {part.spec.name: part.stack for part in parts}
    return list(dict.fromkeys(stack_of.get(spec.name, spec) for spec in tensors))
