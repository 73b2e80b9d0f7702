"""What the command `hlwq` runs first, so that Ctrl-C ends it in one line while PyTorch is still being imported."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line."""
    by_python = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if by_python:  # libraries go on from an import that was interrupted, with a half of it
        signal.signal(signal.SIGINT, _end)
    from hlwq.cli import main as run

    try:
        if by_python:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _end(number: int, frame: FrameType | None) -> None:
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)
