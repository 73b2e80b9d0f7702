"""AutoRound's side of `quality.py`, which runs this script in an environment with AutoRound."""

import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound

BATCH = 8


def main() -> None:
    source, tokens, out = sys.argv[1:]
    samples = torch.tensor(json.loads(Path(tokens).read_text()))
    rounding = AutoRound(
        source,
        scheme="W4A16",
        group_size=64,
        sym=True,
        iters=200,
        seqlen=samples.shape[1],
        nsamples=len(samples),
        batch_size=BATCH,
        dataset=list(samples.split(BATCH)),
        device_map="cpu",
    )
    rounding.quantize_and_save(out, format="auto_gptq")


if __name__ == "__main__":
    main()
