from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import ALL_FAMILY_NAMES, ARCHITECTURES, make_checkpoint, model_config, some_names

from hlwq import CheckpointError, UnsupportedError
from hlwq.containers import Reader
from hlwq.families import FAMILIES, ModelLayout, describe
from hlwq.families.qwen3_5 import layer_types

EMBEDDINGS = some_names(model_config("llama", num_hidden_layers=8))
REAL_9B = {
    **dict(vocab_size=248320, hidden_size=4096, intermediate_size=12288, num_hidden_layers=8, head_dim=256),
    **dict(num_attention_heads=16, num_key_value_heads=4, linear_num_key_heads=16, linear_num_value_heads=32),
    **dict(linear_key_head_dim=128, linear_value_head_dim=128),
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 64}],
    "mistral": [{}, {"head_dim": 64, "num_key_value_heads": 4}],
    "qwen2": [{}, {"tie_word_embeddings": True}],
    "qwen3": [{}, {"head_dim": 128}, {"attention_bias": True}, {"tie_word_embeddings": True}],
    "qwen3_5": [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, REAL_9B],
    "qwen3_5_text": [
        {},
        {"tie_word_embeddings": True},
        {"full_attention_interval": 2},
        {"layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"]},
        REAL_9B,
    ],
}

_QKV, _GATED = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
WHOLES: dict[str, dict[str, set[str]]] = {
    "phi3": {},  # its matrices are wholes
    "glm4": {"self_attn.qkv_proj": _QKV},
    "starcoder2": {"self_attn.qkv_proj": _QKV},
    "apertus": {"self_attn.qkv_proj": _QKV},
    "lfm2": {"self_attn.qkv_proj": _QKV, "feed_forward.w13": {"w1", "w3"}},
    "falcon_h1": {"self_attn.qkv_proj": _QKV, "feed_forward.gate_up_proj": _GATED},
    "nemotron_h": {"mixer.qkv_proj": _QKV},
    "qwen3_moe": {"self_attn.qkv_proj": _QKV},
    "olmoe": {"self_attn.qkv_proj": _QKV},
    "mixtral": {"self_attn.qkv_proj": _QKV},
    "glm4_moe": {
        "self_attn.qkv_proj": _QKV,
        "mlp.gate_up_proj": _GATED,
        "mlp.shared_experts.gate_up_proj": _GATED,
    },
    "qwen3_5_moe": {"self_attn.qkv_proj": _QKV, "mlp.shared_expert.gate_up_proj": _GATED},
    "qwen3_5_moe_text": {"self_attn.qkv_proj": _QKV, "mlp.shared_expert.gate_up_proj": _GATED},
    "qwen3_next": {"self_attn.qkv_proj": _QKV, "mlp.shared_expert.gate_up_proj": _GATED},
    "qwen2_moe": {"self_attn.qkv_proj": _QKV, "mlp.shared_expert.gate_up_proj": _GATED},
    "phimoe": {"self_attn.qkv_proj": _QKV},
    "minimax_m2": {"self_attn.qkv_proj": _QKV},
    "lfm2_moe": {"self_attn.qkv_proj": _QKV, "feed_forward.w13": {"w1", "w3"}},
    "ernie4_5_moe": {
        "self_attn.qkv_proj": _QKV,
        "mlp.gate_up_proj": _GATED,
        "mlp.shared_experts.gate_up_proj": _GATED,
    },
    "deepseek_v3": {
        "self_attn.fused_qkv_a_proj": {"q_a_proj", "kv_a_proj_with_mqa"},
        "mlp.gate_up_proj": _GATED,
        "mlp.shared_experts.gate_up_proj": _GATED,
    },
}
"""What engines fuse in a family, where it is not what they fuse in most."""


ROUTING = "e_score_correction_bias", "expert_bias"
"""What routers add to their scores, in float32."""


