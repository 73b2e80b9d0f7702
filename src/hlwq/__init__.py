"""hlwq: a Hugging Face LLM in, the best small checkpoint that engines load as it is out, with the evidence."""

from hlwq import evaluate
from hlwq.calibration import Calibration
from hlwq.check import check_directory as check
from hlwq.errors import HlwqError
from hlwq.inspect import inspect
from hlwq.integrations import torchao
from hlwq.quantize import convert, quantize
from hlwq.recipes import Recipe, Stage
from hlwq.solvers.gptq import GptqOptions
from hlwq.version import __version__

__all__ = [
    "Calibration",
    "GptqOptions",
    "HlwqError",
    "Recipe",
    "Stage",
    "__version__",
    "check",
    "convert",
    "evaluate",
    "inspect",
    "quantize",
    "torchao",
]
