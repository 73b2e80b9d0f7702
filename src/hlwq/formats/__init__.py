"""File formats: how codes and parameters lie on disk so that an engine loads them."""

from __future__ import annotations

from hlwq.containers import Reader
from hlwq.errors import RequestError, UnsupportedError
from hlwq.formats import compressed_tensors, dense, gptq, hlwq, mlx, polar
from hlwq.formats.base import (
    ENGINE_SECTIONS,
    Contents,
    Demand,
    Engine,
    Format,
    ReadableFormat,
    Scheme,
    StoredModule,
    demand,
    without_sections,
)
from hlwq.formats.reading import section_of

__all__ = [
    "ENGINE_SECTIONS",
    "FORMATS",
    "READABLE_FORMATS",
    "Contents",
    "Demand",
    "Engine",
    "Format",
    "ReadableFormat",
    "Scheme",
    "StoredModule",
    "demand",
    "detect_format",
    "format_named",
    "without_sections",
]

FORMATS: dict[str, Format] = {each.FORMAT.name: each.FORMAT for each in (gptq, compressed_tensors, mlx, hlwq, dense)}
"""What is written, and read."""
READABLE_FORMATS: dict[str, ReadableFormat] = {**FORMATS, polar.FORMAT.name: polar.FORMAT}
"""What is read."""


def format_named(name: str) -> Format:
    """Look up a format to write.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in FORMATS:
        lack = (
            f"Format {name} can be read, but not written" if name in READABLE_FORMATS else f"There is no format {name}"
        )
        raise RequestError(f"{lack}. Formats are: {', '.join(FORMATS)}.", argument="format")
    return FORMATS[name]


def detect_format(reader: Reader) -> ReadableFormat:
    """The format of a directory.

    Raises:
        UnsupportedError: it is quantized in a way that cannot be read here.
    """
    if polar.is_polar(reader):
        return polar.FORMAT
    key = next((key for key in ENGINE_SECTIONS if reader.config.get(key)), None)
    if key is None:
        return dense.FORMAT
    section, _ = section_of(reader, key)
    # mlx-lm writes no method, but its section under two keys.
    method = section.get("quant_method", "mlx" if reader.config.get("quantization") else None)
    if isinstance(method, str) and method in FORMATS and key != "compression_config":  # of old files, not read here
        return FORMATS[method]
    raise UnsupportedError(
        f"config.json: weights quantized by {method or 'an unnamed method'} cannot be read. Use the original model."
    )
