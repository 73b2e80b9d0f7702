"""Qwen3: Llama with norms on the heads of q and k."""

from __future__ import annotations

from typing import Any

from hlwq.families.family import Family, Layer, attention, with_mlp


def _layers(config: dict[str, Any]) -> list[Layer]:
    bias = bool(config.get("attention_bias", False))
    mixer = attention(config, qkv_bias=bias, o_bias=bias, head_dim=128, head_norms=True)
    return [with_mlp(mixer, config)] * config["num_hidden_layers"]


QWEN3 = Family("Qwen3", ("Qwen3ForCausalLM",), _layers, ("qwen3",), ("full_attention", "sliding_attention"))
