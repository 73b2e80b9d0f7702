"""Run in vLLM's own environment: what a mixture computes with caches of its experts, and what the caches did.

    python vllm_experts.py DIRECTORY SIZES.json OUT.json

Each size, or null for all experts in memory, runs in a process forked from this one. What a cache did is compared with
a replay of what it was asked for.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the cache is looked at from this process
PROMPTS = [[5 + 37 * place % 1900 for place in range(length)] for length in (150, 20, 1)]


def main(directory: str, sizes_file: str, out: str) -> None:
    import vllm  # noqa: F401

    sizes = json.loads(Path(sizes_file).read_text())
    for place, size in enumerate(sizes):
        if not os.fork():
            status = 1
            try:
                if size is not None:
                    os.environ["HLWQ_EXPERT_CACHE"] = size
                Path(f"{out}.{place}").write_text(json.dumps(run(directory)))
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.wait()
        assert not status, f"cache of {size}"
    Path(out).write_text(json.dumps([json.loads(Path(f"{out}.{place}").read_text()) for place in range(len(sizes))]))


def run(directory: str) -> dict:
    from vllm import LLM, SamplingParams

    from hlwq.expert_policies import LayerCache, Lfru

    llm = LLM(model=directory, enforce_eager=True, max_model_len=256, language_model_only=True)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    methods = [layer.routed_experts.quant_method for layer in layers if hasattr(layer, "routed_experts")]
    replays = {}
    cache = methods[0].cache
    if cache:
        before = vars(cache.counters).copy()
        for method in methods:
            replays[method.stack] = replay = LayerCache(cache.capacity, Lfru())
            rows = method.rows

            def counted(tokens, device, rows=rows, replay=replay):
                replay.use(tokens)
                return rows(tokens, device)

            method.rows = counted
        assert not before["misses"], "the engine ran the model before it was asked to"
    report = {"greedy": [], "sampled": [], "logprobs": []}
    for name, settings in (("greedy", {"temperature": 0}), ("sampled", {"temperature": 1.5, "seed": 3})):
        sampling = SamplingParams(max_tokens=12, prompt_logprobs=0, ignore_eos=True, **settings)
        for result in llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling):
            report[name].append(list(result.outputs[0].token_ids))
            steps = zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True)
            report["logprobs"].append([step[token].logprob for token, step in steps])
    if cache:
        report["counters"] = [cache.counters.hits, cache.counters.misses]
        report["replay"] = [sum(each.hits for each in replays.values()), sum(each.misses for each in replays.values())]
    return report


if __name__ == "__main__":
    main(*sys.argv[1:])
