"""The one exception that a user's mistake raises, and the one warning."""

from __future__ import annotations


class HlwqError(Exception):
    """A request that cannot be met: the message says what is wrong, where, and what to do.

    The command line prints it as one line and exits with status 1; anything else that escapes is a
    bug and keeps its traceback.
    """


class HlwqWarning(UserWarning):
    """What a user should know before the work is done."""
