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


def compute_dtype(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.dtype:
    """The dtype to run a model of this dtype in: its own, or float32 on a CPU that would be ten times slower so."""
    if device.type != "cpu" or dtype is torch.float32:
        return dtype
    fast = dtype is torch.bfloat16 and torch.backends.mkldnn.is_available()
    return dtype if fast and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    peak = peak_of_process("self")  # on Linux getrusage starts from the peak of the process that started this one
    if peak is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_of_process(process: int | str) -> int | None:
    """The most memory that a process, by its number, has held, in bytes; None where the system does not say."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    peak = next((line for line in lines if line.startswith("VmHWM:")), None)
    return None if peak is None else int(peak.split()[1]) * 1024


def available_memory() -> int:
    """The memory that could be had now, in bytes; where the system does not say, all that the machine has."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
