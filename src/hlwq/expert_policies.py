"""Which experts of a layer stay in memory where not all of them fit.

A token goes to a few experts of each layer. Those that are not resident are loaded, each in the place of another, which
a policy chooses among those that the token does not need.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from math import exp2, inf, sqrt
from typing import Any, Protocol

HALF_LIFE = 32.0
"""Tokens after which a use counts half, for `lfru`."""


class Policy(Protocol):
    """What says which experts are worth keeping."""

    def used(self, expert: int, time: int) -> None:
        """An expert was used. Times count tokens, from 0."""

    def worth(self, expert: int) -> Any:
        """What an expert that was used is worth now; no two are worth the same."""


class Lru:
    """Least recently used."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}

    def used(self, expert: int, time: int) -> None:
        """See `Policy`."""
        self._last[expert] = time

    def worth(self, expert: int) -> Any:
        """See `Policy`."""
        return self._last[expert], -expert


class Lfu(Lru):
    """Least frequently used since the beginning, resident or not; of equals, the least recently."""

    def __init__(self) -> None:
        super().__init__()
        self._uses: Counter[int] = Counter()

    def used(self, expert: int, time: int) -> None:
        """See `Policy`."""
        super().used(expert, time)
        self._uses[expert] += 1

    def worth(self, expert: int) -> Any:
        """See `Policy`."""
        return self._uses[expert], super().worth(expert)


class Lfru(Lru):
    """Least frequently used of late: Σ 2^(−ageᵢ / `HALF_LIFE`) over the uses i, over √(2 + age of the last).

    Ages are in tokens. The sum alone ranks below `Lru` where a cache holds few of the experts (by 0.3 points at 8 of
    128 of gpt-oss-120b), the square root mends that; `benchmarks/routing_traces.py` measures it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[int, float] = {}
        self._now = 0

    def used(self, expert: int, time: int) -> None:
        """See `Policy`."""
        self._uses[expert] = 1 + (self._decayed(expert, time) if expert in self._uses else 0)
        self._now = time
        super().used(expert, time)

    def worth(self, expert: int) -> Any:
        """See `Policy`."""
        frequency = self._decayed(expert, self._now)
        return frequency / sqrt(2 + self._now - self._last[expert]), super().worth(expert)

    def _decayed(self, expert: int, time: int) -> float:
        return self._uses[expert] * exp2((self._last[expert] - time) / HALF_LIFE)


class Belady:
    """The expert whose next use is farthest away (Belady, 1966): for replays, which know it.

    No other choice has more hits where a cache keeps all experts of a token.
    """

    def __init__(self, uses: Sequence[Sequence[int]]) -> None:
        self._next: list[dict[int, float]] = []
        self._worth: dict[int, Any] = {}
        following: dict[int, float] = {}
        for time in range(len(uses) - 1, -1, -1):
            self._next.append({expert: following.get(expert, inf) for expert in uses[time]})
            following.update(dict.fromkeys(uses[time], time))
        self._next.reverse()

    def used(self, expert: int, time: int) -> None:
        """See `Policy`."""
        self._worth[expert] = (-self._next[time][expert], -expert)

    def worth(self, expert: int) -> Any:
        """See `Policy`."""
        return self._worth[expert]


POLICIES: dict[str, Callable[[], Policy]] = {"lru": Lru, "lfu": Lfu, "lfru": Lfru}
"""Those that need not know what comes."""


@dataclass(frozen=True)
class Walk:
    """The experts of a call.

    Attributes:
        hits: those that are resident, which run first.
        loads: the others.
        leaving: those that are not resident afterwards, without those that are only passing.
    """

    hits: list[int]
    loads: list[int]
    leaving: list[int]


class LayerCache:
    """The experts of one layer that are in memory.

    Attributes:
        capacity: how many fit.
        resident: which are there after the last call.
        hits: how often an expert was there when a call needed it.
        misses: how often one was not.
    """

    def __init__(self, capacity: int, policy: Policy) -> None:
        self.capacity, self._policy = capacity, policy
        self.resident: set[int] = set()
        self.hits = self.misses = self._time = 0

    def use(self, tokens: Sequence[Sequence[int]]) -> Walk:
        """Use the experts of the tokens of a call, each once however many tokens go to it.

        Those of the last token are resident afterwards, and of the others what is worth most.

        Args:
            tokens: the experts of each, by their numbers, each once.
        """
        for experts in tokens:
            for expert in experts:
                self._policy.used(expert, self._time)
            self._time += 1
        before, needed = self.resident, {expert for experts in tokens for expert in experts}
        last, worth = set(tokens[-1]), self._policy.worth
        self.resident = set(nlargest(self.capacity, before | needed, key=lambda each: (each in last, worth(each))))
        walk = Walk(sorted(needed & before), sorted(needed - before), sorted(before - self.resident))
        self.hits += len(walk.hits)
        self.misses += len(walk.loads)
        return walk


def hit_rate(uses: Sequence[Sequence[int]], policy: Policy, capacity: int) -> float:
    """The share of uses that a cache of one layer, empty at first, has there, token by token.

    Args:
        uses: the experts of each token.
        policy: what it gives up.
        capacity: experts that fit.
    """
    cache = LayerCache(capacity, policy)
    for experts in uses:
        cache.use([experts])
    total = cache.hits + cache.misses
    return cache.hits / total if total else 0.0
