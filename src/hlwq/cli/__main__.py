"""`python -m hlwq.cli`, the same as `hlwq`."""

from hlwq.cli import main

main()
