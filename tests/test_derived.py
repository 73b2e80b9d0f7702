"""Layers derived from transformers' own modules are those that families describe by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from checkpoints import FAMILY_NAMES, model_config, some_names

from hlwq.errors import UnsupportedError
from hlwq.families import Layer, describe
from hlwq.families.derived import derived_decoder

VARIANTS: list[dict[str, Any]] = [{}, {"attention_bias": True}, {"tie_word_embeddings": True}, {"head_dim": 64}]


def without_engines(layer: Layer) -> Layer:
    """A layer without what only a family can know: what is kept, and what single engines fuse."""
    usual = ("self_attn.qkv_proj", "mlp.gate_up_proj")
    steps = (
        tuple(replace(matrix, keep="", fused=matrix.fused if matrix.fused in usual else "") for matrix in step)
        for step in layer.steps
    )
    return replace(layer, steps=tuple(steps))


def test_a_model_whose_layers_stand_elsewhere_is_refused() -> None:
    config = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": 64,
        "n_layer": 1,
        "n_head": 2,
    }
    with pytest.raises(UnsupportedError, match="the layers of BloomModel do not run one by one"):
        derived_decoder(config)


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_derived_layers_are_those_described(family: str, overrides: dict[str, Any]) -> None:
    config = model_config(family, **overrides)
    layout = describe(config, some_names(config, "model.language_model." if family == "qwen3_5" else "model."))
    decoder = derived_decoder(config)
    assert list(decoder.layers) == [without_engines(layer) for layer in layout.layers]
    assert decoder.norm == "norm"
    hidden, vocabulary = layout.text_config["hidden_size"], layout.text_config["vocab_size"]
    assert decoder.others == {"embed_tokens.weight": (vocabulary, hidden), "norm.weight": (hidden,)}
