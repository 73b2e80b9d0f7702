"""Small random checkpoints of every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from hlwq.families import describe

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "apertus": "ApertusForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "mistral3": "Mistral3ForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "gemma4_text": "Gemma4ForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_5", "qwen3_5_text")
"""Those that tests of everything use."""
ALL_FAMILY_NAMES = tuple(ARCHITECTURES)

_DECODER = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_HYBRID = {
    **_DECODER,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
}
_HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
_OF_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "ministral3": {"head_dim": 32},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 32, "sliding_window": 16},
    "gemma3_text": {"tie_word_embeddings": True, "head_dim": 32, "sliding_window": 16},
    "phi3": {"pad_token_id": 0},
    "smollm3": {"tie_word_embeddings": True, "pad_token_id": 0},
    "olmo3": {"sliding_window": 16},
    "cohere2": {"logit_scale": 1.0, "tie_word_embeddings": True, "sliding_window": 16},
    "glm4": {"head_dim": 32, "pad_token_id": 0, "partial_rotary_factor": 0.5},
    "exaone4": {
        "num_hidden_layers": 4,
        "layer_types": [*3 * ["sliding_attention"], "full_attention"],
        **{"sliding_window": 16, "sliding_window_pattern": "LLLG", "head_dim": 32, "rope_scaling": None},
    },
    "seed_oss": {"head_dim": 32},
    "ernie4_5": {"head_dim": 32},
    "granite": {"tie_word_embeddings": True},
    "starcoder2": {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
    "lfm2": {
        "tie_word_embeddings": True,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        **{"block_dim": 128, "block_ff_dim": 256, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0},
        **{"block_auto_adjust_ff_dim": False, "conv_bias": False, "conv_L_cache": 3, "conv_dim": 128, "norm_eps": 1e-5},
    },
    "qwen3_vl_text": {"head_dim": 32, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
    "gemma4_text": {
        "tie_word_embeddings": True,
        "head_dim": 32,
        "global_head_dim": 64,
        "sliding_window": 16,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
    "qwen3_moe": {"head_dim": 32, **_OF_EXPERTS},
    "qwen3_5_moe_text": {**_OF_EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_next": {**_OF_EXPERTS, "shared_expert_intermediate_size": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    "olmoe": {"intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {
        **{"head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        **{"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "pad_token_id": 0},
        "rope_scaling": None,
    },
    "qwen2_moe": {**_OF_EXPERTS, "shared_expert_intermediate_size": 64},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
    "minimax_m2": {
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "rotary_dim": 16, "use_qk_norm": True},
        **{"scoring_func": "sigmoid", "shared_intermediate_size": 0, "use_routing_bias": True},
    },
    "lfm2_moe": {
        **_OF_EXPERTS,
        **{"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
        **{"conv_bias": False, "conv_L_cache": 3, "norm_eps": 1e-5, "tie_word_embeddings": True},
    },
    "ernie4_5_moe": {
        **{"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 64},
        **{"moe_layer_start_index": 1, "moe_layer_end_index": 1, "pad_token_id": 0},
    },
    "deepseek_v3": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1},
        **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "q_lora_rank": 64},
        **{"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 64, "v_head_dim": 64, "pad_token_id": 0},
        "rope_scaling": None,
    },
    "apertus": {"hidden_act": "xielu", "mlp_bias": False, "post_norm": False, "qk_norm": True, "rope_scaling": None},
    "hunyuan_v1_dense": {"head_dim": 32, "pad_token_id": 0},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_state": 16, "mamba_d_head": 32, "head_dim": 32},
    "nemotron_h": {
        "hybrid_override_pattern": "M*-M",
        "num_hidden_layers": 4,
        **{"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "head_dim": 32},
    },
}
"""What a family's small configuration has beside the usual, or instead."""
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral3": ("ministral3", {"model_type": "pixtral", "image_size": 28, "patch_size": 14, **_VISION}),
    "gemma3": ("gemma3_text", {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **_VISION}),
    "qwen3_vl": (
        "qwen3_vl_text",
        {
            "model_type": "qwen3_vl",
            **{"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128},
            "deepstack_visual_indexes": [0],
        },
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {
            **{"model_type": "qwen3_5_moe", "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2},
            "out_hidden_size": 128,
        },
    ),
    "gemma4": ("gemma4_text", {"model_type": "gemma4_vision", **_VISION, "num_key_value_heads": 2, "head_dim": 16}),
}
"""What wrappers wrap, and the towers in them."""
_VISION_WIDTH, _VISION_MLP, _VISION_MERGED = 72, 88, 4 * 72


def model_config(family: str, **overrides: Any) -> dict[str, Any]:
    """A small `config.json`. An override replaces the entry wherever it stands, or is added to the decoder's."""
    config: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "model_type": family, "dtype": "bfloat16"}
    if family == "qwen3_5":
        text = {**_HYBRID, "model_type": "qwen3_5_text"}
        vision = {
            "model_type": "qwen3_5_vision",
            "depth": 1,
            "hidden_size": _VISION_WIDTH,
            "intermediate_size": _VISION_MLP,
            "num_heads": 2,
            "out_hidden_size": text["hidden_size"],
        }
        config |= {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}
    elif family in _WRAPPED:
        inner, vision = _WRAPPED[family]
        text = {**(_HYBRID if inner in _HYBRIDS else _DECODER), **_OWN.get(inner, {}), "model_type": inner}
        config |= {"text_config": text, "vision_config": vision, "tie_word_embeddings": text["tie_word_embeddings"]}
    else:
        config |= _HYBRID if family in _HYBRIDS else _DECODER
        config |= _OWN.get(family, {})
    decoder = config.get("text_config", config)
    for key, value in overrides.items():
        if key in config:
            config[key] = value
        if key in decoder or key not in config:
            decoder[key] = value
    return config


