"""Experts that run on their bytes, as checkpoints in format hlwq hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hlwq.formats import Scheme
from hlwq.formats.hlwq import decode
from hlwq.kernels import matmul

CHUNK = 1024
"""Tokens whose experts are walked through together. It bounds what their outputs take before they are summed."""

Rows = Callable[[Sequence[Sequence[int]], torch.device], Iterable[tuple[int, Tensor]]]
"""What gives the experts that tokens go to, each once and in any order, with its bytes on a device."""


@dataclass(frozen=True)
class ExpertShape:
    """What the bytes of an expert are: codes of gate, up and down, then their norms.

    Attributes:
        hidden: width of what an expert is given and makes.
        inner: width between its matrices.
        scheme: bits and group size.
    """

    hidden: int
    inner: int
    scheme: Scheme

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out, in) of gate, up and down."""
        return [(self.inner, self.hidden), (self.inner, self.hidden), (self.hidden, self.inner)]

    @cached_property
    def starts(self) -> list[int]:
        """Where codes and then norms begin, in bytes; last, where the expert ends."""
        codes = [rows * (columns * self.scheme.bits // 8) for rows, columns in self.shapes]
        norms = [rows * (columns // self.scheme.group_size) * 2 for rows, columns in self.shapes]
        return [sum((codes + norms)[:place]) for place in range(7)]

    @property
    def nbytes(self) -> int:
        """What an expert takes."""
        return self.starts[-1]

    def matrix(self, expert: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Codes, uint8 (rows, bytes), and norms, float16 (rows, groups), of gate, up or down, in an expert's bytes."""
        rows, starts = self.shapes[place][0], self.starts
        codes = expert[starts[place] : starts[place + 1]].view(rows, -1)
        norms = expert[starts[place + 3] : starts[place + 4]].view(torch.float16).view(rows, -1)
        return codes, norms

    def decoded(self, expert: Tensor, place: int) -> Tensor:
        """Gate, up or down: float32 (out, in)."""
        return decode(*self.matrix(expert, place), self.scheme.bits)

    def compute(self, expert: Tensor, inputs: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """What an expert makes of inputs.

        Args:
            expert: its bytes, uint8.
            inputs: (n, hidden).
            gate: makes (n, inner) of the outputs of gate and up, (n, 2·inner).

        Returns:
            (n, hidden) in the dtype of the inputs.
        """
        outputs = [matmul(inputs, *self.matrix(expert, place), self.scheme.bits) for place in (0, 1)]
        return matmul(gate(torch.cat(outputs, -1)), *self.matrix(expert, 2), self.scheme.bits)


def rows_in(packed: Tensor, tokens: Sequence[Sequence[int]], device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """The experts that tokens go to, where all are in memory: see `Rows`."""
    for expert in sorted({expert for experts in tokens for expert in experts}):
        if expert < len(packed):  # the others are what other ranks hold
            yield expert, packed[expert].to(device)


def run_experts(
    inputs: Tensor, index: Tensor, weights: Tensor, shape: ExpertShape, gate: Callable[[Tensor], Tensor], rows: Rows
) -> Tensor:
    """What the experts make of tokens, weighted and summed, which depends in no bit on the order they run in.

    Args:
        inputs: (tokens, hidden).
        index: the experts of each token, (tokens, k).
        weights: their weights, (tokens, k).
        shape: what an expert's bytes are.
        gate: see `ExpertShape.compute`.
        rows: gives the experts; those that it leaves out count nothing.

    Returns:
        (tokens, hidden) in the dtype of the inputs.
    """
    sums = torch.empty_like(inputs)
    for start in range(0, len(inputs), CHUNK):
        part = slice(start, start + CHUNK)
        given, chosen = inputs[part], index[part]
        outputs = inputs.new_zeros(*chosen.shape, shape.hidden)
        for expert, row in rows(chosen.tolist(), inputs.device):
            token, place = torch.where(chosen == expert)
            outputs[token, place] = shape.compute(row, given[token], gate)
        sums[part] = (outputs * weights[part].unsqueeze(-1)).sum(1)
    return sums
