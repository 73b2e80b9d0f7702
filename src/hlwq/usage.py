"""Commands that run a finished directory in the engines that load it."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path

from hlwq.files import read_json
from hlwq.formats import READABLE_FORMATS
from hlwq.formats.base import HLWQ_PIPELINE_COMMAND, PIPELINE_COMMAND
from hlwq.formats.transforms import SECTION
from hlwq.manifest import read_manifest

TORCHAO_RECIPE = "hlwq-torchao"
"""The recipe whose dense files torchao is meant to round as it loads them."""
TORCHAO_COMMAND = (
    "python -c 'import sys, hlwq; from transformers import pipeline; "
    'options = {{"quantization_config": hlwq.torchao.transformers_config(sys.argv[1])}}; '
    'print(pipeline("text-generation", sys.argv[1], model_kwargs=options)("Hello")[0]["generated_text"])\' {path}'
)


def commands(
    directory: Path, format_name: str, without: Collection[str] = (), called: str | None = None
) -> list[tuple[str, str]]:
    """The commands to run a directory, as (engine, shell command).

    Args:
        directory: the finished directory.
        format_name: its format.
        without: engines that would not load it.
        called: its name in the commands, such as its hub id; by default its path.
    """
    config = read_json(directory / "config.json")
    text_only = " --language-model-only" if "vision_config" in config else ""
    name = called or str(directory)
    path = shlex.quote(f"./{name}" if name.startswith("-") else name)  # which is no option
    recipe = (read_manifest(directory) or {"recipe": None})["recipe"]
    if recipe == TORCHAO_RECIPE and format_name == "dense":
        templates = [("torchao", TORCHAO_COMMAND)]
    else:
        engines = READABLE_FORMATS[format_name].engines
        templates = [(engine.name, engine.command) for engine in engines if engine.command]
    if (config.get("quantization_config") or {}).get(SECTION):  # rotated, which transformers alone refuses
        templates = [(name, HLWQ_PIPELINE_COMMAND if each == PIPELINE_COMMAND else each) for name, each in templates]
    return [(name, each.format(path=path, text_only=text_only)) for name, each in templates if name not in without]