def transformers_model(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], transformers.PreTrainedModel]:
    """The real module, without memory, and the `config.json` that transformers itself saves for it."""
    (folder / "config.json").write_text(json.dumps(config))
    architecture = getattr(transformers, config["architectures"][0])
    parsed = architecture.config_class.from_pretrained(folder)
    with torch.device("meta"):
        model = architecture(parsed)
    model.config.architectures = config["architectures"]
    model.config.save_pretrained(folder / "saved")
    return json.loads((folder / "saved" / "config.json").read_text()), model


@pytest.mark.parametrize(
    ("family", "overrides"), [(family, each) for family, variants in VARIANTS.items() for each in variants]
)
def test_required_tensors_are_those_of_the_real_module(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    config = model_config(family, **overrides)
    saved, model = transformers_model(config, tmp_path)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if overrides.get("tie_word_embeddings"):
        assert state.pop("lm_head.weight") == (96, 128)
    for source in (config, saved):
        layout = describe(source, state)
        kept = tuple(layout.beside)
        assert layout.required_tensors() == {n: shape for n, shape in state.items() if not n.startswith(kept)}
        assert layout.tied == bool(overrides.get("tie_word_embeddings"))


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_matrices_are_exactly_the_linear_layers_of_the_decoder(family: str, tmp_path: Path) -> None:
    _, model = transformers_model(model_config(family), tmp_path)
    linears = {
        name: (module.out_features, module.in_features, module.bias is not None)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name and "vision" not in name
    }
    linears = {name: each for name, each in linears.items() if family != "phimoe" or not name.endswith("router")}
    layout = describe(model_config(family), model.state_dict())
    for name, module in model.named_modules():
        for expert in range(len(getattr(module, "gate_up_proj", ())) if name.endswith(".experts") else 0):
            rows, hidden = module.gate_up_proj.shape[1:]
            shapes = {
                "gate_proj": (rows // 2, hidden),
                "up_proj": (rows // 2, hidden),
                "down_proj": (hidden, rows // 2),
            }
            linears |= {f"{name}.{expert}.{matrix}": (*shape, False) for matrix, shape in shapes.items()}
    assert linears
    linears = {layout.family.in_files(name): linear for name, linear in linears.items()}
    matrices = {
        layout.layer_prefix(index) + matrix.name: (*matrix.shape, matrix.bias)
        for index, layer in enumerate(layout.layers)
        for matrix in layer.matrices()
    }
    assert matrices == linears


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_names_in_files_lead_back_to_modules(family: str, tmp_path: Path) -> None:
    _, model = transformers_model(model_config(family), tmp_path)
    layout = describe(model_config(family), model.state_dict())
    for name in model.get_decoder().state_dict():
        inside = name.partition(".")[2].partition(".")[2]
        assert layout.family.in_modules(layout.family.in_files(inside)) == inside


def layout_of(family: str, **overrides: Any) -> ModelLayout:
    return describe(model_config(family, **overrides), EMBEDDINGS)


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_what_engines_fuse_shares_its_input_and_its_fate(family: str) -> None:
    names = some_names(model_config(family), "model.language_model." if family == "qwen3_5" else "model.")
    fused: dict[str, set[str]] = {}
    for layer in describe(model_config(family), names).layers:
        for step in layer.steps:
            assert len({matrix.shape[1] for matrix in step}) == 1
        for matrix in layer.matrices():
            if matrix.experts:
                assert matrix.fused == matrix.experts
            elif matrix.fused:
                fused.setdefault(matrix.fused, set()).add(matrix.name)
                partners = [each for each in layer.matrices() if each.fused == matrix.fused]
                assert len({each.shape[1] for each in partners}) == len({each.keep for each in partners}) == 1
    expected = WHOLES.get(family, {"self_attn.qkv_proj": _QKV, "mlp.gate_up_proj": _GATED})
    expected = {whole: {f"{whole.rpartition('.')[0]}.{part}" for part in parts} for whole, parts in expected.items()}
    if family.startswith("qwen3_5"):
        expected["linear_attn.in_proj_qkvz"] = {"linear_attn.in_proj_qkv", "linear_attn.in_proj_z"}
        expected["linear_attn.in_proj_ba"] = {"linear_attn.in_proj_b", "linear_attn.in_proj_a"}
    assert fused == expected


def test_only_the_gates_of_the_recurrence_are_kept_by_default() -> None:
    layers = layout_of("qwen3_5_text").layers
    assert {matrix.name for layer in layers for matrix in layer.matrices() if matrix.keep} == {
        "linear_attn.in_proj_a",
        "linear_attn.in_proj_b",
    }


@pytest.mark.parametrize(
    ("overrides", "full"),
    [
        ({"num_hidden_layers": 8}, [3, 7]),
        ({"full_attention_interval": 2}, [1, 3]),
        ({"layer_types": ["full_attention"] + 3 * ["linear_attention"]}, [0]),
    ],
)
def test_every_fourth_layer_is_full_attention_unless_the_configuration_says_otherwise(
    overrides: dict[str, Any], full: list[int]
) -> None:
    kinds = layer_types(model_config("qwen3_5_text", **overrides))
    assert [index for index, kind in enumerate(kinds) if kind == "full_attention"] == full


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_text"])
def test_both_spellings_of_the_decoder_are_found(family: str, prefix: str) -> None:
    layout = describe(model_config(family), some_names(model_config(family), prefix))
    assert layout.embedding == f"{prefix}embed_tokens"
    assert layout.layer_prefix(3) == f"{prefix}layers.3."
    assert all(name.startswith((prefix, "lm_head")) for name in layout.required_tensors())


@pytest.mark.parametrize(
    ("entries", "names", "tied"),
    [
        ({"tie_word_embeddings": True}, ["lm_head.weight"], True),
        ({"tie_word_embeddings": False}, [], False),
        ({}, [], True),
        ({}, ["lm_head.weight"], False),
    ],
)
def test_tying_is_as_the_configuration_says_or_else_as_the_tensors_show(
    entries: dict[str, bool], names: list[str], tied: bool
) -> None:
    config = model_config("llama")
    del config["tie_word_embeddings"]
    assert describe({**config, **entries}, EMBEDDINGS + names).tied == tied


def test_tying_stated_in_the_text_configuration_alone_counts() -> None:
    config = model_config("qwen3_5", tie_word_embeddings=True)
    del config["tie_word_embeddings"]
    assert describe(config, [*EMBEDDINGS, "lm_head.weight"]).tied


@pytest.mark.parametrize("name", ["BertForMaskedLM", "T5ForConditionalGeneration", "SomeForCausalLM", ""])
def test_what_is_no_causal_language_model_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} is no causal language model that transformers 5.* knows"):
        describe({"architectures": [name]}, EMBEDDINGS)


def test_every_family_has_a_checkpoint_in_these_tests() -> None:
    assert sorted(name for family in FAMILIES for name in family.architectures) == sorted(ARCHITECTURES.values())


@pytest.mark.parametrize("entries", [{}, {"architectures": []}, {"architectures": None}])
def test_a_configuration_without_an_architecture_is_refused(entries: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="names no architectures"):
        describe(entries, EMBEDDINGS)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_an_incomplete_configuration_is_refused_by_key(family: str, key: str) -> None:
    config = model_config(family)
    del config.get("text_config", config)[key]
    with pytest.raises(CheckpointError, match=f"config.json lacks '{key}'"):
        describe(config, EMBEDDINGS)


def test_a_checkpoint_without_an_embedding_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no decoder layers\. An output head is there"):
        describe(model_config("llama"), ["lm_head.weight"])


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_the_checkpoints_of_these_tests_hold_what_is_required(family: str, tmp_path: Path) -> None:
    reader = Reader(make_checkpoint(tmp_path / "model", family))
    required = describe(reader.config, reader.tensors).required_tensors()
    assert {name: reader.tensors[name].shape for name in required} == required
    routing = {spec.dtype for name, spec in reader.tensors.items() if name.endswith(ROUTING)}
    assert {spec.dtype for spec in reader.tensors.values()} == {"BF16", *routing}
    beside = tuple(describe(reader.config, reader.tensors).beside)
    if family == "phimoe":
        beside = (*beside, "lm_head.bias")
    assert all(name.startswith(beside) for name in reader.tensors.keys() - required.keys())
