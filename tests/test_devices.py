from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hlwq
from hlwq import devices
from hlwq.demo import bundled_model
from hlwq.devices import available_memory, device_peak, peak_memory, torch_device, usual_device
from hlwq.errors import RequestError, ResourceError
from hlwq.evaluate.model import load_model
from hlwq.evaluate.speed import speed
from hlwq.files import read_json


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_usual_device_is_the_fastest_here(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert usual_device() == expected


def test_a_run_says_where_it_computed(tmp_path: Path) -> None:
    result = hlwq.quantize(bundled_model(), tmp_path / "out", "rtn")
    assert result.device == usual_device()
    assert read_json(tmp_path / "out" / "hlwq.json")["device"] == usual_device()


@pytest.mark.parametrize("name", ["meta", "tpu9", "vulkan", "hpu:0", ""])
def test_devices_that_hold_no_data_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="`device='cpu'`") as caught:
        torch_device(name)
    assert f"`device={name!r}`" in str(caught.value)
    assert caught.value.argument == "device"


def test_a_device_that_is_not_here_is_a_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*sizes: int, device: torch.device) -> torch.Tensor:
        raise AssertionError("Torch not compiled with CUDA enabled")

    assert torch_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch, "zeros", absent)
    with pytest.raises(ResourceError, match=r"`device='cuda:1'` cannot be used here: .*CUDA"):
        torch_device("cuda:1")


def test_device_memory_is_that_of_the_device_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {torch.device("cuda:0"): 7 << 30, torch.device("cuda:1"): 5 << 30}

    def current(device: torch.device | None = None) -> torch.device:
        return torch.device("cuda:0") if device is None else torch.device(device)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: peaks.update({current(device): 0}))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: peaks[current(device)])

    def load(path: Path, device: str) -> object:
        peaks[torch.device(device)] += 3 << 20
        return load_model(path)

    monkeypatch.setattr("hlwq.evaluate.speed.torch_device", torch.device)
    monkeypatch.setattr("hlwq.evaluate.speed.load_model", load)
    result = speed(bundled_model(), prompt_tokens=8, new_tokens=2, runs=1, device="cuda:1")
    assert result.device_memory == 3 << 20
    assert peaks[torch.device("cuda:0")] == 7 << 30


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_no_peak_is_told_where_none_is_measured(name: str) -> None:
    assert device_peak(torch.device(name)) is None


def test_hlwq_imports_without_resource() -> None:
    script = "import sys; sys.modules['resource'] = None; import hlwq, hlwq.evaluate.speed, hlwq.evaluate.sandbox"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_memory_of_windows_is_what_psutil_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1, peak_wset=12345))
    psutil = SimpleNamespace(Process=lambda: process, virtual_memory=lambda: SimpleNamespace(available=678))
    without_linux(monkeypatch)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    assert (peak_memory(), available_memory()) == (12345, 678)
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.delattr(os, "sysconf")
    assert (peak_memory(), available_memory()) == (None, None)


def test_memory_of_other_systems_needs_no_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    without_linux(monkeypatch)
    monkeypatch.setitem(sys.modules, "psutil", None)
    peak, available = peak_memory(), available_memory()
    assert peak is not None
    assert peak > 1e7
    assert available is not None
    assert available > 1e8


def without_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """No /proc."""
    monkeypatch.setattr(devices, "peak_of_process", lambda process: None)
    monkeypatch.setattr(Path, "is_file", lambda path: False)
