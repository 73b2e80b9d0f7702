"""The Walsh–Hadamard rotation of weight blocks."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hlwq.compiled import cpu_kernels
from hlwq.errors import RequestError


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept may later be used where gradients are taken
def hadamard_matrix(size: int, device: torch.device | str = "cpu") -> Tensor:
    """The normalised Sylvester–Hadamard matrix H: symmetric, orthogonal, its own inverse.

    Args:
        size: the order d, a power of two.
        device: where the matrix is wanted.

    Returns:
        float32 tensor of shape (d, d) with entries ±1/√d. It is shared: do not write to it.

    Raises:
        RequestError: `size` is not a power of two.

    Sylvester's construction: H_1 = [1], H_2n = [[H_n, H_n], [H_n, −H_n]].
    """
    _check(size)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    normalised: Tensor = matrix / size**0.5
    return normalised.to(torch.float32).to(device)


def rotate_blocks(values: Tensor, block_size: int) -> Tensor:
    """Multiply each block of the last axis by H: x ↦ x · diag(H_d, …, H_d). Applied twice, it is the identity.

    By the fast transform, which only adds and subtracts, in one order: every machine gets the same bits.

    Args:
        values: float32 tensor of shape (…, n), n a multiple of `block_size`.
        block_size: d, a power of two.

    Returns:
        float32 tensor of the same shape.

    Raises:
        RequestError: `block_size` is not a power of two or does not divide n.
    """
    if block_size < 1 or values.shape[-1] % block_size:
        raise RequestError(f"Blocks of {block_size} do not divide an axis of {values.shape[-1]}.")
    _check(block_size)
    kernels = cpu_kernels(values)
    if kernels and block_size in kernels.GROUP_SIZES and values.dtype == torch.float32:
        compiled: Tensor = kernels.rotate_blocks(values, block_size)
        return compiled
    return _rotate_blocks(values, block_size)


def _rotate_blocks(values: Tensor, block_size: int) -> Tensor:
    """In plain torch, on any device."""
    distance = 1
    while distance < block_size:
        first, second = values.unflatten(-1, (-1, 2, distance)).unbind(-2)
        values = torch.stack([first + second, first - second], -2).flatten(-3)
        distance *= 2
    return values.mul(block_size**-0.5)


def _check(size: int) -> None:
    if size < 1 or size & (size - 1):
        raise RequestError(f"A Hadamard block must be a power of two, not {size}. Use 32, 64 or 128.")
