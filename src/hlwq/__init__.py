"""hlwq: a Hugging Face LLM in, the best small checkpoint that engines load as it is out, with the evidence."""

from typing import Any

from hlwq import evaluate
from hlwq.bases import Hadamard, Identity
from hlwq.calibration import Calibration
from hlwq.check import check_directory as check
from hlwq.errors import CheckpointError, HlwqError, RequestError, ResourceError, UnsupportedError
from hlwq.grids import LloydGrid, UniformGrid
from hlwq.inspect import inspect
from hlwq.integrations import register_with_transformers, torchao
from hlwq.quantize import convert, quantize
from hlwq.recipes import Recipe, Stage
from hlwq.request import Request
from hlwq.solvers import Gptq, Nearest
from hlwq.version import __version__

__all__ = [
    "Calibration",
    "CheckpointError",
    "Gptq",
    "HLWQConfig",
    "Hadamard",
    "HlwqError",
    "Identity",
    "LloydGrid",
    "Nearest",
    "Recipe",
    "Request",
    "RequestError",
    "ResourceError",
    "Stage",
    "UniformGrid",
    "UnsupportedError",
    "__version__",
    "check",
    "convert",
    "evaluate",
    "inspect",
    "quantize",
    "torchao",
]


def __getattr__(name: str) -> Any:
    """`HLWQConfig` is a class of transformers', which is imported only by those who ask for it."""
    if name != "HLWQConfig":
        raise AttributeError(f"module 'hlwq' has no attribute {name!r}")
    from hlwq.integrations.transformers import HLWQConfig

    return HLWQConfig


register_with_transformers()
