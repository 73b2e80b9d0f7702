"""Run in vLLM's own environment: log-probabilities of a prompt's tokens by each of some models, or why there are none.

    python vllm_models.py DIRECTORIES.json OUT.json

Each model runs in a process of its own, one for each core at a time, forked from one that has imported vLLM, which
takes longer than all else.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
TOKENS = [5 + 37 * place % 1900 for place in range(48)]


def main(directories_file: str, out: str) -> None:
    import vllm  # noqa: F401

    directories = json.loads(Path(directories_file).read_text())
    running: set[int] = set()
    for directory in directories:
        if len(running) == (os.cpu_count() or 1):
            running.discard(os.wait()[0])
        child = os.fork()
        if not child:
            tell(directory)
        running.add(child)
    while running:
        running.discard(os.wait()[0])
    results = {}
    for directory in directories:
        report = Path(directory) / "vllm.json"
        results[directory] = json.loads(report.read_text()) if report.exists() else {"error": "the process died"}
    Path(out).write_text(json.dumps(results))


def tell(directory: str) -> None:
    """Write what becomes of a model into its directory, and end the process."""
    descriptor = os.open(Path(directory) / "vllm.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        report = {"logprobs": run(directory)}
    except BaseException as error:
        traceback.print_exc()
        report = {"error": f"{type(error).__name__}: {error}"}
    (Path(directory) / "vllm.json").write_text(json.dumps(report))
    os._exit(0)


def run(directory: str) -> list[float]:
    from vllm import LLM, ModelRegistry, SamplingParams

    config = json.loads((Path(directory) / "config.json").read_text())
    for name in config["architectures"]:
        # As a class, vLLM looks at it here; by its name, in a process that imports vLLM once more.
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    options = {"language_model_only": True} if "vision_config" in config else {}
    if config.get("quantization_config", {}).get("quant_method", "hlwq") == "hlwq" and not has_linear_attention(config):
        options["dtype"] = "float32"  # INT4 kernels and gated-delta layers of a CPU know bfloat16 only
    llm = LLM(model=directory, enforce_eager=True, max_model_len=128, **options)
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (result,) = llm.generate({"prompt_token_ids": TOKENS}, sampling)
    steps = result.prompt_logprobs[1:]
    return [step[token].logprob for token, step in zip(TOKENS[1:], steps, strict=True)]


def has_linear_attention(config: dict) -> bool:
    return "linear_attention" in config.get("text_config", config).get("layer_types", ())


if __name__ == "__main__":
    main(*sys.argv[1:])
