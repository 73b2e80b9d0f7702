"""How to run a finished directory in the engines that load it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path


def commands(directory: Path, format_name: str) -> list[tuple[str, str]]:
    """The commands to run a directory, as (engine, shell command).

    Args:
        directory: the finished directory.
        format_name: the format it is in.
    """
    path = shlex.quote(str(directory))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    text_only = " --language-model-only" if "vision_config" in config else ""
    transformers = (
        "from transformers import AutoModelForCausalLM; "
        f"model = AutoModelForCausalLM.from_pretrained({str(directory)!r})"
    )
    vllm = ("vLLM", f"vllm serve {path}{text_only}")
    return {
        "gptq": [vllm],
        "mlx": [("mlx-lm", f"mlx_lm.generate --model {path} --prompt 'Hello'")],
        "hlwq": [("hlwq", f"hlwq convert {path} {shlex.quote(str(directory) + '-dense')} --format dense")],
        "dense": [("transformers", f"python -c {shlex.quote(transformers)}"), vllm],
    }[format_name]
