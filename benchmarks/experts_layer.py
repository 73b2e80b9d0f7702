"""Time and memory to calibrate a layer of experts: random weights in the shape of Qwen3-30B-A3B.

    python benchmarks/experts_layer.py

One layer with 128 experts of (768, 2048), 8 of them for each token, is quantized by recipe `best`; the model has
nothing else but a small vocabulary. Peak memory is the process's own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file

import hlwq
from hlwq.demo import bundled_model
from hlwq.families import describe

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "vocab_size": 2048,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}


def make_model(path: Path, experts: int, layers: int = 1) -> Path:
    """Write the checkpoint, with the bundled model's tokenizer."""
    path.mkdir()
    config = {**CONFIG, "num_experts": experts, "num_hidden_layers": layers}
    (path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, path / name)
    stored = ["model.embed_tokens.weight", *(f"model.layers.{layer}.some.weight" for layer in range(layers))]
    layout = describe(config, stored)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in layout.required_tensors().items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = (1 + 0.1 * noise if len(shape) == 1 else 0.02 * noise).to(torch.bfloat16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--format", default="gptq")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    options = parser.parse_args()
    calibration = hlwq.Calibration(("embedded",), options.samples, options.sequence_length, generated_samples=0)
    with tempfile.TemporaryDirectory() as folder, Progress() as bar:
        source = make_model(Path(folder) / "layer", options.experts)
        task = bar.add_task("calibrating")

        def report(done: int, total: int, item: str) -> None:
            bar.update(task, completed=done, total=total)

        result = hlwq.quantize(
            source, Path(folder) / "out", "best", format=options.format, calibration=calibration, progress=report
        )
        recorded = json.loads((Path(folder) / "out" / "hlwq.json").read_text())["modules"]
    tokens = sorted(each["calibration_tokens"] for each in recorded.values() if "calibration_tokens" in each)[::3]
    weights = 3 * options.experts * CONFIG["moe_intermediate_size"] * CONFIG["hidden_size"]
    peak = "not known" if result.peak_memory is None else f"{result.peak_memory / 1e9:.2f} GB"
    Console().print(
        f"{options.experts} experts, {weights / 1e6:.0f} million weights, {options.samples} samples of "
        f"{options.sequence_length} tokens, {tokens[0]} to {tokens[-1]} of them to an expert: "
        f"{result.seconds:.0f} s, peak memory {peak}."
    )


if __name__ == "__main__":
    main()
