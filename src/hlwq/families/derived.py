"""Decoder layers as transformers' own modules describe them: which matrices there are, and what each is given.

A model is built without weights, and each kind of layer runs once on the `meta` device, where tensors have shapes and
no values: linear layers that are handed the same tensor share an input, and a sum with a layer's output tells which
hidden states that output is added to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hlwq.errors import UnsupportedError, reason
from hlwq.families.family import Layer, Matrix
from hlwq.transformers_models import build_skeleton, quiet_transformers

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Matrices that every engine runs as one if they share an input, by the name of the whole."""
SUMS = ("add", "add_", "__add__", "__radd__", "__iadd__")
"""The names of torch's functions that add two tensors."""
EXPERTS = ("gate_up_proj", "down_proj")
"""The stacks in which transformers' modules hold the matrices of all experts of a layer."""
OTHERWISE = "another way than as gate, up and down, one row for each output, which is not supported"
TOKENS = 4
"""Tokens of the sample that goes through a layer."""


@dataclass(frozen=True)
class Decoder:
    """A decoder without its values.

    Attributes:
        layers: its layers.
        others: its tensors outside the layers, by their paths in it, with their shapes.
        embedding: the module, by its path in it, that token ids go through.
        norm: the module, by its path in it, that the last layer's outputs go through.
        place: the names before all of these in the whole model, such as `model.`.
        head: the output head, by its path in the whole model.
    """

    layers: tuple[Layer, ...]
    others: Mapping[str, tuple[int, ...]]
    embedding: str
    norm: str
    place: str
    head: str


def derived_decoder(config: dict[str, Any]) -> Decoder:
    """The decoder of a `config.json`.

    Raises:
        UnsupportedError: transformers does not know the model, or its layers do not run one by one.
        CheckpointError: the configuration makes no model.
    """
    return _derived(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=16)
def _derived(config: str) -> Decoder:
    with torch.device("cpu"):  # whatever a caller, such as transformers' `from_pretrained`, has set
        model = build_skeleton(json.loads(config), tied=False)
        decoder = model.get_decoder()
        try:
            return _described(model, decoder)
        except UnsupportedError:
            raise
        except Exception as error:  # of the model's own code
            name = type(decoder).__name__
            raise UnsupportedError(f"the layers of {name} do not run one by one ({reason(error)}).") from None


def _described(model: Any, decoder: Any) -> Decoder:
    """Run each kind of layer once, and describe what was seen."""
    name_of = {module: name for name, module in model.named_modules()}
    place = f"{name_of[decoder]}." if name_of[decoder] else ""
    embedding = name_of[decoder.get_input_embeddings()].removeprefix(place)
    head = name_of[model.get_output_embeddings()]
    others = {name: tuple(each.shape) for name, each in decoder.state_dict().items() if not name.startswith("layers.")}
    given, norm = _given(decoder)
    known: dict[Any, Layer] = {}
    layers = []
    for layer, (positional, named) in zip(decoder.layers, given, strict=True):
        kind = type(layer), tuple((name, each.shape) for name, each in layer.state_dict().items())
        if kind not in known:
            known[kind] = _described_layer(layer, positional, named)
        layers.append(known[kind])
    return Decoder(tuple(layers), others, embedding, norm, place, head)


