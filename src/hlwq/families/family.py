"""How a model family is described: its decoder layers, and all that is special about it in any engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from hlwq.containers import TensorSpec

MATRICES = "gate_proj", "up_proj", "down_proj"
"""An expert's, as transformers' modules are described."""
OF_EXPERT = re.compile(r"(experts\.\d+\.)(\w+)")
GATE, ROUTER = "a gate, and tiny", "routes tokens to experts"


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
        experts: the module inside the layer that holds all experts, if it is a matrix of one of them.
        expert: which.
    """

    name: str
    shape: tuple[int, int]
    fused: str = ""
    bias: bool = False
    keep: str = ""
    stream: str = ""
    experts: str = ""
    expert: int = -1


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

    def experts(self) -> list[str]:
        """The modules that hold all experts."""
        return list(dict.fromkeys(matrix.experts for matrix in self.matrices() if matrix.experts))


def _kept(matrix: Matrix, layer: Layer) -> str:
    """Why a matrix of any family stays as it is: gates, and what routes tokens to experts."""
    if matrix.shape[0] == 1:
        return GATE
    experts = len({each.expert for each in layer.matrices() if each.experts})
    return ROUTER if experts and not matrix.experts and matrix.shape[0] == experts else ""


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
        refusal: why no file of this family runs in mlx-lm with its codes; empty if one does.
        runs_experts: its experts are where those of most families are.
        reads_top_level_vocabulary: a wrapper takes `vocab_size` from the top level of the configuration.
        reads_top_level_rope: it looks for `rope_theta` and `rope_scaling` beside the decoder's other entries.
        demands: what it wants of a text configuration, each as (requirement, offenders, remedy).
        converted: whether these tensors went through mlx-lm's own conversion, which changes more than their storage.
        restoration: what undoes that conversion. Its `config` also undoes what `model_type` did.
    """

    model_type: str = ""
    path: Callable[[str], str] = lambda name: name
    refusal: str = ""
    runs_experts: bool = True
    reads_top_level_vocabulary: bool = True
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
        model_types: what it says under `model_type`.
        fused: the path inside a layer under which engines run a matrix joined with others, by its own path, beside what
            all engines do.
        keep: why a matrix stays in its own dtype unless the user includes it, by its path inside a layer.
        architecture_of: architectures by `model_type`, for configurations that were saved without one.
        renamings: parts of paths inside a layer in transformers' modules, and what the files have instead.
        expert_matrices: what the files call an expert's `gate_proj`, `up_proj` and `down_proj`.
        vllm_unrotated: fused matrices, by their paths inside a layer, whose inputs vLLM does not rotate.
        vllm_packs_embedding: vLLM's model can hold its embedding and its output head as codes.
        vllm_packs_experts: it leaves the loading of experts to what runs them.
        mlx: the family in mlx-lm.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    fused: dict[str, str] = field(default_factory=dict)
    keep: dict[str, str] = field(default_factory=dict)
    architecture_of: dict[str, str] = field(default_factory=dict)
    renamings: tuple[tuple[str, str], ...] = ()
    expert_matrices: tuple[str, str, str] = MATRICES
    vllm_unrotated: tuple[str, ...] = ()
    vllm_packs_embedding: bool = True
    vllm_packs_experts: bool = True
    mlx: MlxModel = field(default_factory=MlxModel)

    def in_files(self, path: str) -> str:
        """The path inside a layer by which files call what transformers' modules call `path`."""
        for module, file in self.renamings:
            path = path.replace(module, file)
        names = dict(zip(MATRICES, self.expert_matrices, strict=True))
        return OF_EXPERT.sub(lambda found: found[1] + names.get(found[2], found[2]), path)

    def in_modules(self, path: str) -> str:
        """The reverse."""
        for module, file in reversed(self.renamings):
            path = path.replace(file, module)
        names = dict(zip(self.expert_matrices, MATRICES, strict=True))
        return OF_EXPERT.sub(lambda found: found[1] + names.get(found[2], found[2]), path)

    def adapted(self, layer: Layer) -> Layer:
        """A layer as transformers describes it, with what only the family knows."""
        steps = (
            tuple(
                replace(
                    matrix,
                    name=self.in_files(matrix.name),
                    experts=self.in_files(matrix.experts),
                    fused=self.in_files(self.fused.get(matrix.name, matrix.fused)),
                    keep=self.keep.get(matrix.name, matrix.keep or _kept(matrix, layer)),
                )
                for matrix in step
            )
            for step in layer.steps
        )
        others = {self.in_files(name): shape for name, shape in layer.others.items()}
        return replace(layer, steps=tuple(steps), others=others)
