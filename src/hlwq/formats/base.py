"""What every format provides. A format knows codes and engines, and neither solvers nor recipes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from torch import Tensor

from hlwq.bases import Basis
from hlwq.containers import Part, Reader, TensorSpec
from hlwq.errors import UnsupportedError
from hlwq.families import Matrix, ModelLayout, Restoration
from hlwq.grids import Grid
from hlwq.matrix import QuantizedMatrix

ENGINE_SECTIONS = ("quantization_config", "quantization", "compression_config")
"""The keys of `config.json`, and of the sections in it, that say how weights are stored."""

PIPELINE_COMMAND = (
    "python -c 'import sys; from transformers import pipeline; "
    'print(pipeline("text-generation", sys.argv[1])("Hello")[0]["generated_text"])\' {path}'
)
"""Runs a directory that plain transformers loads. The path is an argument, so that it is quoted for the shell alone."""


HLWQ_PIPELINE_COMMAND = PIPELINE_COMMAND.replace("import sys;", "import sys, hlwq;")
"""Runs a directory that transformers loads after `import hlwq`."""


@dataclass(frozen=True)
class Scheme:
    """How one module is stored.

    Attributes:
        bits: width of a code.
        group_size: weights that share parameters.
        symmetric: for uniform grids; None where the word has no meaning.
        desc_act: groups are formed of columns anywhere in the matrix.
        block_size: columns that are Hadamard-rotated together, where a format leaves that to each module.
    """

    bits: int
    group_size: int
    symmetric: bool | None = None
    desc_act: bool = False
    block_size: int | None = None


@dataclass(frozen=True)
class StoredModule:
    """A module found as codes in a directory.

    Attributes:
        scheme: how it is stored.
        shape: (out, in) of the matrix that the codes stand for.
        tensors: the names of its parts, bias vectors of the layer apart.
    """

    scheme: Scheme
    shape: tuple[int, int]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint in some format holds.

    Attributes:
        layout: the model.
        quantized: the modules stored as codes.
        kept: the decoder's other linear modules, in their own dtype.
        dtype: the model's own dtype, as safetensors spells it.
    """

    layout: ModelLayout
    quantized: dict[str, Scheme]
    kept: list[str]
    dtype: str


@dataclass(frozen=True)
class Engine:
    """A program that loads a format.

    Attributes:
        name: as people write it.
        bits: widths it loads.
        symmetry: which codes it loads, in words.
        command: how to run a directory, with {path} for it, and {text_only} for the option that leaves out the vision
            tower; empty where there is no command.
    """

    name: str
    bits: tuple[int, ...]
    symmetry: str
    command: str = ""


@dataclass(frozen=True)
class Demand:
    """One demand of one engine on a directory, and whether it is met.

    Attributes:
        engine: who demands it.
        requirement: what is demanded.
        passed: whether the directory meets it.
        detail: what is there instead, where it does not.
        remedy: what to do about it.
    """

    engine: str
    requirement: str
    passed: bool
    detail: str = ""
    remedy: str = ""


def demand(engine: str, requirement: str, offenders: Iterable[str], remedy: str) -> Demand:
    """A demand that is met unless something offends it; of the offenders the first three are named."""
    offending = list(offenders)
    shown = ", ".join(offending[:3]) + (f" and {len(offending) - 3} more" if len(offending) > 3 else "")
    return Demand(engine, requirement, not offending, f"{shown}." if offending else "", remedy if offending else "")


@dataclass(frozen=True)
class ReadableFormat:
    """A way in which quantized matrices are stored. Each module of this package describes one.

    Attributes:
        name: as users write it; its `quant_method` in `config.json`.
        engines: the programs that load it.
        stored_modules: the modules that a directory stores as codes. Raises CheckpointError if it is inconsistent.
        dequantize: decodes one module: float32 (out, in).
        demands: what the engines want of a directory, and whether it is met.
        restoration: what undoes the changes that a directory's maker made beside storing codes.
    """

    name: str
    engines: tuple[Engine, ...]
    stored_modules: Callable[[Reader], dict[str, StoredModule]]
    dequantize: Callable[[Reader, str, Scheme], Tensor]
    demands: Callable[[Reader, ModelLayout, dict[str, StoredModule]], list[Demand]]
    restoration: Callable[[Reader], Restoration] = field(default=lambda reader: Restoration(), kw_only=True)


