"""Which experts of a layer stay in memory where not all of them fit.

A token goes to a few experts of each layer. Those that are not resident are loaded, each in the place of another, which
a policy chooses among those that the token does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from math import exp2, inf, log2
from typing import Any, Protocol

HALF_LIFE = 16.0
"""Tokens after which a use counts half, for `lfru`."""


class Policy(Protocol):
    """What says which experts are worth keeping.

    Attributes:
        worth: of each expert that was used; no two are worth the same.
    """

    worth: dict[int, Any]

    def used(self, expert: int, time: int) -> None:
        """An expert was used. Times count tokens, from 0."""


class Lru:
    """Least recently used."""

    def __init__(self) -> None:
        self.worth: dict[int, Any] = {}

    def used(self, expert: int, time: int) -> None:
        """See `Policy`."""
        self.worth[expert] = (time, -expert)


class Lfu(Lru):
    """Least frequently used since the beginning, resident or not; of equals, the least recently."""

    def used(self, expert: int, time: int) -> None:
        """See `Policy`."""
        count = self.worth[expert][0] if expert in self.worth else 0
        self.worth[expert] = (count + 1, time, -expert)


class Lfru(Lru):
    """Least frequently used of late: each use counts half after `HALF_LIFE` more tokens; of equals, least recently.

    Kept as log2(Σ 2^(tᵢ / half-life)) over the uses tᵢ, which ranks experts as the decayed sums do at any time.
    """

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        super().__init__()
        self._half_life = half_life

    def used(self, expert: int, time: int) -> None:
        """See `Policy`."""
        now = time / self._half_life
        before = self.worth[expert][0] if expert in self.worth else -inf
        self.worth[expert] = (now + log2(1 + exp2(before - now)), time, -expert)


class Belady:
    """The expert whose next use is farthest away (Belady, 1966): for replays, which know it.

    No other choice has more hits where a cache keeps all experts of a token.
    """

    def __init__(self, uses: Sequence[Sequence[int]]) -> None:
        self.worth: dict[int, Any] = {}
        self._next: list[dict[int, float]] = []
        following: dict[int, float] = {}
        for time in range(len(uses) - 1, -1, -1):
            self._next.append({expert: following.get(expert, inf) for expert in uses[time]})
            following.update(dict.fromkeys(uses[time], time))
        self._next.reverse()

    def used(self, expert: int, time: int) -> None:
        """See `Policy`."""
        self.worth[expert] = (-self._next[time][expert], -expert)


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
        self.resident = set(nlargest(self.capacity, before | needed, key=lambda each: (each in last, worth[each])))
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
