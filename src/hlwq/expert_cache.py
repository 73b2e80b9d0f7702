"""Experts in memory as far as there is room, those that tokens need and that are not there read beside the work."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from threading import Lock
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hlwq.errors import RequestError, UnsupportedError
from hlwq.expert_policies import POLICIES, LayerCache
from hlwq.expert_store import ExpertStore
from hlwq.options import bytes_of

AHEAD = 2
"""Experts in memory beside those that are kept: one runs while the next is read."""


_Read = tuple[int, Tensor, "Future[None]"]
"""An expert that is being read: its number, its memory, and what ends when it is there."""


@dataclass
class Counters:
    """What a cache has done.

    Attributes:
        hits: how often an expert was there when the tokens of a call needed it.
        misses: how often one was not.
        nbytes: read.
        seconds: waited for what was read.
    """

    hits: int = 0
    misses: int = 0
    nbytes: int = 0
    seconds: float = 0.0


class ExpertCache:
    """The experts of a model's layers, of which a number is kept in memory.

    Attributes:
        capacity: experts of each layer that are kept.
        counters: what was done since the beginning.
    """

    def __init__(self, store: ExpertStore, size: int | str, policy: str = "lfru") -> None:
        """Start empty.

        Args:
            store: where the experts are.
            size: experts of each layer that are kept; or bytes for those of all layers, like `4GB`.
            policy: which are kept: lru, lfu or lfru.

        Raises:
            RequestError: the size is none or does not hold one expert of each layer, or the policy is unknown.
        """
        if policy not in POLICIES:
            message = f"`expert_policy` {policy} is unknown. Use one of {', '.join(POLICIES)}."
            raise RequestError(message, argument="expert_policy")
        least = store.nbytes * len(store.counts)
        if isinstance(size, bool):
            raise RequestError(f"`expert_cache` {size} is not a size. Write it like 4GB.", argument="expert_cache")
        self.capacity = size if isinstance(size, int) else bytes_of("expert_cache", size) // least
        if self.capacity < 1:
            raise RequestError(
                f"`expert_cache` {size} must hold an expert of each layer: {least / 1e6:,.1f} MB at least.",
                argument="expert_cache",
            )
        if isinstance(size, int) and self.capacity > max(store.counts.values()):
            raise RequestError(
                f"`expert_cache` {size} counts experts of a layer, which has {max(store.counts.values())}. Write bytes "
                "like 4GB.",
                argument="expert_cache",
            )
        self.counters = Counters()
        self._store = store
        self._layers = {layer: LayerCache(self.capacity, POLICIES[policy]()) for layer in store.counts}
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._spare: list[Tensor] = []
        self._expected: tuple[str, deque[_Read]] = "", deque()
        self._start_thread()

    def _start_thread(self) -> None:
        self._process, self._lock = os.getpid(), Lock()
        self._reader = ThreadPoolExecutor(1, "experts")

    def _after_fork(self) -> None:
        """Begin anew in a process that was forked, to which threads and what they read do not come along."""
        if self._process != os.getpid():
            self._start_thread()
            self._expected = "", deque()

    def reserve(self, device: torch.device) -> None:
        """Take all memory now, where others would take it otherwise."""
        most = sum(min(self.capacity, count) for count in self._store.counts.values()) + AHEAD
        while len(self._spare) + len(self._kept) < most:
            self._spare.append(self._memory(device))

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertCache:
        """Copies of a model share it."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("Experts that are not in memory cannot be pickled. Leave `expert_cache` out.")

    def rows(self, layer: str, tokens: Sequence[Sequence[int]], device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """The experts that tokens go to, each once: those that are there, then the others as they arrive.

        Args:
            layer: the name of their stack.
            tokens: the experts of each.
            device: where they are wanted.

        Yields:
            The number of an expert, and its bytes, uint8, good until the next is asked for.

        Raises:
            CheckpointError: a file is not what it was.
        """
        self._after_fork()
        with self._lock:
            cache, needed = self._layers[layer], {expert for experts in tokens for expert in experts}
            reads = self._expected_of(layer, needed - self._layers[layer].resident, device)
            early = {expert for expert, _, _ in reads}
            walk = cache.use(tokens)
            self.counters.hits += len(walk.hits)
            self.counters.misses += len(walk.loads)
            loads, leaving = (each for each in walk.loads if each not in early), iter(walk.leaving)
            try:
                reads.extend(self._start(layer, expert, device) for expert in islice(loads, AHEAD - len(reads)))
                for expert in walk.hits:
                    self._kept[layer, expert] = row = self._kept[layer, expert].to(device)
                    yield expert, row
                while reads:
                    expert, row, done = reads.popleft()
                    self._wait(done)
                    done.result()
                    yield expert, row
                    if expert in cache.resident:
                        self._kept[layer, expert] = row
                        left = next(leaving, None)
                        if left is not None:
                            self._spare.append(self._kept.pop((layer, left)))
                    else:
                        self._spare.append(row)
                    reads.extend(self._start(layer, expert, device) for expert in islice(loads, 1))
            except BaseException:
                for _, _, done in reads:
                    self._wait(done)
                there = cache.resident & {expert for of, expert in self._kept if of == layer}
                cache.resident = there
                self._kept = {key: row for key, row in self._kept.items() if key[0] != layer or key[1] in there}
                raise

    def expect(self, layer: str, experts: Sequence[int], device: torch.device) -> None:
        """Begin to read what a layer is likely to need next.

        Args:
            layer: the name of the stack.
            experts: which, the likeliest first; those that are there are left out, and what there is no memory for.
            device: where they will be wanted.
        """
        self._after_fork()
        with self._lock:
            self._expected_of("", set(), device)
            missing = (expert for expert in experts if expert not in self._layers[layer].resident)
            self._expected = layer, deque(self._start(layer, expert, device) for expert in islice(missing, AHEAD))

    def _expected_of(self, layer: str, experts: set[int], device: torch.device) -> deque[_Read]:
        """What is being read of what a layer needs; the memory of the rest is spare again."""
        of, reads = self._expected
        self._expected = "", deque()
        wanted: deque[_Read] = deque()
        for expert, row, done in reads:
            if of == layer and expert in experts and row.device == device:
                wanted.append((expert, row, done))
            else:
                self._wait(done)  # an error in what is not needed is none
                self._spare.append(row)
        return wanted

    def _memory(self, device: torch.device) -> Tensor:
        with torch.inference_mode(False):  # else the reading thread could not write to it
            return torch.empty(self._store.nbytes, dtype=torch.uint8, device=device)

    def _start(self, layer: str, expert: int, device: torch.device) -> _Read:
        """Begin to read an expert into memory that is spare."""
        at = next((place for place, row in enumerate(self._spare) if row.device == device), None)
        if at is not None:
            row = self._spare.pop(at)
        else:
            del self._spare[-1:]  # of another device, from which the model has moved
            row = self._memory(device)
        # What still runs on a GPU may use that memory.
        free = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        return expert, row, self._reader.submit(self._read, layer, expert, row, free)

    def _read(self, layer: str, expert: int, row: Tensor, free: torch.cuda.Event | None) -> None:
        if free is None:
            self._store.read(layer, expert, row)
        else:
            stream = torch.cuda.Stream(row.device)
            with torch.cuda.stream(stream):
                stream.wait_event(free)
                self._store.read(layer, expert, row)
                stream.synchronize()
        self.counters.nbytes += self._store.nbytes

    def _wait(self, read: Future[None]) -> None:
        since = perf_counter()
        wait([read])
        self.counters.seconds += perf_counter() - since
