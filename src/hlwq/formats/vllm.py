"""What vLLM wants of a directory, whatever its format."""

from __future__ import annotations

from collections.abc import Iterator

from hlwq.families import Matrix, ModelLayout
from hlwq.formats.base import Demand, Scheme, StoredModule, demand
from hlwq.formats.uniform import GROUP_SIZES, WORD_BITS

VLLM = "vLLM"


def decoder_matrices(layout: ModelLayout) -> Iterator[tuple[str, Matrix]]:
    """Each linear layer of the decoder, after the names that stand before it in the checkpoint."""
    for index, layer in enumerate(layout.layers):
        for matrix in layer.matrices():
            yield layout.layer_prefix(index), matrix


def uniform_demands(layout: ModelLayout, modules: dict[str, StoredModule], again: str) -> list[Demand]:
    """What vLLM wants of uniform codes in any format."""
    bits = {f"{stored.scheme.bits} bits" for stored in modules.values() if stored.scheme.bits not in WORD_BITS}
    groups = [
        f"{name} (group {stored.scheme.group_size})"
        for name, stored in modules.items()
        if stored.scheme.group_size not in GROUP_SIZES
    ]
    uneven = [
        f"{name} {stored.shape}" for name, stored in modules.items() if stored.shape[0] % 32 or stored.shape[1] % 32
    ]
    return [
        demand(VLLM, "4 or 8 bits (4 on a CPU)", sorted(bits), again),
        demand(VLLM, "groups of 32, 64 or 128", groups, "Quantize again with `group_size=64`."),
        demand(VLLM, "in and out divisible by 32", uneven, "Quantize again and `exclude` them."),
        demand(VLLM, "fused matrices have one scheme", mixed_fusions(layout, modules), again),
    ]


def mixed_fusions(layout: ModelLayout, modules: dict[str, StoredModule]) -> list[str]:
    """The matrices that vLLM fuses, by its names for them, whose members do not have one scheme."""
    schemes: dict[str, set[Scheme | None]] = {}
    for prefix, matrix in decoder_matrices(layout):
        if matrix.fused:
            stored = modules.get(prefix + matrix.name)
            schemes.setdefault(prefix + matrix.fused, set()).add(stored.scheme if stored else None)
    return [fused for fused, members in schemes.items() if len(members) > 1]
