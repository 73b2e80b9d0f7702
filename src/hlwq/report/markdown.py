"""Names and other words of strangers inside Markdown, where they mean nothing but themselves."""

from __future__ import annotations

import re

from hlwq.side_files import printable

_SPECIAL = re.compile(r"[\\`*\[\]<>|&~]|(?<!\w)_|_(?!\w)")


def code(text: object) -> str:
    """A value as code, in which nothing means anything; backticks become quotation marks."""
    plain = printable(str(text)).replace("`", "'")
    return f"`{plain or ' '}`"


def inline(text: object) -> str:
    """A value as one line of text in which Markdown and HTML find nothing of theirs."""
    return _SPECIAL.sub(r"\\\g<0>", printable(str(text)))
