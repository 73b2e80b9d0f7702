"""The typed reading of `config.json`: what transformers would refuse, and what no model can have, is refused by name.

Transformers is not needed for it, and an entry that hlwq does not read is none of its business.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hlwq.errors import CheckpointError

LARGEST = 1 << 31
"""No size of a model reaches it, and products of two stay exact."""
ACTIVATIONS = {
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "hardswish"),
    *("gelu_pytorch_tanh", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu", "relu2", "relu6"),
    *("sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "xielu"),
}
"""The names that transformers knows."""
ROPES = {"default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "su", "mrope"}
DTYPES = {"float16", "bfloat16", "float32", "float64", "auto"}


@dataclass(frozen=True)
class Kind:
    """What an entry can be.

    Attributes:
        words: that, in words.
        accepts: whether a value is such a thing.
    """

    words: str
    accepts: Callable[[Any], bool]

    def or_null(self) -> Kind:
        """The same, or null."""
        return Kind(f"{self.words} or null", lambda value: value is None or self.accepts(value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _is_rope(value: Any) -> bool:
    """Rotary parameters: one set of them, or one for each type of layer."""
    if not isinstance(value, dict):
        return False
    if value and all(isinstance(each, dict) for each in value.values()):
        return all(map(_is_rope, value.values()))
    kinds = [value[key] for key in ("rope_type", "type") if key in value]
    numbers = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor")
    return all(isinstance(kind, str) and kind in ROPES for kind in kinds) and all(
        value.get(key) is None or (_is_number(value[key]) and value[key] > 0) for key in numbers
    )


SIZE = Kind(f"an integer from 1 to {LARGEST:,}", lambda value: type(value) is int and 1 <= value <= LARGEST)
FLAG = Kind("true or false", lambda value: type(value) is bool)
NAMES = Kind("a list of names", lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value))
LAYERS = "layers_block_type"
"""An entry by which some models tell how many layers there are, and of which types."""
ENTRIES: dict[str, Kind] = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": SIZE,
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE.or_null(),
    "head_dim": SIZE.or_null(),
    "max_position_embeddings": SIZE,
    "sliding_window": Kind("an integer or null", lambda value: value is None or type(value) is int),
    "rms_norm_eps": Kind("a positive number", lambda value: type(value) is float and _is_number(value) and value > 0),
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "use_cache": FLAG,
    "tie_word_embeddings": FLAG,
    "hidden_act": Kind(
        "an activation that transformers knows", lambda value: isinstance(value, str) and value in ACTIVATIONS
    ),
    "rope_theta": Kind("a positive number", lambda value: _is_number(value) and value > 0).or_null(),
    "rope_scaling": Kind("rotary parameters", _is_rope).or_null(),
    "rope_parameters": Kind("rotary parameters", _is_rope).or_null(),
    "layer_types": NAMES.or_null(),
    LAYERS: NAMES.or_null(),
    "dtype": Kind(
        "a dtype of weights", lambda value: isinstance(value, str) and value.removeprefix("torch.") in DTYPES
    ).or_null(),
    "linear_num_key_heads": SIZE,
    "linear_num_value_heads": SIZE,
    "linear_key_head_dim": SIZE,
    "linear_value_head_dim": SIZE,
    "linear_conv_kernel_dim": SIZE,
    "full_attention_interval": SIZE,
}
"""Entries of a decoder's configuration, as transformers has them for the families here."""
ENTRIES["torch_dtype"] = ENTRIES["dtype"]
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def check_architectures(config: dict[str, Any]) -> list[str]:
    """The `architectures` of a `config.json`.

    Raises:
        CheckpointError: none is named, or they are no names.
    """
    found = config.get("architectures")
    if found and NAMES.accepts(found):
        return list(found)
    if not found and not isinstance(found, bool | int | float):
        message = 'config.json names no architectures. Add them, such as "architectures": ["LlamaForCausalLM"].'
        raise CheckpointError(message)
    raise CheckpointError(f"config.json: architectures is {_shown(found)}, not {NAMES.words}. Correct it.")


def text_config_of(config: dict[str, Any], *, wrapped: bool) -> dict[str, Any]:
    """The configuration of the decoder.

    Args:
        config: the parsed `config.json`.
        wrapped: the architecture wraps a decoder, whose configuration is a section of its own.

    Raises:
        CheckpointError: there is no such section, or it is no object.
    """
    if not wrapped:
        return config
    section = config.get("text_config")
    if not isinstance(section, dict):
        raise CheckpointError(f"config.json: text_config is {_shown(section)}, not an object. Correct it.")
    return section


def check_entries(config: dict[str, Any], text_config: dict[str, Any], family: str) -> None:
    """Check the entries that hlwq, or the engines for which it writes, will read.

    Raises:
        CheckpointError: one is missing, has another type than transformers accepts, or contradicts another.
    """
    for name in REQUIRED:
        if name not in text_config and not (name == "num_hidden_layers" and text_config.get(LAYERS)):
            raise CheckpointError(f"config.json lacks '{name}', which {family} needs.")
    sections = {"": config} if text_config is config else {"": config, "text_config.": text_config}
    for where, section in sections.items():
        for name, kind in ENTRIES.items():
            if name in section and not kind.accepts(section[name]):
                raise CheckpointError(
                    f"config.json: {where}{name} is {_shown(section[name])}, not {kind.words}. Correct it.",
                )
    heads, keys = text_config["num_attention_heads"], text_config.get("num_key_value_heads")
    if keys and heads % keys:
        raise CheckpointError(
            f"config.json: num_attention_heads is {heads}, which num_key_value_heads, {keys}, does not divide. "
            "Correct them."
        )
    if not text_config.get("head_dim") and text_config["hidden_size"] % heads:
        raise CheckpointError(
            f"config.json: hidden_size is {text_config['hidden_size']}, which num_attention_heads, {heads}, does not "
            "divide, and there is no head_dim. Correct them."
        )


def check_model_type(config: dict[str, Any], accepted: tuple[str, ...]) -> None:
    """Raise CheckpointError if a `config.json` has a `model_type` that is not among those of its architecture."""
    model_type = config.get("model_type", accepted[0])  # without one, only transformers refuses the file
    if not isinstance(model_type, str) or model_type not in accepted:
        raise CheckpointError(
            f"config.json: model_type is {_shown(model_type)}, but architectures is "
            f"{_shown(config.get('architectures'))}, whose model_type is {' or '.join(accepted)}. Correct one of them."
        )


def check_layers(text_config: dict[str, Any], stored: int) -> None:
    """Check the number of layers, and of their types where the configuration lists them.

    Args:
        text_config: with its entries checked.
        stored: layers of which the checkpoint holds tensors.

    Raises:
        CheckpointError: there are more layers than the checkpoint holds, or `layer_types` does not fit them.
    """
    types = text_config.get("layer_types")
    count = len(text_config[LAYERS]) if text_config.get(LAYERS) else text_config["num_hidden_layers"]
    if count > stored:
        raise CheckpointError(
            f"config.json: num_hidden_layers is {count}, but the checkpoint holds tensors of {stored} layers. "
            "They do not belong together, or a part is missing."
        )
    if types is not None and len(types) != count:
        raise CheckpointError(f"config.json: layer_types names {len(types)} layers of {count}. Correct it.")


def with_tying(config: dict[str, Any], tied: bool) -> dict[str, Any]:
    """The configuration that says, wherever an engine looks, whether the output head is the embedding."""
    written = {**config, "tie_word_embeddings": tied}
    if isinstance(config.get("text_config"), dict):
        written["text_config"] = {**config["text_config"], "tie_word_embeddings": tied}
    return written


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"
