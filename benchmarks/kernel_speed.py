"""Speed of encoding, decoding, packing and multiplying HLWQ matrices: weights per second, and ratios within one run.

    python benchmarks/kernel_speed.py --polarquant VENV/bin/python --json kernel_speed.json

The ratios are to polarquant 0.6.0, the published HLWQ code (`pip install polarquant==0.6.0` in VENV; a second process
runs it on the same matrix), to the same computation in plain torch, and to a copy of a float32 matrix. The candidates
alternate, and the shortest time over the rounds counts, because other load on the machine can only lengthen a time.
Decoding and the copy write to memory that is already allocated; polarquant and plain torch allocate their results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from math import inf, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hlwq.bases import Hadamard
from hlwq.grids import LloydGrid
from hlwq.hadamard import hadamard_matrix
from hlwq.kernels import cpu, matmul
from hlwq.lloyd import codebook
from hlwq.packing import pack, unpack
from hlwq.solvers import Nearest

PAUSE = 0.02
"""Seconds before each run. torch's threads spin for a while after their work, and would slow the next candidate."""
GROUP = 128

# Program of the second process: its answer to each input line `work bits` is a time in seconds.
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


Run = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--polarquant", metavar="PYTHON", help="interpreter of an environment with polarquant 0.6.0")
    parser.add_argument("--matrix", type=int, nargs=2, default=(1024, 4096), help="rows and columns to encode")
    parser.add_argument("--product", type=int, nargs=2, default=(4096, 12288), help="rows and columns to multiply by")
    parser.add_argument("--bits", type=int, nargs="+", default=list(range(2, 9)))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shared", action="store_true", help="processor time of one thread, for a machine in use")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    threads = 1 if options.shared else options.threads
    torch.set_num_threads(threads)
    arguments = (*options.matrix, GROUP, threads, int(options.shared))
    peer = Peer(options.polarquant, *arguments) if options.polarquant else None
    clock = time.process_time if options.shared else time.perf_counter
    torch.manual_seed(0)
    weights, factor = torch.randn(options.matrix) * 0.02, torch.randn(options.product)
    results = []
    for bits in options.bits:
        for work, runs in (*on_one_matrix(weights, bits, peer), ("product", products(factor, bits))):
            size = factor.numel() if work == "product" else weights.numel()
            results.append({"work": work, "bits": bits, "weights": size, "seconds": best(runs, options.rounds, clock)})
    if options.json:
        record = {"setting": vars(options), "results": results}
        options.json.write_text(json.dumps(record, default=str, indent=1) + "\n")
    print(table(results))


def on_one_matrix(weights: Tensor, bits: int, peer: Peer | None) -> Iterator[tuple[str, dict[str, Run]]]:
    """Candidates for encoding, decoding, packing and unpacking one matrix: hlwq and those it is compared with."""
    grid, plain = LloydGrid(bits, GROUP), LloydGrid(bits, GROUP, least_squares=False)
    quantized = Nearest().solve(weights, grid, Hadamard(grid.group_size))
    codes, norms = quantized.codes, quantized.parameters.scale
    packed, target = pack(codes, bits), torch.empty_like(weights)
    rotation, book = hadamard_matrix(GROUP), codebook(bits)

    def encode_in_torch() -> Tensor:
        groups = weights.unflatten(-1, (-1, GROUP))
        scale = sqrt(GROUP) / groups.norm(dim=-1, keepdim=True)
        return torch.bucketize(groups @ rotation * scale, book.boundaries, out_int32=True).to(torch.uint8)

    def decode_in_torch() -> Tensor:
        groups = book.centroids[codes.int()].unflatten(-1, (-1, GROUP)) @ rotation
        return groups * (norms / sqrt(GROUP)).unsqueeze(-1)

    def others(work: str) -> dict[str, Run]:
        # polarquant packs codes up to 4 bits wide as 4 bits, 5-bit codes as 5, and no wider ones.
        supported = peer is not None and (bits <= 5 or "pack" not in work)
        polarquant: dict[str, Run] = {"polarquant": lambda: peer.seconds(work, bits)} if peer and supported else {}
        return {**polarquant, "copy": lambda: target.copy_(weights)}

    yield (
        "encode",
        {
            "hlwq": lambda: Nearest().solve(weights, plain, Hadamard(plain.group_size)),
            "hlwq, least squares": lambda: Nearest().solve(weights, grid, Hadamard(grid.group_size)),
            "torch": encode_in_torch,
            **others("encode"),
        },
    )
    decode = {"hlwq": lambda: cpu.decode(packed, norms, bits, bits, True, target), "torch": decode_in_torch}
    yield "decode", {**decode, **others("decode")}
    yield "pack", {"hlwq": lambda: pack(codes, bits), **others("pack")}
    yield "unpack", {"hlwq": lambda: unpack(packed, bits), **others("unpack")}


def products(weights: Tensor, bits: int) -> dict[str, Run]:
    """Candidates for one row of inputs times a matrix. Random codes will do: their values do not affect the speed."""
    rows, columns = weights.shape
    packed = torch.randint(256, (rows, columns * bits // 8), dtype=torch.uint8)
    norms = torch.rand(rows, columns // GROUP).to(torch.float16)
    half, inputs = weights.to(torch.bfloat16), torch.randn(1, columns)
    half_inputs = inputs.to(torch.bfloat16)
    return {
        "hlwq": lambda: matmul(half_inputs, packed, norms, bits),
        "torch, bfloat16": lambda: half_inputs @ half.T,
        "torch, float32": lambda: inputs @ weights.T,
    }


def best(runs: dict[str, Run], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Shortest time of each candidate in seconds. Round 0 is a warm-up; candidates above half a second run twice."""
    seconds = dict.fromkeys(runs, inf)
    for number in range(rounds + 1):
        for name, run in runs.items():
            if number > 2 and seconds[name] > 0.5:
                continue
            time.sleep(PAUSE)
            start = clock()
            answer = run()
            took = clock() - start
            if number:
                seconds[name] = min(seconds[name], answer if isinstance(answer, float) else took)
    return seconds


class Peer:
    """Second process, which runs polarquant and measures its time."""

    def __init__(self, python: str, *arguments: int) -> None:
        command = [python, "-c", POLARQUANT, *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, work: str, bits: int) -> float:
        questions, answers = self._process.stdin, self._process.stdout
        assert questions is not None
        assert answers is not None
        print(work, bits, file=questions, flush=True)
        answer = answers.readline()
        if not answer:
            sys.exit(f"polarquant ended at {work}, {bits} bits")
        return float(answer)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown tables: millions of weights per second, and ratios."""
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