def _given(decoder: Any) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], str]:
    """What a decoder gives its layers for a few tokens, and its child that takes the last layer's outputs."""
    embedding = decoder.get_input_embeddings()
    embedding.weight = nn.Parameter(torch.zeros(1, embedding.weight.shape[1]), requires_grad=False)
    embedding.padding_idx = None
    for name, child in decoder.named_children():
        if name != "layers":
            for module in child.modules():
                for own, parameter in list(module.named_parameters(recurse=False)):
                    zeros = torch.zeros(()).expand(parameter.shape)  # which take no memory
                    setattr(module, own, nn.Parameter(zeros, requires_grad=False))
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    after: list[str] = []

    def record(hidden: Tensor, *positional: Any, **named: Any) -> Tensor:
        given.append(((hidden, *positional), named))
        after.clear()
        return hidden

    hooks = []
    for name, child in decoder.named_children():
        if name != "layers":
            hooks.append(child.register_forward_pre_hook(lambda *_, name=name: after.append(name)))
    for layer in decoder.layers:
        layer.forward = record
    with quiet_transformers(), torch.no_grad():
        decoder(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    for layer in decoder.layers:
        del layer.forward
    for hook in hooks:
        hook.remove()
    return given, after[0] if after else ""


class _Sums(TorchFunctionMode):
    """Keeps the pairs of tensors that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (
            getattr(func, "__name__", "") in SUMS
            and len(args) > 1
            and isinstance(args[0], Tensor)
            and isinstance(args[1], Tensor)
        ):
            self.pairs.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


def _described_layer(layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Layer:
    """Run a layer on `meta`, and describe what was seen."""
    layer.to("meta", torch.bfloat16)  # in which all kernels of experts run
    modules = dict(layer.named_modules())
    linears = {name: module for name, module in modules.items() if type(module) is nn.Linear}
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, Tensor] = {}

    def before(name: str) -> Callable[..., None]:
        return lambda module, args: inputs.setdefault(name, []).extend(args[:1])

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, output: outputs.__setitem__(name, output)

    experts = {name: module for name, module in modules.items() if _holds_experts(module)}
    hooks = [module.register_forward_pre_hook(before(name)) for name, module in modules.items() if name]
    hooks += [module.register_forward_hook(after(name)) for name, module in linears.items()]
    with quiet_transformers(), torch.no_grad(), _Sums() as sums:
        layer(*_on_meta(positional), **_on_meta(named))
    for hook in hooks:
        hook.remove()
    normed = {name: given[0] for name, given in inputs.items() if given and "Norm" in type(modules[name]).__name__}
    steps: list[list[str]] = []
    for name in inputs:  # in the order of evaluation
        if name in linears:
            step = next((each for each in steps if inputs[each[0]][0] is inputs[name][0]), None)
            if step is None:
                steps.append([name])
            else:
                step.append(name)
        elif name in experts:
            steps.append([name])
    matrices: list[tuple[Matrix, ...]] = []
    for step in steps:
        if step[0] in experts:
            matrices += _of_experts(step[0], experts[step[0]])
            continue
        matrices.append(
            tuple(
                Matrix(
                    name,
                    (linears[name].out_features, linears[name].in_features),
                    _fused(name, step),
                    linears[name].bias is not None,
                    stream=_stream(outputs[name], sums.pairs, normed),
                )
                for name in step
            )
        )
    own = {f"{name}.{part}" for step in steps for name in step for part in (*("weight", "bias"), *EXPERTS)}
    for name in modules.keys() - experts.keys():
        if name.endswith("experts") and any(each.ndim == 3 for each in modules[name].parameters(recurse=False)):
            raise UnsupportedError(f"{type(modules[name]).__name__} holds its experts in {OTHERWISE}.")
    rest = {name: tuple(each.shape) for name, each in layer.state_dict().items() if name not in own}
    return Layer(tuple(matrices), rest)


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module holds the matrices of experts as two stacks."""
    return all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in EXPERTS)


def _of_experts(name: str, module: nn.Module) -> list[tuple[Matrix, ...]]:
    """The steps of each expert: gate and up, then down."""
    gate_up, down = (module.get_parameter(stack) for stack in EXPERTS)
    count, rows, hidden = gate_up.shape
    inner = rows // 2
    usual = {"is_transposed": False, "is_concatenated": True, "has_gate": True, "has_bias": False}
    usual["has_post_expert_norm"] = False
    if down.shape != (count, hidden, inner) or any(getattr(module, key, usual[key]) != usual[key] for key in usual):
        raise UnsupportedError(f"{type(module).__name__} holds its experts in {OTHERWISE}.")
    steps: list[tuple[Matrix, ...]] = []
    for index in range(count):
        place = f"{name}.{index}."
        gate, up = (
            Matrix(f"{place}{part}", (inner, hidden), name, experts=name, expert=index)
            for part in ("gate_proj", "up_proj")
        )
        steps += [(gate, up), (Matrix(f"{place}down_proj", (hidden, inner), name, experts=name, expert=index),)]
    return steps


def _fused(name: str, step: list[str]) -> str:
    """The path of the whole that engines make of a matrix and others of its step; empty if they do not."""
    parent, _, leaf = name.rpartition(".")
    for whole, members in FUSED.items():
        if leaf in members and all(f"{parent}.{member}" in step for member in members):
            return f"{parent}.{whole}"
    return ""


def _stream(output: Tensor, pairs: list[tuple[Tensor, Tensor]], normed: dict[str, Tensor]) -> str:
    """The norm that is given what an output is added to: the hidden states that go by its module."""
    others = [right if output is left else left for left, right in pairs if output is left or output is right]
    return next((name for name, given in normed.items() for other in others if given is other), "")


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta", torch.bfloat16 if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: _on_meta(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_on_meta, value))
    return value
