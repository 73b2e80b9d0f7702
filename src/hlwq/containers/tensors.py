"""Tensors as headers describe them, and what a place to read them from provides."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U32": torch.uint32,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtype names of the safetensors format."""
CHUNK = 1 << 24
"""Values that are looked at together, to bound what is in memory beside them."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (as safetensors spells it) and shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """The number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes on disk, header apart."""
        return self.parameters * DTYPES[self.dtype].itemsize


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """What a header says of a tensor."""
    dtype = next(spelled for spelled, dtype in DTYPES.items() if dtype == tensor.dtype)
    return TensorSpec(name, dtype, tuple(tensor.shape))


class Source(Protocol):
    """A checkpoint to read from: dense, or decoded as it is read.

    Attributes:
        path: its directory.
        config: the model's configuration.
        tensors: what it holds, by name, in its order.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorSpec]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""

    def stamps(self) -> dict[str, str]:
        """What tells its weight files from others, short of hashing them, which would take as long as the work."""

    def side_files(self) -> dict[str, Path]:
        """The files that go along unchanged, by their paths inside the directory."""


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal."""
    return sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def what_is_not_finite(tensor: Tensor) -> str:
    """`NaN` or `infinite` if a tensor holds such a value, else empty. Only floating numbers can."""
    if not tensor.is_floating_point():
        return ""
    for chunk in tensor.reshape(-1).split(CHUNK):
        values = chunk if chunk.dtype.itemsize > 1 else chunk.float()  # torch tests no 8-bit numbers
        if not torch.isfinite(values).all():
            return "NaN" if torch.isnan(values).any() else "infinite"
    return ""
