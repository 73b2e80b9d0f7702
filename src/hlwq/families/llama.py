"""Llama, and Mistral, which has the same tensors."""

from __future__ import annotations

from typing import Any

from hlwq.families.family import Family, Layer, attention, with_mlp


def _layers(config: dict[str, Any]) -> list[Layer]:
    bias = bool(config.get("attention_bias", False))
    mixer = attention(config, qkv_bias=bias, o_bias=bias)
    return [with_mlp(mixer, config, bias=bool(config.get("mlp_bias", False)))] * config["num_hidden_layers"]


def _layers_without_biases(config: dict[str, Any]) -> list[Layer]:
    """Transformers' Mistral has none, whatever the configuration says."""
    return [with_mlp(attention(config, qkv_bias=False, o_bias=False), config)] * config["num_hidden_layers"]


LLAMA = Family("Llama", ("LlamaForCausalLM",), _layers, ("llama",))
MISTRAL = Family(
    "Mistral",
    ("MistralForCausalLM",),
    _layers_without_biases,
    ("mistral",),
    ("full_attention", "sliding_attention"),
)
