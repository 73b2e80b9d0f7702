"""Model families: what each checkpoint holds, what is quantized, what is kept, what engines fuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hlwq.containers import DTYPES, TensorSpec
from hlwq.errors import CheckpointError, UnsupportedError
from hlwq.families.configuration import (
    check_architectures,
    check_entries,
    check_layers,
    check_model_type,
    text_config_of,
    with_tying,
)
from hlwq.families.derived import FUSED, derived_decoder
from hlwq.families.family import Family, Layer, Matrix, MlxModel, Restoration
from hlwq.families.known import KNOWN
from hlwq.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from hlwq.transformers_models import model_types_of, transformers_version

__all__ = [
    "FAMILIES",
    "FLOATS",
    "FUSED",
    "Family",
    "Layer",
    "Matrix",
    "MlxModel",
    "ModelLayout",
    "Restoration",
    "check_supported",
    "describe",
    "family_of",
    "model_dtype",
    "with_tying",
]

FLOATS = ("BF16", "F16", "F32")
"""The dtypes that models are stored and run in."""
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel, DeepSpeed or FSDP",
    "base_model.model.": "peft",
    "_fsdp_wrapped_module.": "FSDP",
    "model._orig_mod.": "torch.compile",
}
"""Beginnings of names in checkpoints that were saved from around a model."""
FAMILIES = (*KNOWN, QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT)
"""Those that hlwq is tested with."""
PARTS = {
    "visual": "vision tower",
    "vision_tower": "vision tower",
    "vision_model": "vision tower",
    "vision_encoder": "vision tower",
    "embed_vision": "vision tower",
    "audio_tower": "audio tower",
    "embed_audio": "audio tower",
    "multi_modal_projector": "projector of the vision tower",
    "mtp": "multi-token prediction head",
}
"""What is in checkpoints beside a decoder, by a part of its tensors' names."""


@dataclass(frozen=True)
class ModelLayout:
    """A family's description applied to one checkpoint.

    Attributes:
        family: which family.
        text_config: the configuration of the decoder.
        prefix: the names before the decoder's, such as `model.language_model.`
        layers: the decoder layers, in order.
        others: the decoder's tensors outside its layers, by their paths in it, with their shapes.
        embedding: the embedding's module path.
        norm: the module, by its path in the decoder, whose outputs the output head is given.
        output_head: the module path that an output head has if it is not the embedding.
        tied: the output head is the embedding.
        beside: the beginnings of names of parts outside the decoder that are never quantized, and what they are.
    """

    family: Family
    text_config: dict[str, Any]
    prefix: str
    layers: list[Layer]
    others: Mapping[str, tuple[int, ...]]
    embedding: str
    norm: str
    output_head: str
    tied: bool
    beside: Mapping[str, str]

    @property
    def head(self) -> str:
        """The module path of the output head, which is the embedding where they are tied."""
        return self.embedding if self.tied else self.output_head

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return any(layer.experts() for layer in self.layers)

    def tables(self) -> list[str]:
        """The modules outside the layers in which tokens are looked up: the embedding, and what else a model has."""
        vocabulary = self.others[f"{self.embedding.removeprefix(self.prefix)}.weight"][0]
        tables = [name for name, shape in self.others.items() if len(shape) == 2 and shape[0] == vocabulary]
        return [self.prefix + name.removesuffix(".weight") for name in tables]

    def layer_prefix(self, index: int) -> str:
        """The names before a decoder layer's modules."""
        return f"{self.prefix}layers.{index}."

    def matrices(self) -> dict[str, Matrix]:
        """The linear layers of the decoder, by their names in the checkpoint."""
        return {
            self.layer_prefix(index) + matrix.name: matrix
            for index, layer in enumerate(self.layers)
            for matrix in layer.matrices()
        }

    def fusions(self) -> dict[str, list[str]]:
        """The matrices that engines run as one: the members, by the name of the whole."""
        members: dict[str, list[str]] = {}
        for module, matrix in self.matrices().items():
            if matrix.fused:
                members.setdefault(module.removesuffix(matrix.name) + matrix.fused, []).append(module)
        return members

    def required_tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the decoder cannot do without, with its shape."""
        required = {self.prefix + name: shape for name, shape in self.others.items()}
        embedding = required[f"{self.embedding}.weight"]
        for index, layer in enumerate(self.layers):
            prefix = self.layer_prefix(index)
            for matrix in layer.matrices():
                required[f"{prefix}{matrix.name}.weight"] = matrix.shape
                if matrix.bias:
                    required[f"{prefix}{matrix.name}.bias"] = matrix.shape[:1]
            required |= {prefix + name: shape for name, shape in layer.others.items()}
        if not self.tied:
            required[f"{self.output_head}.weight"] = embedding
        return required


def check_supported(config: dict[str, Any]) -> Family:
    """The family of a `config.json`.

    Raises:
        CheckpointError: none is named.
        UnsupportedError: the architecture is not supported.
    """
    architectures = check_architectures(config)
    family = family_of(config)
    if family is not None:
        return family
    raise UnsupportedError(
        f"config.json: {architectures[0]} is no causal language model that transformers {transformers_version()} "
        "knows. Upgrade transformers, or correct the file."
    )


def family_of(config: dict[str, Any]) -> Family | None:
    """The family of a `config.json`: one of `FAMILIES`, or what transformers knows of another; None if nothing."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(first, str):
        return None
    known = next((family for family in FAMILIES if first in family.architectures), None)
    if known is not None:
        return known
    model_types = model_types_of(first)
    return Family(first, (first,), model_types) if model_types else None


