"""MLX affine: what `mlx_lm.convert` writes and stock mlx-lm runs on Apple silicon.

For a linear of shape (out, in): `weight` uint32 (out, in·bits/32), codes packed along `in`; `scales` and `biases`
(out, groups) in the model's dtype; w = scale · code + bias.

Names and kept tensors stay as Hugging Face has them: mlx-lm's `sanitize` renames them on load, and takes a convolution
in the HF layout as the sign that the norms are in it too. Only the per-module overrides use MLX's own paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hlwq.bases import Basis
from hlwq.containers import DTYPES, EXPERT, OF_MIXTRAL, Part, Reader, TensorSpec, stack_of_matrices
from hlwq.errors import CheckpointError, UnsupportedError
from hlwq.families import FAMILIES, ModelLayout, Restoration, family_of
from hlwq.formats import reading
from hlwq.formats.base import Contents, Demand, Engine, Format, Scheme, StoredModule, common_scheme, demand
from hlwq.formats.uniform import GROUP_SIZES, uniform_grid
from hlwq.grids import Grid, Parameters, UniformGrid
from hlwq.matrix import QuantizedMatrix
from hlwq.packing import pack, unpack

NAME = "mlx"
BITS = (2, 3, 4, 5, 6, 8)


def hold(module: str, shape: tuple[int, int], grid: Grid, basis: Basis, dtype: str) -> Grid:
    """Any bias; parameters in the model's dtype.

    Raises:
        UnsupportedError: codes, bits or a group size that MLX does not have.
    """
    return uniform_grid(NAME, BITS, "hlwq-mlx", grid, basis, integer_zero=False, storage=(DTYPES[dtype],))


def outputs(module: str, shape: tuple[int, int], grid: Grid, dtype: str) -> list[TensorSpec]:
    """The three tensors of a module."""
    rows, columns = shape
    groups = columns // grid.group_size
    return [
        TensorSpec(f"{module}.weight", "U32", (rows, columns * grid.bits // 32)),
        TensorSpec(f"{module}.scales", dtype, (rows, groups)),
        TensorSpec(f"{module}.biases", dtype, (rows, groups)),
    ]


def encode(module: str, matrix: QuantizedMatrix, dtype: str) -> dict[str, Tensor]:
    """Codes, scales and biases, packed."""
    stored = matrix.parameters.apply(lambda values: values.to(DTYPES[dtype]))
    if stored.bias is None:
        raise ValueError("MLX stores grids with biases.")
    return {
        f"{module}.weight": pack(matrix.codes, matrix.grid.bits).view(torch.uint32),
        f"{module}.scales": stored.scale,
        f"{module}.biases": stored.bias,
    }


def json_files(config: dict[str, Any], contents: Contents) -> dict[str, dict[str, Any]]:
    """`config.json` with `quantization`, under both of the keys that mlx-lm writes, and what mlx-lm asks of a model."""
    common, mlx = common_scheme(contents.quantized), contents.layout.family.mlx
    section: dict[str, Any] = {"group_size": common.group_size, "bits": common.bits, "mode": "affine"}
    for module, scheme in contents.quantized.items():
        if scheme != common:
            section[mlx.path(_switched(module))] = {"group_size": scheme.group_size, "bits": scheme.bits}
    config = {**config, "quantization": section, "quantization_config": section}
    if mlx.model_type:
        config["model_type"] = mlx.model_type
    text = config.get("text_config")
    if isinstance(text, dict):
        if mlx.reads_top_level_vocabulary:
            config.setdefault("vocab_size", text["vocab_size"])
        if mlx.reads_top_level_rope:
            config["text_config"] = {**text, **rope_as_before(text)}
    elif mlx.reads_top_level_rope:
        config |= rope_as_before(config)
    return {"config.json": config}


MATRICES = {name: usual for usual, name in OF_MIXTRAL.items()}
"""mlx-lm's names of Mixtral's matrices."""


def parts(tensors: Iterable[TensorSpec]) -> list[Part]:
    """The experts of a layer, each matrix and its scales and biases in stacks, as mlx-lm's `switch_mlp` has them."""
    stacks: dict[str, dict[int, TensorSpec]] = {}
    for spec in tensors:
        found = EXPERT.match(spec.name)
        if found and len(spec.shape) == 2:
            name = f"{found[1]}switch_mlp.{MATRICES.get(found[3], found[3])}.{found[4]}"
            stacks.setdefault(name, {})[int(found[2])] = spec
    return [part for name, each in stacks.items() for part in stack_of_matrices(name, [each[i] for i in sorted(each)])]


def _switched(module: str) -> str:
    """The path by which mlx-lm knows a matrix of an expert: that of the stack; any other module's own."""
    parent, _, name = module.rpartition(".")
    switched = re.sub(r"\.experts\.\d+$", ".switch_mlp", parent)
    return module if switched == parent else f"{switched}.{MATRICES.get(name, name)}"