@dataclass(frozen=True)
class Format(ReadableFormat):
    """A way to store quantized matrices that some engine loads: what is written as well as read.

    Attributes:
        bits: widths of codes.
        hold: for a module of some shape (out, in), the grid with its parameters as the file stores them, given the
            model's dtype. Raises UnsupportedError unless the format can hold these codes in this basis.
        outputs: the tensors that `encode` will return for a module on a grid that `hold` gave.
        encode: a quantized matrix as the tensors of the file, by name, given the model's dtype.
        json_files: `config.json`, and whatever else engines read beside it.
        refusal: why no engine of the format runs a model; empty if one does.
        cautions: what users should know before the work, one line each.
        unrotated: what is said of a matrix that stays unrotated whatever the basis, or nothing if it does not; given
            None for the embedding and the output head.
        shared_tensors: what is written beside the tensors of modules, given the checkpoint's contents.
        parts: which of the tensors that are written lie in stacks.
        multiples: what divides the output and input features of every matrix that it holds.
        default_symmetric: whether uniform codes are symmetric where the user does not say.
        fused_alike: engines run some matrices as one, whose members must have one scheme.
        holds_embeddings: the embedding and the output head can be stored as codes.
        holds_head: the output head can, where it is a matrix of its own.
        includes_embeddings: they are, unless the user says otherwise.
        holds_scattered_groups: groups can be formed of columns anywhere in the matrix.
        stores_decoded: the file holds decoded weights, in the model's dtype.
    """

    bits: tuple[int, ...]
    hold: Callable[[str, tuple[int, int], Grid, Basis, str], Grid]
    outputs: Callable[[str, tuple[int, int], Grid, str], list[TensorSpec]]
    encode: Callable[[str, QuantizedMatrix, str], dict[str, Tensor]]
    json_files: Callable[[dict[str, Any], Contents], dict[str, dict[str, Any]]]
    _: KW_ONLY
    refusal: Callable[[ModelLayout], str] = lambda layout: ""
    cautions: Callable[[Contents], list[str]] = lambda contents: []
    unrotated: Callable[[ModelLayout, Matrix | None], str] = lambda layout, matrix: ""
    shared_tensors: Callable[[Contents], dict[str, Tensor]] = lambda contents: {}
    parts: Callable[[Iterable[TensorSpec]], list[Part]] = lambda tensors: []
    multiples: tuple[int, int] = (1, 1)
    default_symmetric: bool = True
    fused_alike: bool = True
    holds_embeddings: bool = False
    holds_head: bool = False
    includes_embeddings: bool = False
    holds_scattered_groups: bool = False
    stores_decoded: bool = False


def without_sections(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that says nothing of how weights are stored, nor of code that stands beside them.

    Neither goes into an output: engines would read the weights by another tool's section, if only an empty one.
    """

    def without(section: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in section.items() if key not in (*ENGINE_SECTIONS, "auto_map")}

    return {key: without(value) if isinstance(value, dict) else value for key, value in without(config).items()}


def check_bits(format_name: str, bits: int, allowed: tuple[int, ...]) -> None:
    """Raise UnsupportedError unless a format has codes of this width."""
    if bits not in allowed:
        raise UnsupportedError(
            f"format {format_name} has {', '.join(map(str, allowed))} bits, not {bits}. See `hlwq formats`.",
            argument="bits",
        )


def common_scheme(quantized: dict[str, Scheme]) -> Scheme:
    """The scheme that most modules have."""
    return Counter(quantized.values()).most_common(1)[0][0]
