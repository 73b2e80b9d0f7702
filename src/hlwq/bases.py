"""Bases: the coordinates in which weights are rounded.

A basis is an orthogonal matrix R along the input dimension. A solver rounds W R; what it decodes is Ŵ = Q(W R) Rᵀ, and
‖(W − Ŵ) X‖ is the same on both sides, with the Hessian Rᵀ H R. A basis has a block size of its own: the columns that
are rotated together need not be those that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from torch import Tensor

from hlwq.errors import RequestError
from hlwq.hadamard import rotate_blocks
from hlwq.options import check_types, option


class Basis(Protocol):
    """What every basis provides."""

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]

    @property
    def summary(self) -> str:
        """What it does to columns, in a few words; nothing if nothing."""

    def fitted(self, in_features: int, group_size: int) -> Basis:
        """The basis for matrices of this width, whose groups have this size.

        Raises:
            RequestError: it has no block that divides the width.
        """

    def rotate(self, values: Tensor) -> Tensor:
        """Float32 (…, in) times R."""

    def unrotate(self, values: Tensor) -> Tensor:
        """Float32 (…, in) times Rᵀ."""


@dataclass(frozen=True)
class Identity:
    """The columns as they are."""

    name: ClassVar[str] = "identity"
    title: ClassVar[str] = "columns as they are"
    reference: ClassVar[str] = ""

    @property
    def summary(self) -> str:
        """Nothing."""
        return ""

    def fitted(self, in_features: int, group_size: int) -> Identity:
        """Itself, whatever the width."""
        return self

    def rotate(self, values: Tensor) -> Tensor:
        """The same tensor."""
        return values

    def unrotate(self, values: Tensor) -> Tensor:
        """The same tensor."""
        return values


@dataclass(frozen=True)
class Hadamard:
    """Blocks of neighbouring columns, each times the Walsh–Hadamard matrix: R = diag(H_d, …, H_d).

    Attributes:
        block_size: d, a power of two; where it does not divide the width of a matrix, the largest power of two below
            it that does. None stands for the group size.
    """

    name: ClassVar[str] = "hadamard"
    title: ClassVar[str] = "Hadamard-rotated blocks"
    reference: ClassVar[str] = ""
    block_size: int | None = option("Columns rotated together, a power of two (default: a group).", default=None)

    def __post_init__(self) -> None:
        check_types(self)
        size = self.block_size
        if size is not None and (size < 2 or size & (size - 1)):
            raise RequestError(f"`block_size` is {size}; it must be a power of two from 2.")

    @property
    def summary(self) -> str:
        """The size of the blocks."""
        return f"rotated in blocks of {self.block_size or 'a group'}"

    def fitted(self, in_features: int, group_size: int) -> Hadamard:
        """The basis with the block size for this width. Raises RequestError where there is none."""
        if self.block_size is None:
            if group_size < 2 or group_size & (group_size - 1):
                raise RequestError(
                    f"`group_size` {group_size} must be a power of two, since groups are Hadamard-rotated."
                )
            return Hadamard(group_size)
        size = min(self.block_size, in_features & -in_features)  # the lowest set bit: the largest power that divides
        if size < 2:
            raise RequestError(
                f"in_features is {in_features}, which no power of two divides, so that nothing can be rotated. "
                "Keep the tensor with `exclude`.",
                argument="block_size",
            )
        return replace(self, block_size=size)

    def rotate(self, values: Tensor) -> Tensor:
        """Each block times H."""
        return rotate_blocks(values, self._size)

    def unrotate(self, values: Tensor) -> Tensor:
        """Each block times Hᵀ, which is H."""
        return rotate_blocks(values, self._size)

    @property
    def _size(self) -> int:
        if self.block_size is None:
            raise ValueError("This basis is not fitted to a width yet: see `fitted`.")
        return self.block_size


def rotates_groups(basis: Basis, group_size: int) -> bool:
    """Whether a basis rotates each group of this size by itself."""
    return isinstance(basis, Hadamard) and basis.block_size == group_size


BASES: dict[str, type[Identity] | type[Hadamard]] = {basis.name: basis for basis in (Identity, Hadamard)}
