"""Model families: what each checkpoint holds, what is quantized, what is kept, what engines fuse."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from hlwq.errors import HlwqError
from hlwq.models.family import Family, Layer, Matrix
from hlwq.models.llama import LLAMA, MISTRAL
from hlwq.models.qwen2 import QWEN2
from hlwq.models.qwen3 import QWEN3
from hlwq.models.qwen3_5 import QWEN3_5

__all__ = ["FAMILIES", "Family", "Layer", "Matrix", "ModelLayout", "check_supported", "describe"]

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_5)


@dataclass(frozen=True)
class ModelLayout:
    """A family's description applied to one checkpoint.

    Attributes:
        family: which family.
        text_config: the configuration of the decoder.
        prefix: the names before `embed_tokens`, such as `model.language_model.`
        layers: the decoder layers, in order.
        tied: the output head is the embedding.
    """

    family: Family
    text_config: dict[str, Any]
    prefix: str
    layers: list[Layer]
    tied: bool

    @property
    def embedding(self) -> str:
        """The embedding's module path."""
        return f"{self.prefix}embed_tokens"

    def layer_prefix(self, index: int) -> str:
        """The names before a decoder layer's modules."""
        return f"{self.prefix}layers.{index}."

    def required_tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the decoder cannot do without, with its shape."""
        vocabulary, hidden = self.text_config["vocab_size"], self.text_config["hidden_size"]
        required: dict[str, tuple[int, ...]] = {f"{self.embedding}.weight": (vocabulary, hidden)}
        for index, layer in enumerate(self.layers):
            prefix = self.layer_prefix(index)
            for matrix in layer.matrices():
                required[f"{prefix}{matrix.name}.weight"] = matrix.shape
                if matrix.bias:
                    required[f"{prefix}{matrix.name}.bias"] = matrix.shape[:1]
            required |= {prefix + name: shape for name, shape in layer.others.items()}
        required[f"{self.prefix}norm.weight"] = (hidden,)
        if not self.tied:
            required["lm_head.weight"] = (vocabulary, hidden)
        return required


def check_supported(config: dict[str, Any]) -> Family:
    """The family of a `config.json`.

    Raises:
        HlwqError: the architecture is not supported, or none is named.
    """
    architectures = config.get("architectures")
    if not architectures:
        raise HlwqError('config.json names no architectures. Add them, such as "architectures": ["LlamaForCausalLM"].')
    for family in FAMILIES:
        if architectures[0] in family.architectures:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    experts = " Mixture-of-experts models are not supported yet." if "Moe" in architectures[0] else ""
    raise HlwqError(
        f"config.json: architecture {architectures[0]} is not supported.{experts} Supported are: {supported}."
    )


def describe(config: dict[str, Any], names: Collection[str]) -> ModelLayout:
    """Lay out the decoder of a checkpoint.

    Args:
        config: the parsed `config.json`.
        names: the checkpoint's tensors.

    Raises:
        HlwqError: the architecture is not supported, or the configuration or the embedding is incomplete.
    """
    family = check_supported(config)
    text_config = config.get("text_config") or config
    prefix = next((prefix for prefix in family.prefixes if f"{prefix}embed_tokens.weight" in names), None)
    if prefix is None:
        raise HlwqError(f"tensor {family.prefixes[0]}embed_tokens.weight is missing. Download the checkpoint again.")
    tied = config.get("tie_word_embeddings", text_config.get("tie_word_embeddings"))
    if tied is None:
        tied = "lm_head.weight" not in names
    try:
        layers = family.layers(text_config)
        assert text_config["vocab_size"]
    except KeyError as error:
        raise HlwqError(f"config.json lacks {error}, which {family.name} needs.") from None
    return ModelLayout(family, text_config, prefix, layers, bool(tied))
