"""Run in vLLM's own environment: what vLLM's get_dynamic_override says of each module name.

python vllm_rules.py DIRECTORY NAMES.json OUT.json
"""

import json
import sys
from pathlib import Path

from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override


def main(directory: str, names_file: str, out: str) -> None:
    section = json.loads((Path(directory) / "config.json").read_text())["quantization_config"]
    config = AutoGPTQConfig.from_config(section)
    names = json.loads(Path(names_file).read_text())
    rules = {name: get_dynamic_override(config, name) for name in names}
    sizes = {name: get_dynamic_override(config, name, "group_size", config.group_size) for name in names}
    Path(out).write_text(json.dumps({"rules": rules, "group_sizes": sizes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
