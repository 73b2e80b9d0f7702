"""Experts in memory as far as there is room, those that tokens need and that are not there read beside the work."""

from __future__ import annotations

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

from hlwq.errors import RequestError
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
        self.capacity = size if isinstance(size, int) else bytes_of("expert_cache", size) // least
        if self.capacity < 1:
            raise RequestError(
                f"`expert_cache` {size} must hold an expert of each layer: {least / 1e6:,.1f} MB at least.",
                argument="expert_cache",
            )
        self.counters = Counters()
        self._store = store
        self._layers = {layer: LayerCache(self.capacity, POLICIES[policy]()) for layer in store.counts}
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._spare: list[Tensor] = []
        self._passing = 0  # being read or run
        self._expected: tuple[str, deque[_Read]] = "", deque()
        self._lock = Lock()
        self._reader = ThreadPoolExecutor(1, "experts")

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertCache:
        """Copies of a model share it."""
        return self

    @property
    def held(self) -> int:
        """Bytes that experts take now."""
        return self._store.nbytes * (len(self._kept) + len(self._spare) + self._passing)

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
        with self._lock:
            cache = self._layers[layer]
            walk = cache.use(tokens)
            self.counters.hits += len(walk.hits)
            self.counters.misses += len(walk.loads)
            reads = self._expected_of(layer, walk.loads)
            early = {expert for expert, _, _ in reads}
            loads, leaving = (each for each in walk.loads if each not in early), iter(walk.leaving)
            try:
                reads.extend(self._start(layer, expert, device) for expert in islice(loads, AHEAD - len(reads)))
                for expert in walk.hits:
                    yield expert, self._kept[layer, expert].to(device)
                while reads:
                    expert, row, done = reads.popleft()
                    self._wait(done)
                    yield expert, row
                    if expert in cache.resident:
                        self._kept[layer, expert] = row
                        left = next(leaving, None)
                        if left is not None:
                            self._spare.append(self._kept.pop((layer, left)))
                    else:
                        self._spare.append(row)
                    self._passing -= 1
                    reads.extend(self._start(layer, expert, device) for expert in islice(loads, 1))
            except BaseException:
                for _, _, done in reads:
                    wait([done])
                self._passing = 0
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
        with self._lock:
            self._expected_of("", [])
            missing = (expert for expert in experts if expert not in self._layers[layer].resident)
            self._expected = layer, deque(self._start(layer, expert, device) for expert in islice(missing, AHEAD))

    def _expected_of(self, layer: str, experts: Sequence[int]) -> deque[_Read]:
        """What is being read of what a layer needs; the memory of the rest is spare again."""
        of, reads = self._expected
        self._expected = "", deque()
        wanted: deque[_Read] = deque()
        for read in reads:
            if of == layer and read[0] in experts:
                wanted.append(read)
            else:
                self._wait(read[2])
                self._spare.append(read[1])
                self._passing -= 1
        return wanted

    def _start(self, layer: str, expert: int, device: torch.device) -> _Read:
        """Begin to read an expert into memory that is spare."""
        at = next((place for place, row in enumerate(self._spare) if row.device == device), None)
        if at is None:
            with torch.inference_mode(False):  # else the reading thread could not write to it
                row = torch.empty(self._store.nbytes, dtype=torch.uint8, device=device)
        else:
            row = self._spare.pop(at)
        self._passing += 1
        # What still runs on a GPU may use that memory.
        free = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        return expert, row, self._reader.submit(self._read, layer, expert, row, free)

    def _read(self, layer: str, expert: int, row: Tensor, free: torch.cuda.Event | None) -> None:
        if free is None:
            self._store.read(layer, expert, row)
        else:
            with torch.cuda.stream(torch.cuda.Stream(row.device)) as stream:
                stream.wait_event(free)
                self._store.read(layer, expert, row)
                stream.synchronize()
        self.counters.nbytes += self._store.nbytes

    def _wait(self, read: Future[None]) -> None:
        since = perf_counter()
        read.result()
        self.counters.seconds += perf_counter() - since
