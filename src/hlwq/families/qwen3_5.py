"""Qwen3.5: gated-delta linear attention, every fourth layer full attention, inside a vision wrapper or text-only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from hlwq.containers import TensorSpec
from hlwq.families.family import Family, MlxModel, Restoration

_GATES = "gates the recurrence, and is tiny"


def layer_types(config: dict[str, Any]) -> list[str]:
    """`linear_attention` or `full_attention` for each layer; by default every fourth is full."""
    interval = config.get("full_attention_interval", 4)
    default = [
        "full_attention" if (index + 1) % interval == 0 else "linear_attention"
        for index in range(config["num_hidden_layers"])
    ]
    return list(config.get("layer_types") or default)


# mlx-lm calls the decoder of every Qwen3.5 checkpoint `language_model.model`.
_IN_MLX = "language_model.model."


def _mlx_path(module: str) -> str:
    if module.startswith("model.language_model."):
        return _IN_MLX + module.removeprefix("model.language_model.")
    return f"language_model.{module}"


def _mlx_demands(config: dict[str, Any]) -> list[tuple[str, list[str], str]]:
    interval = config.get("full_attention_interval", 4)
    odd = [
        f"layer {index}"
        for index, kind in enumerate(layer_types(config))
        if (kind == "full_attention") != ((index + 1) % interval == 0)
    ]
    return [("full attention in every layer of the interval", odd, "mlx-lm cannot run this model.")]


def _config_before_mlx(config: dict[str, Any]) -> dict[str, Any]:
    """A text-only checkpoint by its own model type again."""
    if config.get("model_type") in ("qwen3_5", "qwen3_5_moe") and "text_config" not in config:
        return {**config, "model_type": f"{config['model_type']}_text"}
    return config


def _name_before_mlx(name: str) -> str:
    if name.startswith(_IN_MLX):
        return "model.language_model." + name.removeprefix(_IN_MLX)
    return name.removeprefix("language_model.")


def _tensor_before_mlx(name: str, tensor: Tensor) -> Tensor:
    """A convolution transposed back, norms without the 1 that was added; these are rounded to the model's dtype."""
    if name.endswith("conv1d.weight"):
        return tensor.movedim(1, 2)
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return tensor - 1
    return tensor


def _shape_before_mlx(spec: TensorSpec) -> tuple[int, ...]:
    return (spec.shape[0], spec.shape[2], spec.shape[1]) if spec.name.endswith("conv1d.weight") else spec.shape


QWEN3_5 = Family(
    "Qwen3.5 (hybrid)",
    ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
    ("qwen3_5", "qwen3_5_text"),
    fused={
        "linear_attn.in_proj_qkv": "linear_attn.in_proj_qkvz",
        "linear_attn.in_proj_z": "linear_attn.in_proj_qkvz",
        "linear_attn.in_proj_b": "linear_attn.in_proj_ba",
        "linear_attn.in_proj_a": "linear_attn.in_proj_ba",
    },
    keep={"linear_attn.in_proj_b": _GATES, "linear_attn.in_proj_a": _GATES},
    architecture_of={"qwen3_5_text": "Qwen3_5ForCausalLM"},
    vllm_unrotated=("linear_attn.in_proj_qkvz",),
    vllm_packs_embedding=False,
    mlx=MlxModel(
        model_type="qwen3_5",
        path=_mlx_path,
        reads_top_level_vocabulary=False,
        reads_top_level_rope=False,
        demands=_mlx_demands,
        converted=lambda names: any(name.startswith(_IN_MLX) for name in names),
        restoration=Restoration(_config_before_mlx, _name_before_mlx, _shape_before_mlx, _tensor_before_mlx),
    ),
)
QWEN3_5_MOE = replace(
    QWEN3_5,
    name="Qwen3.5-MoE (hybrid)",
    architectures=("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    architecture_of={},
    mlx=replace(QWEN3_5.mlx, model_type="qwen3_5_moe"),
)
QWEN3_NEXT = Family(
    "Qwen3-Next (hybrid)",
    ("Qwen3NextForCausalLM",),
    ("qwen3_next",),
    keep={"linear_attn.in_proj_ba": _GATES},
    vllm_unrotated=("linear_attn.in_proj_qkvz",),
    vllm_packs_embedding=False,
    mlx=MlxModel(refusal="mlx-lm changes norms and convolutions of this family only where it stacks experts itself"),
)
