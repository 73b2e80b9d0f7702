"""What the command `hlwq` runs first, so that Ctrl-C ends it in one line while PyTorch is still being imported."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from hlwq.cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
