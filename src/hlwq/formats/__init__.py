"""File formats: how codes and parameters lie on disk so that an engine loads them."""

from __future__ import annotations

from typing import Any

from hlwq.errors import HlwqError
from hlwq.formats import dense, gptq, hlwq, mlx
from hlwq.formats.base import Contents, Engine, Format, Scheme, StoredModule

__all__ = ["FORMATS", "Contents", "Engine", "Format", "Scheme", "StoredModule", "detect_format", "format_named"]

FORMATS: dict[str, Format] = {each.NAME: each for each in (gptq, mlx, hlwq, dense)}


def format_named(name: str) -> Format:
    """Look a format up.

    Raises:
        HlwqError: there is none of that name.
    """
    if name not in FORMATS:
        raise HlwqError(f"There is no format {name}. Formats are: {', '.join(FORMATS)}.")
    return FORMATS[name]


def detect_format(config: dict[str, Any]) -> Format:
    """The format of a directory with this `config.json`.

    Raises:
        HlwqError: it is quantized in a way that cannot be read here.
    """
    section = config.get("quantization_config") or config.get("quantization")
    if not section:
        return dense
    # mlx-lm writes no method, but its section under two keys.
    method = section.get("quant_method", "mlx" if config.get("quantization") else None)
    if method in FORMATS:
        return FORMATS[method]
    raise HlwqError(
        f"config.json: weights quantized by {method or 'an unnamed method'} cannot be read. Use the original model."
    )
