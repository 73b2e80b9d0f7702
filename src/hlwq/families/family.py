"""How a model family is described: its decoder layers, and all that is special about it in any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hlwq.containers import TensorSpec


@dataclass(frozen=True)
class Matrix:
    """A linear layer of a decoder layer.

    Attributes:
        name: the module's path inside the decoder layer, such as `self_attn.q_proj`.
        shape: (out_features, in_features).
        fused: the path under which engines run it joined with its siblings, such as `self_attn.qkv_proj`. All members
            of a fused matrix must have one scheme.
        bias: whether a bias vector goes with it.
        keep: why it stays in its own dtype unless the user includes it; empty if it is quantized.
        stream: the module whose inputs are the hidden states that its outputs are added to; empty if they are not.
    """

    name: str
    shape: tuple[int, int]
    fused: str = ""
    bias: bool = False
    keep: str = ""
    stream: str = ""


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        steps: the linear layers in the order of evaluation; the members of a step share their input.
        others: every other tensor of the layer, by its path inside it, with its shape. They are always kept.
    """

    steps: tuple[tuple[Matrix, ...], ...]
    others: dict[str, tuple[int, ...]]

    def matrices(self) -> list[Matrix]:
        """All linear layers, in the order of evaluation."""
        return [matrix for step in self.steps for matrix in step]


@dataclass(frozen=True)
class Restoration:
    """How Hugging Face's names, tensors and configuration come back from a directory that an engine's tool changed.

    Attributes:
        config: the configuration as it was.
        name: a tensor's Hugging Face name, by its name in the directory.
        shape: its shape as it was.
        tensor: its values as they were, given its name in the directory.
    """

    config: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
    name: Callable[[str], str] = lambda name: name
    shape: Callable[[TensorSpec], tuple[int, ...]] = lambda spec: spec.shape
    tensor: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor


@dataclass(frozen=True)
class MlxModel:
    """What mlx-lm's model class for a family wants and does.

    Attributes:
        model_type: what `config.json` must say, where that is not what the checkpoint says.
        path: a module's name after `sanitize`, by its name in the checkpoint.
        reads_top_level_rope: it looks for `rope_theta` and `rope_scaling` at the top level of the configuration.
        demands: what it wants of a text configuration, each as (requirement, offenders, remedy).
        converted: whether these tensors went through mlx-lm's own conversion, which changes more than their storage.
        restoration: what undoes that conversion. Its `config` also undoes what `model_type` did.
    """

    model_type: str = ""
    path: Callable[[str], str] = lambda name: name
    reads_top_level_rope: bool = True
    demands: Callable[[dict[str, Any]], list[tuple[str, list[str], str]]] = lambda config: []
    converted: Callable[[Iterable[str]], bool] = lambda names: False
    restoration: Restoration = field(default_factory=Restoration)


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: as people write it.
        architectures: what `config.json` says under `architectures`.
        layers: the decoder layers that a text configuration describes, whose entries are checked.
        model_types: what it says under `model_type`.
        layer_types: types of layers that a configuration may list.
        wrappers: of the architectures, those whose configuration has the decoder's as `text_config`.
        prefixes: where the decoder may stand in the checkpoint, as the names before `embed_tokens`.
        kept: parts outside the decoder, by the beginning of their tensors' names, and what they are.
        architecture_of: architectures by `model_type`, for configurations that were saved without one.
        vllm_prefixes: beginnings of names, and what vLLM has in their place.
        vllm_unrotated: fused matrices, by their paths inside a layer, whose inputs vLLM does not rotate.
        vllm_packs_embedding: vLLM's model can hold its embedding as codes.
        mlx: the family in mlx-lm.
    """

    name: str
    architectures: tuple[str, ...]
    layers: Callable[[dict[str, Any]], list[Layer]]
    model_types: tuple[str, ...]
    layer_types: tuple[str, ...] = ("full_attention",)
    wrappers: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("model.",)
    kept: dict[str, str] = field(default_factory=dict)
    architecture_of: dict[str, str] = field(default_factory=dict)
    vllm_prefixes: dict[str, str] = field(default_factory=dict)
    vllm_unrotated: tuple[str, ...] = ()
    vllm_packs_embedding: bool = True
    mlx: MlxModel = field(default_factory=MlxModel)

    def vllm_name(self, name: str) -> str:
        """A module's name in vLLM, by its name in the checkpoint."""
        for prefix, theirs in self.vllm_prefixes.items():
            if name.startswith(prefix):
                return theirs + name.removeprefix(prefix)
        return name


def attention(
    config: dict[str, Any],
    *,
    qkv_bias: bool,
    o_bias: bool,
    head_dim: int | None = None,
    head_norms: bool = False,
    gated: bool = False,
) -> Layer:
    """Softmax attention as the Llama line has it.

    Args:
        config: the text configuration.
        qkv_bias: q, k and v have biases.
        o_bias: the output projection has one.
        head_dim: the width of a head where the configuration does not say; by default what the hidden size leaves.
        head_norms: q and k are normalised per head (`q_norm`, `k_norm`).
        gated: q carries an output gate, which doubles it.
    """
    hidden = config["hidden_size"]
    width = config.get("head_dim") or head_dim or hidden // config["num_attention_heads"]
    queries = config["num_attention_heads"] * width
    keys = (config.get("num_key_value_heads") or config["num_attention_heads"]) * width
    fused = "self_attn.qkv_proj"
    return Layer(
        steps=(
            (
                Matrix("self_attn.q_proj", (2 * queries if gated else queries, hidden), fused, qkv_bias),
                Matrix("self_attn.k_proj", (keys, hidden), fused, qkv_bias),
                Matrix("self_attn.v_proj", (keys, hidden), fused, qkv_bias),
            ),
            (Matrix("self_attn.o_proj", (hidden, queries), bias=o_bias, stream="input_layernorm"),),
        ),
        others={"self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,)} if head_norms else {},
    )


def with_mlp(mixer: Layer, config: dict[str, Any], *, bias: bool = False) -> Layer:
    """A decoder layer of `mixer` and a gated MLP, each behind its norm."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    fused = "mlp.gate_up_proj"
    return Layer(
        steps=(
            *mixer.steps,
            (
                Matrix("mlp.gate_proj", (intermediate, hidden), fused, bias),
                Matrix("mlp.up_proj", (intermediate, hidden), fused, bias),
            ),
            (Matrix("mlp.down_proj", (hidden, intermediate), bias=bias, stream="post_attention_layernorm"),),
        ),
        others={
            **mixer.others,
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        },
    )
