"""Safetensors checkpoints, read lazily: which file each tensor comes from, and what it holds."""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hlwq.containers.stacks import parts_of
from hlwq.containers.tensors import DTYPES, TensorSpec
from hlwq.errors import CheckpointError, UnsupportedError, reason
from hlwq.files import LONGEST_NAME, check_file, exists, is_folder, read_json
from hlwq.side_files import side_files

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
NOT_THE_MODEL = re.compile(r"(consolidated|adapter|optimizer|optim|scheduler|scaler|random_states|rng_state)[._-]")
"""How files begin that lie beside a model and are none of its shards: a second copy, adapters, states of training."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MOST_HEADER_BYTES = 1 << 24
"""Of one shard. The largest models have some ten thousand tensors in one, of a hundred bytes each."""
SHARD_NUMBER = re.compile(r"-of-(\d+)\.safetensors$")


class Reader:
    """A checkpoint directory, opened without reading any weights.

    Attributes:
        path: the directory.
        config: the parsed `config.json`.
        tensors: what the checkpoint holds, by name, in the order of its files; the experts of a layer each alone, also
            where they are stacked.
    """

    def __init__(self, path: Path) -> None:
        """Read the configuration and the shards' headers.

        Raises:
            CheckpointError: no `config.json`, no safetensors, a missing, truncated or inconsistent shard, or a tensor
                of which it is not plain where it comes from.
            UnsupportedError: it is pickled, in GGUF or an adapter, or a tensor has an unknown dtype.
        """
        self.path = path
        refuse_adapter(path)
        refuse_other_containers(path)
        self.config = read_json(path / "config.json")
        self.tensors: dict[str, TensorSpec] = {}
        self._places: dict[str, tuple[Path, int]] = {}  # the file, and where in it the tensor begins
        self._sizes: dict[Path, int] = {}
        for file, specs in _contents(path).items():
            offsets, self._sizes[file] = _offsets_in(file), file.stat().st_size
            for name, spec in specs.items():
                parts = parts_of(spec, self.config)
                for each, offset in [(part.spec, part.offset) for part in parts] or [(spec, 0)]:
                    if each.name in self.tensors:
                        message = f"{path}: {each.name} is there alone and in the stack of all experts. Delete one."
                        raise CheckpointError(message, path=path, tensor=each.name)
                    self.tensors[each.name] = each
                    self._places[each.name] = file, offsets[name] + offset
        if not self.tensors:
            raise CheckpointError(f"{path} holds no tensor. Download the checkpoint again.", path=path)

    def read(self, name: str) -> Tensor:
        """Load one tensor, in its own dtype and shape, on the CPU.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        if name not in self.tensors:
            message = f"{self.path}: tensor {name} is missing. Download the checkpoint again."
            raise CheckpointError(message, path=self.path, tensor=name)
        (file, offset), spec = self._places[name], self.tensors[name]
        # Not mapped, and read into memory of its own: no mapping of a file outlives the tensors taken from it.
        contents = bytearray(spec.nbytes)
        with file.open("rb") as stream:
            if stream.seek(0, os.SEEK_END) != self._sizes[file]:
                message = f"{file} has changed since it was opened. Start again."
                raise CheckpointError(message, path=file, tensor=name)
            stream.seek(offset)
            stream.readinto(contents)
        if not contents:
            return torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        return torch.frombuffer(contents, dtype=DTYPES[spec.dtype]).reshape(spec.shape)

    def place(self, name: str) -> tuple[Path, int]:
        """The file that holds a tensor, and where in it the tensor begins, in bytes."""
        return self._places[name]

    def stamps(self) -> dict[str, str]:
        """Each weight file's size, and a hash of its header."""
        return {file.name: _stamp(file) for file in sorted({file for file, _ in self._places.values()})}

    def side_files(self) -> dict[str, Path]:
        """What stands beside the weights and goes along unchanged; see `side_files.side_files`."""
        return side_files(self.path)


