"""Errors that users can act on, by what is wrong, and the one warning.

Messages name arguments as Python has them, in backticks: `` `group_size` ``, or with a value, `` `symmetric=False` ``.
The command line prints the same messages in its own words, `--group-size` and `--asymmetric`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self


def reason(error: BaseException) -> str:
    """What an error of another library says, in one line without its full stop; its kind where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.rstrip(".") for line in lines if line.strip(".")), type(error).__name__)


def was_interrupted(error: BaseException | None) -> bool:
    """Whether an error is Ctrl-C, or what another library made of it: imports inside imports raise their own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class HlwqError(Exception):
    """A request that cannot be met: the message says what is wrong, where, and what to do.

    The command line prints it as one line and exits with status 1; anything else that escapes is a bug and keeps its
    traceback. Raise one of the children.

    Attributes:
        argument: the argument that is wrong, as Python spells it; by default the first one that the message names.
        path: the file or directory that the error is about.
        tensor: the tensor or module that the error is about.
    """

    def __init__(
        self, message: str, *, argument: str | None = None, path: Path | str | None = None, tensor: str | None = None
    ) -> None:
        # In one line, whatever names and values of others it holds.
        message = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in message)
        super().__init__(message)
        named = re.search(r"`([a-z_]+)(=[^`]*)?`", message)
        self.argument = argument or (named[1] if named else None)
        self.path = None if path is None else Path(path)
        self.tensor = tensor

    def about(self, *tensors: str) -> Self:
        """The same error, whose message begins with the tensor that it is about, or with the several it may be."""
        which = "tensor" if len(tensors) == 1 else "one of"
        message = f"{which} {', '.join(tensors)}: {self}"
        return type(self)(message, argument=self.argument, path=self.path, tensor=tensors[0])


class RequestError(HlwqError):
    """The request is wrong: an argument is out of range, would change nothing, or contradicts another."""


class CheckpointError(HlwqError):
    """A checkpoint, or another file that was given, is damaged, incomplete or inconsistent."""


class UnsupportedError(HlwqError):
    """The request is sound, but hlwq, a format or an engine does not have what it asks for."""


class ResourceError(HlwqError):
    """Something outside is lacking: a package, memory, disk, a device, the network, a server."""


class HlwqWarning(UserWarning):
    """What a user should know before the work is done."""
