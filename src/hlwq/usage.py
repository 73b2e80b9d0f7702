"""How to run a finished directory in the engines that load it."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path

from hlwq.files import read_json
from hlwq.formats import READABLE_FORMATS

TORCHAO_RECIPE = "hlwq-torchao"
TORCHAO_COMMAND = (
    'python -c "import hlwq; from transformers import pipeline; '
    "options = {{'quantization_config': hlwq.torchao.transformers_config('{path}')}}; "
    "print(pipeline('text-generation', '{path}', model_kwargs=options)('Hello'))\""
)
"""Dense files of this recipe are meant to be rounded by torchao as they are loaded."""


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
    manifest = directory / "hlwq.json"
    recipe = read_json(manifest)["recipe"] if manifest.is_file() else None
    if recipe == TORCHAO_RECIPE and format_name == "dense":
        found = [("torchao", TORCHAO_COMMAND)]
    else:
        found = [(engine.name, engine.command) for engine in READABLE_FORMATS[format_name].engines if engine.command]
    return [(name, command.format(path=path, text_only=text_only)) for name, command in found if name not in without]
