"""Where to compute, and how much memory that took."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from hlwq.errors import RequestError, ResourceError, reason

DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")


def usual_device() -> str:
    """Where to compute unless the user says otherwise: `cuda`, else `mps`, else `cpu`, by what torch finds here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def torch_device(name: str | None = None) -> torch.device:
    """The device of that name (`cpu`, `cuda`, `cuda:1`, `mps`, `xpu`), or the usual one.

    Raises:
        RequestError: there is no such device, or it holds no data.
        ResourceError: it cannot be used here.
    """
    name = usual_device() if name is None else name
    if name.partition(":")[0] not in DEVICE_TYPES:
        raise RequestError(
            f"`device={name!r}` is none of those that hold data: {', '.join(DEVICE_TYPES)}. Use `device='cpu'`.",
            argument="device",
        )
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ResourceError(
            f"`device={name!r}` cannot be used here: {reason(error)}. Use `device='cpu'`.", argument="device"
        ) from None
    return device


def compute_dtype(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.dtype:
    """The dtype to run a model of this dtype in: its own, or float32 on a CPU that is ten times faster with it."""
    if device.type != "cpu" or dtype is torch.float32:
        return dtype
    fast = dtype is torch.bfloat16 and torch.backends.mkldnn.is_available()
    return dtype if fast and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def reset_device_peak(device: torch.device) -> None:
    """Begin to measure `device_peak` anew."""
    reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
    if reset:
        reset(device)


def device_peak(device: torch.device) -> int | None:
    """Peak memory of this process on a device, in bytes; None where torch does not measure it (cpu, mps)."""
    peak = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return int(peak(device)) if peak else None


def peak_memory() -> int | None:
    """Peak memory of this process, in bytes; None where neither the system nor psutil tells."""
    peak = peak_of_process("self")  # on Linux getrusage starts from the peak of the process that started this one
    if peak is not None:
        return peak
    try:
        import resource  # not on Windows
    except ImportError:
        psutil = _psutil()
        return getattr(psutil.Process().memory_info(), "peak_wset", None) if psutil else None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_of_process(process: int | str) -> int | None:
    """Peak memory of the process of this number, in bytes; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    peak = next((line for line in lines if line.startswith("VmHWM:")), None)
    return None if peak is None else int(peak.split()[1]) * 1024


def available_memory(device: torch.device | None = None) -> int | None:
    """Memory that can be had now, in bytes: the machine's, or a GPU's own where torch tells of it.

    Where only psutil or sysconf tell: what psutil says, else all that the machine has. None where nothing tells.
    """
    if device is not None and device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        # What torch holds of it and does not use can be had too.
        return int(module.mem_get_info(device)[0] + module.memory_reserved(device) - module.memory_allocated(device))
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    if psutil := _psutil():
        return int(psutil.virtual_memory().available)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # there is no sysconf on Windows
        return None


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Tell by this message that memory is lacking, which is torch's own type of error only on some devices.

    Raises:
        ResourceError: it is.
    """
    told = ("out of memory", "can't allocate memory", "not enough memory")
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in told):
            raise ResourceError(message) from None
        raise


def _psutil() -> ModuleType | None:
    """The module, which comes with the extra `eval`."""
    try:
        import psutil
    except ImportError:
        return None
    module: ModuleType = psutil
    return module
