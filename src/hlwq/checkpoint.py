"""Reading safetensors checkpoints lazily, and writing them tensor by tensor, durably and all or nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hlwq.errors import HlwqError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U32": torch.uint32,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtype names of the safetensors format."""

SIDE_FILES_LEFT_OUT = (
    ".bin.index.json",
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".msgpack",
    ".h5",
    ".onnx",
)
SIDE_FILES_WRITTEN_ANEW = {
    "config.json",
    "quantize_config.json",
    "polar_config.json",
    "hlwq.json",
    "README.md",
    ".gitattributes",
}
DEFAULT_SHARD_BYTES = 5 * 10**9
"""The hub's own habit."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (as safetensors spells it) and shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """The number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes on disk, header apart."""
        return self.parameters * DTYPES[self.dtype].itemsize


class Reader:
    """A checkpoint directory, opened without reading any weights.

    Attributes:
        path: the directory.
        config: the parsed `config.json`.
        tensors: what the shards hold, by name, in the order of their files.
    """

    def __init__(self, path: Path) -> None:
        """Read the configuration and the shards' headers.

        Raises:
            HlwqError: no `config.json`, no safetensors, a missing, truncated or inconsistent shard.
        """
        self.path = path
        self.config = read_json(path / "config.json")
        self.tensors: dict[str, TensorSpec] = {}
        self._files: dict[str, Path] = {}
        for file in self._shards():
            with _opened(file) as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    view = handle.get_slice(name)
                    if view.get_dtype() not in DTYPES:
                        raise HlwqError(f"{file}: tensor {name} has dtype {view.get_dtype()}, which is not supported.")
                    self.tensors[name] = TensorSpec(name, view.get_dtype(), tuple(view.get_shape()))
                    self._files[name] = file
        self._check_index()

    def _shards(self) -> list[Path]:
        shards = sorted(self.path.glob("*.safetensors"))
        if not shards:
            pickled = sorted([*self.path.glob("*.bin"), *self.path.glob("*.pt"), *self.path.glob("*.pth")])
            if pickled:
                raise HlwqError(
                    f"{pickled[0]} is a pickled checkpoint, and unpickling can run code. Convert it to "
                    "safetensors first: load it with transformers where you trust it and call save_pretrained."
                )
            raise HlwqError(f"{self.path} holds no *.safetensors file. Download the checkpoint again.")
        index = self._index_file()
        if index is not None:
            # An index names its shards; other safetensors files beside them (adapters, say) are not read.
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise HlwqError(f"{index} has no weight_map. Download it again.")
            names = sorted(set(weight_map.values()))
            for name in names:
                if not (self.path / name).is_file():
                    raise HlwqError(f"{self.path / name} is missing, though {index.name} names it. Download it again.")
            return [self.path / name for name in names]
        if self.path / "model.safetensors" in shards:
            return [self.path / "model.safetensors"]  # not an adapter or a consolidated copy beside it
        for shard in shards:
            if count := re.search(r"-of-(\d+)\.safetensors$", shard.name):
                siblings = [each for each in shards if each.name.endswith(count[0])]
                if len(siblings) != int(count[1]):
                    raise HlwqError(f"{self.path} holds {len(siblings)} shards *{count[0]}. Download it again.")
        return shards

    def _index_file(self) -> Path | None:
        index = self.path / "model.safetensors.index.json"
        return index if index.is_file() else None

    def _check_index(self) -> None:
        index = self._index_file()
        if index is None:
            return
        for name, file in read_json(index)["weight_map"].items():
            if name not in self.tensors:
                raise HlwqError(
                    f"{self.path / file}: tensor {name} is missing, though {index.name} names it. Download it again."
                )

    def read(self, name: str) -> Tensor:
        """Load one tensor, in its own dtype and shape, on the CPU.

        Raises:
            HlwqError: the checkpoint has no such tensor.
        """
        if name not in self.tensors:
            raise HlwqError(f"{self.path}: tensor {name} is missing. Download the checkpoint again.")
        # Opened anew each time, so that no mapping of a shard outlives the tensors taken from it.
        with _opened(self._files[name]) as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    def file_of(self, name: str) -> Path:
        """The shard that holds a tensor."""
        return self._files[name]

    def side_files(self) -> dict[str, Path]:
        """What stands beside the weights and goes along unchanged, by its path inside the directory.

        Tokenizer, templates, processors, licence and so on: everything but weights, and what is written anew.
        """
        candidates = [*self.path.iterdir(), *(self.path / "additional_chat_templates").glob("*.jinja")]
        return {
            file.relative_to(self.path).as_posix(): file
            for file in sorted(candidates)
            if file.is_file()
            and not file.name.endswith(SIDE_FILES_LEFT_OUT)
            and file.name not in SIDE_FILES_WRITTEN_ANEW
        }


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise HlwqError(f"{file} is damaged or truncated ({error}). Download it again.") from error


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object.

    Raises:
        HlwqError: it is missing, or not such a file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HlwqError(f"{file} is missing. Is {file.parent} a model directory?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HlwqError(f"{file} is not valid JSON ({error}). Download it again.") from None
    if not isinstance(value, dict):
        raise HlwqError(f"{file} does not hold a JSON object. Download it again.")
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write indented UTF-8 JSON, as the hub's own files are, durably, and whole or not at all."""
    partial = file.with_name(file.name + ".tmp")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


