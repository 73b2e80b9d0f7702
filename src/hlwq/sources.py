"""Where checkpoints come from: a directory, a hub id, a GGUF file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from hlwq.errors import CheckpointError, RequestError, ResourceError
from hlwq.families import check_supported
from hlwq.files import expanded, hash_file, read_json
from hlwq.side_files import PATTERNS

READ = (
    *("config.json", "model.safetensors.index.json", "adapter_config.json", "README.md"),
    *("hlwq.json", "polar_config.json", "hlwq_config.json"),
)
"""Files that are read, beside weights and side files."""


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The directory of a checkpoint: as given, downloaded from the hub, or converted from GGUF.

    Args:
        source: a directory, a hub id, or a `.gguf` file that transformers can dequantize.
        revision: a branch, tag or commit of the hub.

    Raises:
        RequestError: it is nothing that can be found, or `revision` is given for something local.
        CheckpointError: a GGUF file cannot be converted.
        ResourceError: the hub does not give it, or a package is missing.
    """
    path = expanded(source)
    if path.exists() and revision is not None:
        raise RequestError(f"`revision` {revision} changes nothing: {source} is on this disk, not on the hub.")
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.exists():
        raise RequestError(f"{source} is neither a model directory nor a .gguf file.", argument="source", path=path)
    try:
        # Only what is copied or read: never code, never pickles, never a second copy of the weights.
        small = [*READ, *PATTERNS]
        config = Path(snapshot_download(str(source), revision=revision, allow_patterns=small)) / "config.json"
        check_supported(read_json(config))  # before the weights are downloaded
        ignored = ["consolidated*", "original/*", "adapter*"]
        allowed = [*small, "*.safetensors"]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=allowed, ignore_patterns=ignored))
    except HFValidationError:
        message = f"{source} is neither a directory nor a hub id (such as Qwen/Qwen3.5-9B)."
        raise RequestError(message, argument="source") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ResourceError(
            f"{source} is no directory here, and the hub did not give it: {reason}. "
            "Check the name, the network, and `hf auth login` for a gated model."
        ) from None


def _from_gguf(file: Path) -> Path:
    """Dequantize a GGUF file into the cache, once. Transformers holds the whole model in memory for that."""
    if not file.is_file():
        raise RequestError(f"{file} does not exist.", argument="source", path=file)
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hlwq" / hash_file(file)[:16]
    if cache.is_dir():
        return cache
    try:
        import gguf  # noqa: F401 - transformers needs it
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise ResourceError(f"Reading {file.name} needs {error.name}. Run: pip install 'hlwq[eval]'") from None
    partial = cache.with_name(cache.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        message = f"{file}: transformers cannot dequantize it ({str(error).splitlines()[0]})."
        raise CheckpointError(message, path=file) from None
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(cache)
    return cache
