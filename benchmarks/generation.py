"""Memory and tokens per second of a packed HLWQ checkpoint in transformers and of the BF16 model it is made from.

    python benchmarks/generation.py SmolLM2-135M-Instruct.Q4_1.gguf --include-embeddings

Each measurement runs in its own process, and the two models alternate. Each number is the median over the rounds; the
last column is the range of the ratios of single rounds. The memory of the weights is the growth of the resident memory
(Linux) while a model is loaded and every page of its weights is read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

import hlwq
from hlwq.sources import locate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="dense model: a directory, a hub id or a .gguf file")
    parser.add_argument("--bits", type=int, default=5)
    parser.add_argument("--include-embeddings", action="store_true")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="device of the speeds; memory is the CPU's")
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_only:
        print(json.dumps(memory_of_weights(options.source)))
        return
    source = locate(options.source)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "packed"
        hlwq.quantize(source, made, "hlwq", bits=options.bits, include_embeddings=options.include_embeddings)
        rounds: dict[str, list[dict[str, float]]] = {"dense": [], "packed": []}
        for _ in range(options.rounds):
            for kind, directory in (("dense", source), ("packed", made)):
                rounds[kind].append(measure(kind, directory, options))
    table = Table("", "BF16", f"HLWQ {options.bits} bits, packed", "packed ÷ BF16", "in each round")
    for name in rounds["dense"][0]:
        dense, packed = ([each[name] for each in rounds[kind]] for kind in ("dense", "packed"))
        ratios = [ours / other for ours, other in zip(packed, dense, strict=True)]
        middle = median(packed) / median(dense)
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        table.add_row(name, f"{median(dense):.4g}", f"{median(packed):.4g}", f"{middle:.3f}", spread)
    Console().print(table)


def measure(kind: str, directory: Path, options: argparse.Namespace) -> dict[str, float]:
    memory = run([str(Path(__file__)), str(directory), "--memory-only"])
    command = ["-m", "hlwq.cli", "eval", "speed", str(directory), "--json", "--runs", "3"]
    command += ["--device", options.device]
    command += ["--prompt-tokens", str(options.prompt_tokens), "--new-tokens", str(options.new_tokens)]
    speed = run([*command, *(["--packed"] if kind == "packed" else [])])
    return {
        "tensors, MB": memory["tensors"] / 1e6,
        "tensors without the embedding, MB": memory["without_embedding"] / 1e6,
        "resident memory of the weights, MB": memory["resident"] / 1e6,
        "peak memory of the process, MB": speed["peak_memory"] / 1e6,
        "prefill, tokens/s": speed["prefill"][0],
        "decode, tokens/s": speed["decode"][0],
    }


def run(arguments: list[str]) -> dict[str, Any]:
    return json.loads(subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE).stdout)


def memory_of_weights(directory: str) -> dict[str, int]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):  # The modelling code's imports happen here, before memory is read.
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory, trust_remote_code=False))
    before = resident_bytes()
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False, use_safetensors=True)
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    for tensor in tensors.values():
        tensor.flatten()[::1024].clone()  # one element or more in each page of 4 KiB
    inside = model.get_input_embeddings()
    embedding = {tensor.data_ptr() for tensor in (*inside.parameters(), *inside.buffers())}
    return {
        "tensors": sum(tensor.nbytes for tensor in tensors.values()),
        "without_embedding": sum(tensor.nbytes for place, tensor in tensors.items() if place not in embedding),
        "resident": resident_bytes() - before,
    }


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