def refuse_adapter(path: Path) -> None:
    """Raise UnsupportedError if a directory holds an adapter, alone or beside a model: transformers would apply it."""
    file = path / ADAPTER
    if not exists(file):
        return
    base = read_json(file).get("base_model_name_or_path")
    merge = (
        "import sys; from peft import AutoPeftModelForCausalLM as Model; from transformers import AutoTokenizer; "
        "m = Model.from_pretrained(sys.argv[1], dtype='auto').merge_and_unload(); m.save_pretrained(sys.argv[2]); "
        "AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    command = shlex.join(["python", "-c", merge, str(path), f"{path.name}-merged"])
    what = "an adapter beside the model" if exists(path / "config.json") else "an adapter and no model"
    message = f"{path} holds {what} ({ADAPTER}; its base is {base}). Merge it first: {command}"
    raise UnsupportedError(message, path=file)


def refuse_other_containers(path: Path) -> None:
    """Raise an error that says what to do if a directory has weights, but none in safetensors.

    Raises:
        UnsupportedError: they are pickled, or in GGUF.
        CheckpointError: there are none, or the model is in folders below.
    """
    names = sorted(file.name for file in path.iterdir()) if is_folder(path) else []
    if any(name.endswith(".safetensors") for name in names):
        return
    if ggufs := [name for name in names if name.lower().endswith(".gguf")]:
        example = shlex.quote(str(path / ggufs[0]))
        raise UnsupportedError(f"{path} holds GGUF files. Name one of them: {example}.", argument="source", path=path)
    if pickled := [name for name in names if name.endswith(PICKLED)]:
        raise UnsupportedError(
            f"{path / pickled[0]} is a pickled checkpoint, and unpickling can run code. Convert it to "
            "safetensors first: load it with transformers where you trust it and call save_pretrained.",
            path=path / pickled[0],
        )
    if "model_index.json" in names:
        raise UnsupportedError(f"{path} is a pipeline of diffusers, which hlwq does not quantize.", path=path)
    if exists(path / "config.json"):
        again = "Download the checkpoint again" if INDEX in names else "Is it a model directory"
        end = "." if INDEX in names else "?"
        raise CheckpointError(f"{path} holds no *.safetensors file. {again}{end}", path=path)


def _contents(path: Path) -> dict[Path, dict[str, TensorSpec]]:
    """A checkpoint's tensors by the file that each comes from.

    As transformers and vLLM agree: an index says it tensor by tensor, and what it does not name is no part of the
    checkpoint. Without one, `model.safetensors` is the checkpoint, or else all shards are.
    """
    index, single = path / INDEX, path / SINGLE
    if exists(index):
        files = _indexed(index)
        if not exists(single) or SINGLE in files.values():
            return _as_indexed(path, files)
        try:
            _as_indexed(path, files)
        except CheckpointError:  # its shards are not there, or not whole: transformers loads such a folder
            return {single: _tensors_in(single)}
        raise CheckpointError(
            f"{path} holds two checkpoints, {SINGLE} and the shards of {INDEX}: transformers loads the first, vLLM "
            "the second. Delete one of them.",
            path=path,
        )
    shards = sorted(
        file for file in path.iterdir() if file.name.endswith(".safetensors") and not NOT_THE_MODEL.match(file.name)
    )
    if not shards:
        message = f"{path} holds no *.safetensors file of a Hugging Face model, only copies in other forms or states."
        raise CheckpointError(message, path=path)
    if not exists(single):
        _check_numbers(path, shards)
    contents = {file: _tensors_in(file) for file in shards}
    seen: dict[str, Path] = {}
    for file, specs in contents.items():
        for name in specs:
            if name in seen:
                raise CheckpointError(
                    f"{path}: tensor {name} is in {seen[name].name} and in {file.name}, and there is no {INDEX} to say "
                    "which counts. Delete the file that does not belong to the model.",
                    path=file,
                    tensor=name,
                )
            seen[name] = file
    return {single: contents[single]} if single in contents else contents


def _indexed(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map. Download it again.", path=index)
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.isprintable() and Path(file).name == file and len(file) <= LONGEST_NAME
        if not plain or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: weight_map sends {name} to {json.dumps(file)[:100]}, which is not the name of a safetensors "
                "file. Download it again.",
                path=index,
                tensor=name,
            )
    return weight_map


def _as_indexed(path: Path, files: dict[str, str]) -> dict[Path, dict[str, TensorSpec]]:
    """What an index names, which has to be where it says."""
    contents = {}
    for file in sorted(set(files.values())):
        if not exists(path / file):
            message = f"{path / file} is missing, though {INDEX} names it. Download it again."
            raise CheckpointError(message, path=path / file)
        specs = _tensors_in(path / file)
        contents[path / file] = {name: spec for name, spec in specs.items() if files.get(name) == file}
        if absent := [name for name, place in files.items() if place == file and name not in specs]:
            message = f"{path / file}: tensor {absent[0]} is missing, though {INDEX} names it. Download it again."
            raise CheckpointError(message, path=path / file, tensor=absent[0])
    return contents


def _check_numbers(path: Path, shards: list[Path]) -> None:
    """Raise CheckpointError if the numbers in the names of shards say that there are more."""
    for shard in shards:
        if count := SHARD_NUMBER.search(shard.name):
            siblings = [each for each in shards if each.name.endswith(count[0])]
            if len(siblings) != int(count[1]):
                message = f"{path} holds {len(siblings)} shards *{count[0]}. Download it again."
                raise CheckpointError(message, path=path)


def _tensors_in(file: Path) -> dict[str, TensorSpec]:
    """The tensors in a shard, in its order.

    Raises:
        CheckpointError: one has a name that no tool gives.
        UnsupportedError: one has an unknown dtype.
    """
    specs = {}
    with _opened(file) as handle:
        for name in handle.keys():  # noqa: SIM118 - not a mapping
            if not name or not name.isprintable():
                message = f"{file}: a tensor is called {json.dumps(name)[:100]}, which is no name. Download it again."
                raise CheckpointError(message, path=file)
            view = handle.get_slice(name)
            if view.get_dtype() not in DTYPES:
                message = f"{file}: tensor {name} has dtype {view.get_dtype()}, which is not supported."
                raise UnsupportedError(message, path=file, tensor=name)
            specs[name] = TensorSpec(name, view.get_dtype(), tuple(view.get_shape()))
    return specs


def _offsets_in(file: Path) -> dict[str, int]:
    """Where each tensor of a shard, whose header was found to be sound, begins in the file."""
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
    return {name: 8 + length + each["data_offsets"][0] for name, each in header.items() if name != "__metadata__"}


def _stamp(file: Path) -> str:
    with file.open("rb") as stream:
        header = stream.read(8)
        header += stream.read(struct.unpack("<Q", header)[0])
    return f"{file.stat().st_size} bytes, header {sha256(header).hexdigest()[:16]}"


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    check_file(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > MOST_HEADER_BYTES:
        message = f"{file} is damaged or truncated (its header would have {length:,} bytes). Download it again."
        raise CheckpointError(message, path=file)
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        message = f"{file} is damaged or truncated ({reason(error)}). Download it again."
        raise CheckpointError(message, path=file) from error
