"""What is derived from transformers' own modules, where it is more than a family's layout."""

from __future__ import annotations

import pytest

from hlwq.errors import UnsupportedError
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
