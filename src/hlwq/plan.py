"""The plan: what will become of every tensor, and what that will cost, before any work."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from hlwq.calibration import Calibration
from hlwq.checkpoint import DTYPES, TensorSpec
from hlwq.errors import HlwqError
from hlwq.formats import Contents, Format, Scheme, format_named
from hlwq.grids import CHUNK_WEIGHTS, Basis, Grid, LloydGrid, UniformGrid
from hlwq.layers import activation_bytes, default_batch_size
from hlwq.models import Matrix, ModelLayout, describe
from hlwq.recipes import Recipe, Stage
from hlwq.solvers.gptq import GptqOptions

SOURCE_DTYPES = ("BF16", "F16", "F32")
GROUP_SIZES = (128, 64, 32)
"""What stands in for a group size that does not divide in_features, the first that is not above it and divides."""
REST = "outside the layers"


class Source(Protocol):
    """What a plan is made for: a dense checkpoint, or a quantized one that decodes as it is read."""

    config: dict[str, Any]
    tensors: dict[str, TensorSpec]


@dataclass(frozen=True)
class PlannedTensor:
    """What becomes of one tensor of the source.

    Attributes:
        spec: the tensor.
        action: `quantize`, `copy` (bit for bit) or `drop`.
        reason: why it is not quantized; empty if it is.
        unit: the part of the run that handles it: a decoder layer, or what is outside the layers.
        steps: for `quantize`: the grid and basis of each stage.
        outputs: the tensors written for it.
        gptq: for `quantize`: how it is calibrated, or None.
    """

    spec: TensorSpec
    action: Literal["quantize", "copy", "drop"]
    reason: str
    unit: str
    steps: tuple[tuple[Grid, Basis], ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    gptq: GptqOptions | None = None

    @property
    def module(self) -> str:
        """The module that the tensor belongs to."""
        return self.spec.name.rpartition(".")[0]

    @property
    def scheme(self) -> Scheme:
        """How it is stored, for `quantize`."""
        grid = self.steps[-1][0]
        symmetric = grid.symmetric if isinstance(grid, UniformGrid) else None
        return Scheme(grid.bits, grid.group_size, symmetric, self.gptq is not None and self.gptq.desc_act)


@dataclass(frozen=True)
class Plan:
    """A recipe applied to a checkpoint.

    Attributes:
        layout: the model.
        recipe: with all overrides applied.
        format: what is written.
        dtype: the model's own dtype.
        tensors: one entry for each tensor of the source, in its order.
        remarks: what the user may want to know, one line each.
        warnings: what the user should know before the work is done, one line each.
    """

    layout: ModelLayout
    recipe: Recipe
    format: Format
    dtype: str
    tensors: tuple[PlannedTensor, ...]
    remarks: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def quantized(self) -> list[PlannedTensor]:
        """The tensors that will be quantized."""
        return [tensor for tensor in self.tensors if tensor.action == "quantize"]

    def units(self) -> list[str]:
        """The units in which the work is done and recorded: the layers in order, then the rest."""
        units = {tensor.unit for tensor in self.tensors if tensor.action != "drop"}
        layers = [layer_unit(index) for index in range(len(self.layout.layers))]
        return [unit for unit in (*layers, REST) if unit in units]

    def outputs(self) -> Iterator[TensorSpec]:
        """Every tensor that will be written."""
        for tensor in self.tensors:
            yield from tensor.outputs

    def contents(self) -> Contents:
        """What the output will hold, as formats see it."""
        quantized = {tensor.module: tensor.scheme for tensor in self.quantized()}
        return Contents(
            self.layout, quantized, [m for m in _decoder_matrices(self.layout) if m not in quantized], self.dtype
        )

    def output_bytes(self) -> int:
        """Bytes of all tensors written; headers and side files are not counted."""
        return sum(spec.nbytes for spec in self.outputs())

    def bits_per_weight(self) -> tuple[float | None, float]:
        """Bits on disk per weight: over the quantized matrices (None without any), and over all parameters."""
        quantized = self.quantized()
        weights = sum(tensor.spec.parameters for tensor in quantized)
        stored = sum(spec.nbytes for tensor in quantized for spec in tensor.outputs)
        everything = sum(tensor.spec.parameters for tensor in self.tensors if tensor.action != "drop")
        return 8 * stored / weights if weights else None, 8 * self.output_bytes() / everything

    def peak_memory(self, calibration: Calibration | None = None) -> int:
        """Bytes that the work will need at most, estimated; of a calibrated recipe, with this calibration."""
        interpreter, chunk = 400 << 20, 60 * CHUNK_WEIGHTS  # measured: Python with torch; float32 work per chunk
        largest = 0
        for tensor in self.tensors:
            if tensor.action == "quantize" and tensor.gptq is None:
                # The source, a byte for each code, and twice the encoded form while its chunks are joined.
                need = tensor.spec.nbytes + tensor.spec.parameters + 2 * sum(spec.nbytes for spec in tensor.outputs)
                largest = max(largest, need)
            elif tensor.action == "copy":
                largest = max(largest, tensor.spec.nbytes)
        if self.recipe.gptq is not None:
            largest = max(largest, self._calibration_memory(calibration or Calibration(), self.recipe.gptq))
        return interpreter + chunk + largest

    def _calibration_memory(self, calibration: Calibration, gptq: GptqOptions) -> int:
        """A layer, the samples between layers, the activations of a batch, and the largest problem of the solver."""
        transformers, width = 300 << 20, DTYPES[self.dtype].itemsize
        copies = 2 if gptq.gptaq_alpha else 1
        states = calibration.samples * calibration.sequence_length * self.layout.text_config["hidden_size"] * width
        batch = calibration.batch_size or default_batch_size(self.layout, calibration.sequence_length)
        activations = activation_bytes(self.layout, calibration.sequence_length) * min(batch, calibration.samples)
        weights = solver = 0
        for layer in self.layout.layers:
            weights = max(weights, width * sum(matrix.shape[0] * matrix.shape[1] for matrix in layer.matrices()))
            for step in layer.steps:
                columns = step[0].shape[1]
                # Of float32: the Hessian, its damped copy, factor and inverse; the weights, their latent form, errors.
                rows = sum(matrix.shape[0] for matrix in step)
                solver = max(solver, 4 * columns * (5 * columns + 4 * rows))
        stored = 0 if calibration.offload_activations else copies * states
        return transformers + copies * weights + stored + max(activations, solver)


def make_plan(
    source: Source,
    recipe: Recipe,
    format_name: str | None = None,
    *,
    include_embeddings: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    modules: Collection[str] | None = None,
) -> Plan:
    """Decide what becomes of every tensor.

    Args:
        source: a checkpoint that is not quantized, or one that decodes as it is read.
        recipe: what to do to each matrix.
        format_name: what to write; the recipe's usual format if None.
        include_embeddings: quantize the embedding, and the output head if it is a matrix of its own.
        include: regular expressions; modules kept by default that match are quantized.
        exclude: regular expressions; modules that match are kept.
        modules: if given, exactly what to quantize, instead of the family's choice.

    Raises:
        HlwqError: the architecture, a tensor, the format or a pattern does not allow it; the message says which.
    """
    output_format = format_named(format_name or recipe.formats[0])
    layout = describe(source.config, source.tensors)
    check_tensors(source, layout)
    embedding = source.tensors[f"{layout.embedding}.weight"]
    chosen = set(modules or _choose(source, layout, include_embeddings, include, exclude))
    if modules and not output_format.HOLDS_EMBEDDINGS:  # what the source had as codes is then written decoded
        chosen -= set(_embeddings(layout))
    _check_chosen(layout, output_format, chosen)
    _check_calibrated(recipe, output_format)
    matrices, required = _decoder_matrices(layout), layout.required_tensors()
    planned, fallbacks = [], {}
    for spec in source.tensors.values():
        module = spec.name.rpartition(".")[0]
        unit = _unit(spec.name, layout)
        if spec.name == "lm_head.weight" and layout.tied:
            planned.append(PlannedTensor(spec, "drop", f"tied to {embedding.name}", unit))
        elif spec.name == f"{module}.weight" and module in chosen:
            steps = tuple(
                _step(stage, spec, output_format, embedding.dtype, last=stage is recipe.stages[-1])
                for stage in recipe.stages
            )
            grid = steps[-1][0]
            for stage, (each, _) in zip(recipe.stages, steps, strict=True):
                if each.group_size != stage.group_size:
                    fallbacks[spec.shape[1], stage.group_size] = each.group_size
            outputs = tuple(output_format.outputs(module, (spec.shape[0], spec.shape[1]), grid, embedding.dtype))
            gptq = recipe.gptq if module in matrices else None
            planned.append(PlannedTensor(spec, "quantize", "", unit, steps, outputs, gptq))
        else:
            planned.append(
                PlannedTensor(spec, "copy", _why_kept(spec.name, layout, matrices, required), unit, (), (spec,))
            )
    remarks = [
        f"group {size} where in_features is {width}, which {wanted} does not divide"
        for (width, wanted), size in fallbacks.items()
    ]
    if recipe.gptq and chosen.intersection(_embeddings(layout)):
        remarks.append("the embedding and the output head are rounded to nearest: only layers are calibrated")
    warnings = []
    if recipe.gptq and recipe.gptq.desc_act and output_format.NAME == "gptq":
        warnings.append("vLLM 0.32 and later refuse desc_act: run the result in GPTQModel, or leave --desc-act out")
    if layout.tied and "lm_head.weight" in source.tensors:
        remarks.append("lm_head.weight is dropped: config.json ties it to the embedding")
    return Plan(layout, recipe, output_format, embedding.dtype, tuple(planned), tuple(remarks), tuple(warnings))


def plan_decoding(source: Source) -> Plan:
    """The plan that writes every tensor of a source as it reads, which for a quantized one means decoded.

    Raises:
        HlwqError: the architecture is not supported or a tensor is missing.
    """
    layout = describe(source.config, source.tensors)
    check_tensors(source, layout)
    planned = [
        PlannedTensor(spec, "copy", "decoded", _unit(spec.name, layout), (), (spec,))
        for spec in source.tensors.values()
    ]
    recipe = Recipe("decode", "decode only", (), ("dense",))
    return Plan(
        layout, recipe, format_named("dense"), source.tensors[f"{layout.embedding}.weight"].dtype, tuple(planned), ()
    )


def usual_modules(layout: ModelLayout) -> set[str]:
    """The modules that are quantized unless the user says otherwise."""
    return {module for module, matrix in _decoder_matrices(layout).items() if not matrix.keep}


def fit_group_size(wanted: int, in_features: int) -> int | None:
    """`wanted` if it divides in_features, else the largest of 128, 64 and 32 below it that does, else None."""
    return next((size for size in (wanted, *GROUP_SIZES) if size <= wanted and in_features % size == 0), None)


def check_tensors(source: Source, layout: ModelLayout) -> None:
    """Raise HlwqError unless every tensor that the model needs is there, in its shape and a dtype to start from."""
    for name, shape in layout.required_tensors().items():
        if name not in source.tensors:
            raise HlwqError(f"tensor {name} is missing from the checkpoint. Download it again.")
        spec = source.tensors[name]
        if spec.shape != shape:
            raise HlwqError(
                f"tensor {name} has shape {spec.shape}, but config.json says {shape}. They do not belong together."
            )
        if spec.dtype not in SOURCE_DTYPES:
            raise HlwqError(
                f"tensor {name} has dtype {spec.dtype}: the source is quantized already. Start from its BF16 original."
            )


def _decoder_matrices(layout: ModelLayout) -> dict[str, Matrix]:
    return {
        layout.layer_prefix(index) + matrix.name: matrix
        for index, layer in enumerate(layout.layers)
        for matrix in layer.matrices()
    }


def _choose(
    source: Source,
    layout: ModelLayout,
    include_embeddings: bool,
    include: Sequence[str],
    exclude: Sequence[str],
) -> set[str]:
    """The modules to quantize: the family's choice, changed by options, each of which must change something."""
    matrices = _decoder_matrices(layout)
    embeddings = _embeddings(layout)
    chosen = usual_modules(layout)
    if include_embeddings:
        chosen.update(embeddings)
    for pattern in include:
        chosen |= _matching(
            pattern, "--include", {*matrices, *embeddings} - chosen, source, chosen, "quantized already"
        )
    for pattern in exclude:
        chosen -= _matching(pattern, "--exclude", chosen, source, chosen, "kept already")
    return chosen


