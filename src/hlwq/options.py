"""The options of grids, bases, solvers, calibration data and requests: fields that carry their own help.

An option is declared once, as a field of the dataclass that uses it. Python takes it as a keyword argument, the command
line makes a flag of it, `hlwq.json` records it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hlwq.errors import RequestError


@dataclass(frozen=True)
class Option:
    """How the command line shows a field.

    Attributes:
        help: one line.
        flag: what the command line calls it, where that is not its name: `--scale`, `--symmetric/--asymmetric`.
        reference: the paper to cite where it is not 0, as a card has it.
    """

    help: str
    flag: str = ""
    reference: str = ""


def option(help: str, *, default: Any = MISSING, flag: str = "", reference: str = "") -> Any:
    """A dataclass field that users may set; without a default it must be set."""
    metadata = {"option": Option(help, flag, reference)}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def options_of(kind: Any) -> dict[str, Field[Any]]:
    """The fields of a dataclass that are options, by name."""
    return {each.name: each for each in fields(kind) if "option" in each.metadata}


def references(part: Any) -> list[str]:
    """What a card cites for a grid, basis or solver: the method's paper, and those of the options that are in use."""
    used = [each.metadata["option"].reference for name, each in options_of(part).items() if getattr(part, name)]
    return [text for text in (part.reference, *used) if text]


def recorded(part: Any) -> dict[str, Any]:
    """A grid, basis or solver as `hlwq.json` has it: its name, its options, and what else is not as by default.

    The dtypes that a grid is stored in are left out: the format decides them.
    """
    own = {each.name: each for each in fields(part)}
    values = {name: getattr(part, name) for name in own}
    options = options_of(part)
    kept = {
        name: value
        for name, value in values.items()
        if name in options or (isinstance(value, bool | int | float | str) and value != own[name].default)
    }
    return {"name": part.name, **kept}


_HINTS: dict[type[Any], dict[str, Any]] = {}
"""The types of the fields of each class that was checked: to find them out takes longer than small matrices do."""


def check_types(part: Any) -> None:
    """Raise RequestError, which names the option, unless the options of a dataclass have the types of its fields.

    A bool is no integer here, and an integer is a float.
    """
    kind = type(part)
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind)
    for name, hint in _HINTS[kind].items():
        if name in options_of(part) and not _has_type(getattr(part, name), hint):
            raise RequestError(f"`{name}` is {getattr(part, name)!r}; it must be {_in_words(hint)}.")


def several(values: Any) -> tuple[str, ...]:
    """Values of an option that may be given several times; a single string, path or pattern is one of them."""
    single = isinstance(values, str | Path | re.Pattern) or not isinstance(values, Iterable)
    return tuple(
        each.pattern if isinstance(each, re.Pattern) else str(each) if isinstance(each, Path) else each
        for each in ((values,) if single else values)
    )


def _has_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_has_type(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_has_type(each, get_args(hint)[0]) for each in value)
    if hint in (bool, int):
        return type(value) is hint
    if hint is float:
        return type(value) in (int, float)
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_in_words(each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return f"several of {_in_words(get_args(hint)[0])}"
    words = {bool: "True or False", int: "an integer", float: "a number", str: "a string", Path: "a path"}
    return "None" if hint is type(None) else words.get(hint, f"a {hint.__name__}")


def bytes_of(name: str, size: int | str) -> int:
    """A size in bytes, like `5GB`.

    Args:
        name: the argument that has it.
        size: in bytes, or with a unit.

    Raises:
        RequestError: it is no size.
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])B", str(size).strip(), re.IGNORECASE)
    if not match:
        raise RequestError(f"`{name}` {size} is not a size. Write it like 5GB or 500MB.", argument=name)
    return int(float(match[1]) * {"K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()])
