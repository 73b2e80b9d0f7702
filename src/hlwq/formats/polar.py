"""What was published under the name PolarQuant, and the first HLWQ files: read, not written.

Matrices are padded to whole blocks along `in`; a block decodes to norm/√block · H · centroid[code]. The norms are
(out, blocks), usually float16. There are two spellings of a module M:

- `polar_engine_v4` and `v5`: `M.codes`, `M.norms` and `M.ct_scaled`, the centroids over √block (or `M.ct`, the
  centroids themselves). The codes are (out, …): a byte each; or, up to 4 bits, nibbles, a block's first half being the
  low ones of its bytes; or, of 5 bits, a bit stream with the least significant bits first. `polar_config.json`, later
  called `hlwq_config.json`, lists each module's bits, block and true width.
- Bit-packed: `M__packed`, `M__norms` and `M__meta`, with `__` for the dots of M, with or without its `.weight`. The
  codes are one bit stream with the most significant bits first. The centroids are not stored. Their author's programs
  know two kinds of `meta`: (out, blocks, block, codes), with centroids of a normal distribution cut at ±4, as his
  notebooks and his converter compute them; and (bits, padded width), with those of his package's own loader. That
  reads `M__codes` too, a byte for a code, without `meta`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import inf, pi, sqrt
from typing import Any

import torch
from torch import Tensor

from hlwq.containers import Reader
from hlwq.errors import CheckpointError, UnsupportedError
from hlwq.families import FAMILIES, ModelLayout, Restoration, describe
from hlwq.files import is_file, read_json
from hlwq.formats import reading
from hlwq.formats.base import Demand, Engine, ReadableFormat, Scheme, StoredModule, demand
from hlwq.hadamard import rotate_blocks
from hlwq.matrix import CHUNK_WEIGHTS
from hlwq.packing import unpack, unpack_big_endian

NAME = "polar"
CODES = (".codes", "__codes", "__packed")
"""What the names of codes end in."""
INTEGERS = ("I64", "I32", "I16", "I8", "U8", "U32")
CONFIG_FILES = ("polar_config.json", "hlwq_config.json")
"""The names of one file, which was renamed in published repositories."""
VERSIONS = ("polar_engine_v4", "polar_engine_v5")


@dataclass(frozen=True)
class _Module:
    """How a module is stored.

    Attributes:
        bits: width of a code.
        width: bits that a code takes in the file.
        block: weights that share a norm.
        shape: (out, in), without the padding.
        codes: the name of their tensor.
        norms: likewise.
        levels: the name of `ct_scaled` or `ct`, or None where the centroids are not stored.
        meta: the name of that tensor, or None.
        cut: where the normal distribution of centroids that are not stored ends.
    """

    bits: int
    width: int
    block: int
    shape: tuple[int, int]
    codes: str
    norms: str
    levels: str | None
    meta: str | None
    cut: float


def is_polar(reader: Reader) -> bool:
    """Whether a directory holds matrices in either spelling, whatever its `config.json` says."""
    # Other formats have `.codes`, too, but no norms.
    return any(
        name.endswith(CODES[1:]) or (name.endswith(CODES) and f"{name.removesuffix('codes')}norms" in reader.tensors)
        for name in reader.tensors
    )


def restored_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with its architecture, which the package left out where it took the decoder of a vision model."""
    architectures = (family.architecture_of.get(str(config.get("model_type"))) for family in FAMILIES)
    architecture = next(filter(None, architectures), None)
    return config if config.get("architectures") or not architecture else {**config, "architectures": [architecture]}


def stored_modules(reader: Reader) -> dict[str, StoredModule]:
    """Modules that have codes.

    Raises:
        CheckpointError: the tensors of a module are missing or disagree.
        UnsupportedError: an unknown version wrote the directory.
    """
    config, file = _polar_config(reader)
    modules = {}
    for name in reader.tensors:
        module = _module_of(name)
        if module is not None:
            stored = _describe_module(reader, config, file, module, name)
            parts = tuple(filter(None, (stored.codes, stored.norms, stored.levels, stored.meta)))
            modules[module] = StoredModule(Scheme(stored.bits, stored.block), stored.shape, parts)
    return modules


