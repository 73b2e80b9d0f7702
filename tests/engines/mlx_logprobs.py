"""Run in mlx-lm's own environment: log-probabilities of a prompt's tokens, and a greedy continuation.

python mlx_logprobs.py DIRECTORY TOKENS.json OUT.json
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import generate, load


def main(directory: str, tokens_file: str, out: str) -> None:
    model, tokenizer = load(directory)
    tokens = json.loads(Path(tokens_file).read_text())
    text = generate(model, tokenizer, tokenizer.decode(tokens[:16]), max_tokens=4)
    # The CPU kernels sum in the dtype of the scales, and bfloat16 sums hide small mistakes.
    model.set_dtype(mx.float32)
    logits = model(mx.array([tokens[:-1]]))[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logprobs, mx.array(tokens[1:])[:, None], axis=-1)[:, 0]
    Path(out).write_text(json.dumps({"logprobs": chosen.tolist(), "text": text}))


if __name__ == "__main__":
    main(*sys.argv[1:])
