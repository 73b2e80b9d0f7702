"""Where to compute, and what it took."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

from hlwq.errors import HlwqError


def torch_device(name: str) -> torch.device:
    """The device of that name: `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises:
        HlwqError: it cannot be used here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise HlwqError(
            f"--device {name} cannot be used here: {str(error).splitlines()[0]} Use --device cpu."
        ) from None
    return device


def fast_on_cpu(dtype: torch.dtype) -> bool:
    """Whether torch has fast kernels for products of this dtype on this CPU; the others are ten times slower."""
    if dtype is torch.bfloat16 and torch.backends.mkldnn.is_available():
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: getrusage starts from the peak of the process that started this one
        peak_line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak_line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int:
    """The memory that could be had now, in bytes; where the system does not say, all that the machine has."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
