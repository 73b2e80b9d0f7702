"""Products with packed HLWQ matrices, and look-ups in them, that never decode the whole matrix.

Since H is symmetric and orthogonal, x · (norm/√d · H c)ᵀ = (x H) · (norm/√d · c)ᵀ: the inputs are rotated once, and the
codes of the matrix are only looked up. Few rows of inputs, as in generation, are multiplied by a kernel that looks up
codes on their way to the product; for many, a tile of the matrix is looked up at a time and multiplied by torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hlwq.compiled import cpu_kernels, cuda_kernels
from hlwq.hadamard import rotate_blocks
from hlwq.kernels import reference

__all__ = ["embedding", "matmul"]

FEW_ROWS = 16
"""Up to here, the kernel for few rows is faster than torch's product with decoded tiles."""


def matmul(inputs: Tensor, packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    """Multiply by a packed matrix Ŵ, as a linear layer does: inputs · Ŵᵀ.

    Few rows of inputs are multiplied by a compiled kernel: on a CPU from native.cpp, on a CUDA device by Triton.
    Without them, and where a gradient is wanted, by plain torch, as many rows are.

    Args:
        inputs: (…, in), any floating dtype.
        packed: uint8 (out, in·bits/8), codes as `hlwq.packing.pack` lays them out.
        norms: float16 (out, groups), of groups of in / groups neighbouring columns, a power of two.
        bits: of a code, 2 to 8.

    Returns:
        (…, out), in the dtype of `inputs`.

    Raises:
        ValueError: the tensors do not fit each other. Compiled code would read what lies beside them.
    """
    opaque = torch.compiler.is_compiling() and not (inputs.requires_grad and torch.is_grad_enabled())
    multiply: Callable[[Tensor, Tensor, Tensor, int], Tensor] = _opaque if opaque else _matmul
    return multiply(inputs, packed, norms, bits)


def _matmul(inputs: Tensor, packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    columns, device = inputs.shape[-1], inputs.device
    dtypes = packed.dtype == torch.uint8 and norms.dtype == torch.float16
    sizes = columns * bits == 8 * packed.shape[-1] and columns % 8 == 0 and len(norms) == len(packed)
    if not dtypes or not sizes or not (groups := norms.shape[1]) or columns % groups:
        raise ValueError(
            f"Inputs {tuple(inputs.shape)} do not fit codes of {bits} bits {tuple(packed.shape)}, {packed.dtype}, "
            f"with norms {tuple(norms.shape)}, {norms.dtype}."
        )
    if not device == packed.device == norms.device:
        raise ValueError(f"Inputs are on {device}, codes on {packed.device}, norms on {norms.device}.")
    if inputs.numel() == columns and (cpu := cpu_kernels(inputs)) and cpu.multiplies_row(columns, norms):
        outputs: Tensor = cpu.multiply_row(inputs, packed, norms, bits)
        return outputs if outputs.dtype == inputs.dtype else outputs.to(inputs.dtype)
    rows = inputs.reshape(-1, columns)
    kernels = (cpu_kernels(inputs) or cuda_kernels(inputs)) if 0 < len(rows) <= FEW_ROWS else None
    multiply = kernels.matmul if kernels else reference.matmul
    outputs = multiply(rows, packed, norms, bits)
    return outputs.to(inputs.dtype).view(*inputs.shape[:-1], len(packed))


@torch.library.custom_op("hlwq::matmul", mutates_args=())
def _opaque(inputs: Tensor, packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    """`matmul`, which torch.compile and torch.export cannot look into."""
    return _matmul(inputs, packed, norms, bits)


@_opaque.register_fake
def _(inputs: Tensor, packed: Tensor, norms: Tensor, bits: int) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], packed.shape[0])


def embedding(ids: Tensor, packed: Tensor, norms: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of a packed embedding; no others are decoded.

    Args:
        ids: integers (…), rows of the embedding.
        packed: as for `matmul`, (vocabulary, width·bits/8).
        norms: as for `matmul`, (vocabulary, groups).
        bits: of a code, 2 to 8.
        dtype: of the result; the rows are decoded in float32.

    Returns:
        (…, width).

    Raises:
        ValueError: codes and norms do not fit each other.
    """
    rows = ids.flatten()
    weights = reference.look_up(packed[rows], norms[rows], bits)
    decoded = rotate_blocks(weights, weights.shape[1] // norms.shape[1])
    return decoded.to(dtype).view(*ids.shape, weights.shape[1])
