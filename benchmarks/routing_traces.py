"""Hit rates of caches of experts on routing traces that others published.

    python benchmarks/routing_traces.py qwen.route.csv gptoss.route.csv gemma.route.csv

The files are those of github.com/Helldez/BigMoeOnEdge (Apache-2.0, commit 2d4f2b11), in
docs/bench-data/2026-07-15-route-trace: one request each, of which the generated tokens are replayed, one cache for each
layer, empty at first. Lines are what was used: turn, phase, step, layer, slot, expert and more; `phase` 1 generates.
`fork` is the score that a published fork of vLLM calls LFRU: uses, each 0.95 of the next, over one plus the tokens
since the last.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hlwq.expert_policies import POLICIES, Belady, LayerCache


class Fork:
    """The score of the fork, which changes as time passes."""

    def __init__(self) -> None:
        self._uses: dict[int, tuple[float, int]] = {}
        self._now = 0

    def used(self, expert: int, time: int) -> None:
        count, _ = self._uses.get(expert, (0.0, 0))
        self._uses[expert], self._now = (count * 0.95 + 1, time), time

    def worth(self, expert: int) -> tuple[float, int]:
        count, last = self._uses[expert]
        return count / (1 + self._now - last), -expert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--capacities", type=int, nargs="+", default=[8, 16, 32])
    options = parser.parse_args()
    names = ["lru", "lfu", "fork", "lfru", "belady"]
    table = Table("trace", "experts", *names, "lfru − lru", "belady − lfru")
    for file in options.files:
        layers, experts = uses_in(file)
        each = max(len(token) for tokens in layers for token in tokens)
        for capacity in options.capacities:
            rates = {}
            for name in names:
                hits = misses = 0
                for tokens in layers:
                    policy: Callable[[], Any] = {**POLICIES, "fork": Fork}.get(
                        name, lambda tokens=tokens: Belady(tokens)
                    )
                    cache = LayerCache(capacity, policy())
                    for token in tokens:
                        cache.use([token])
                    hits, misses = hits + cache.hits, misses + cache.misses
                rates[name] = 100 * hits / (hits + misses)
            differences = rates["lfru"] - rates["lru"], rates["belady"] - rates["lfru"]
            table.add_row(
                f"{file.name}, {len(layers)} layers, {len(layers[0])} tokens",
                f"{capacity} of {experts}, {each} for each token",
                *(f"{rates[name]:.1f}" for name in names),
                *(f"{difference:+.1f}" for difference in differences),
            )
    Console(width=150).print(table)


def uses_in(file: Path) -> tuple[list[list[list[int]]], int]:
    """The experts of each generated token, layer by layer, and how many there are: the next power of two."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    uses: dict[int, dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in csv.DictReader(lines):
        if row["phase"] == "1":
            uses[int(row["layer"])][int(row["turn"]), int(row["step"])].append(int(row["expert"]))
    layers = [[tokens[key] for key in sorted(tokens)] for _, tokens in sorted(uses.items())]
    most = max(expert for tokens in layers for token in tokens for expert in token)
    return layers, 1 << most.bit_length()


if __name__ == "__main__":
    main()
