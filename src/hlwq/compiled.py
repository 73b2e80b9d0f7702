"""Finding the compiled kernels. The plain code that they speed up asks here, and goes on by itself without them."""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor


def cpu_kernels(tensor: Tensor) -> ModuleType | None:
    """The module `hlwq.kernels.cpu`, or None where it cannot serve a tensor.

    It needs the CPU, numba (the extra `kernels`), and no gradients.
    """
    return None if tensor.device.type != "cpu" or _has_gradient(tensor) else _module("numba", "hlwq.kernels.cpu")


def one_row_kernels(tensor: Tensor) -> ModuleType | None:
    """The module `hlwq.kernels.one_row`, on the same terms."""
    return None if tensor.device.type != "cpu" or _has_gradient(tensor) else _module("numba", "hlwq.kernels.one_row")


def cuda_kernels(tensor: Tensor) -> ModuleType | None:
    """The module `hlwq.kernels.triton`, which comes with torch for CUDA, or None where it cannot serve a tensor."""
    return None if tensor.device.type != "cuda" or _has_gradient(tensor) else _module("triton", "hlwq.kernels.triton")


def _has_gradient(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


@lru_cache
def _module(compiler: str, name: str) -> ModuleType | None:
    if not find_spec(compiler):
        return None
    try:
        return import_module(name)
    except ImportError as error:  # such as a numba that is older than its numpy
        warnings.warn(f"{compiler} is installed but cannot be used, so hlwq is slower: {error}", stacklevel=2)
        return None
