"""Products with packed HLWQ matrices on a CUDA device, against torch's product with the same matrix in bfloat16.

    python benchmarks/gpu_kernels.py

Few rows of inputs, as in generation. Candidates alternate, the median over the rounds counts, and each run of a
candidate multiplies by several matrices in turn, more than the device's cache holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hlwq.kernels import matmul, reference
from hlwq.packing import pack

CACHE = 256 << 20
"""Bytes that no device's cache holds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--product", type=int, nargs=2, default=(4096, 12288), help="rows and columns of the matrix")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows of inputs")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    table = Table("bits", "rows", "µs", "BF16, µs", "plain torch, µs", "BF16 ÷ packed", "GB/s of codes")
    for bits in options.bits:
        for rows in options.rows:
            ours, bf16, plain = measure(*options.product, bits, rows, options.rounds)
            figures = [f"{1e6 * each:.1f}" for each in (ours, bf16, plain)]
            nbytes = options.product[0] * options.product[1] * bits / 8
            table.add_row(str(bits), str(rows), *figures, f"{bf16 / ours:.2f}", f"{nbytes / ours / 1e9:.0f}")
    console = Console()
    console.print(torch.cuda.get_device_name())
    console.print(table)


def measure(out: int, columns: int, bits: int, rows: int, rounds: int) -> list[float]:
    """Seconds of a product: packed by our kernel, in BF16 by torch, and packed by plain torch."""
    packed = pack(torch.randint(2**bits, (out, columns), dtype=torch.uint8), bits).cuda()
    norms = torch.rand(out, columns // 128).half().cuda()
    inputs = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
    copies = [packed.clone() for _ in range(1 + CACHE // packed.nbytes)]
    weights = torch.randn(out, columns, dtype=torch.bfloat16, device="cuda")
    dense = [weights.clone() for _ in range(1 + CACHE // weights.nbytes)]
    candidates: list[tuple[list[Tensor], Callable[[Tensor], object]]] = [
        (copies, lambda matrix: matmul(inputs, matrix, norms, bits)),
        (dense, lambda matrix: torch.nn.functional.linear(inputs, matrix)),
        (copies, lambda matrix: reference.matmul(inputs, matrix, norms, bits)),
    ]
    times: list[list[float]] = [[] for _ in candidates]
    for number in range(rounds + 2):
        for seconds, (matrices, multiply) in zip(times, candidates, strict=True):
            found = timed(matrices, multiply) / len(matrices)
            if number > 1:  # the first compile and warm up
                seconds.append(found)
    return [median(each) for each in times]


def timed(matrices: list[Tensor], multiply: Callable[[Tensor], object]) -> float:
    """Seconds that the device takes for all products."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for matrix in matrices:
        multiply(matrix)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


if __name__ == "__main__":
    main()
