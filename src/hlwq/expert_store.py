"""Experts of a packed checkpoint where they lie: each is one contiguous read."""

from __future__ import annotations

import os
from io import RawIOBase
from pathlib import Path

import torch
from torch import Tensor

from hlwq.containers import EXPERT, Reader
from hlwq.errors import CheckpointError, RequestError, UnsupportedError
from hlwq.formats.hlwq import PARTS


class ExpertStore:
    """The packed experts of a checkpoint, in its files or in memory.

    Attributes:
        counts: how many each layer has, by the name of its stack in the files.
        nbytes: what an expert takes.
    """

    def __init__(self, reader: Reader, source: str = "disk") -> None:
        """Find the experts.

        Args:
            reader: a checkpoint in format hlwq.
            source: `disk`, or `memory` to read them all now into memory from which a GPU copies fast.

        Raises:
            RequestError: the source is neither.
            UnsupportedError: there are none, or their sizes differ.
        """
        if source not in ("disk", "memory"):
            message = f"`expert_source` {source} is unknown. Use disk or memory."
            raise RequestError(message, argument="expert_source")
        self._places: dict[tuple[str, int], tuple[Path, int]] = {}
        sizes: dict[tuple[str, int], int] = {}
        for name, spec in reader.tensors.items():
            found = EXPERT.match(name)
            if found and found[4] in PARTS:
                key, (file, offset) = (f"{found[1]}experts", int(found[2])), reader.place(name)
                self._places[key] = file, min(offset, self._places.get(key, (file, offset))[1])
                sizes[key] = sizes.get(key, 0) + spec.nbytes
        if len(set(sizes.values())) != 1:
            what = "has experts of different sizes" if sizes else "has no packed experts"
            raise UnsupportedError(f"{reader.path} {what}.", path=reader.path)
        self.nbytes = next(iter(sizes.values()))
        layers = [layer for layer, _ in sizes]
        self.counts = {layer: layers.count(layer) for layer in dict.fromkeys(layers)}
        self._files = {file: file.open("rb", buffering=0) for file, _ in self._places.values()}
        self._stamps = {file: _stamp(stream) for file, stream in self._files.items()}
        self._staged: Tensor | None = None
        self._memory: dict[str, Tensor] = {}
        if source == "memory":
            stacks = {layer: _host_memory(count, self.nbytes) for layer, count in self.counts.items()}
            for layer, expert in self._places:
                self.read(layer, expert, stacks[layer][expert])
            self._memory = stacks

    def read(self, layer: str, expert: int, into: Tensor) -> None:
        """Copy an expert. Not for two threads at once.

        Args:
            layer: the name of its stack.
            expert: its number.
            into: uint8 (nbytes,), on any device.

        Raises:
            CheckpointError: the file is not what it was.
        """
        if self._memory:
            into.copy_(self._memory[layer][expert], non_blocking=True)
            return
        if into.device.type != "cpu":
            if self._staged is None:
                (self._staged,) = _host_memory(1, self.nbytes)
            self.read(layer, expert, self._staged)
            into.copy_(self._staged)
            return
        file, offset = self._places[layer, expert]
        stream, buffer, done = self._files[file], into.numpy().data, 0
        changed = _stamp(stream) != self._stamps[file]
        while not changed and done < self.nbytes:
            now = _read_at(stream, buffer[done:], offset + done)
            changed, done = not now, done + now
        if changed:
            raise CheckpointError(
                f"{file} has changed since it was opened. Load the model again.", path=file, tensor=layer
            )


def _read_at(stream: RawIOBase, buffer: memoryview, offset: int) -> int:
    """Read some bytes, without the position that processes share which were forked; how many."""
    if hasattr(os, "preadv"):
        return os.preadv(stream.fileno(), [buffer], offset)
    stream.seek(offset)  # Windows, where none are
    return stream.readinto(buffer) or 0


def _stamp(stream: RawIOBase) -> tuple[int, int]:
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def _host_memory(count: int, nbytes: int) -> Tensor:
    # Said, since models are made on the device `meta`.
    return torch.empty(count, nbytes, dtype=torch.uint8, device="cpu", pin_memory=torch.cuda.is_available())
