"""What vLLM wants of a directory, whatever its format."""

from __future__ import annotations

from hlwq.families import ModelLayout
from hlwq.formats.base import Demand, StoredModule, demand
from hlwq.formats.uniform import GROUP_SIZES

VLLM = "vLLM"


def uniform_demands(
    layout: ModelLayout, modules: dict[str, StoredModule], bits: tuple[int, ...], again: str
) -> list[Demand]:
    """What vLLM wants of uniform codes, in a format of which it has kernels for these bits."""
    odd = {f"{stored.scheme.bits} bits" for stored in modules.values() if stored.scheme.bits not in bits}
    groups = [
        f"{name} (group {stored.scheme.group_size})"
        for name, stored in modules.items()
        if stored.scheme.group_size not in GROUP_SIZES
    ]
    uneven = [
        f"{name} {stored.shape}" for name, stored in modules.items() if stored.shape[0] % 32 or stored.shape[1] % 32
    ]
    return [
        demand(VLLM, f"{' or '.join(map(str, bits))} bits (4 on a CPU)", sorted(odd), again),
        demand(VLLM, "groups of 32, 64 or 128", groups, "Quantize again with `group_size=64`."),
        demand(VLLM, "in and out divisible by 32", uneven, "Quantize again and `exclude` them."),
        demand(VLLM, "fused matrices have one scheme", mixed_fusions(layout, modules), again),
    ]


def vllm_name(layout: ModelLayout, name: str) -> str:
    """A module's name in vLLM, by its name in the checkpoint: parts beside the decoder are not in `model` there."""
    inside = "model.language_model."
    if name.startswith(inside):
        return "language_model.model." + name.removeprefix(inside)
    return name.removeprefix("model.") if name.startswith(tuple(layout.beside)) else name


def mixed_fusions(layout: ModelLayout, modules: dict[str, StoredModule]) -> list[str]:
    """The matrices that vLLM fuses, by its names for them, whose members do not have one scheme."""
    return [
        fused
        for fused, members in layout.fusions().items()
        if len({modules[member].scheme if member in modules else None for member in members}) > 1
    ]