def _embeddings(layout: ModelLayout) -> list[str]:
    return [layout.embedding] if layout.tied else [layout.embedding, "lm_head"]


def _check_chosen(layout: ModelLayout, output_format: Format, chosen: set[str]) -> None:
    if not chosen:
        raise HlwqError("Nothing is left to quantize. Take some --exclude away.")
    if not output_format.HOLDS_EMBEDDINGS and chosen.intersection(_embeddings(layout)):
        raise HlwqError(
            f"format {output_format.NAME} cannot hold a quantized embedding or output head that engines load. "
            "Use --format mlx, hlwq or dense for that, or leave them out."
        )
    if output_format.FUSED_ALIKE:
        _check_fused(layout, chosen)


def _check_calibrated(recipe: Recipe, output_format: Format) -> None:
    if len(recipe.stages) > 1 and any(stage.gptq for stage in recipe.stages):
        raise HlwqError(f"Recipe {recipe.name} rounds more than once. Only a single rounding can be calibrated.")
    if recipe.gptq is None or not recipe.gptq.desc_act:
        return
    if not output_format.HOLDS_DESC_ACT:
        raise HlwqError(f"format {output_format.NAME} has no place for --desc-act. Use --format gptq, or leave it out.")
    if recipe.stages[-1].basis != "identity":
        raise HlwqError("--desc-act needs columns that are rounded as they are, not Hadamard-rotated. Leave it out.")


