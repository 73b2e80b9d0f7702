"""Dense: an ordinary checkpoint of the decoded weights, which everything loads and which saves no space."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hlwq.checkpoint import DTYPES, Reader, TensorSpec
from hlwq.errors import HlwqError
from hlwq.formats.base import Contents, Engine, Scheme, StoredModule, check_bits, engine_storage
from hlwq.grids import Grid, LloydGrid, QuantizedMatrix, ScaleMethod, UniformGrid

NAME = "dense"
BITS: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
ENGINES: tuple[Engine, ...] = (
    Engine(
        "transformers",
        BITS,
        "any",
        """python -c "from transformers import pipeline; print(pipeline('text-generation', '{path}')('Hello'))\"""",
    ),
    Engine("vLLM", BITS, "any", "vllm serve {path}{text_only}"),
)
DEFAULT_SYMMETRIC = True
FUSED_ALIKE = False
HOLDS_EMBEDDINGS = True
HOLDS_DESC_ACT = True
STORES_DECODED = True


def lloyd_grid(bits: int, group_size: int) -> Grid:
    """As format hlwq would store it. Raises HlwqError for bits outside 2 to 8."""
    check_bits(NAME, bits, BITS)
    return LloydGrid(bits, group_size)


def uniform_grid(bits: int, group_size: int, symmetric: bool, scale_method: ScaleMethod, dtype: str) -> Grid:
    """As format gptq would store it, at more widths. Raises HlwqError for bits outside 2 to 8."""
    check_bits(NAME, bits, BITS)
    return UniformGrid(bits, group_size, symmetric, True, scale_method, engine_storage(dtype))


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
    raise HlwqError(f"{module} is not stored as codes.")
