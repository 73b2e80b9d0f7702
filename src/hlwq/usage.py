"""How to run a finished directory in the engines that load it."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path

from hlwq.checkpoint import read_json
from hlwq.formats import READABLE_FORMATS


def commands(
    directory: Path, format_name: str, without: Collection[str] = (), called: str | None = None
) -> list[tuple[str, str]]:
    """The commands to run a directory, as (engine, shell command).

    Args:
        directory: the finished directory.
        format_name: the format it is in.
        without: engines that would not load it.
        called: what the commands call it, such as its hub id; by default its path.
    """
    text_only = " --language-model-only" if "vision_config" in read_json(directory / "config.json") else ""
    path = shlex.quote(called or str(directory))
    return [
        (engine.name, engine.command.format(path=path, text_only=text_only))
        for engine in READABLE_FORMATS[format_name].ENGINES
        if engine.command and engine.name not in without
    ]
