"""Flags made from the options of dataclasses, flags that several commands have, and messages spelled in flags."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from inspect import Parameter
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from hlwq.files import expanded
from hlwq.options import Option, options_of

Command = Callable[..., Any]

_QUOTED = re.compile(r"`([A-Za-z_]\w*)(?:=([^`]+))?`")
_RENAMED = {"`run=run_unsafely`": "`unsafe=True`"}
"""Arguments whose flag has another name, which nothing that the command declares gives away."""


def flag(help: str, *spellings: str, **limits: Any) -> Any:
    """The annotation of a parameter that is a flag: `--its-name`, or as spelled."""
    return typer.Option(*spellings, help=help, **limits)


Device = Annotated[str | None, flag("Where to compute: cuda, mps, cpu; by default the first that is here.")]


def parameter(name: str, annotation: Any, option: Option, default: Any = None) -> Parameter:
    """The parameter that typer makes a flag of, unset unless it is given, for an argument of the library.

    Args:
        name: the argument's name.
        annotation: the argument's type.
        option: its help, and its spelling where that is not its name.
        default: the library's default; what is on by default gets a flag that turns it off.
    """
    kind: Any = _value_type(annotation)
    dashed = name.replace("_", "-")
    spelling = option.flag or (f"--{dashed}/--no-{dashed}" if default is True else f"--{dashed}")
    annotated: Any = Annotated
    flagged = annotated[kind | None, flag(option.help, spelling)]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=flagged)


def flags_of(*kinds: type[Any]) -> dict[str, Parameter]:
    """The flags for the options of dataclasses, by the name of the option."""
    return {
        name: parameter(name, get_type_hints(kind)[name], field.metadata["option"], field.default)
        for kind in kinds
        for name, field in options_of(kind).items()
    }


def one_of(names: Iterable[str]) -> Any:
    """The type of a string that is one of these."""
    literal: Any = Literal
    return literal[tuple(names)]


def with_flags(flags: Mapping[str, Parameter]) -> Callable[[Command], Command]:
    """A decorator for a command that takes `**options`: typer sees these flags in their place, after the arguments.

    Args:
        flags: by the name of the argument. The command gets those that are given on the command line.
    """

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**values: Any) -> Any:
            unset = [name for name in flags if values[name] is None or values[name] == []]
            return command(**{name: value for name, value in values.items() if name not in unset})

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [each for each in own if each.kind is Parameter.POSITIONAL_OR_KEYWORD]
        parameters += [*flags.values(), *(each for each in own if each.kind is Parameter.KEYWORD_ONLY)]
        return _declared(run, parameters)

    return decorate


def with_json(command: Command) -> Command:
    """A command with `--json`, which is for whoever prints what it returns; in its paths, `~` is a home directory.

    A shell leaves `--text=~/wiki.txt` as it is.
    """

    def at_home(value: Any) -> Any:
        if isinstance(value, list):
            return [at_home(each) for each in value]
        return expanded(value) if isinstance(value, Path) else value

    @wraps(command)
    def run(*, as_json: bool | None, **values: Any) -> Any:
        return command(**{name: at_home(value) for name, value in values.items()})

    as_json = parameter("as_json", bool, Option("Print JSON instead of a table.", "--json"))
    return _declared(run, [*inspect.signature(command, eval_str=True).parameters.values(), as_json])


def spelled(message: str, *commands: Any) -> str:
    """A message of the library in the words of typer commands: `--group-size` for an argument in backticks.

    What stands in backticks and is no argument of the commands stays as it is; the first that has one spells it.
    """
    known: dict[str, Any] = {}
    for each in (each for command in reversed(commands) for each in command.params):
        known |= {opt.lstrip("-").replace("-", "_"): each for opt in each.opts} | {each.name: each}

    def in_flags(quoted: re.Match[str]) -> str:
        match = _QUOTED.fullmatch(_RENAMED.get(quoted[0], quoted[0]))
        if not match or match[1] not in known:
            return quoted[0]
        name, value, declared = match[1], match[2], known[match[1]]
        if declared.param_type_name == "argument":
            return quoted[0] if value else str(name.upper())
        if value == "False":
            return str(declared.secondary_opts[0]) if declared.secondary_opts else quoted[0]
        if value in (None, "True"):
            return str(declared.opts[0])
        try:
            return f"{declared.opts[0]} {shlex.quote(str(ast.literal_eval(value)))}"
        except (ValueError, SyntaxError):
            return quoted[0]

    return _QUOTED.sub(in_flags, message)


def _declared(run: Command, parameters: Sequence[Parameter]) -> Command:
    """A function that declares these parameters to typer."""
    # What `inspect.signature` looks for, though the type of functions does not have it.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _value_type(annotation: Any) -> Any:
    """The type of a flag's value: what a field's type has that can be written on a command line."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    plain = [each for each in members if each in (bool, int, float, str) or get_origin(each) in (Literal, tuple)]
    if str in plain:  # in which all else can be written
        return str
    if len(plain) != 1:
        raise TypeError(f"an option of type {annotation} has no single form on the command line")
    several: Any = list
    return several[get_args(plain[0])[0]] if get_origin(plain[0]) is tuple else plain[0]