class Writer:
    """Writes a checkpoint whose tensors are known in advance, in any order, into `OUT.partial`.

    Since names, dtypes and shapes come from the plan, every shard's header is written first and each tensor goes
    straight to its place: nothing is held back in memory, the bytes do not depend on the order of the work, and a run
    that was interrupted goes on after the last unit that `commit` made durable.
    """

    def __init__(
        self,
        out: Path,
        tensors: Iterable[TensorSpec],
        arguments: dict[str, Any],
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        json_files: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Start, or go on with, the directory `out`.

        `OUT.partial` can be opened by a `Reader` from the beginning; tensors not yet written read as zeros.

        Args:
            out: the directory that will appear; absent or empty.
            tensors: everything that will be written, in the order in which the shards shall hold it.
            arguments: what determines the bytes. A run goes on only with the same arguments.
            shard_bytes: the most that a shard holds, unless a single tensor is larger.
            json_files: `config.json` and the like, by name.

        Raises:
            HlwqError: `out` is not empty, an interrupted run had other arguments, or the disk is too small.
        """
        self.out = out = out.absolute()
        self.partial = out.with_name(out.name + ".partial")
        self._shards = _split_into_shards(list(tensors), shard_bytes)
        self._json_files = dict(json_files or {})
        self._place: dict[str, tuple[str, int, TensorSpec]] = {}
        headers: dict[str, bytes] = {}
        for file, shard in self._shards.items():
            headers[file], offsets = _header(shard)
            self._place |= {spec.name: (file, offsets[spec.name], spec) for spec in shard}
        if len(self._shards) > 1:
            total = sum(spec.nbytes for _, _, spec in self._place.values())
            weight_map = {name: file for name, (file, _, _) in sorted(self._place.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self._json_files["model.safetensors.index.json"] = index
        self._written: set[str] = set()
        self._committed: dict[str, Any] = {}
        refuse_unless_empty(out)
        self._journal = self.partial / "journal.jsonl"
        if self.partial.exists() and not (self.partial / "arguments.json").is_file():
            self._discard_unstarted()
        if self.partial.exists():
            self._resume(arguments)
        else:
            self._start(arguments, headers)

    def _start(self, arguments: dict[str, Any], headers: dict[str, bytes]) -> None:
        needed = sum(spec.nbytes for _, _, spec in self._place.values())
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            check_disk(self.out.parent, needed)
            self.partial.mkdir()
        except OSError as error:
            raise HlwqError(f"{self.out} cannot be made: {error.strerror}. Choose another output directory.") from None
        with disk_errors(self.partial):
            for file, header in headers.items():
                with (self.partial / file).open("wb") as stream:
                    stream.write(header)
                    stream.truncate(len(header) + sum(spec.nbytes for spec in self._shards[file]))
                    stream.flush()
                    os.fsync(stream.fileno())
            for name, value in self._json_files.items():
                write_json(self.partial / name, value)
            # The arguments come last: with them in place, the shards are.
            write_json(self.partial / "arguments.json", arguments)

    def _discard_unstarted(self) -> None:
        """Remove what a run left that stopped before its shards were laid out, and nothing else."""
        files = list(self.partial.iterdir())
        ours = {*self._shards, *self._json_files, "arguments.json"}
        for file in files:
            if file.name.removesuffix(".tmp") not in ours:
                raise HlwqError(
                    f"{self.partial} holds {file.name}, but no record of a run that could go on. "
                    "Look at it, and delete it to start afresh."
                )
        for file in files:
            file.unlink()
        self.partial.rmdir()

    def _resume(self, arguments: dict[str, Any]) -> None:
        remedy = f"Repeat the run with its arguments, or delete {self.partial} to start afresh."
        before, now = read_json(self.partial / "arguments.json"), json.loads(json.dumps(arguments))
        if difference := first_difference(before, now):
            raise HlwqError(f"{self.partial} was left by a run with other arguments: {difference}. {remedy}")
        if self._journal.is_file():
            # A last line without its end was being written when the run was killed.
            complete = self._journal.read_bytes().rpartition(b"\n")
            with self._journal.open("r+b") as stream:
                stream.truncate(len(complete[0]) + len(complete[1]))
            for line in complete[0].splitlines():
                entry = json.loads(line)
                self._committed[entry["unit"]] = entry["record"]
                self._written.update(entry["tensors"])

    def committed(self, unit: str) -> Any:
        """The record given to `commit` for this unit by an earlier run, or None."""
        return self._committed.get(unit)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place.

        Args:
            name: one of the names announced.
            tensor: of the dtype and shape announced, on any device.

        Raises:
            HlwqError: the disk is full.
            ValueError: the tensor is not the one announced, which is a bug.
        """
        file, offset, spec = self._place[name]
        if DTYPES[spec.dtype] != tensor.dtype or spec.shape != tuple(tensor.shape):
            raise ValueError(f"{name}: planned {spec.dtype} {spec.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with disk_errors(self.partial), (self.partial / file).open("r+b") as stream:
            stream.seek(offset)
            stream.write(data.data)
        self._written.add(name)

    def commit(self, unit: str, names: Iterable[str], record: Any) -> None:
        """Make a unit's tensors durable, then record that they are done.

        Args:
            unit: a name, unique in the run.
            names: the tensors written for it.
            record: JSON-serialisable; a later run gets it back from `committed`.
        """
        names = list(names)
        with disk_errors(self.partial):
            for file in {self._place[name][0] for name in names}:
                with (self.partial / file).open("rb") as stream:
                    os.fsync(stream.fileno())
            with self._journal.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"unit": unit, "record": record, "tensors": names}) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        self._committed[unit] = record

    def finish(self, side_files: dict[str, Path], json_files: dict[str, dict[str, Any]]) -> None:
        """Add what stands beside the weights. The directory is then complete but still called `OUT.partial`.

        Args:
            side_files: copied byte for byte, by their paths inside the directory.
            json_files: written anew, by name, beside those given at the start.

        Raises:
            HlwqError: the disk is full.
            ValueError: an announced tensor was not written, which is a bug.
        """
        if missing := self._place.keys() - self._written:
            raise ValueError(f"planned tensors were not written: {sorted(missing)[:5]}")
        with disk_errors(self.partial):
            for name, file in side_files.items():
                copy = self.partial / name
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
                _sync(copy)
            for name, value in json_files.items():
                write_json(self.partial / name, value)

    def publish(self) -> None:
        """Rename `OUT.partial` to `OUT`, then remove the run's own records: killed in between, nothing is lost."""
        refuse_unless_empty(self.out)  # as it was when the run began
        if self.out.exists():
            self.out.rmdir()
        _sync(self.partial)
        self.partial.rename(self.out)
        _sync(self.out.parent)
        for record in (self._journal.name, "arguments.json"):
            (self.out / record).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Force a file's contents, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_unless_empty(out: Path) -> None:
    """Raise HlwqError if `out` exists and is anything but an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HlwqError(f"{out} is not empty. Choose another output directory or delete this one.")


def check_disk(directory: Path, needed: int) -> None:
    """Raise HlwqError if the file system of `directory` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise HlwqError(
            f"{directory} has {free / 1e9:.2f} GB free, but the output needs {needed / 1e9:.2f} GB. "
            "Free some space or choose another disk."
        )


