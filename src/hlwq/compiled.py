"""Finding the compiled kernels. The plain code that they speed up asks here, and goes on by itself without them."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from hlwq.errors import HlwqWarning, RequestError, reason


def cpu_kernels(tensor: Tensor) -> ModuleType | None:
    """The module `hlwq.kernels.cpu`, or None where it cannot serve a tensor.

    It needs the CPU, code that was compiled when hlwq was installed, and no gradients. What torch.compile traces is
    plain torch.
    """
    if tensor.device.type != "cpu" or _has_gradient(tensor) or torch.compiler.is_compiling():
        return None
    return _cpu_module()


def cuda_kernels(tensor: Tensor) -> ModuleType | None:
    """The module `hlwq.kernels.triton`, which comes with torch for CUDA, or None where it cannot serve a tensor."""
    return None if tensor.device.type != "cuda" or _has_gradient(tensor) else _triton_module()


def _has_gradient(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


@lru_cache
def _cpu_module() -> ModuleType | None:
    """Of the level that the environment variable HLWQ_KERNELS names, or the best; or None if it is `off`."""
    level = os.environ.get("HLWQ_KERNELS")
    if level == "off":
        return None
    try:
        native = import_module("hlwq.kernels._native")
    except ImportError as error:
        warnings.warn(
            f"hlwq was installed without its compiled kernels, so it is slower on a CPU ({reason(error)}). "
            "Install it again where there is a C++ compiler.",
            HlwqWarning,
            stacklevel=2,
        )
        return None
    if level:
        if level not in native.available_levels():
            choices = ", ".join(["off", *native.available_levels()])
            raise RequestError(f"The environment variable HLWQ_KERNELS is {level}, not one of {choices}.")
        native.use(level)
    return import_module("hlwq.kernels.cpu")


@lru_cache
def _triton_module() -> ModuleType | None:
    if not find_spec("triton"):
        return None
    try:
        return import_module("hlwq.kernels.triton")
    except ImportError as error:
        warnings.warn(
            f"triton is installed but cannot be used, so hlwq is slower: {reason(error)}", HlwqWarning, stacklevel=2
        )
        return None
