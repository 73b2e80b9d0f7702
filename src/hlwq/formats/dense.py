"""Dense: an ordinary checkpoint of the decoded weights, which everything loads and which saves no space."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from hlwq.bases import Basis
from hlwq.containers import DTYPES, Reader, TensorSpec
from hlwq.families import ModelLayout
from hlwq.formats.base import (
    ENGINE_SECTIONS,
    PIPELINE_COMMAND,
    Contents,
    Demand,
    Engine,
    Format,
    Scheme,
    StoredModule,
    check_bits,
    demand,
)
from hlwq.formats.uniform import engine_storage
from hlwq.grids import Grid, UniformGrid
from hlwq.matrix import QuantizedMatrix

NAME = "dense"
BITS = (2, 3, 4, 5, 6, 7, 8)


def hold(module: str, shape: tuple[int, int], grid: Grid, basis: Basis, dtype: str) -> Grid:
    """Any grid in any basis; uniform ones with the parameters that format gptq would store.

    Raises:
        UnsupportedError: bits outside 2 to 8.
    """
    check_bits(NAME, grid.bits, BITS)
    return replace(grid, storage=engine_storage(dtype)) if isinstance(grid, UniformGrid) else grid


def outputs(module: str, shape: tuple[int, int], grid: Grid, dtype: str) -> list[TensorSpec]:
    """One weight, in the model's dtype."""
    return [TensorSpec(f"{module}.weight", dtype, shape)]


def encode(module: str, matrix: QuantizedMatrix, dtype: str) -> dict[str, Tensor]:
    """The decoded weight."""
    return {f"{module}.weight": matrix.dequantize(DTYPES[dtype])}


def json_files(config: dict[str, Any], contents: Contents) -> dict[str, dict[str, Any]]:
    """The source's `config.json`, unchanged."""
    return {"config.json": config}


def stored_modules(reader: Reader) -> dict[str, StoredModule]:
    """None: the weights are ordinary."""
    return {}


def dequantize(reader: Reader, module: str, scheme: Scheme) -> Tensor:
    """Never called, since no module is stored as codes."""
    raise ValueError(f"{module} is not stored as codes.")


def demands(reader: Reader, layout: ModelLayout, modules: dict[str, StoredModule]) -> list[Demand]:
    """An ordinary checkpoint says nothing of quantization."""
    parts = (reader.config, reader.config.get("text_config"))
    sections = [key for part in parts if isinstance(part, dict) for key in ENGINE_SECTIONS if part.get(key)]
    return [demand("transformers", "config.json names no quantization", sections, "Remove that section.")]


ENGINES = (
    Engine("transformers", BITS, "any", PIPELINE_COMMAND),
    Engine("vLLM", BITS, "any", "vllm serve {path}{text_only}"),
)
FORMAT = Format(
    name=NAME,
    engines=ENGINES,
    stored_modules=stored_modules,
    dequantize=dequantize,
    demands=demands,
    bits=BITS,
    hold=hold,
    outputs=outputs,
    encode=encode,
    json_files=json_files,
    fused_alike=False,
    holds_embeddings=True,
    holds_scattered_groups=True,
    stores_decoded=True,
)