def _matching(pattern: str, option: str, candidates: set[str], source: Source, chosen: set[str], idle: str) -> set[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise HlwqError(f"{option} {pattern!r} is not a regular expression: {error}.") from None
    hits = {module for module in candidates if expression.search(module) or expression.search(f"{module}.weight")}
    if hits:
        return hits
    others = sorted(name for name in source.tensors if expression.search(name))
    if not others:
        raise HlwqError(f"{option} {pattern!r} matches no tensor. `hlwq quantize … --dry-run` lists them.")
    why = idle if others[0].rpartition(".")[0] in chosen or option == "--exclude" else "never quantized"
    raise HlwqError(f"{option} {pattern!r} changes nothing: what it matches, such as {others[0]}, is {why}.")


def _check_fused(layout: ModelLayout, chosen: set[str]) -> None:
    members: dict[str, list[str]] = {}
    for index, layer in enumerate(layout.layers):
        for matrix in layer.matrices():
            if matrix.fused:
                members.setdefault(layout.layer_prefix(index) + matrix.fused, []).append(
                    layout.layer_prefix(index) + matrix.name
                )
    for fused, modules in members.items():
        inside = [module for module in modules if module in chosen]
        if inside and len(inside) < len(modules):
            outside = [module for module in modules if module not in chosen]
            raise HlwqError(
                f"engines run {', '.join(modules)} as one matrix ({fused}), so all or none can be quantized. "
                f"Exclude {', '.join(inside)} too, or include {', '.join(outside)}; or write --format mlx or dense."
            )


def _step(stage: Stage, spec: TensorSpec, output_format: Format, dtype: str, *, last: bool) -> tuple[Grid, Basis]:
    if stage.group_size < 1:
        raise HlwqError(f"--group-size {stage.group_size} must be positive.")
    if stage.basis == "hadamard" and stage.group_size & (stage.group_size - 1):
        raise HlwqError(f"--group-size {stage.group_size} must be a power of two, since groups are Hadamard-rotated.")
    group_size = fit_group_size(stage.group_size, spec.shape[1])
    if group_size is None:
        raise HlwqError(
            f"tensor {spec.name} has in_features {spec.shape[1]}, which neither {stage.group_size} nor a smaller one "
            "of 128, 64 and 32 divides. Choose a --group-size that does, or keep the tensor with --exclude."
        )
    if stage.grid == "lloyd":
        grid = output_format.lloyd_grid(stage.bits, group_size) if last else LloydGrid(stage.bits, group_size)
        return grid, stage.basis
    symmetric = output_format.DEFAULT_SYMMETRIC if stage.symmetric is None else stage.symmetric
    if stage.scale_method is not None and not symmetric:
        raise HlwqError("--scale changes nothing where the grid is asymmetric. Add --symmetric.")
    scale_method = stage.scale_method or "signed"
    if not last:
        return UniformGrid(stage.bits, group_size, symmetric, scale_method=scale_method), stage.basis
    return output_format.uniform_grid(stage.bits, group_size, symmetric, scale_method, dtype), stage.basis


def layer_unit(index: int) -> str:
    """The unit of a decoder layer."""
    return f"layer {index}"


def _unit(name: str, layout: ModelLayout) -> str:
    match = re.match(re.escape(layout.prefix) + r"layers\.(\d+)\.", name)
    return layer_unit(int(match[1])) if match and int(match[1]) < len(layout.layers) else REST


def _why_kept(name: str, layout: ModelLayout, matrices: dict[str, Matrix], required: Container[str]) -> str:
    for prefix, reason in layout.family.kept.items():
        if name.startswith(prefix):
            return reason
    module = name.rpartition(".")[0]
    if module == layout.embedding:
        return "embedding (--include-embeddings quantizes it)"
    if module == "lm_head":
        return "output head (--include-embeddings quantizes it)"
    if module in matrices and name.endswith(".weight"):
        return matrices[module].keep or "excluded"
    if name in required:
        return "not a matrix of a linear layer"
    return "unknown to this family"
