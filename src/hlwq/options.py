"""The options of grids, bases, solvers, calibration data and requests: fields that carry their own help.

An option is declared once, as a field of the dataclass that uses it. Python takes it as a keyword argument, the command
line makes a flag of it, `hlwq.json` records it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any


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
    """A grid, basis or solver as `hlwq.json` has it: its name and its options."""
    values: Mapping[str, Any] = {name: getattr(part, name) for name in options_of(part)}
    return {"name": part.name, **values}


def several(values: str | Iterable[str]) -> tuple[str, ...]:
    """Values of an option that may be given several times; a single string is one of them."""
    return (values,) if isinstance(values, str) else tuple(values)
