"""GGUF files, whose headers are read here only to be checked: transformers dequantizes the tensors.

Readers of GGUF believe the counts and lengths that a file states, and loop or allocate as long as it says.
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any

from hlwq.errors import CheckpointError, UnsupportedError
from hlwq.files import check_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values, as `struct` calls them."""
STRING, ARRAY = 8, 9
LONGEST_LIST = 1000
"""Elements of an array that is returned; vocabularies are passed over."""
MOST_AXES, MOST_NAME_BYTES = 4, 1 << 16


def read_gguf_header(file: Path) -> dict[str, Any]:
    """The metadata of a GGUF file, all of whose parts are where its header says.

    Returns:
        By key: numbers, strings and short lists; longer ones are left out.

    Raises:
        CheckpointError: it is damaged, truncated, or no GGUF file.
        UnsupportedError: it has a version that is not read, or its tensors are in several files.
    """
    check_file(file)
    if file.stat().st_size < len(MAGIC) + 20:
        raise _damaged(file, "it is too short")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != MAGIC:
            raise CheckpointError(f"{file} is no GGUF file: it does not begin with {MAGIC.decode()}.", path=file)
        version = int.from_bytes(data[4:8], "little")
        if version not in VERSIONS:
            message = f"{file}: GGUF of version {version}, or with its bytes in the other order, is not read."
            raise UnsupportedError(message, path=file)
        try:
            metadata = _Cursor(data, 8).check()
        except (ValueError, struct.error, UnicodeDecodeError) as error:
            raise _damaged(file, str(error)) from None
    if metadata.get("split.count", 1) not in (0, 1):
        message = f"{file} is one of several parts. Join them with llama.cpp's gguf-split, and name the whole."
        raise UnsupportedError(message, path=file)
    return metadata


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged or truncated ({what}). Download it again.", path=file)


class _Cursor:
    """A place in a file, which is read from there on."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data, self.position = data, position

    def check(self) -> dict[str, Any]:
        """Read all of the header, and find out that the tensors it describes are inside the file."""
        tensors, entries = self.number("Q"), self.number("Q")
        self.require(tensors * 24 + entries * 13)  # the least that each of them takes
        metadata = {}
        for _ in range(entries):
            key, value = self.text(), self.value(self.number("I"))
            if key in metadata:
                raise ValueError(f"{key} is there twice")
            metadata[key] = value
        spans = self.spans(tensors)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment}")
        start = -(-self.position // alignment) * alignment
        end = start
        for name, (offset, nbytes) in sorted(spans.items(), key=lambda each: each[1]):
            if offset % alignment or start + offset < end:
                raise ValueError(f"tensor {name} does not begin where it can")
            end = start + offset + nbytes
            if end > len(self.data):
                raise ValueError(f"tensor {name} ends behind the end of the file")
        return {key: value for key, value in metadata.items() if value is not None}

    def spans(self, count: int) -> dict[str, tuple[int, int]]:
        """Offset and bytes of each tensor."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        spans: dict[str, tuple[int, int]] = {}
        for _ in range(count):
            name, axes = self.text(), self.number("I")
            if name in spans or not name.isprintable():
                raise ValueError(f"a tensor is called {name!r}")
            if not 0 < axes <= MOST_AXES:
                raise ValueError(f"tensor {name} has {axes} axes")
            sizes = [self.number("Q") for _ in range(axes)]
            kind, offset = self.number("I"), self.number("Q")
            block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]  # a ValueError if there is no such type
            if 0 in sizes or sizes[0] % block:
                raise ValueError(f"tensor {name} has {sizes[0]} columns, which are no blocks of {block}")
            spans[name] = (offset, prod(sizes) // block * nbytes)
        return spans

    def require(self, nbytes: int) -> None:
        """Raise ValueError unless so many bytes are left."""
        if nbytes > len(self.data) - self.position:
            raise ValueError("its header says more than it holds")

    def number(self, kind: str) -> Any:
        """The next number."""
        (value,) = struct.unpack_from("<" + kind, self.data, self.position)
        self.position += struct.calcsize("<" + kind)
        return value

    def text(self) -> str:
        """The next string."""
        length = self.number("Q")
        self.require(length)
        self.position += length
        if length > MOST_NAME_BYTES:  # a template; no name has as many
            return ""
        return self.data[self.position - length : self.position].decode()

    def value(self, kind: int) -> Any:
        """The next value, or None if it is a long list."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"a value has type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            size = struct.calcsize("<" + SCALARS[inner])
            self.require(count * size)
            if count > LONGEST_LIST:
                self.position += count * size
                return None
            return [self.number(SCALARS[inner]) for _ in range(count)]
        if inner != STRING:
            raise ValueError(f"a list has elements of type {inner}")
        self.require(count * 8)
        if count <= LONGEST_LIST:
            return [self.text() for _ in range(count)]
        for _ in range(count):
            length = self.number("Q")
            self.require(length)
            self.position += length
        return None
