"""Containers: where tensors come from and go to. Today that is safetensors."""

from __future__ import annotations

from hlwq.containers.safetensors import DEFAULT_SHARD_BYTES, Reader, Writer, partial_of, refuse_unless_empty
from hlwq.containers.tensors import DTYPES, Source, TensorSpec, digest_of, what_is_not_finite

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "DTYPES",
    "Reader",
    "Source",
    "TensorSpec",
    "Writer",
    "digest_of",
    "partial_of",
    "refuse_unless_empty",
    "what_is_not_finite",
]
