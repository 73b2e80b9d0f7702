"""Where checkpoints come from: a directory, a hub id, a GGUF file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from yaml import YAMLError

from hlwq.errors import CheckpointError, RequestError, ResourceError, reason
from hlwq.families import check_supported
from hlwq.files import hash_file, read_json

INHERITED = ("license", "license_name", "license_link", "language", "base_model")


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
    path = Path(source).expanduser()
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
        small = ["README.md", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
        config = Path(snapshot_download(str(source), revision=revision, allow_patterns=small)) / "config.json"
        check_supported(read_json(config))  # before the weights are downloaded
        ignored = ["consolidated*", "original/*", "adapter*"]
        allowed = [*small, "*.safetensors"]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=allowed, ignore_patterns=ignored))
    except HFValidationError:
        message = f"{source} is neither a directory nor a hub id (such as Qwen/Qwen3.5-9B)."
        raise RequestError(message, argument="source") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ResourceError(
            f"{source} is no directory here, and the hub did not give it: {reason(error)}. "
            "Check the name, the network, and `hf auth login` for a gated model."
        ) from None


def stated_by_card(directory: Path) -> dict[str, Any]:
    """What a model's card says that holds for its quantizations too: license, base model, languages.

    Nothing where there is no card, or none that can be understood: a license that is not stated must not be guessed.
    """
    file = directory / "README.md"
    if not file.is_file():
        return {}
    try:
        data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, YAMLError, UnicodeDecodeError):
        return {}
    return {key: data[key] for key in INHERITED if data.get(key)}


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
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        message = f"{file}: transformers cannot dequantize it ({reason(error)})."
        raise CheckpointError(message, path=file) from None
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(cache)
    return cache
