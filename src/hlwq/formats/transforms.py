"""Run-time transforms of compressed-tensors files: inputs that the engine rotates, as columns were before rounding.

`transform_config` has a group for each size of blocks, whose `head_dim` it is, and patterns of the layers whose inputs
it rotates. An engine multiplies each block of an input by Sylvester's matrix over √size: vLLM by a fused kernel of CUDA
if the type is `hadamard`, else by the tensor `MODULE.GROUP_input.weight`, of entries ±1. Of these it keeps one for all
modules of a group, so that one in the file is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hlwq.containers import DTYPES, Reader
from hlwq.errors import UnsupportedError
from hlwq.formats import reading
from hlwq.formats.base import Contents
from hlwq.formats.patterns import check_pattern, matches_start, module_patterns, outside_the_decoder, targets
from hlwq.hadamard import hadamard_matrix

SECTION = "transform_config"
TYPE = "hadamard"
LARGEST_BLOCK = 1 << 15
"""The most columns that vLLM's kernel rotates together."""
REFUSAL = "transformers_needs_import_hlwq"
"""A key that compressed-tensors does not know, in the group of each rotated scheme.

transformers 5.23 ignores `transform_config`, and would run the file without a word, and talk nonsense; for this key it
refuses, with its name in the message. vLLM looks up the keys that it knows. `import hlwq` takes it out.
"""

SGLANG_REFUSAL = {"linear_fp8_config": {"activation_scheme": "sglang_does_not_apply_transform_config"}}
"""An entry that SGLang 0.5.23 alone reads, and refuses with this name in its message.

It ignores `transform_config` as transformers does. (Read in its source, not run: it needs a GPU.)
"""


@dataclass(frozen=True)
class InputTransform:
    """A rotation of the inputs of some modules.

    Attributes:
        name: its group's, such as `R64`.
        block_size: columns that are rotated together.
        targets: patterns or names of the modules.
        ignore: likewise, of those that are left out.
    """

    name: str
    block_size: int
    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    def tensor_of(self, module: str) -> str:
        """The name of a module's matrix."""
        return f"{module}.{self.name}_input.weight"

    def applies(self, module: str, where: str) -> bool:
        """Whether a module's inputs are rotated. Raises CheckpointError, which names the place, if that is unclear."""
        return _matches(self.targets, module, where) and not _matches(self.ignore, module, where)


def transform_config(contents: Contents) -> dict[str, Any]:
    """The section for the modules whose scheme has a block size: empty if none has."""
    groups = {
        each.name: {
            "type": TYPE,
            "head_dim": each.block_size,
            "apply": [{"targets": list(each.targets), "location": "input", "ignore": list(each.ignore)}],
        }
        for each in _transforms(contents)
    }
    return {SECTION: {"config_groups": groups}, **SGLANG_REFUSAL} if groups else {}


def shared_tensors(contents: Contents) -> dict[str, Tensor]:
    """Sylvester's matrix for each size of blocks, in the model's dtype, by the name that the first module gives it."""
    first = {scheme.block_size: module for module, scheme in reversed(contents.quantized.items())}
    return {
        each.tensor_of(first[each.block_size]): hadamard_matrix(each.block_size).sign().to(DTYPES[contents.dtype])
        for each in _transforms(contents)
    }


def _transforms(contents: Contents) -> list[InputTransform]:
    layout = contents.layout
    sizes = sorted({scheme.block_size for scheme in contents.quantized.values() if scheme.block_size is not None})
    modules_of = {size: {m for m, scheme in contents.quantized.items() if scheme.block_size == size} for size in sizes}
    return [
        InputTransform(
            f"R{size}",
            size,
            tuple(targets(module_patterns(modules_of[size], layout))),
            tuple(targets(outside_the_decoder(layout))),
        )
        for size in sizes
    ]


def read_transforms(reader: Reader, section: dict[str, Any], where: str) -> list[InputTransform]:
    """The transforms of a file.

    Args:
        reader: the directory.
        section: its `quantization_config`.
        where: what an error calls that.

    Raises:
        CheckpointError: the section is damaged.
        UnsupportedError: it has other transforms than rotations of inputs by Sylvester's matrix.
    """
    if section.get(SECTION) is None:
        return []
    where = f"{where}.{SECTION}"
    groups = reading.entry(reading.entry(section, SECTION, dict, where), "config_groups", dict, where)
    transforms = []
    for name in groups:
        here = f"{where}.config_groups.{name}"
        group = reading.entry(groups, name, dict, here)
        kind, size = reading.entry(group, "type", str, here), reading.entry(group, "head_dim", int, here, default=0)
        applied = reading.entry(group, "apply", list, here)
        if not all(isinstance(each, dict) for each in applied):
            raise reading.damaged(f"{here}.apply is not a list of objects.")
        for each in applied:
            if each.get("location") in ("weight_input", "weight_output"):  # in the weights already
                continue
            known = each.get("location") == "input" and not group.get("randomize")
            if not known or size < 2 or size > LARGEST_BLOCK or size & (size - 1):
                raise UnsupportedError(
                    f"{here}: only rotations of inputs in blocks of a power of two can be undone, not "
                    f"{each.get('location')} by a {kind} of {size or 'unknown size'}."
                )
            names = {key: reading.entry(each, key, list, f"{here}.apply", default=[]) for key in ("targets", "ignore")}
            for target in (*names["targets"], *names["ignore"]):
                check_pattern(target.removeprefix("re:") if isinstance(target, str) else target, here)
            transforms.append(InputTransform(name, size, tuple(names["targets"]), tuple(names["ignore"])))
        if any(each.name == name for each in transforms):
            _check_matrices(reader, name, size, kind, here)
    return transforms


def _check_matrices(reader: Reader, name: str, size: int, kind: str, where: str) -> None:
    """Raise UnsupportedError unless the matrices of a group are Sylvester's, which type `hadamard` implies."""
    stored = [tensor for tensor in reader.tensors if tensor.endswith(f".{name}_input.weight")]
    if not stored and kind == TYPE:
        return
    expected = hadamard_matrix(size).sign()
    if not stored or not all(_is_matrix(reader, tensor, expected) for tensor in stored):
        raise UnsupportedError(f"{where}: the matrix of type {kind} is not Sylvester's, which alone can be undone.")


def _is_matrix(reader: Reader, name: str, expected: Tensor) -> bool:
    return reader.tensors[name].shape == expected.shape and torch.equal(reader.read(name).float(), expected)


def _matches(patterns: tuple[str, ...], module: str, where: str) -> bool:
    return any(
        matches_start(each[3:], module, where) if each.startswith("re:") else each in (module, "Linear")
        for each in patterns
    )