def dequantize(reader: Reader, module: str, scheme: Scheme) -> Tensor:
    """norm/√block · H · centroid[code], without the padding.

    Raises:
        CheckpointError: a code has no centroid.
    """
    name = next(name for name in reader.tensors if _module_of(name) == module)
    stored = _describe_module(reader, *_polar_config(reader), module, name)
    codes, levels = _codes(reader, stored), _levels(reader, stored)
    if int(codes.max()) >= len(levels):
        raise _damaged(reader, module, f"has the code {int(codes.max())}, but {len(levels)} centroids")
    norms = reader.read(stored.norms).to(torch.float32)
    decoded = torch.empty(stored.shape)
    count = max(1, CHUNK_WEIGHTS // codes.shape[1])
    for start in range(0, len(codes), count):
        rows = slice(start, start + count)
        blocks = rotate_blocks(levels[codes[rows].int()], stored.block).unflatten(-1, (-1, stored.block))
        decoded[rows] = (blocks * norms[rows].unsqueeze(-1)).flatten(-2)[:, : stored.shape[1]]
    return decoded


def _module_of(name: str) -> str | None:
    """The module whose codes a tensor of this name holds, or None."""
    if name.endswith(".codes"):
        return name.removesuffix(".codes")
    if name.endswith(CODES):
        return name.rpartition("__")[0].replace("__", ".").removesuffix(".weight")
    return None


def _polar_config(reader: Reader) -> tuple[dict[str, Any], str]:
    """What `polar_config.json` or `hlwq_config.json` holds, or nothing where there is neither, and the file's path.

    Raises:
        CheckpointError: both are there, and differ.
        UnsupportedError: an unknown version wrote it.
    """
    files = [reader.path / name for name in CONFIG_FILES]
    found = [(read_json(file), str(file)) for file in files if is_file(file)]
    if len(found) == 2 and found[0][0] != found[1][0]:
        message = f"{found[1][1]} and {CONFIG_FILES[0]} differ. Delete the one that is not of these weights."
        raise CheckpointError(message, path=found[1][1])
    config, file = found[0] if found else ({}, str(files[0]))
    version = config.get("format", VERSIONS[0])
    if version not in VERSIONS:
        raise UnsupportedError(f"{file}: format {version} is unknown; {' and '.join(VERSIONS)} can be read.")
    return config, file


def _describe_module(reader: Reader, config: dict[str, Any], file: str, module: str, codes: str) -> _Module:
    """Bring together what the headers, `polar_config.json` and `meta` say of a module.

    Args:
        reader: the directory.
        config: what `polar_config.json` holds.
        file: the path of that file.
        module: the name of the matrix.
        codes: the name of the tensor with its codes.

    Raises:
        CheckpointError: they disagree, or a tensor is missing.
    """
    dotted, packed = codes.endswith(".codes"), codes.endswith("__packed")
    prefix = codes.removesuffix("packed" if packed else "codes")
    norms, levels, meta = f"{prefix}norms", f"{prefix}ct_scaled", f"{prefix}meta"
    if levels not in reader.tensors and f"{prefix}ct" in reader.tensors:
        levels = f"{prefix}ct"
    dtypes_of = {codes: ("I8", "U8"), norms: reading.FLOATS}
    if dotted:
        dtypes_of[levels] = reading.FLOATS
    if packed:
        dtypes_of[meta] = INTEGERS
    for name, dtypes in dtypes_of.items():
        if name not in reader.tensors:
            raise _damaged(reader, module, f"lacks its tensor {name}")
        if reader.tensors[name].dtype not in dtypes:
            raise _damaged(reader, module, f"has its tensor {name} in {reader.tensors[name].dtype}")
    rows, blocks = reading.matrix_shape(reader, norms)
    layers = reading.entry(config, "layers", dict, file, default={})
    stated = {**config, **reading.entry({module: {}, **layers}, module, dict, f"{file}: layers")}
    file = f"{file}: layers.{module}"
    block, cut = reading.entry(stated, "block_size", int, file, default=128), inf
    bits = reading.entry(stated, "bits", int, file, default=0)
    if packed:
        if reader.tensors[meta].shape not in ((2,), (4,)):
            raise CheckpointError(
                f"{reader.path}: {meta} has shape {reader.tensors[meta].shape}; (2,) and (4,) can be read."
            )
        numbers = reader.read(meta).tolist()
        if len(numbers) == 4:
            block, cut = numbers[2], 4.0
            agrees = numbers[:2] == [rows, blocks]
        else:
            bits = numbers[0]
            agrees = numbers[1] == blocks * block
        if not agrees:
            raise _damaged(reader, module, f"has {meta} {numbers}, but {rows} rows of {blocks} blocks")
    elif not dotted:
        bits = bits or 5  # as the package assumes
    if block < 8 or block & (block - 1):
        raise _damaged(reader, module, f"has blocks of {block}, which is no power of two from 8")
    padded = blocks * block
    width, rest = divmod(8 * reader.tensors[codes].parameters, rows * padded)
    bits = bits or width
    if rest or width not in ((2, 3, 4, 5, 6, 8) if packed else (4, 5, 8)) or not 1 <= bits <= width:
        counts = f"{reader.tensors[codes].parameters} bytes for {rows * padded} codes of {bits} bits"
        raise _damaged(reader, module, f"has {counts}")
    if dotted and reader.tensors[levels].shape != (2**bits,):
        raise _damaged(reader, module, f"has centroids of shape {reader.tensors[levels].shape}, but {bits} bits")
    columns = reading.entry(stated, "in_features", int, file, default=0) or _true_width(reader, module) or padded
    if not padded - block < columns <= padded:
        raise _damaged(reader, module, f"has {blocks} blocks of {block} for {columns} columns")
    shape = (rows, columns)
    return _Module(bits, width, block, shape, codes, norms, levels if dotted else None, meta if packed else None, cut)


def _true_width(reader: Reader, module: str) -> int | None:
    """The width of a matrix as the model has it, or None where it is not one of the decoder's."""
    names = [f"{_module_of(name)}.weight" if _module_of(name) else name for name in reader.tensors]
    shape = describe(restored_config(reader.config), names).required_tensors().get(f"{module}.weight")
    return shape[1] if shape else None


def _codes(reader: Reader, stored: _Module) -> Tensor:
    """The codes of a module, with the padding: uint8 (out, padded)."""
    rows = stored.shape[0]
    packed = reader.read(stored.codes).view(torch.uint8).reshape(rows, -1)
    if stored.width == 8:
        return packed
    if stored.meta is not None:
        return unpack_big_endian(packed, stored.width)
    if stored.width == 5:
        return unpack(packed, 5)
    halves = packed.unflatten(-1, (-1, stored.block // 2))
    return torch.cat([halves & 15, halves >> 4], -1).flatten(-2)


def _levels(reader: Reader, stored: _Module) -> Tensor:
    """The centroids of a module over √block: float32 (2^bits,)."""
    if stored.levels is None:
        return _centroids(stored.bits, stored.cut) / sqrt(stored.block)
    levels = reader.read(stored.levels).to(torch.float32)
    return levels / sqrt(stored.block) if stored.levels.endswith(".ct") else levels


@lru_cache(maxsize=16)
def _centroids(bits: int, cut: float) -> Tensor:
    """The centroids that files without them were made with: a hundred rounds of Lloyd's, which do not converge.

    Args:
        bits: width of a code.
        cut: where the normal distribution ends, 4 or infinity.

    Returns:
        float32 (2^bits,). It is shared: do not write to it.
    """
    edges = torch.linspace(-4, 4, 2**bits + 1, dtype=torch.float64)
    edges[0], edges[-1] = -cut, cut
    centroids = edges[1:]
    for _ in range(100):
        density, below = torch.exp(-(edges**2) / 2) / sqrt(2 * pi), torch.special.ndtr(edges)
        centroids = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
        edges[1:-1] = (centroids[:-1] + centroids[1:]) / 2
    return centroids.to(torch.float32)


def _damaged(reader: Reader, module: str, why: str) -> CheckpointError:
    message = f"{reader.path}: {module} {why}. The directory is damaged; download it again."
    return CheckpointError(message, path=reader.path, tensor=module)


def demands(reader: Reader, layout: ModelLayout, modules: dict[str, StoredModule]) -> list[Demand]:
    """What hlwq wants, which is all that reads such a directory."""
    known = layout.required_tensors()
    strange = [module for module in modules if f"{module}.weight" not in known]
    return [demand("hlwq", "every coded matrix is one of the model's", strange, "Convert another copy.")]


FORMAT = ReadableFormat(
    name=NAME,
    engines=(
        Engine(
            "hlwq",
            tuple(range(1, 9)),
            "Lloyd–Max codes, read only",
            "hlwq convert {path} {path}-dense --format dense",
        ),
    ),
    stored_modules=stored_modules,
    dequantize=dequantize,
    demands=demands,
    restoration=lambda reader: Restoration(restored_config),
)
