"""Regular expressions of users and of files: they are matched with a limit, since matching some of them never ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import regex

SECONDS = 5.0
"""Time for one name; ordinary patterns take microseconds."""

Matcher = Callable[[str], bool]


def matcher(pattern: Any, *, anywhere: bool = False) -> Matcher:
    """A function that says whether a name matches a pattern, from its beginning, or `anywhere` in it.

    Raises:
        ValueError: it is no regular expression. The function raises it too, where matching a name takes too long.
    """
    if not isinstance(pattern, str):
        raise ValueError("it is no text")
    try:
        expression = regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    find = expression.search if anywhere else expression.match

    def matches(name: str) -> bool:
        try:
            return find(name, timeout=SECONDS) is not None
        except (TimeoutError, MemoryError):
            raise ValueError(f"matching {name} takes too long") from None

    return matches
