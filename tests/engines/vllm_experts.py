"""Run in vLLM's own environment: what a mixture computes with caches of its experts, and what the caches did.

    python vllm_experts.py DIRECTORY VARIABLES.json OUT.json

Each set of environment variables runs in a process forked from this one. What a cache did is compared with a replay of
what it was asked for.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the cache is looked at from this process
PROMPTS = [[5 + 37 * place % 1900 for place in range(length)] for length in (150, 20, 1)]


def main(directory: str, variables_file: str, out: str) -> None:
    import vllm  # noqa: F401

    files = []
    for variables in json.loads(Path(variables_file).read_text()):
        files.append(Path(f"{out}.{len(files)}"))
        if not os.fork():
            try:
                os.environ.update(variables)
                report = run(directory)
            except Exception as error:
                traceback.print_exc()
                report = {"error": str(error)}
            files[-1].write_text(json.dumps(report))
            os._exit(0)
        os.wait()
    Path(out).write_text(json.dumps([json.loads(file.read_text()) for file in files]))


def run(directory: str) -> dict:
    from vllm import LLM, SamplingParams

    from hlwq.expert_policies import POLICIES, LayerCache

    llm = LLM(model=directory, enforce_eager=True, max_model_len=256, language_model_only=True)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    methods = [layer.routed_experts.quant_method for layer in layers if hasattr(layer, "routed_experts")]
    replays = {}
    cache = methods[0].config.cache
    if cache:
        before = vars(cache.counters).copy()
        for method in methods:
            policy = POLICIES[os.environ.get("HLWQ_EXPERT_POLICY", "lfru")]
            replays[method.stack] = replay = LayerCache(cache.capacity, policy())
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
