"""Which experts of a layer stay in memory where not all of them fit.

A token goes to a few experts of each layer. Those that are not resident are loaded, each in the place of another, which
a policy chooses among those that the token does not need.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import exp2, inf, log2
from typing import Protocol

HALF_LIFE = 16.0
"""Uses of a layer after which a use counts half, for `lfru`."""


class Policy(Protocol):
    """What chooses the expert to give up: the one that it ranks lowest."""

    def used(self, expert: int, time: int) -> None:
        """An expert was used. Times count the uses of the layer, from 0."""

    def rank(self, expert: int, time: int) -> tuple[float, ...]:
        """How much an expert is worth keeping; of those never used, the least."""


class Lru:
    """Least recently used."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}

    def used(self, expert: int, time: int) -> None:
        """See `Policy`."""
        self._last[expert] = time

    def rank(self, expert: int, time: int) -> tuple[float, ...]:
        """Its last use."""
        return (self._last.get(expert, -1),)


class Lfu(Lru):
    """Least frequently used since the beginning, resident or not; of equals, the least recently."""

    def __init__(self) -> None:
        super().__init__()
        self._count: dict[int, int] = defaultdict(int)

    def used(self, expert: int, time: int) -> None:
        """See `Policy`."""
        super().used(expert, time)
        self._count[expert] += 1

    def rank(self, expert: int, time: int) -> tuple[float, ...]:
        """Its uses, then the last of them."""
        return (self._count.get(expert, 0), *super().rank(expert, time))


class Lfru(Lru):
    """Least frequently used of late: each use counts half after `HALF_LIFE` more uses of the layer.

    Kept as log2(Σ 2^(tᵢ / half-life)) over the uses tᵢ, which ranks experts as the decayed sums do at any time.
    """

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        super().__init__()
        self._half_life = half_life
        self._score: dict[int, float] = {}

    def used(self, expert: int, time: int) -> None:
        """See `Policy`."""
        super().used(expert, time)
        now = time / self._half_life
        before = self._score.get(expert, -inf)
        self._score[expert] = now + log2(1 + exp2(before - now))

    def rank(self, expert: int, time: int) -> tuple[float, ...]:
        """Its decayed uses, then the last of them."""
        return (self._score.get(expert, -inf), *super().rank(expert, time))


class Belady:
    """The expert whose next use is farthest away, which no policy beats (Belady, 1966): for replays, which know it."""

    def __init__(self, uses: Iterable[Sequence[int]]) -> None:
        self._times: dict[int, list[int]] = defaultdict(list)
        for time, experts in enumerate(uses):
            for expert in experts:
                self._times[expert].append(time)

    def used(self, expert: int, time: int) -> None:
        """See `Policy`."""

    def rank(self, expert: int, time: int) -> tuple[float, ...]:
        """How near its next use is."""
        times = self._times.get(expert, [])
        place = bisect_right(times, time)
        return (-times[place] if place < len(times) else -inf,)


POLICIES: dict[str, Callable[[], Policy]] = {"lru": Lru, "lfu": Lfu, "lfru": Lfru}
"""Those that need not know what comes."""


class LayerCache:
    """The experts of one layer that are in memory.

    Attributes:
        capacity: how many fit.
        resident: which are there.
        hits: how often an expert was there when a token needed it.
        misses: how often one was not.
    """

    def __init__(self, capacity: int, policy: Policy) -> None:
        if capacity < 1:
            raise ValueError(f"a capacity of {capacity} holds no expert.")
        self.capacity, self._policy = capacity, policy
        self.resident: set[int] = set()
        self.hits = self.misses = self._time = 0

    def use(self, experts: Sequence[int]) -> list[tuple[int, int | None]]:
        """Use the experts of a token.

        Args:
            experts: by their numbers, each once.

        Returns:
            What is loaded, in this order, and what each takes the place of; None while there is room. More experts
            than fit are walked through: one that is loaded may take the place of one that the token has used.
        """
        loads: list[tuple[int, int | None]] = []
        needed = set(experts)
        for expert in sorted(experts, key=lambda each: each not in self.resident):  # those that are there first
            if expert in self.resident:
                self.hits += 1
            else:
                self.misses += 1
                given_up = None
                if len(self.resident) == self.capacity:
                    spare = self.resident - needed or self.resident
                    given_up = min(spare, key=lambda each: (self._policy.rank(each, self._time), -each))
                    self.resident.remove(given_up)
                self.resident.add(expert)
                loads.append((expert, given_up))
            self._policy.used(expert, self._time)
        self._time += 1
        return loads


def hit_rate(uses: Sequence[Sequence[int]], policy: Policy, capacity: int) -> float:
    """The share of uses that a cache of one layer, empty at first, has there.

    Args:
        uses: the experts of each token.
        policy: what it gives up.
        capacity: experts that fit.
    """
    cache = LayerCache(capacity, policy)
    for experts in uses:
        cache.use(experts)
    total = cache.hits + cache.misses
    return cache.hits / total if total else 0.0
