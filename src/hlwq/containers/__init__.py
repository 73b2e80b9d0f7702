"""Containers: where tensors come from and go to. Today that is safetensors."""

from __future__ import annotations

from hlwq.containers.gguf import read_gguf_header
from hlwq.containers.reader import Reader, refuse_adapter
from hlwq.containers.stacks import EXPERT, OF_MIXTRAL, PACKED, Part, stack_of_bytes, stack_of_matrices
from hlwq.containers.tensors import DTYPES, Source, TensorSpec, digest_of, spec_of, what_is_not_finite
from hlwq.containers.writer import DEFAULT_SHARD_BYTES, Writer, arguments_before, partial_of, refuse_unless_empty

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "DTYPES",
    "EXPERT",
    "OF_MIXTRAL",
    "PACKED",
    "Part",
    "Reader",
    "Source",
    "TensorSpec",
    "Writer",
    "arguments_before",
    "digest_of",
    "partial_of",
    "read_gguf_header",
    "refuse_adapter",
    "refuse_unless_empty",
    "spec_of",
    "stack_of_bytes",
    "stack_of_matrices",
    "what_is_not_finite",
]
