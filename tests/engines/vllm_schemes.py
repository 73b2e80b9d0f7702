"""Run in vLLM's own environment: what vLLM's CompressedTensorsConfig gives to each module name.

python vllm_schemes.py DIRECTORY NAMES.json OUT.json
"""

import json
import sys
from pathlib import Path

import torch
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3_5 import Qwen3_5ForConditionalGeneration

MODELS = {each.__name__: each for each in (LlamaForCausalLM, Qwen3_5ForConditionalGeneration)}


class ColumnParallelLinear(torch.nn.Module):
    """vLLM looks at the name of the class where no target matches the module's."""


def main(directory: str, names_file: str, out: str) -> None:
    description = json.loads((Path(directory) / "config.json").read_text())
    config = CompressedTensorsConfig.from_config(description["quantization_config"])
    config.packed_modules_mapping = MODELS[description["architectures"][0]].packed_modules_mapping
    schemes = {}
    for name in json.loads(Path(names_file).read_text()):
        scheme = config.get_scheme_dict(ColumnParallelLinear(), name)
        weights = scheme and scheme["weights"]
        schemes[name] = weights and [weights.num_bits, weights.group_size, weights.symmetric]
    Path(out).write_text(json.dumps(schemes))


if __name__ == "__main__":
    main(*sys.argv[1:])
