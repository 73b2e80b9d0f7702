"""Run in mlx-lm's own environment: log-probabilities of a prompt's tokens by each of some models, or why none.

python mlx_models.py DIRECTORIES.json OUT.json
"""

import json
import sys
from pathlib import Path

TOKENS = [5 + 37 * place % 1900 for place in range(48)]


def main(directories_file: str, out: str) -> None:
    import mlx.core as mx
    from mlx_lm import load

    results = {}
    for directory in json.loads(Path(directories_file).read_text()):
        try:
            model, _ = load(directory)
            model.set_dtype(mx.float32)
            logits = model(mx.array([TOKENS[:-1]]))[0].astype(mx.float32)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            chosen = mx.take_along_axis(logprobs, mx.array(TOKENS[1:])[:, None], axis=-1)[:, 0]
            results[directory] = {"logprobs": chosen.tolist()}
        except Exception as error:
            results[directory] = {"error": f"{type(error).__name__}: {error}"}
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