def some_names(config: dict[str, Any], prefix: str = "model.") -> list[str]:
    """Names of tensors, without an output head, that say where a decoder is and how many layers it has."""
    layers = (config.get("text_config") or config).get("num_hidden_layers")
    embedding = "embeddings" if config.get("model_type") == "nemotron_h" else "embed_tokens"
    return [f"{prefix}{embedding}.weight", *(f"{prefix}layers.{index}.some.weight" for index in range(layers or 0))]


def make_checkpoint(path: Path, family: str, **overrides: Any) -> Path:
    """Write a random BF16 checkpoint: `config.json`, `model.safetensors` and an empty `tokenizer.json`.

    The tensors depend on nothing but the configuration. `qwen3_5` has parts of a vision tower, whose widths 32 does not
    divide, and of a multi-token prediction head.
    """
    if family not in FAMILY_NAMES:
        return save_model(path, family, **overrides)
    config = model_config(family, **overrides)
    prefix = "model.language_model." if family == "qwen3_5" else "model."
    layout = describe(config, some_names(config, prefix))
    shapes = layout.required_tensors()
    if family == "qwen3_5":
        hidden = layout.text_config["hidden_size"]
        shapes |= {
            "model.visual.blocks.0.mlp.linear_fc1.weight": (_VISION_MLP, _VISION_WIDTH),
            "model.visual.blocks.0.mlp.linear_fc1.bias": (_VISION_MLP,),
            "model.visual.blocks.0.mlp.linear_fc2.weight": (_VISION_WIDTH, _VISION_MLP),
            "model.visual.merger.linear_fc2.weight": (hidden, _VISION_MERGED),
            "mtp.layers.0.mlp.down_proj.weight": (hidden, layout.text_config["intermediate_size"]),
        }
    generator = torch.Generator().manual_seed(0)
    tensors = {name: _random(name, shape, family, generator) for name, shape in shapes.items()}
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "tokenizer.json").write_text("{}")
    return path


def save_model(path: Path, family: str, **overrides: Any) -> Path:
    """Write what transformers itself saves of a small model of a family, with random values."""
    config = model_config(family, **overrides)
    model = random_model(config)
    model.save_pretrained(path)
    # Entries that transformers does not keep as they were, and published checkpoints have.
    saved = json.loads((path / "config.json").read_text())
    if "text_config" in saved:
        config = {**config, "text_config": {**saved["text_config"], **config["text_config"]}}
    (path / "config.json").write_text(json.dumps({**saved, **config}, indent=2))
    (path / "tokenizer.json").write_text("{}")
    return path


def random_model(config: dict[str, Any]) -> Any:
    """A random BF16 model of transformers."""
    parsed = transformers.AutoConfig.for_model(**config)
    auto = transformers.AutoModelForCausalLM
    if config["architectures"][0].endswith("ForConditionalGeneration"):
        auto = transformers.AutoModelForImageTextToText
    model = auto.from_config(parsed, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values in model.parameters():
            noise = 0.1 * torch.randn(values.shape, generator=generator)
            # Norms are near 1 (some families add that themselves), matrices near 0.
            values.copy_(values + noise if values.ndim == 1 else noise)
    return model


def _random(name: str, shape: tuple[int, ...], family: str, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        values = 0.05 * noise
    elif name.endswith("norm.weight"):
        plain = not family.startswith("qwen3_5") or name.endswith("linear_attn.norm.weight")
        values = 0.1 * noise + (1 if plain else 0)
    else:
        values = 0.1 * noise
    return values.to(torch.bfloat16)
