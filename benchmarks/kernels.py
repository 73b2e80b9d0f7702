"""Encoding, decoding, packing and products of HLWQ matrices: weights per second, and as ratios within one run.

    python benchmarks/kernels.py --polarquant VENV/bin/python --json kernels.json

beside polarquant 0.6.0, the published HLWQ code (`pip install polarquant==0.6.0` in VENV; a second process runs it on
the same matrix), the same in plain torch, and a copy of a float32 matrix. All take turns, and the best of several rounds
counts, since whatever else the machine does only adds to a time. Decoding writes to memory that is there already, as the
copy does; polarquant and plain torch cannot be told where to.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from math import sqrt
from pathlib import Path
from typing import Any

import torch

GROUP = 128
WIDTHS = range(2, 9)

# What the process beside this one runs: it answers each line `work bits` with seconds.
POLARQUANT = """
import math, sys, time
import torch
from polarengine_vllm.packing import pack_codes_half_block, pack_codes_q5, unpack_codes_half_block, unpack_codes_q5
from polarengine_vllm.quantizer import PolarQuantizer
from polarengine_vllm.utils import get_centroids
from polarengine_vllm.weight_converter import _dequant_weight

rows, columns, group, threads, shared = map(int, sys.argv[1:])
clock = time.process_time if shared else time.perf_counter
torch.set_num_threads(threads)
weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
quantizer = PolarQuantizer(group)
made = {}
for line in sys.stdin:
    work, bits = line.split()
    bits = int(bits)
    pack, unpack = (pack_codes_half_block, unpack_codes_half_block) if bits <= 4 else (pack_codes_q5, unpack_codes_q5)
    if bits not in made:
        quantized = quantizer.quantize_tensor(weights, bits)
        packed = pack(quantized["codes"], group) if bits <= 5 else None
        made = {bits: (quantized["codes"], quantized["norms"], packed)}
    codes, norms, packed = made[bits]
    start = clock()
    if work == "encode":
        quantizer.quantize_tensor(weights, bits)
    elif work == "decode":
        _dequant_weight(codes, norms, get_centroids(bits), group)
    elif work == "pack":
        pack(codes, group)
    else:
        unpack(packed, group)
    print(clock() - start, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--polarquant", metavar="PYTHON", help="an interpreter that has polarquant 0.6.0")
    parser.add_argument("--matrix", type=int, nargs=2, default=(1024, 4096), help="rows and columns to encode")
    parser.add_argument("--product", type=int, nargs=2, default=(4096, 12288), help="rows and columns to multiply by")
    parser.add_argument("--bits", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shared", action="store_true", help="others use this machine: processor time, one thread")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.shared:
        options.threads = 1
    torch.set_num_threads(options.threads)
    arguments = (*options.matrix, GROUP, options.threads, int(options.shared))
    with (
        subprocess.Popen(
            [options.polarquant, "-c", POLARQUANT, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if options.polarquant
        else nullcontext()
    ) as peer:
        results = [*matrices(options, peer), *products(options)]
    if options.json:
        options.json.write_text(
            json.dumps({"setting": vars(options), "results": results}, default=str, indent=1) + "\n"
        )
    print(table(results))


def matrices(options: argparse.Namespace, peer: subprocess.Popen[str] | None) -> list[dict[str, Any]]:
    """Encoding, decoding, packing and unpacking of one matrix."""
    from hlwq.grids import LloydGrid
    from hlwq.hadamard import hadamard_matrix
    from hlwq.kernels import cpu
    from hlwq.lloyd import codebook
    from hlwq.packing import pack, unpack
    from hlwq.solvers.nearest import quantize_nearest

    weights = torch.randn(options.matrix, generator=torch.Generator().manual_seed(0)) * 0.02
    target, matrix = torch.empty_like(weights), hadamard_matrix(GROUP)
    results = []
    for bits in options.bits:
        plain_norms, grid = LloydGrid(bits, GROUP, least_squares=False), LloydGrid(bits, GROUP)
        quantized = quantize_nearest(weights, grid, "hadamard")
        packed, norms = pack(quantized.codes, bits), quantized.parameters.scale.to(torch.float16)
        book = codebook(bits)

        def encode_in_torch(book: Any = book) -> None:
            groups = weights.unflatten(-1, (-1, GROUP))
            scale = sqrt(GROUP) / groups.norm(dim=-1, keepdim=True)
            torch.bucketize(groups @ matrix * scale, book.boundaries, out_int32=True).to(torch.uint8)

        def decode_in_torch(book: Any = book, quantized: Any = quantized) -> None:
            groups = book.centroids[quantized.codes.int()].unflatten(-1, (-1, GROUP)) @ matrix
            groups * (quantized.parameters.scale / sqrt(GROUP)).unsqueeze(-1)

        def decode(bits: int = bits, packed: Any = packed, norms: Any = norms) -> None:
            cpu.decode(packed, norms, bits, bits, True, target)

        def of_peer(work: str, bits: int = bits) -> Callable[[], float] | None:
            # It packs 4 bits at 2 to 4, and 5 at 5.
            return None if peer is None or ("pack" in work and bits > 5) else lambda: ask(peer, work, bits)

        works: dict[str, dict[str, Callable[[], Any] | None]] = {
            "encode": {
                "hlwq": lambda: quantize_nearest(weights, plain_norms, "hadamard"),  # noqa: B023
                "hlwq, least squares": lambda: quantize_nearest(weights, grid, "hadamard"),  # noqa: B023
                "torch": encode_in_torch,
            },
            "decode": {"hlwq": decode, "torch": decode_in_torch},
            "pack": {"hlwq": lambda: pack(quantized.codes, bits)},  # noqa: B023
            "unpack": {"hlwq": lambda: unpack(packed, bits)},  # noqa: B023
        }
        for work, runs in works.items():
            seconds = best({**runs, "polarquant": of_peer(work), "copy": lambda: target.copy_(weights)}, options.rounds)
            results.append({"work": work, "bits": bits, "weights": weights.numel(), "seconds": seconds})
    return results


def products(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of inputs times a matrix."""
    from hlwq import kernels
    from hlwq.packing import pack

    rows, columns = options.product
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(rows, columns, generator=generator)
    of_dtype = {dtype: weights.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    inputs = {dtype: torch.randn(1, columns, generator=generator).to(dtype) for dtype in of_dtype}
    norms = torch.rand(rows, columns // GROUP, generator=generator).to(torch.float16)
    results = []
    for bits in options.bits:
        packed = pack(torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=generator), bits)
        runs: dict[str, Callable[[], Any] | None] = {
            "hlwq": lambda: kernels.matmul(inputs[torch.bfloat16], packed, norms, bits),  # noqa: B023
            "torch, bfloat16": lambda: inputs[torch.bfloat16] @ of_dtype[torch.bfloat16].T,
            "torch, float32": lambda: inputs[torch.float32] @ of_dtype[torch.float32].T,
        }
        results.append(
            {"work": "product", "bits": bits, "weights": rows * columns, "seconds": best(runs, 3 * options.rounds)}
        )
    return results


def best(runs: dict[str, Callable[[], Any] | None], rounds: int) -> dict[str, float]:
    """The least time of each, in seconds; polarquant is asked for its own, and only twice where it takes long."""
    seconds: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, run in runs.items():
            if run is None or (number > 2 and seconds[name] > 0.5):
                continue
            start = time.perf_counter()
            told = run()
            took = told if name == "polarquant" else time.perf_counter() - start
            seconds[name] = took if number == 0 else min(seconds[name], took)
    return seconds


def ask(peer: subprocess.Popen[str], work: str, bits: int) -> float:
    assert peer.stdin is not None
    assert peer.stdout is not None
    print(work, bits, file=peer.stdin, flush=True)
    answer = peer.stdout.readline()
    if not answer:
        sys.exit(f"polarquant ended at {work}, {bits} bits")
    return float(answer)


def table(results: list[dict[str, Any]]) -> str:
    """Millions of weights per second, and ratios."""
    lines = []
    for work in dict.fromkeys(result["work"] for result in results):
        of_work = [result for result in results if result["work"] == work]
        names = list(dict.fromkeys(name for result in of_work for name in result["seconds"] if name != "hlwq"))
        lines += [
            f"\n{work}, {of_work[0]['weights'] / 1e6:.1f} million weights\n",
            "| bits | hlwq, M/s | " + " | ".join(f"{name}, M/s (hlwq ÷)" for name in names) + " |",
            "|---" * (len(names) + 2) + "|",
        ]
        for result in of_work:
            rates = {name: result["weights"] / each / 1e6 for name, each in result["seconds"].items()}
            cells = [
                f"{rates[name]:,.4g} ({rates['hlwq'] / rates[name]:.3g})" if name in rates else "–" for name in names
            ]
            lines.append(f"| {result['bits']} | {rates['hlwq']:,.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
