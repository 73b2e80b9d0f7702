"""Finding the compiled kernels. The plain code that they speed up asks here, and goes on by itself without them."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The module `hlwq.kernels.cpu`, or None where it cannot serve a tensor.

    It needs the CPU, numba (the extra `kernels`), and no gradients.
    """
    if tensor.device.type != "cpu" or (tensor.requires_grad and torch.is_grad_enabled()):
        return None
    return _cpu_kernels()


@lru_cache(maxsize=1)
def _cpu_kernels() -> ModuleType | None:
    return import_module("hlwq.kernels.cpu") if find_spec("numba") else None
