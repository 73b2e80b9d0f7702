"""Safetensors checkpoints, written tensor by tensor, durably and all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hlwq.containers.stacks import Part, with_stacks
from hlwq.containers.tensors import DTYPES, TensorSpec
from hlwq.errors import HlwqWarning, RequestError
from hlwq.files import check_disk, differences, disk_errors, read_json, sync, write_json

DEFAULT_SHARD_BYTES = 5 * 10**9
"""The hub's own habit."""
MODEL, ARGUMENTS, JOURNAL = "model", "arguments.json", "journal.jsonl"
"""Inside `OUT.partial`: the checkpoint, what determines its bytes, and which units are done."""


def arguments_before(out: Path) -> dict[str, Any]:
    """What determined the bytes of an interrupted run into `out`; empty where there was none."""
    file = partial_of(out.absolute()) / ARGUMENTS
    return read_json(file) if file.is_file() else {}


class Writer:
    """Writes a checkpoint whose tensors are known in advance, in any order, into `OUT.partial`.

    Since names, dtypes and shapes come from the plan, every shard's header is written first and each tensor goes
    straight to its place: nothing is held back in memory, the bytes do not depend on the order of the work, and a run
    that was interrupted goes on after the last unit that `commit` made durable. The checkpoint lies in
    `OUT.partial/model`, and the run's own records beside it, so that a single renaming publishes all of it and nothing
    else.

    Attributes:
        out: the directory that will appear.
        partial: the one that holds the run's records meanwhile.
        nbytes: bytes of the weight files, headers included.
        published: the directory had appeared already: an earlier run with these arguments was killed right after that.
    """

    def __init__(
        self,
        out: Path,
        tensors: Iterable[TensorSpec],
        arguments: dict[str, Any],
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        json_files: dict[str, dict[str, Any]] | None = None,
        parts: Iterable[Part] = (),
    ) -> None:
        """Start, or go on with, the directory `out`.

        The checkpoint can be opened by a `Reader` from the beginning; tensors not yet written read as zeros.

        Args:
            out: the directory that will appear; absent or empty.
            tensors: everything that will be written, in the order in which the shards shall hold it.
            arguments: what determines the bytes. A run goes on only with the same arguments.
            shard_bytes: the most that a shard holds, unless a single tensor is larger.
            json_files: `config.json` and the like, by name.
            parts: those of the tensors that lie in stacks, which are then in the files instead of them.

        Raises:
            RequestError: `out` is not empty, or an interrupted run had other arguments.
            ResourceError: the disk is too small.
        """
        self.out = out = out.absolute()
        self.partial = partial_of(out)
        part_of = {part.spec.name: part for part in parts}
        tensors = list(tensors)
        self._shards = _split_into_shards(with_stacks(tensors, part_of.values()), shard_bytes)
        self._json_files = dict(json_files or {})
        self._place: dict[str, tuple[str, int, TensorSpec]] = {}
        self._headers: dict[str, bytes] = {}
        self.nbytes = 0
        for file, shard in self._shards.items():
            self._headers[file], offsets = _header(shard)
            self.nbytes += len(self._headers[file]) + sum(spec.nbytes for spec in shard)
            self._place |= {spec.name: (file, offsets[spec.name], spec) for spec in shard}
        weight_map = {name: file for name, (file, _, _) in sorted(self._place.items())}
        for name, part in part_of.items():
            file, offset, _ = self._place[part.stack.name]
            self._place[name] = file, offset + part.offset, part.spec
        self._place = {spec.name: self._place[spec.name] for spec in tensors}
        if len(self._shards) > 1:
            total = sum(spec.nbytes for _, _, spec in self._place.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self._json_files["model.safetensors.index.json"] = index
        self._written: set[str] = set()
        self._committed: dict[str, Any] = {}
        self._digests: dict[str, dict[str, str]] = {}  # of each committed unit, by tensor
        self._journal = self.partial / JOURNAL
        self._model = self.partial / MODEL
        refuse_unless_empty(out)
        self.published = out.is_dir() and any(out.iterdir())  # and yet not refused
        started = (self.partial / ARGUMENTS).is_file() and (self._model.is_dir() or self.published)
        if self.partial.exists() and not started:
            self._discard_unstarted()
        if started:
            self._resume(arguments)
        else:
            self._start(arguments)

    @property
    def directory(self) -> Path:
        """Where the checkpoint lies now."""
        return self.out if self.published else self._model

    def _start(self, arguments: dict[str, Any]) -> None:
        needed = sum(spec.nbytes for _, _, spec in self._place.values())
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            check_disk(self.out.parent, needed)
            self.partial.mkdir()
            self._model.mkdir()
        except OSError as error:
            message = f"{self.out} cannot be made: {error.strerror}. Choose another output directory."
            raise RequestError(message, argument="out", path=self.out) from None
        with disk_errors(self.partial):
            self._lay_out()
            # The arguments come last: with them in place, the shards are.
            write_json(self.partial / ARGUMENTS, arguments)

    def _lay_out(self) -> None:
        """Give every shard its header and its size, and write the JSON files; what is there already stays."""
        for file, header in self._headers.items():
            with (self._model / file).open("r+b" if (self._model / file).exists() else "w+b") as stream:
                size = len(header) + sum(spec.nbytes for spec in self._shards[file])
                if stream.read(len(header)) != header or stream.seek(0, os.SEEK_END) != size:
                    stream.seek(0)
                    stream.write(header)
                    stream.truncate(size)
                    stream.flush()
                    os.fsync(stream.fileno())
        for name, value in self._json_files.items():
            write_json(self._model / name, value)
        sync(self._model)

    def _discard_unstarted(self) -> None:
        """Remove what a run left that stopped before its shards were laid out, and nothing else."""
        ours = {*self._shards, *self._json_files, ARGUMENTS, JOURNAL, MODEL}
        files = [*self.partial.iterdir(), *(self._model.iterdir() if self._model.is_dir() else ())]
        for file in files:
            if file.name.removesuffix(".tmp") not in ours or (file.is_dir() and file != self._model):
                raise RequestError(
                    f"{self.partial} holds {file.name}, but no record of a run that could go on. "
                    "Look at it, and delete it to start afresh.",
                    argument="out",
                    path=self.partial,
                )
        shutil.rmtree(self.partial)

    def _resume(self, arguments: dict[str, Any]) -> None:
        before, now = read_json(self.partial / ARGUMENTS), json.loads(json.dumps(arguments))
        if found := differences(before, now):
            raise RequestError(
                f"{self.partial} was left by a run that differs: {'; '.join(found[:3])}"
                f"{f'; and {len(found) - 3} more' if len(found) > 3 else ''}. "
                f"Repeat the run as it was, or delete {self.partial} to start afresh.",
                argument="out",
                path=self.partial,
            )
        if not self.published:
            with disk_errors(self.partial):
                self._lay_out()
        if self._journal.is_file():
            self._read_journal()

    def _read_journal(self) -> None:
        """Take up the units that are done, up to the first line that is damaged; what follows is cut off."""
        lines, end = self._journal.read_bytes().split(b"\n"), 0
        for number, line in enumerate(lines[:-1]):  # the last, without its end, was being written as the run was killed
            digest, _, text = line.partition(b" ")
            if digest.decode("latin1") != sha256(text).hexdigest():
                warnings.warn(
                    f"{self._journal}, line {number + 1} is damaged. What it and the {len(lines) - 2 - number} lines "
                    "after it record is done again.",
                    HlwqWarning,
                    stacklevel=2,
                )
                break
            entry = json.loads(text)
            self._committed[entry["unit"]], self._digests[entry["unit"]] = entry["record"], entry["sha256"]
            self._written.update(entry["sha256"])
            end += len(line) + 1
        with self._journal.open("r+b") as stream:
            stream.truncate(end)

    def verify(self, progress: Callable[[int, int, str], None]) -> list[str]:
        """Read what earlier runs committed, and forget the units that are not as they were written.

        A checkpoint that was published already is left to whoever reads it.

        Returns:
            The units that have to be done again.
        """
        lost = []
        for done, (unit, digests) in enumerate([] if self.published else self._digests.items()):
            progress(done, len(self._digests), f"verifying {unit}")
            if any(self._digest(name) != digest for name, digest in digests.items()):
                lost.append(unit)
        for unit in lost:
            del self._committed[unit]
            self._written.difference_update(self._digests.pop(unit))
        return lost

    def _digest(self, name: str) -> str:
        """SHA-256 of a tensor's bytes as the file holds them."""
        file, offset, spec = self._place[name]
        return _digest_of(self._model / file, offset, spec.nbytes)

    def committed(self, unit: str) -> Any:
        """The record given to `commit` for this unit by an earlier run, or None."""
        return self._committed.get(unit)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place.

        Args:
            name: one of the names announced.
            tensor: the values, in the dtype and shape announced, on any device.

        Raises:
            ResourceError: the disk is full.
            ValueError: the tensor is not the one announced, which is a bug.
        """
        file, offset, spec = self._place[name]
        if DTYPES[spec.dtype] != tensor.dtype or spec.shape != tuple(tensor.shape):
            raise ValueError(f"{name}: planned {spec.dtype} {spec.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with disk_errors(self.partial), (self._model / file).open("r+b") as stream:
            stream.seek(offset)
            stream.write(data.data)
        self._written.add(name)

    def commit(self, unit: str, names: Iterable[str], record: Any) -> None:
        """Make a unit's tensors durable, then record that they are done, and what they are.

        Args:
            unit: a name, unique in the run.
            names: the tensors written for it.
            record: JSON-serialisable; a later run gets it back from `committed`.
        """
        names = list(names)
        with disk_errors(self.partial):
            for file in {self._place[name][0] for name in names}:
                sync(self._model / file)
            digests = {name: self._digest(name) for name in names}
            text = json.dumps({"unit": unit, "record": record, "sha256": digests}).encode()
            with self._journal.open("ab") as stream:
                stream.write(sha256(text).hexdigest().encode() + b" " + text + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        self._committed[unit] = record
        self._digests[unit] = digests

    def finish(self, side_files: dict[str, Path], json_files: dict[str, dict[str, Any]]) -> None:
        """Add what stands beside the weights. The directory is then complete, but not yet in its place.

        Args:
            side_files: copied byte for byte, by their paths inside the directory.
            json_files: written anew, by name, beside those given at the start.

        Raises:
            ResourceError: the disk is full.
            ValueError: an announced tensor was not written, which is a bug.
        """
        if missing := self._place.keys() - self._written:
            raise ValueError(f"planned tensors were not written: {sorted(missing)[:5]}")
        if self.published:
            return
        with disk_errors(self.partial):
            for name, file in side_files.items():
                copy = self._model / name
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
                sync(copy)
            for name, value in json_files.items():
                write_json(self._model / name, value)

    def digests(self) -> dict[str, str]:
        """SHA-256 of the bytes of every tensor, in hexadecimal, once all are committed."""
        digests = {name: digest for unit in self._digests.values() for name, digest in unit.items()}
        return {name: digests[name] for name in self._place}

    def publish(self) -> None:
        """Give the checkpoint its place by one renaming, then remove the run's records."""
        if not self.published:
            refuse_unless_empty(self.out)  # as it was when the run began
            sync(self._model)
            self._model.replace(self.out)  # also over an empty directory
            sync(self.out.parent)
            self.published = True
        for record in (ARGUMENTS, JOURNAL):  # in this order: without arguments, there is no run to go on with
            (self.partial / record).unlink(missing_ok=True)
        self.partial.rmdir()
        sync(self.out.parent)


def partial_of(out: Path) -> Path:
    """Where a run writes until its output is complete: `OUT.partial`."""
    return out.with_name(out.name + ".partial")


def refuse_unless_empty(out: Path) -> None:
    """Raise RequestError if `out` is anything but absent, an empty directory, or what a run published as it was killed.

    Such a run's records are still in `OUT.partial`, and its checkpoint is not.
    """
    partial = partial_of(out)
    records = {file.name for file in partial.iterdir()} if partial.is_dir() else set()
    if not out.exists() or (out.is_dir() and not any(out.iterdir())) or (ARGUMENTS in records and MODEL not in records):
        return
    if partial.is_dir() and records <= {JOURNAL}:  # a run was killed as it cleared away the last of its records
        shutil.rmtree(partial)
    what = "is a finished checkpoint" if (out / "hlwq.json").is_file() else "is not empty"
    message = f"{out} {what}. Choose another output directory or delete this one."
    raise RequestError(message, argument="out", path=out)


def _digest_of(file: Path, offset: int, nbytes: int) -> str:
    """SHA-256 of a part of a file, in hexadecimal; of as much of it as the file holds."""
    digest = sha256()
    with file.open("rb") as stream:
        stream.seek(offset)
        while nbytes and (block := stream.read(min(nbytes, 1 << 22))):
            digest.update(block)
            nbytes -= len(block)
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
