"""Model directories as dense checkpoints: those that are, and quantized ones decoded as they are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hlwq.containers import Reader, TensorSpec
from hlwq.errors import CheckpointError, UnsupportedError
from hlwq.families import FLOATS, model_dtype
from hlwq.formats import ENGINE_SECTIONS, FORMATS, Scheme, StoredModule, detect_format, without_sections


def open_dense(path: Path) -> Reader:
    """Open a checkpoint that must not be quantized.

    Raises:
        CheckpointError: it is damaged.
        UnsupportedError: it is quantized already.
    """
    reader = Reader(path)
    if all(spec.dtype in FLOATS for spec in reader.tensors.values()):
        for key in _sections(reader.config):
            raise _left_over(path / "config.json", key)
    refuse_quantized(reader.config, path / "config.json")
    if detect_format(reader) is not FORMATS["dense"]:
        raise _quantized_already(path, "PolarQuant")
    return reader


def refuse_quantized(config: dict[str, Any], where: str | Path) -> None:
    """Raise UnsupportedError, which names the place, if a `config.json` says that weights are quantized."""
    for section in _sections(config).values():
        method = section.get("quant_method", "mlx") if isinstance(section, dict) else "in an unknown way"
        raise _quantized_already(where, method)


def _sections(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration, or the text configuration in it, says to engines of how weights are stored."""
    text_config = config.get("text_config")
    parts = (text_config if isinstance(text_config, dict) else {}, config)
    return {key: part[key] for part in parts for key in ENGINE_SECTIONS if part.get(key) is not None}


def _quantized_already(where: str | Path, method: str) -> UnsupportedError:
    decode = "" if method == "fp8" else ", or decode it with `hlwq convert`"
    return UnsupportedError(
        f"{where}: the model is quantized already ({method}). Start from its BF16 original{decode}.",
        argument="source",
        path=Path(where),
    )


def _left_over(file: Path, key: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: the section {key} says that the weights are quantized, but no tensor is stored so. Remove that "
        "section.",
        path=file,
    )


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
            CheckpointError: the directory is damaged.
            UnsupportedError: it is quantized in a way that cannot be read.
        """
        self._reader = Reader(path)
        self.path = path
        self.format = detect_format(self._reader)
        self._restoration = self.format.restoration(self._reader)
        self.config = self._restoration.config(without_sections(self._reader.config))
        try:
            modules = self.format.stored_modules(self._reader)
        except KeyError as error:
            message = f"{path / 'config.json'}: its quantization section lacks {error}."
            raise CheckpointError(message, path=path) from None
        key = next((key for key in ENGINE_SECTIONS if self._reader.config.get(key) is not None), None)
        if not modules and key is not None:
            raise _left_over(path / "config.json", key)
        self.tensors: dict[str, TensorSpec] = {}
        self._modules: dict[str, tuple[str, StoredModule]] = {}
        self._kept: dict[str, str] = {}
        module_of = {part: module for module, stored in modules.items() for part in stored.tensors}
        specs = self._reader.tensors.values()
        dtype = model_dtype(self.config, [spec for spec in specs if spec.name not in module_of])
        for spec in specs:
            module = module_of.get(spec.name)
            name = self._restoration.name(f"{module}.weight" if module else spec.name)
            if name in self.tensors and (module is None or name in self._kept):
                raise CheckpointError(
                    f"{path}: tensor {name} is stored twice, as codes and as it is, and engines differ in which they "
                    "take. Make the checkpoint again.",
                    path=path,
                    tensor=name,
                )
            if module is None:
                self._kept[name] = spec.name
                self.tensors[name] = replace(spec, name=name, shape=self._restoration.shape(spec))
            elif name not in self.tensors:
                self._modules[name] = (module, modules[module])
                self.tensors[name] = TensorSpec(name, dtype, modules[module].shape)

    def read(self, name: str) -> Tensor:
        """One dense tensor: float32 if it was decoded, else as it is stored.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name in self._modules:
            module, stored = self._modules[name]
            return self.format.dequantize(self._reader, module, stored.scheme)
        if name not in self._kept:
            message = f"{self.path}: tensor {name} is missing. The directory is damaged."
            raise CheckpointError(message, path=self.path, tensor=name)
        return self._restoration.tensor(self._kept[name], self._reader.read(self._kept[name]))

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

    def stamps(self) -> dict[str, str]:
        """See `Reader.stamps`."""
        return self._reader.stamps()

    def side_files(self) -> dict[str, Path]:
        """See `Reader.side_files`."""
        return self._reader.side_files()
