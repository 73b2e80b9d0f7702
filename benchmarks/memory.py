"""Peak memory of calibrated quantization by number of layers, on hybrids with the layer shapes of Qwen3.5-9B.

    python benchmarks/memory.py --layers 2 6

The weights are random, and the vocabulary is small so that nearly all weights are in the layers. Every other layer has
linear attention, the others full attention. Each run has its own process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from hlwq.demo import bundled_model
from hlwq.families import describe

REAL_9B = {
    "model_type": "qwen3_5_text",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 2048,  # size of the bundled tokenizer's vocabulary
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--hidden-size", type=int, default=4096, help="width of the layers: a multiple of 256")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--recipe", default="hlwq-v7")
    options = parser.parse_args()
    table = Table("layers", "weights of the layers, GB", "peak memory, GB", "estimate, GB", "seconds")
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder) / "model", Path(folder) / "out"
            weights = make_model(source, layers, options.hidden_size)
            command = [sys.executable, "-m", "hlwq.cli", "quantize", str(source), str(out), "--recipe", options.recipe]
            command += ["--calibration", "embedded", "--samples", str(options.samples), "--json"]
            command += ["--sequence-length", str(options.sequence_length)]
            made = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            planned = json.loads(subprocess.run([*command, "--dry-run"], check=True, stdout=subprocess.PIPE).stdout)
        table.add_row(
            str(layers),
            f"{weights / 1e9:.2f}",
            f"{made['peak_memory'] / 1e9:.2f}",
            f"{planned['peak_memory_estimate'] / 1e9:.2f}",
            f"{made['seconds']:.0f}",
        )
    Console().print(table)


def narrowed(hidden_size: int) -> dict[str, object]:
    """Configuration of the 9B with the MLP's width and the numbers of heads in proportion to the hidden size."""
    keys = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
    keys += ("linear_num_key_heads", "linear_num_value_heads")
    share = {key: max(1, REAL_9B[key] * hidden_size // REAL_9B["hidden_size"]) for key in keys}
    return {**REAL_9B, **share, "hidden_size": hidden_size}


def make_model(path: Path, layers: int, hidden_size: int) -> int:
    """Random checkpoint with one shard per layer, written to `path`; returns the size of the layers in bytes."""
    kinds = ["linear_attention", "full_attention"] * (layers // 2) + ["linear_attention"] * (layers % 2)
    config = {
        **narrowed(hidden_size),
        "num_hidden_layers": layers,
        "layer_types": kinds,
        "architectures": ["Qwen3_5ForCausalLM"],
    }
    config |= {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 1e7}}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, path / name)
    names = ["model.embed_tokens.weight", *(f"model.layers.{index}." for index in range(layers))]
    shapes = describe(config, names).required_tensors()
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer = name.split("layers.")[1].split(".")[0] if "layers." in name else "rest"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    generator = torch.Generator().manual_seed(0)
    total = 0
    for file, members in shards.items():
        tensors = {}
        for name, shape in members.items():
            values = torch.randn(shape, generator=generator) * (0.02 if len(shape) > 1 else 0.1)
            tensors[name] = (values + name.endswith("linear_attn.norm.weight")).to(torch.bfloat16)
        total += sum(tensor.nbytes for name, tensor in tensors.items() if "layers." in name)
        save_file(tensors, path / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


if __name__ == "__main__":
    main()
