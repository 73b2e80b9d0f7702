"""Qwen3.5: gated-delta linear attention, every fourth layer full attention, inside a vision wrapper or text-only."""

from __future__ import annotations

from typing import Any

from hlwq.models.family import Family, Layer, Matrix, attention, with_mlp

_GATES = "gates the recurrence, and is tiny"


def _linear_attention(config: dict[str, Any]) -> Layer:
    hidden = config["hidden_size"]
    heads = config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    channels = 2 * keys + values
    return Layer(
        steps=(
            (
                Matrix("linear_attn.in_proj_qkv", (channels, hidden), "linear_attn.in_proj_qkvz"),
                Matrix("linear_attn.in_proj_z", (values, hidden), "linear_attn.in_proj_qkvz"),
                Matrix("linear_attn.in_proj_b", (heads, hidden), "linear_attn.in_proj_ba", keep=_GATES),
                Matrix("linear_attn.in_proj_a", (heads, hidden), "linear_attn.in_proj_ba", keep=_GATES),
            ),
            (Matrix("linear_attn.out_proj", (hidden, values)),),
        ),
        others={
            "linear_attn.conv1d.weight": (channels, 1, config["linear_conv_kernel_dim"]),
            "linear_attn.dt_bias": (heads,),
            "linear_attn.A_log": (heads,),
            "linear_attn.norm.weight": (config["linear_value_head_dim"],),
        },
    )


def layer_types(config: dict[str, Any]) -> list[str]:
    """`linear_attention` or `full_attention` for each layer; by default every fourth is full."""
    interval = config.get("full_attention_interval", 4)
    default = [
        "full_attention" if (index + 1) % interval == 0 else "linear_attention"
        for index in range(config["num_hidden_layers"])
    ]
    return list(config.get("layer_types") or default)


def _layers(config: dict[str, Any]) -> list[Layer]:
    bias = bool(config.get("attention_bias", False))
    kinds = {
        "full_attention": attention(config, qkv_bias=bias, o_bias=bias, head_dim=256, head_norms=True, gated=True),
        "linear_attention": _linear_attention(config),
    }
    return [with_mlp(kinds[kind], config) for kind in layer_types(config)]


QWEN3_5 = Family(
    "Qwen3.5 (hybrid)",
    ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
    _layers,
    prefixes=("model.language_model.", "model."),
    kept={"model.visual.": "vision tower", "mtp.": "multi-token prediction head"},
)
