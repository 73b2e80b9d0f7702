"""Regular expressions by which the configurations of engines name modules."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import Any

from hlwq.errors import CheckpointError
from hlwq.families import ModelLayout
from hlwq.formats import reading
from hlwq.formats.base import Contents, Scheme
from hlwq.patterns import matcher

EXPERTS_END = r"(\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3))?$"
"""Behind the name of all experts: nothing, or one matrix of one of them."""


def kept_patterns(contents: Contents) -> list[str]:
    """Patterns of all that stays in its own dtype: outside the decoder, and modules in it."""
    outside = outside_the_decoder(contents.layout)
    if contents.layout.output_head in contents.quantized:
        outside.remove(head_pattern(contents.layout))
    return [*outside, *module_patterns(set(contents.kept), contents.layout), *router_patterns(contents.layout)]


def patterns_by_scheme(contents: Contents, common: Scheme) -> dict[Scheme, list[str]]:
    """Patterns of the modules whose scheme is not the common one."""
    modules_of: dict[Scheme, set[str]] = defaultdict(set)
    for module, scheme in contents.quantized.items():
        if scheme != common:
            modules_of[scheme].add(module)
    return {scheme: module_patterns(modules, contents.layout) for scheme, modules in modules_of.items()}


def check_pattern(pattern: Any, where: str) -> None:
    """Raise CheckpointError, which names the place, unless this is a regular expression."""
    try:
        matcher(pattern)
    except ValueError as error:
        shown = json.dumps(pattern)[:80]
        message = f"{where}: {shown} is not a regular expression ({error}). {reading.AGAIN}"
        raise CheckpointError(message) from None


def matches_start(pattern: str, name: str, where: str) -> bool:
    """Whether a name begins as a pattern of a file says. Raises CheckpointError, naming the place, if it cannot."""
    try:
        return matcher(pattern)(name)
    except ValueError as error:
        raise CheckpointError(f"{where}: {json.dumps(pattern)[:80]}: {error}. {reading.AGAIN}") from None


def targets(patterns: list[str]) -> list[str]:
    """Patterns as compressed-tensors spells them."""
    return [f"re:{pattern}" for pattern in patterns]


def outside_the_decoder(layout: ModelLayout) -> list[str]:
    """Patterns of what is not of the decoder: parts beside it, which are never quantized, and the output head.

    vLLM says `visual.…` where the checkpoint says `model.visual.…`: each pattern matches both.
    """
    kept = [rf"(.*\.)?{re.escape(prefix.removeprefix('model.'))}.*" for prefix in layout.beside]
    return [*kept, head_pattern(layout)]


def router_patterns(layout: ModelLayout) -> list[str]:
    """Patterns of what engines build as linear layers and transformers does not: what routes tokens to experts."""
    names = {
        name.removesuffix(".weight")
        for layer in layout.layers
        for name, shape in layer.others.items()
        if len(shape) == 2 and any(matrix.experts for matrix in layer.matrices())
    }
    return [rf"(.*\.)?layers\.\d+\.{re.escape(name)}$" for name in sorted(names)]


def head_pattern(layout: ModelLayout) -> str:
    """A pattern of the output head, wherever an engine has it."""
    return rf"(.*\.)?{re.escape(layout.output_head.rpartition('.')[2])}$"


def module_patterns(modules: set[str], layout: ModelLayout) -> list[str]:
    """Regular expressions that match these modules of the decoder, by their own and their fused names."""
    layers_of: dict[str, set[int]] = defaultdict(set)
    having: dict[str, set[int]] = defaultdict(set)
    fused: dict[str, str] = {}
    experts: set[str] = set()
    for index, layer in enumerate(layout.layers):
        for matrix in layer.matrices():
            name = matrix.experts or matrix.name  # engines ask for all experts of a layer at once
            having[name].add(index)
            fused[name] = "" if matrix.experts else matrix.fused
            experts.update([name] if matrix.experts else [])
            if layout.layer_prefix(index) + matrix.name in modules:
                layers_of[name].add(index)
    # One pattern for modules that share their parent and their layers; in it, the fused names beside the own.
    leaves_of: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name, layers in layers_of.items():
        parent, dot, leaf = name.rpartition(".")
        where = r"\d+" if layers == having[name] else "(" + "|".join(map(str, sorted(layers))) + ")"
        end = EXPERTS_END if name in experts else "$"
        leaves = leaves_of[re.escape(parent + dot), where, end]
        leaves += [each for each in (leaf, fused[name].rpartition(".")[2]) if each and each not in leaves]
    return [
        rf"(.*\.)?layers\.{where}\.{parent}({'|'.join(leaves)}){end}"
        for (parent, where, end), leaves in leaves_of.items()
    ]