def rope_as_before(config: dict[str, Any]) -> dict[str, Any]:
    """A decoder's rotary parameters where mlx-lm reads them: beside its other entries.

    transformers 5 moved them into `rope_parameters`, where some models have one set for each type of layer; without
    them mlx-lm takes its own default in silence.
    """
    parameters = dict(config.get("rope_parameters") or {})
    local = parameters.get("sliding_attention")
    parameters = dict(parameters.get("full_attention") or local or parameters)
    top_level = {key: parameters.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
    if isinstance(local, dict) and "rope_theta" in local:
        top_level["rope_local_base_freq"] = local["rope_theta"]
    if parameters.get("rope_type", "default") != "default":
        top_level["rope_scaling"] = parameters
    return {key: value for key, value in top_level.items() if key not in config}


def refusal(layout: ModelLayout) -> str:
    """Why mlx-lm runs no file of a model with its codes; empty if it does."""
    if layout.has_experts and not layout.family.mlx.runs_experts:
        return "mlx-lm has the experts of this family in stacks of another name"
    return layout.family.mlx.refusal


def stored_modules(reader: Reader) -> dict[str, StoredModule]:
    """Modules that have `scales`.

    Raises:
        CheckpointError: `config.json` is damaged, or tensors of a module are missing or disagree with it.
        UnsupportedError: the mode is not affine.
    """
    section, where = reading.section_of(reader, "quantization")
    if section.get("mode", "affine") != "affine":
        raise UnsupportedError(f"{reader.path}: MLX mode {section['mode']} cannot be read; only affine can.")
    modules = {}
    path_functions = {each.mlx.path for each in FAMILIES}
    for module in reading.modules_with(reader, "scales"):
        parts = reading.require_parts(reader, module, "weight", "scales", "biases")
        (rows, words), (_, groups), _ = (reading.matrix_shape(reader, part) for part in parts)
        # An override goes by MLX's path, which is the file's own name or what `sanitize` makes of it.
        switched = _switched(module)
        paths = (module, switched, *(path(switched) for path in path_functions))
        path = next((path for path in paths if isinstance(section.get(path), dict)), None)
        chosen, here = (section[path], f"{where}.{path}") if path else (section, where)
        scheme = Scheme(
            reading.entry(chosen, "bits", int, here), reading.entry(chosen, "group_size", int, here), symmetric=False
        )
        if scheme.bits not in BITS:
            raise CheckpointError(
                f"{here}: bits is {scheme.bits}; MLX files have {', '.join(map(str, BITS))}. {reading.AGAIN}"
            )
        if scheme.bits * scheme.group_size * groups != words * 32:
            raise reading.not_as_configured(reader, module)
        shape = (rows, words * 32 // scheme.bits)
        reading.check_parts(reader, outputs(module, shape, UniformGrid(scheme.bits, scheme.group_size), "BF16"))
        modules[module] = StoredModule(scheme, shape, parts)
    return modules


def dequantize(reader: Reader, module: str, scheme: Scheme) -> Tensor:
    """scale · code + bias."""
    codes = unpack(reader.read(f"{module}.weight").view(torch.uint8), scheme.bits)
    scale, bias = (reader.read(f"{module}.{part}").to(torch.float32) for part in ("scales", "biases"))
    grid = UniformGrid(scheme.bits, scheme.group_size, symmetric=False, integer_zero=False)
    return QuantizedMatrix(codes, Parameters(scale, bias), grid).dequantize()


def restoration(reader: Reader) -> Restoration:
    """What undoes mlx-lm's own conversion, where the family has one and the directory went through it."""
    model_type = reader.config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types and family.mlx.converted(reader.tensors):
            return family.mlx.restoration
    known = family_of(reader.config)
    return Restoration(known.mlx.restoration.config) if known else Restoration()


def demands(reader: Reader, layout: ModelLayout, modules: dict[str, StoredModule]) -> list[Demand]:
    """What mlx-lm wants."""
    engine, again, config, mlx = "mlx-lm", "Quantize again with `format='mlx'`.", reader.config, layout.family.mlx
    names = [file.name for file in reader.path.glob("*.safetensors") if not file.name.startswith("model")]
    bits = [f"{name} ({stored.scheme.bits} bits)" for name, stored in modules.items() if stored.scheme.bits not in BITS]
    groups = [
        f"{name} (group {stored.scheme.group_size})"
        for name, stored in modules.items()
        if stored.scheme.group_size not in GROUP_SIZES
    ]
    text = config.get("text_config") or config
    # mlx-lm's own default differs from family to family.
    untold = [] if text.get("tie_word_embeddings") is layout.tied else ["tie_word_embeddings"]
    lines = [
        demand(engine, "weight files are called model*.safetensors", names, "Rename them."),
        demand(engine, "2, 3, 4, 5, 6 or 8 bits", bits, again),
        demand(engine, "groups of 32, 64 or 128", groups, again),
        demand(engine, "config.json says whether embeddings are tied", untold, again),
    ]
    if mlx.reads_top_level_rope:
        unread = list(rope_as_before(text))
        lines.append(demand(engine, "rope_theta and rope_scaling stand at the top level", unread, again))
    lines += [demand(engine, *each) for each in mlx.demands(text)]
    if mlx.model_type:
        other = [] if config.get("model_type") == mlx.model_type else [str(config.get("model_type"))]
        lines.append(demand(engine, f"model_type is {mlx.model_type}", other, again))
    return lines


ENGINES = (Engine("mlx-lm", BITS, "asymmetric or symmetric", "mlx_lm.generate --model {path} --prompt Hello"),)
FORMAT = Format(
    name=NAME,
    engines=ENGINES,
    stored_modules=stored_modules,
    dequantize=dequantize,
    demands=demands,
    bits=BITS,
    hold=hold,
    outputs=outputs,
    encode=encode,
    json_files=json_files,
    parts=parts,
    multiples=(1, 32),
    restoration=restoration,
    refusal=refusal,
    default_symmetric=False,
    fused_alike=False,
    holds_embeddings=True,
    includes_embeddings=True,
)
