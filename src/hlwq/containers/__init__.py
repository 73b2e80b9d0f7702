"""Containers: where tensors come from and go to. Today that is safetensors."""

from __future__ import annotations

from hlwq.containers.safetensors import DEFAULT_SHARD_BYTES, Reader, Writer
from hlwq.containers.tensors import DTYPES, Source, TensorSpec

__all__ = ["DEFAULT_SHARD_BYTES", "DTYPES", "Reader", "Source", "TensorSpec", "Writer"]
