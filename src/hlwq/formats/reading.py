"""What reading any format takes: parts of modules, entries of configurations, and what to say where they are wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TypeVar

from hlwq.containers import Reader, TensorSpec
from hlwq.errors import CheckpointError

T = TypeVar("T")

AGAIN = "The directory is damaged; make or download it again."
"""What to do about a damaged directory."""
FLOATS = ("F16", "BF16", "F32")
"""The dtypes in which tools write the parameters of groups."""


_JSON_TYPES: dict[type, str] = {
    int: "an integer",
    float: "a number with a fraction",
    bool: "true or false",
    str: "a string",
    dict: "an object",
    list: "a list",
}


def modules_with(reader: Reader, part: str) -> list[str]:
    """The modules that have a part of this name."""
    return [name.removesuffix(f".{part}") for name in reader.tensors if name.endswith(f".{part}")]


def damaged(what: str) -> CheckpointError:
    """The error of a file that makes no sense: what is wrong, and what to do."""
    return CheckpointError(f"{what} {AGAIN}")


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
        kind: int, float, bool, str, dict or list.
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
