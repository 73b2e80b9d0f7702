"""Where checkpoints come from: a directory, a hub id, a GGUF file, a quantized directory decoded as it is read."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from yaml import YAMLError

from hlwq.checkpoint import DTYPES, Reader, TensorSpec, hash_file, read_json
from hlwq.errors import HlwqError
from hlwq.formats import Scheme, StoredModule, detect_format, mlx, polar
from hlwq.models import check_supported

ENGINE_SECTIONS = ("quantization_config", "quantization")
"""The keys of `config.json` that say how weights are stored."""
INHERITED = ("license", "license_name", "license_link", "language", "base_model")


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The directory of a checkpoint: as given, downloaded from the hub, or converted from GGUF.

    Args:
        source: a directory, a hub id, or a `.gguf` file that transformers can dequantize.
        revision: a branch, tag or commit of the hub.

    Raises:
        HlwqError: it cannot be found, downloaded or converted, or `revision` is given for something local.
    """
    path = Path(source).expanduser()
    if path.exists() and revision is not None:
        raise HlwqError(f"--revision {revision} changes nothing: {source} is on this disk, not on the hub.")
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.exists():
        raise HlwqError(f"{source} is neither a model directory nor a .gguf file.")
    try:
        # Only what is copied or read: never code, never pickles, never a second copy of the weights.
        small = ["README.md", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
        config = Path(snapshot_download(str(source), revision=revision, allow_patterns=small)) / "config.json"
        check_supported(read_json(config))  # before the weights are downloaded
        ignored = ["consolidated*", "original/*", "adapter*"]
        allowed = [*small, "*.safetensors"]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=allowed, ignore_patterns=ignored))
    except HFValidationError:
        raise HlwqError(f"{source} is neither a directory nor a hub id (such as Qwen/Qwen3.5-9B).") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HlwqError(
            f"{source} is no directory here, and the hub did not give it: {reason} "
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
        raise HlwqError(f"{file} does not exist.")
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hlwq" / hash_file(file)[:16]
    if cache.is_dir():
        return cache
    try:
        import gguf  # noqa: F401 - transformers needs it
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise HlwqError(f"Reading {file.name} needs {error.name}. Run: pip install 'hlwq[eval]'") from None
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
        raise HlwqError(f"{file}: transformers cannot dequantize it ({str(error).splitlines()[0]}).") from None
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(cache)
    return cache


def open_dense(path: Path) -> Reader:
    """Open a checkpoint that must not be quantized.

    Raises:
        HlwqError: it is damaged, or quantized already.
    """
    reader = Reader(path)
    for section in (reader.config, reader.config.get("text_config") or {}):
        quantization = next((section[key] for key in ENGINE_SECTIONS if section.get(key)), None)
        if quantization:
            method = quantization.get("quant_method", "mlx") if isinstance(quantization, dict) else "in an unknown way"
            raise _quantized_already(path / "config.json", method)
    if polar.is_polar(reader):
        raise _quantized_already(path, "PolarQuant")
    return reader


def _quantized_already(where: Path, method: str) -> HlwqError:
    return HlwqError(
        f"{where}: the model is quantized already ({method}). Start from its BF16 original, "
        "or decode it with `hlwq convert`."
    )


def model_dtype(config: dict[str, Any]) -> str:
    """The dtype that a model is meant to run in, as safetensors spells it: what `config.json` says, else BF16."""
    for section in (config, config.get("text_config") or {}):
        stated = section.get("dtype") or section.get("torch_dtype")
        for name in ("BF16", "F16", "F32"):
            if stated == str(DTYPES[name]).removeprefix("torch."):
                return name
    return "BF16"


class DecodedCheckpoint:
    """A directory of any format seen as the dense checkpoint that it stands for. Each read decodes.

    Attributes:
        path: the directory.
        config: its configuration without the engines' sections.
        tensors: the dense tensors, by their Hugging Face names.
        format: how the directory stores them.
    """

    def __init__(self, path: Path) -> None:
        """Read the configuration and the headers.

        Raises:
            HlwqError: the directory is damaged, or quantized in a way that cannot be read.
        """
        self._reader = Reader(path)
        self.path = path
        self.format = detect_format(self._reader)
        self.config = {key: value for key, value in self._reader.config.items() if key not in ENGINE_SECTIONS}
        if self.format.NAME == "mlx":
            self.config = mlx.restored_config(self.config)
        elif self.format.NAME == "polar":
            self.config = polar.restored_config(self.config)
        try:
            modules = self.format.stored_modules(self._reader)
        except KeyError as error:
            raise HlwqError(f"{path / 'config.json'}: its quantization section lacks {error}.") from None
        if not modules and any(self._reader.config.get(key) for key in ENGINE_SECTIONS):
            raise HlwqError(f"{path}: config.json says {self.format.NAME}, but no tensor is stored so.")
        # mlx-lm's own conversion renames the tensors of Qwen3.5 and changes some of them.
        self._converted = self.format.NAME == "mlx" and mlx.is_converted(self._reader)
        self.tensors: dict[str, TensorSpec] = {}
        self._modules: dict[str, tuple[str, StoredModule]] = {}
        self._kept: dict[str, str] = {}
        module_of = {part: module for module, stored in modules.items() for part in stored.tensors}
        for spec in self._reader.tensors.values():
            module = module_of.get(spec.name)
            name = self._name(f"{module}.weight" if module else spec.name)
            if module is None:
                shape = mlx.restored_shape(spec) if self._converted else spec.shape
                self._kept[name] = spec.name
                self.tensors[name] = replace(spec, name=name, shape=shape)
            elif name not in self.tensors:
                self._modules[name] = (module, modules[module])
                self.tensors[name] = TensorSpec(name, model_dtype(self.config), modules[module].shape)

    def _name(self, stored: str) -> str:
        return mlx.hugging_face_name(stored) if self._converted else stored

    def read(self, name: str) -> Tensor:
        """One dense tensor: float32 if it was decoded, else as it is stored.

        Raises:
            HlwqError: there is no such tensor.
        """
        if name in self._modules:
            module, stored = self._modules[name]
            return self.format.dequantize(self._reader, module, stored.scheme)
        if name not in self._kept:
            raise HlwqError(f"{self.path}: tensor {name} is missing. The directory is damaged.")
        tensor = self._reader.read(self._kept[name])
        return mlx.restored(self._kept[name], tensor) if self._converted else tensor

    def scheme_of(self, name: str) -> Scheme | None:
        """How a dense tensor is stored, or None if as it is."""
        return self._modules[name][1].scheme if name in self._modules else None

    def quantized_modules(self) -> list[str]:
        """The modules stored as codes, by their Hugging Face names."""
        return [name.removesuffix(".weight") for name in self._modules]

    def stored_bytes(self, name: str) -> int:
        """Bytes on disk of a dense tensor, all parts counted."""
        parts = self._modules[name][1].tensors if name in self._modules else (self._kept[name],)
        return sum(self._reader.tensors[part].nbytes for part in parts)

    def side_files(self) -> dict[str, Path]:
        """See `Reader.side_files`."""
        return self._reader.side_files()
