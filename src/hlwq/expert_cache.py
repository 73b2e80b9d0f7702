"""Which experts of a layer stay in memory where not all of them fit.

A token goes to a few experts of each layer. Those that are not resident are loaded, each in the place of another, which
a policy chooses among those that the token does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp2, inf, log2
from typing import Any, Protocol

HALF_LIFE = 16.0
"""Tokens after which a use counts half, for `lfru`."""


class Policy(Protocol):
    """What chooses the expert to give up.

    Attributes:
        worth: of each expert that was used; that of the least is given up.
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

    No other choice has more hits where all experts of a token are resident together.
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


class LayerCache:
    """The experts of one layer that are in memory.

    Attributes:
        capacity: how many fit: at least those of a token.
        resident: which are there.
        hits: how often an expert was there when a token needed it.
        misses: how often one was not.
    """

    def __init__(self, capacity: int, policy: Policy) -> None:
        self.capacity, self._policy = capacity, policy
        self.resident: set[int] = set()
        self.hits = self.misses = self._time = 0

    def use(self, experts: Sequence[int]) -> list[tuple[int, int | None]]:
        """Use the experts of a token, which are then all resident.

        Args:
            experts: by their numbers, each once.

        Returns:
            What is loaded, and what each takes the place of; None while there is room.

        Raises:
            ValueError: they do not fit.
        """
        if len(experts) > self.capacity:
            raise ValueError(f"{len(experts)} experts of a token do not fit where there is room for {self.capacity}.")
        missing = [expert for expert in experts if expert not in self.resident]
        spare = self.resident.difference(experts)
        loads: list[tuple[int, int | None]] = []
        for expert in missing:
            given_up = None
            if len(self.resident) == self.capacity:
                given_up = min(spare, key=self._policy.worth.__getitem__)
                spare.remove(given_up)
                self.resident.remove(given_up)
            self.resident.add(expert)
            loads.append((expert, given_up))
        for expert in experts:
            self._policy.used(expert, self._time)
        self.hits += len(experts) - len(missing)
        self.misses += len(missing)
        self._time += 1
        return loads


def hit_rate(uses: Sequence[Sequence[int]], policy: Policy, capacity: int) -> float:
    """The share of uses that a cache of one layer, empty at first, has there.

    Args:
        uses: the experts of each token.
        policy: what it gives up.
        capacity: experts that fit, at least those of a token.
    """
    cache = LayerCache(capacity, policy)
    for experts in uses:
        cache.use(experts)
    total = cache.hits + cache.misses
    return cache.hits / total if total else 0.0
