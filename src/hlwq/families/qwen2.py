"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from typing import Any

from hlwq.families.family import Family, Layer, attention, with_mlp


def _layers(config: dict[str, Any]) -> list[Layer]:
    mixer = attention(config, qkv_bias=True, o_bias=False)
    return [with_mlp(mixer, config)] * config["num_hidden_layers"]


QWEN2 = Family("Qwen2 and Qwen2.5", ("Qwen2ForCausalLM",), _layers, ("qwen2",), ("full_attention", "sliding_attention"))