def model_dtype(config: dict[str, Any], tensors: Iterable[TensorSpec] = ()) -> str:
    """The dtype that a model is meant to run in, as safetensors spells it.

    What `config.json` says, else what most matrices have, else BF16.
    """
    text_config = config.get("text_config")
    for section in (config, text_config if isinstance(text_config, dict) else {}):
        stated = section.get("dtype") or section.get("torch_dtype")
        for name in FLOATS:
            if stated == str(DTYPES[name]).removeprefix("torch."):
                return name
    matrices = Counter(spec.dtype for spec in tensors if len(spec.shape) == 2 and spec.dtype in FLOATS)
    return matrices.most_common(1)[0][0] if matrices else "BF16"


def _why_missing(names: Collection[str]) -> str:
    """What to do about a tensor that is not among these names."""
    for prefix, maker in WRAPPERS.items():
        if any(each.startswith(prefix) for each in names):
            return (
                f"The tensors' names begin with {prefix}, which {maker} puts there: save the model itself, not its "
                "wrapper, or take that from the names."
            )
    if "lm_head.weight" in names:
        return "An output head is there, and the embedding is not: save the checkpoint again with save_pretrained."
    if not any(".layers." in each for each in names):
        return "No tensor is of a decoder layer: these are not the weights of a language model that hlwq knows."
    return "Download the checkpoint again."


def describe(config: dict[str, Any], names: Collection[str]) -> ModelLayout:
    """Lay out the decoder of a checkpoint.

    Args:
        config: the parsed `config.json`.
        names: the checkpoint's tensors.

    Raises:
        CheckpointError: the configuration or the embedding is incomplete.
        UnsupportedError: the architecture is not supported.
    """
    family = check_supported(config)
    wrapped = config["architectures"][0].endswith("ForConditionalGeneration")
    text_config = text_config_of(config, wrapped=wrapped)
    check_entries(config, text_config, family.name)
    check_model_type(config, family.model_types)
    stored = _stored_layers(names)
    if not stored:
        raise CheckpointError(f"The checkpoint has no decoder layers. {_why_missing(names)}")
    check_layers(text_config, stored)
    described = {key: value for key, value in config.items() if wrapped or key != "text_config"}
    decoder = derived_decoder({"model_type": family.model_types[0], **described})
    name = f"{decoder.embedding}.weight"
    prefixes = [each.removesuffix(name) for each in names if each == name or each.endswith(f".{name}")]
    prefixes = [each for each in prefixes if _stored_layers(names, each)]
    if not prefixes:
        name = decoder.place + name
        raise CheckpointError(f"tensor {name} is missing. {_why_missing(names)}", tensor=name)
    prefix = decoder.place if decoder.place in prefixes else min(prefixes, key=len)
    if prefix.startswith(tuple(WRAPPERS)):
        raise CheckpointError(_why_missing(names))
    heads = [each.removesuffix(".weight") for each in names if each.endswith(f"{decoder.head}.weight")]
    adapted = {id(layer): family.adapted(layer) for layer in {id(each): each for each in decoder.layers}.values()}
    said = {each["tie_word_embeddings"] for each in (config, text_config) if "tie_word_embeddings" in each}
    return ModelLayout(
        family=family,
        text_config=text_config,
        prefix=prefix,
        layers=[adapted[id(layer)] for layer in decoder.layers],
        others=decoder.others,
        embedding=prefix + decoder.embedding,
        norm=decoder.norm,
        output_head=heads[0] if heads else decoder.head,
        tied=said.pop() if len(said) == 1 else not heads,
        beside=_beside(names, f"{prefix}layers.", len(decoder.layers)),
    )


def _beside(names: Collection[str], layers: str, count: int) -> dict[str, str]:
    """Parts outside the decoder: the beginnings of their tensors' names, and what they are."""
    found = {}
    for name in names:
        number = name.removeprefix(layers).partition(".")[0] if name.startswith(layers) else ""
        if number.isascii() and number.isdigit() and len(number) < 10 and int(number) >= count:
            found[f"{layers}{number}."] = PARTS["mtp"]  # GLM-4.5 and DeepSeek number it as one more layer
        segments = [] if number else name.split(".")
        place = next((place for place, segment in enumerate(segments) if segment in PARTS), None)
        if place is not None:
            found[".".join(segments[: place + 1]) + "."] = PARTS[segments[place]]
    return found


def _stored_layers(names: Collection[str], prefix: str | None = None) -> int:
    """How many layers there are tensors of, by the names: behind a prefix, or behind the one with the most."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        before, found, after = name.partition("layers.")
        number = after.partition(".")[0]
        if found and number.isascii() and number.isdigit() and len(number) < 10:
            numbers.setdefault(before, set()).add(int(number))
    return max(map(len, numbers.values()), default=0) if prefix is None else len(numbers.get(prefix, ()))
