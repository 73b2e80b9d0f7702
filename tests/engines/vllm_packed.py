"""Run in vLLM's own environment: [bits, group size] of each of the decoder's linear layers, or null for a dense one.

python vllm_packed.py DIRECTORY OUT.json
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model is looked at from this process


def main(directory: str, out: str) -> None:
    from vllm import LLM

    llm = LLM(model=directory, enforce_eager=True, max_model_len=512, language_model_only=True)
    (packed,) = llm.apply_model(schemes)
    Path(out).write_text(json.dumps(packed))


def schemes(model):
    from vllm.model_executor.layers.linear import LinearBase

    packed = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and ".layers." in name and "conv1d" not in name:
            scheme = getattr(module.quant_method, "scheme", None)
            assert hasattr(module, "weight_packed") == (scheme is not None)
            packed[name] = scheme and [scheme.bits, scheme.group_size]
    return packed


if __name__ == "__main__":
    main(*sys.argv[1:])
