"""What is derived from transformers' own modules, where it is more than a family's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import model_config, some_names

from hlwq.errors import UnsupportedError
from hlwq.families import describe
from hlwq.families.derived import derived_decoder


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


GOLDEN = json.loads((Path(__file__).parent / "data" / "layers.json").read_text())
"""Layers of the first families as they were described by hand: of each kind the matrices, with their shapes, what
engines fuse, biases, what is kept and what they are added to; and the kind of each layer."""


@pytest.mark.parametrize("case", GOLDEN)
def test_derived_layers_are_those_described_by_hand(case: str) -> None:
    family, _, overrides = case.partition(" ")
    config = model_config(family, **json.loads(overrides))
    layout = describe(config, some_names(config, "model.language_model." if family == "qwen3_5" else "model."))
    kinds, order = GOLDEN[case]["kinds"], GOLDEN[case]["layers"]
    for layer, kind in zip(layout.layers, order, strict=True):
        steps = [[[m.name, [*m.shape], m.fused, m.bias, m.keep, m.stream] for m in step] for step in layer.steps]
        others = {name: [*shape] for name, shape in layer.others.items()}
        assert {"steps": steps, "others": others} == kinds[kind]
