"""Where checkpoints come from: a directory, a hub id, a GGUF file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)

from hlwq.containers import Reader, TensorSpec, read_gguf_header, refuse_adapter
from hlwq.containers.stacks import parts_of
from hlwq.decoded import open_dense, refuse_quantized
from hlwq.errors import CheckpointError, RequestError, ResourceError, UnsupportedError, reason
from hlwq.families import check_supported
from hlwq.files import cache_folder, check_file, disk_errors, exists, expanded, hash_file, is_folder, locked, read_json
from hlwq.side_files import PATTERNS
from hlwq.transformers_models import quiet_transformers

READ = (
    *("config.json", "model.safetensors.index.json", "adapter_config.json", "README.md"),
    *("hlwq.json", "polar_config.json", "hlwq_config.json"),
)
"""Files that are read, beside weights and side files."""
HUB_ADDRESS = re.compile(r"https?://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)")


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
    if exists(path) and revision is not None:
        raise RequestError(f"`revision` {revision} changes nothing: {source} is on this disk, not on the hub.")
    if is_folder(path):
        return path
    if path.suffix.lower() == ".gguf":
        return _from_gguf(path)
    if exists(path):
        message = f"{source} is neither a model directory nor a .gguf file."
        if path.suffix in (".safetensors", ".json"):
            message = f"{source} is a file of a model. Name its directory: {path.parent}."
        raise RequestError(message, argument="source", path=path)
    if address := HUB_ADDRESS.match(str(source)):
        raise RequestError(f"{source} is an address. Name the model by its id: {address[1]}.", argument="source")
    with _hub_errors(source):
        # Only what is copied or read: never code, never pickles, never a second copy of the weights.
        small = [*READ, *PATTERNS]
        directory = Path(snapshot_download(str(source), revision=revision, allow_patterns=small))
        refuse_adapter(directory)
        check_supported(read_json(directory / "config.json"))  # before the weights are downloaded
        ignored = ["consolidated*", "original/*", "adapter*"]
        allowed = [*small, "*.safetensors"]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=allowed, ignore_patterns=ignored))


@dataclass(frozen=True)
class HubHeaders:
    """The configuration and the headers of a checkpoint on the hub.

    Attributes:
        config: the parsed `config.json`.
        tensors: what its files hold, by name.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorSpec]


def headers_of(source: str | Path, revision: str | None = None) -> HubHeaders | Reader:
    """What a checkpoint holds; of one on the hub, only its configuration and the headers of its files are downloaded.

    Raises:
        HlwqError: see `locate` and `open_dense`.
    """
    if exists(expanded(source)) or HUB_ADDRESS.match(str(source)):
        return open_dense(locate(source, revision))
    with _hub_errors(source):
        config = read_json(Path(hf_hub_download(str(source), "config.json", revision=revision)))
        check_supported(config)
        files = HfApi().get_safetensors_metadata(str(source), revision=revision).files_metadata.values()
    refuse_quantized(config, str(source))
    specs = (TensorSpec(name, each.dtype, tuple(each.shape)) for file in files for name, each in file.tensors.items())
    parts = ([part.spec for part in parts_of(spec, config)] or [spec] for spec in specs)
    return HubHeaders(config, {spec.name: spec for each in parts for spec in each})


@contextmanager
def _hub_errors(source: str | Path) -> Iterator[None]:
    """Errors of the hub in one line."""
    try:
        yield
    except HFValidationError:
        message = f"{source} is neither a directory nor a hub id (such as Qwen/Qwen3.5-9B)."
        raise RequestError(message, argument="source") from None
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise UnsupportedError(f"{source} holds no safetensors that can be read: {reason(error)}.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ResourceError(
            f"{source} is no directory here, and the hub did not give it: {reason(error)}. "
            "Check the name, the network, and `hf auth login` for a gated model."
        ) from None


def _from_gguf(file: Path) -> Path:
    """Dequantize a GGUF file into the cache, once. Transformers holds the whole model in memory for that."""
    check_file(file)
    try:
        import gguf  # noqa: F401 - transformers needs it
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise ResourceError(f"Reading {file.name} needs {error.name}. Run: pip install 'hlwq[eval]'") from None
    _check_model(file, read_gguf_header(file))
    cache = cache_folder() / f"gguf-{hash_file(file)[:32]}"
    if cache.is_dir():
        return cache
    partial = cache.with_name(cache.name + ".partial")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{cache.parent} cannot be made, where {file.name} would be dequantized: {error.strerror}."
        raise ResourceError(f"{message} `HF_HOME` names another cache.", path=cache.parent) from None
    with locked(cache), disk_errors(cache.parent):
        if cache.is_dir():  # which another process has just made
            return cache
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with quiet_transformers():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    file.parent,
                    gguf_file=file.name,
                    quantization_config=GgufConfig(dequantize=True),
                    dtype=torch.bfloat16,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
                model, info = loaded
                tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        except Exception as error:  # transformers and gguf raise what they like
            message = f"{file}: transformers cannot dequantize it ({reason(error)})."
            raise CheckpointError(message, path=file) from None
        _check_loaded(file, info)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(cache)
    return cache


def _check_model(file: Path, metadata: dict[str, Any]) -> None:
    """Raise UnsupportedError if a GGUF file holds something else than a language model."""
    if metadata.get("general.architecture") == "clip" or metadata.get("general.type", "model") not in ("model", ""):
        what = metadata.get("general.type", "mmproj")
        message = f"{file} holds no language model, but a part for one ({what}). Name the model's own file."
        raise UnsupportedError(message, path=file)


def _check_loaded(file: Path, info: dict[str, Any]) -> None:
    """Raise CheckpointError if transformers has filled a tensor of the model with random numbers."""
    for what in ("missing", "mismatched"):
        if names := sorted(map(str, info.get(f"{what}_keys") or ())):
            raise CheckpointError(
                f"{file}: {len(names)} tensors are {what}, such as {names[0]}. The file does not hold the whole model, "
                "or transformers does not know its kind: start from the model's safetensors.",
                path=file,
                tensor=names[0],
            )
