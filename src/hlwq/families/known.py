"""Families that transformers' own modules describe: their names, and what engines have otherwise."""

from __future__ import annotations

from dataclasses import replace

from hlwq.families.family import Family, MlxModel

_ROWS = (
    ("Llama", "LlamaForCausalLM", "llama"),
    ("Mistral", "MistralForCausalLM", "mistral"),
    ("Ministral 3", "Ministral3ForCausalLM", "ministral3"),
    ("Qwen2 and Qwen2.5", "Qwen2ForCausalLM", "qwen2"),
    ("Qwen3", "Qwen3ForCausalLM", "qwen3"),
    ("Gemma 3 (text)", "Gemma3ForCausalLM", "gemma3_text"),
    ("Phi-3 and Phi-4", "Phi3ForCausalLM", "phi3"),
    ("Granite", "GraniteForCausalLM", "granite"),
    ("OLMo 2", "Olmo2ForCausalLM", "olmo2"),
    ("OLMo 3", "Olmo3ForCausalLM", "olmo3"),
    ("SmolLM3", "SmolLM3ForCausalLM", "smollm3"),
    ("GLM-4", "Glm4ForCausalLM", "glm4"),
    ("EXAONE 4", "Exaone4ForCausalLM", "exaone4"),
    ("Seed-OSS", "SeedOssForCausalLM", "seed_oss"),
    ("ERNIE 4.5", "Ernie4_5ForCausalLM", "ernie4_5"),
    ("Hunyuan", "HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense"),
    ("Apertus", "ApertusForCausalLM", "apertus"),
    ("StarCoder 2", "Starcoder2ForCausalLM", "starcoder2"),
    ("Nemotron-H", "NemotronHForCausalLM", "nemotron_h"),
    ("Qwen3-MoE", "Qwen3MoeForCausalLM", "qwen3_moe"),
    ("Qwen2-MoE", "Qwen2MoeForCausalLM", "qwen2_moe"),
    ("OLMoE", "OlmoeForCausalLM", "olmoe"),
    ("Mistral 3 (vision)", "Mistral3ForConditionalGeneration", "mistral3"),
    ("Gemma 3 (vision)", "Gemma3ForConditionalGeneration", "gemma3"),
)
LFM2 = Family(
    "LFM2",
    ("Lfm2ForCausalLM",),
    ("lfm2",),
    vllm_unrotated=("conv.in_proj", "conv.out_proj"),
    vllm_packs_embedding=False,
    fused={"feed_forward.w1": "feed_forward.w13", "feed_forward.w3": "feed_forward.w13"},
)
COHERE2 = Family("Cohere 2", ("Cohere2ForCausalLM",), ("cohere2",), vllm_packs_embedding=False)
QWEN3_VL = Family("Qwen3-VL", ("Qwen3VLForConditionalGeneration",), ("qwen3_vl",), vllm_packs_embedding=False)
GEMMA2 = Family("Gemma 2", ("Gemma2ForCausalLM",), ("gemma2",), vllm_packs_embedding=False)
GLM4_MOE = Family("GLM-4.5-MoE", ("Glm4MoeForCausalLM",), ("glm4_moe",), vllm_packs_embedding=False)
_MIXTRALS = "w1", "w3", "w2"
_MIXER = "of the state-space mixer, which vLLM runs in its own dtype"
MIXTRAL = Family(
    "Mixtral",
    ("MixtralForCausalLM",),
    ("mixtral",),
    renamings=(("mlp.", "block_sparse_moe."),),
    expert_matrices=_MIXTRALS,
    vllm_packs_embedding=False,
)
MINIMAX_M2 = replace(
    MIXTRAL,
    name="MiniMax-M2",
    architectures=("MiniMaxM2ForCausalLM",),
    model_types=("minimax_m2",),
    vllm_packs_embedding=True,
)
PHI_MOE = Family(
    "Phi-3.5-MoE",
    ("PhimoeForCausalLM",),
    ("phimoe",),
    renamings=(("mlp.router.", "mlp.gate."), ("mlp.", "block_sparse_moe.")),
    expert_matrices=_MIXTRALS,
)
LFM2_MOE = replace(
    LFM2,
    name="LFM2-MoE",
    architectures=("Lfm2MoeForCausalLM",),
    model_types=("lfm2_moe",),
    expert_matrices=_MIXTRALS,
    mlx=MlxModel(refusal="mlx-lm renames weights of this family's dense layers, and not the scales beside them"),
)
ERNIE_MOE = Family(
    "ERNIE 4.5 MoE",
    ("Ernie4_5_MoeForCausalLM",),
    ("ernie4_5_moe",),
    renamings=(("mlp.gate.moe_statics", "mlp.moe_statics"),),
)
DEEPSEEK_V3 = Family(
    "DeepSeek-V3 and R1",
    ("DeepseekV3ForCausalLM",),
    ("deepseek_v3",),
    fused=dict.fromkeys(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), "self_attn.fused_qkv_a_proj"),
    vllm_packs_experts=False,
)
FALCON_H1 = Family(
    "Falcon-H1",
    ("FalconH1ForCausalLM",),
    ("falcon_h1",),
    keep={"mamba.in_proj": _MIXER, "mamba.out_proj": _MIXER},
    vllm_packs_embedding=False,
    mlx=MlxModel(refusal="mlx-lm multiplies weights of this family by constants as it loads them, and codes it cannot"),
)
GEMMA4 = Family(
    "Gemma 4",
    ("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"),
    ("gemma4", "gemma4_text"),
    mlx=MlxModel(runs_experts=False, reads_top_level_rope=False),
)
KNOWN = (
    *(Family(name, (architecture,), (model_type,)) for name, architecture, model_type in _ROWS),
    COHERE2,
    QWEN3_VL,
    GEMMA2,
    GLM4_MOE,
    LFM2,
    MIXTRAL,
    MINIMAX_M2,
    PHI_MOE,
    LFM2_MOE,
    ERNIE_MOE,
    DEEPSEEK_V3,
    FALCON_H1,
    GEMMA4,
)
