"""How a model family is described: one function from a configuration to its decoder layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


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
    """

    name: str
    shape: tuple[int, int]
    fused: str = ""
    bias: bool = False
    keep: str = ""


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
class Family:
    """A model family.

    Attributes:
        name: as people write it.
        architectures: what `config.json` says under `architectures`.
        layers: the decoder layers that a text configuration describes.
        prefixes: where the decoder may stand in the checkpoint, as the names before `embed_tokens`.
        kept: parts outside the decoder, by the beginning of their tensors' names, and what they are.
    """

    name: str
    architectures: tuple[str, ...]
    layers: Callable[[dict[str, Any]], list[Layer]]
    prefixes: tuple[str, ...] = ("model.",)
    kept: dict[str, str] = field(default_factory=dict)


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
            (Matrix("self_attn.o_proj", (hidden, queries), bias=o_bias),),
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
            (Matrix("mlp.down_proj", (hidden, intermediate), bias=bias),),
        ),
        others={
            **mixer.others,
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        },
    )
