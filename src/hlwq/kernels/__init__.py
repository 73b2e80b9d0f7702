"""Products with packed HLWQ matrices that are never decoded as a whole."""

from __future__ import annotations

from torch import Tensor

from hlwq.kernels import reference

__all__ = ["matmul"]


def matmul(inputs: Tensor, packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    """Multiply by a packed matrix Ŵ, as a linear layer does: inputs · Ŵᵀ.

    Args:
        inputs: (…, in), any floating dtype.
        packed: uint8 (out, in·bits/8), codes as `hlwq.packing.pack` lays them out.
        norms: float16 (out, groups), of groups of in / groups neighbouring columns, a power of two.
        bits: of a code, 2 to 8.

    Returns:
        (…, out), in the dtype of `inputs`.
    """
    return reference.matmul(inputs, packed, norms, bits)