def hash_file(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _split_into_shards(tensors: list[TensorSpec], shard_bytes: int) -> dict[str, list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in tensors:
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _header(tensors: list[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """A shard's safetensors header and where in the file each tensor begins.

    The format: a little-endian uint64 length, that many bytes of JSON padded with spaces, then the data without gaps.
    Wider dtypes come first, so that every tensor is aligned.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in sorted(tensors, key=lambda spec: -DTYPES[spec.dtype].itemsize):
        end = position + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {spec.name: start + entries[spec.name]["data_offsets"][0] for spec in tensors}
    return struct.pack("<Q", len(text)) + text, offsets


def first_difference(before: Any, now: Any, where: str = "") -> str:
    """The first place where two JSON values differ, in words; empty if they are equal."""
    if before == now:
        return ""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if found := first_difference(before.get(key), now.get(key), f"{where}.{key}" if where else key):
                return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            if found := first_difference(old, new, f"{where}[{index}]"):
                return found
    old, new = ("not set" if each is None else json.dumps(each, ensure_ascii=False) for each in (before, now))
    return f"{where} was {old}, now it is {new}"


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turn the errors of a full disk into an HlwqError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise HlwqError(
                f"The disk of {directory} is full. Free some space and run the same command again: "
                "it goes on where it stopped."
            ) from error
        raise
