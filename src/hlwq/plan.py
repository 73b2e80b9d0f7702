"""The plan: what will become of every tensor, and what that will cost, before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hlwq.bases import Hadamard, Identity
from hlwq.calibration import GENERATION_BYTES, Calibration, calibration_memory, kv_bytes_per_token, not_calibrated
from hlwq.containers import DTYPES, Part, TensorSpec, spec_of
from hlwq.devices import available_memory, compute_dtype, torch_device
from hlwq.errors import CheckpointError, HlwqError, RequestError, UnsupportedError
from hlwq.families import FAMILIES, FLOATS, Matrix, ModelLayout, describe, model_dtype
from hlwq.formats import FORMATS, Contents, Format, Scheme, format_named
from hlwq.grids import UniformGrid
from hlwq.matrix import CHUNK_WEIGHTS
from hlwq.patterns import matcher
from hlwq.recipes import Recipe, Stage, changed
from hlwq.request import Budget, Selection
from hlwq.solvers import Nearest, Solver

REST, UNKNOWN = "outside the layers", "unknown to this family"
SHOWN_NAMES = 3
EXPERTS = ".experts."
HEAD_WEIGHTS = 1 << 26
"""Weights of an output head that are solved together: few of it, and yet many for each factorisation."""


class Headers(Protocol):
    """What a plan is made for: the configuration and the headers of a checkpoint, dense or decoded as it is read."""

    @property
    def config(self) -> dict[str, Any]:
        """The parsed `config.json`."""

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """What the files hold, by name."""


@dataclass(frozen=True)
class PlannedTensor:
    """What becomes of one tensor of the source.

    Attributes:
        spec: the tensor.
        action: `quantize`, `copy` (bit for bit, but for what `outputs` says of its name and dtype) or `drop`.
        reason: why it is not quantized; empty if it is.
        unit: the part of the run that handles it: a decoder layer, or what is outside the layers.
        stages: for `quantize`: the recipe's stages with grids and bases as they are for this matrix.
        outputs: the tensors written for it.
    """

    spec: TensorSpec
    action: Literal["quantize", "copy", "drop"]
    reason: str
    unit: str
    stages: tuple[Stage, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    @property
    def module(self) -> str:
        """The module that the tensor belongs to."""
        return self.spec.name.rpartition(".")[0]

    @property
    def calibrated(self) -> bool:
        """Whether it is quantized by a solver that needs calibration data."""
        return bool(self.stages and self.stages[-1].solver.needs)

    @property
    def scheme(self) -> Scheme:
        """How it is stored, for `quantize`."""
        grid, solver = self.stages[-1].grid, self.stages[-1].solver
        basis = self.stages[-1].basis
        # The blocks of Lloyd–Max codes are their groups, wherever they are stored.
        block_size = basis.block_size if isinstance(basis, Hadamard) and isinstance(grid, UniformGrid) else None
        return Scheme(grid.bits, grid.group_size, grid.symmetry, solver.scatters_groups, block_size)


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
        budget: what the codes may cost, where each matrix has its own bits.
    """

    layout: ModelLayout
    recipe: Recipe
    format: Format
    dtype: str
    tensors: tuple[PlannedTensor, ...]
    remarks: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    budget: Budget | None = None

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
        yield from (spec_of(name, tensor) for name, tensor in self.shared_tensors().items())

    def parts(self) -> list[Part]:
        """Which of them lie in stacks."""
        return self.format.parts(self.outputs())

    def shared_tensors(self) -> dict[str, Tensor]:
        """What the format writes beside the tensors of modules."""
        return self.format.shared_tensors(self.contents())

    def contents(self) -> Contents:
        """What the output will hold, as formats see it."""
        quantized = {tensor.module: tensor.scheme for tensor in self.quantized()}
        return Contents(self.layout, quantized, [m for m in self.layout.matrices() if m not in quantized], self.dtype)

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

    def generation_memory(self, calibration: Calibration, device: torch.device) -> int:
        """Bytes that the whole model takes on a device while it writes the `generated_samples` of a calibration."""
        dtype = compute_dtype(device)
        weights = sum(tensor.spec.parameters for tensor in self.tensors if tensor.action != "drop")
        sample = kv_bytes_per_token(self.layout, dtype) * calibration.sequence_length
        together = min(calibration.generated_samples or 0, max(1, GENERATION_BYTES // sample))
        return dtype.itemsize * weights + together * sample

    def sensitivity_memory(self, calibration: Calibration, device: torch.device) -> int:
        """Bytes that the whole model takes on a device while the gradients of a sample are taken, estimated."""
        dtype = compute_dtype(device)
        weights = sum(tensor.spec.parameters for tensor in self.tensors if tensor.action != "drop")
        largest = max((tensor.spec.parameters for tensor in self.quantized()), default=0)
        # What each matrix was given and gave is kept for the way back; so are the logits, and their softmax.
        features: int = sum(sum(matrix.shape) for matrix in self.layout.matrices().values())
        of_token: int = 2 * dtype.itemsize * features + 12 * self.layout.text_config["vocab_size"]
        return dtype.itemsize * weights + 12 * largest + calibration.sequence_length * of_token

    def with_generated_samples(self, calibration: Calibration, device: torch.device) -> Calibration:
        """A calibration that says how many samples the model writes itself.

        Unless it does already: as many as the recipe wants, where the memory that is available now holds the whole
        model; else 0.
        """
        if calibration.generated_samples is not None:
            return calibration
        of_each, most = self.recipe.generated
        possible = calibration.sequence_length > 1  # a prompt and what follows it
        wanted = min(of_each * calibration.samples, most) if possible else 0
        decided = replace(calibration, generated_samples=wanted)
        needed = self.generation_memory(decided, device)
        # A model goes to a GPU by way of the machine's memory.
        places = [available_memory(place) for place in (device, None)]
        if wanted and any(available is not None and available < needed for available in places):
            return replace(calibration, generated_samples=0)
        return decided

    def peak_memory(self, calibration: Calibration | None = None, device: torch.device | None = None) -> int:
        """Bytes that the work will need at most, estimated; for a calibrated recipe, with this calibration.

        Args:
            calibration: its data.
            device: where to compute; by default a GPU if there is one.
        """
        interpreter, chunk = 400 << 20, 60 * CHUNK_WEIGHTS  # measured: Python with torch; float32 work per chunk
        largest = 0
        for tensor in self.tensors:
            if tensor.action == "copy":
                largest = max(largest, tensor.spec.nbytes)
            elif tensor.action == "quantize" and not (tensor.calibrated and tensor.unit != REST):
                # The source, a byte for each code, and twice the encoded form while its chunks are joined.
                need = tensor.spec.nbytes + tensor.spec.parameters + 2 * sum(spec.nbytes for spec in tensor.outputs)
                if tensor.calibrated:  # the output head
                    rows, columns = tensor.spec.shape
                    need += tensor.stages[-1].solver.memory(min(rows, head_rows(columns)), columns)
                largest = max(largest, need)
        if self.budget:
            device = device or torch_device()
            largest = max(largest, self.sensitivity_memory(calibration or Calibration(), device))
        if self.recipe.calibrated:
            width = DTYPES[self.dtype].itemsize
            device = device or torch_device()
            decided = self.with_generated_samples(calibration or Calibration(), device)
            largest = max(largest, calibration_memory(self.layout, decided, self.recipe.solver, width))
            if decided.generated_samples:
                largest = max(largest, self.generation_memory(decided, device))
        return interpreter + chunk + largest


def make_plan(
    source: Headers,
    recipe: Recipe,
    format_name: str | None = None,
    selection: Selection | None = None,
    *,
    modules: Collection[str] | None = None,
    bits: Mapping[str, int] | None = None,
) -> Plan:
    """Decide what becomes of every tensor.

    Args:
        source: a checkpoint that is not quantized, or one that decodes as it is read.
        recipe: what to do to each matrix.
        format_name: what to write; the recipe's usual format if None.
        selection: changes of the family's choice of matrices.
        modules: what to quantize where `selection` does not say otherwise; None for the usual choice.
        bits: widths of codes of single modules, in place of the recipe's.

    Raises:
        RequestError: an argument is wrong or changes nothing.
        CheckpointError: a tensor is missing or has another shape than the configuration says.
        UnsupportedError: the architecture is not supported, or the format cannot hold what is asked for.
    """
    output_format = format_named(recipe.formats[0] if format_name is None else format_name)
    recipe = recipe.in_format(output_format.name)
    layout = describe(source.config, source.tensors)
    if refusal := output_format.refusal(layout):
        message = f"format {output_format.name} is not for {layout.family.name}: {refusal}. Use another format."
        raise UnsupportedError(message, argument="format")
    check_tensors(source, layout)
    selection = selection or Selection()
    usual = usual_modules(layout) if modules is None else set(modules)
    if modules is None and selection.include_embeddings is None and output_format.includes_embeddings:
        usual.update(_embeddings(layout))
    unfit = _unfit(layout, output_format) if modules is None else {}
    chosen = _choose(source, layout, selection, usual.difference(unfit))
    if modules and not output_format.holds_embeddings:  # what the source had as codes is then written decoded
        chosen -= set(_embeddings(layout))
    _check_chosen(layout, output_format, chosen, selection, unfit)
    _check_solver(recipe, output_format)
    if recipe.calibrated and layout.tables() != [layout.embedding]:
        raise UnsupportedError(not_calibrated(layout), argument="recipe")
    matrices, required = layout.matrices(), layout.required_tensors()
    widths = _common_widths(layout)
    dtype = model_dtype(source.config, source.tensors.values())
    remarks: dict[str, None] = {}  # in the order in which they come up, each once
    planned = []
    for spec in source.tensors.values():
        module, unit = spec.name.rpartition(".")[0], _unit(spec.name, layout)
        if spec.name == f"{layout.output_head}.weight" and layout.tied:
            planned.append(PlannedTensor(spec, "drop", f"tied to {layout.embedding}.weight", unit))
        elif spec.name == f"{module}.weight" and module in chosen:
            unrotated = output_format.unrotated(layout, matrices.get(module))
            solver = recipe.solver if module in matrices else Nearest()
            if module == layout.head:
                solver = recipe.solver.without_originals()
            own = recipe if bits is None else changed(recipe, {"bits": bits[module]})
            width = widths.get(module)
            stages = _stages(own, spec, output_format, dtype, solver, rotated=not unrotated, width=width)
            for stage, fitted in zip(own.stages, stages, strict=True):
                remarks |= dict.fromkeys(_fallbacks(stage, fitted, width or spec.shape[1], unrotated))
            outputs = tuple(output_format.outputs(module, (spec.shape[0], spec.shape[1]), stages[-1].grid, dtype))
            planned.append(PlannedTensor(spec, "quantize", "", unit, stages, outputs))
        else:
            reason = unfit.get(module) or _why_kept(spec.name, layout, matrices, required, output_format)
            planned.append(PlannedTensor(spec, "copy", reason, unit, (), (spec,)))
    if recipe.calibrated and layout.embedding in chosen and not layout.tied:
        remarks["the embedding is rounded to nearest: layers and the output head are calibrated"] = None
    if layout.tied and f"{layout.output_head}.weight" in source.tensors:
        remarks[f"{layout.output_head}.weight is dropped: config.json ties it to the embedding"] = None
    plan = Plan(layout, recipe, output_format, dtype, tuple(planned), tuple(remarks))
    return replace(plan, warnings=(*_unknown(plan), *output_format.cautions(plan.contents())))


def _unknown(plan: Plan) -> Iterator[str]:
    """What to say of a family that is not known, and of tensors that are no part of the model as it is known."""
    family = plan.layout.family
    if family not in FAMILIES:
        yield (
            f"{family.name} is none of the models that hlwq is tested with (`hlwq models`): its layers are quantized "
            "as transformers describes them, and engines may want more. Try the result before you share it"
        )
    names = [tensor.spec.name for tensor in plan.tensors if tensor.reason == UNKNOWN]
    if names:
        shown = ", ".join(names[:SHOWN_NAMES]) + (", …" if len(names) > SHOWN_NAMES else "")
        yield (
            f"{len(names)} tensors are no part of a {family.name} model and are copied as they are; an "
            f"engine may refuse them: {shown}"
        )


def plan_decoding(source: Headers) -> Plan:
    """The plan that writes every tensor of a source as it reads, which for a quantized one means decoded.

    Raises:
        CheckpointError: a tensor is missing.
        UnsupportedError: the architecture is not supported.
    """
    layout = describe(source.config, source.tensors)
    check_tensors(source, layout)
    planned = [
        PlannedTensor(spec, "copy", "decoded", _unit(spec.name, layout), (), (spec,))
        for spec in source.tensors.values()
    ]
    recipe = Recipe("decode", "decode only", (), ("dense",))
    dtype = model_dtype(source.config, source.tensors.values())
    return Plan(layout, recipe, format_named("dense"), dtype, tuple(planned), ())


def usual_modules(layout: ModelLayout) -> set[str]:
    """The modules that are quantized unless the user says otherwise."""
    return {module for module, matrix in layout.matrices().items() if not matrix.keep}


def _unfit(layout: ModelLayout, output_format: Format) -> dict[str, str]:
    """Matrices of shapes that a format does not hold, with those that engines fuse with them, and why."""
    matrices, (rows, columns) = layout.matrices(), output_format.multiples
    odd = {name for name, matrix in matrices.items() if matrix.shape[0] % rows or matrix.shape[1] % columns}
    if output_format.fused_alike:
        for members in layout.fusions().values():
            odd.update(members if odd.intersection(members) else ())
    reason = f"{output_format.name} needs multiples of {max(rows, columns)}"
    return {name: reason for name in odd if not matrices[name].keep}


def check_tensors(source: Headers, layout: ModelLayout) -> None:
    """Raise CheckpointError unless every tensor that the model needs is there, in its shape.

    Raises:
        UnsupportedError: a tensor has a dtype of a model that is quantized already, or experts other names or shapes.
    """
    for name, shape in layout.required_tensors().items():
        if name not in source.tensors:
            if EXPERTS in name and not any(EXPERTS in each for each in source.tensors):
                message = f"{layout.family.name}: files call the experts otherwise than {name}, which is not read."
                raise UnsupportedError(message, tensor=name)
            raise CheckpointError(f"tensor {name} is missing from the checkpoint. Download it again.", tensor=name)
        spec = source.tensors[name]
        if spec.shape != shape:
            if EXPERTS in name:
                message = f"{layout.family.name}: {name} has shape {spec.shape} instead of {shape}, which is not read."
                raise UnsupportedError(message, tensor=name)
            raise CheckpointError(
                f"tensor {name} has shape {spec.shape}, but config.json says {shape}. They do not belong together.",
                tensor=name,
            )
        if spec.dtype not in FLOATS:
            raise UnsupportedError(
                f"tensor {name} has dtype {spec.dtype}: the source is quantized already. Start from its BF16 original.",
                tensor=name,
            )


def _choose(source: Headers, layout: ModelLayout, selection: Selection, usual: set[str]) -> set[str]:
    """The modules to quantize: the usual choice, changed by options, each of which must change something."""
    matrices, embeddings, chosen = layout.matrices(), _embeddings(layout), set(usual)
    if selection.include_embeddings:
        chosen.update(embeddings)
    elif selection.include_embeddings is False:
        chosen.difference_update(embeddings)
    for pattern in selection.include:
        kept = {*matrices, *embeddings} - chosen
        chosen |= _matching(pattern, "include", kept, source, chosen, "quantized already")
    for pattern in selection.exclude:
        chosen -= _matching(pattern, "exclude", chosen, source, chosen, "kept already")
    return chosen


def _embeddings(layout: ModelLayout) -> list[str]:
    return [layout.embedding] if layout.tied else [layout.embedding, layout.output_head]


def _check_chosen(
    layout: ModelLayout, output_format: Format, chosen: set[str], selection: Selection, unfit: Mapping[str, str]
) -> None:
    if not chosen and unfit and not selection.exclude:
        others = [name for name, each in FORMATS.items() if not _unfit(layout, each)]
        reason = next(iter(unfit.values()))
        message = f"format {reason}, and no matrix of this model has such sides. Use format {' or '.join(others)}."
        raise UnsupportedError(message, argument="format")
    if not chosen:
        raise RequestError("Nothing is left to quantize. Take some `exclude` away.")
    if not output_format.holds_embeddings:
        _check_unheld(layout, output_format, chosen, selection)
    if output_format.fused_alike:
        _check_fused(layout, chosen)
    elif not output_format.stores_decoded:
        _check_experts(layout, chosen)


def _check_unheld(layout: ModelLayout, output_format: Format, chosen: set[str], selection: Selection) -> None:
    """Raise UnsupportedError if an embedding or output head is chosen that the format cannot hold."""
    parts, remedy = "embedding or output head", "leave them out"
    if output_format.holds_head and not layout.tied:
        parts, remedy = "embedding", "`include='lm_head'`, for the output head alone"
    unheld = {layout.embedding, *([] if parts == "embedding" else [layout.output_head])}
    if chosen & unheld:
        raise UnsupportedError(
            f"format {output_format.name} cannot hold a quantized {parts} that engines load. Use format "
            f"{_formats('holds_embeddings')} for that, or {remedy}.",
            argument="include_embeddings" if selection.include_embeddings else "include",
        )


def _formats(property: str, value: bool = True) -> str:
    """The formats that have a property, in words."""
    names = [each.name for each in FORMATS.values() if getattr(each, property) is value]
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _check_solver(recipe: Recipe, output_format: Format) -> None:
    if len(recipe.stages) > 1 and any(stage.solver.needs for stage in recipe.stages):
        raise RequestError(
            f"Recipe {recipe.name} rounds more than once. Only a single rounding can be calibrated.", argument="recipe"
        )
    if recipe.solver.scatters_groups and not output_format.holds_scattered_groups:
        others = _formats("holds_scattered_groups")
        raise UnsupportedError(
            f"format {output_format.name} has no place for `desc_act`. Use format {others}, or leave it out."
        )


def _matching(
    pattern: str, option: str, candidates: set[str], source: Headers, chosen: set[str], idle: str
) -> set[str]:
    try:
        matches = matcher(pattern, anywhere=True)
        hits = {module for module in candidates if matches(module) or matches(f"{module}.weight")}
        if hits:
            return hits
        others = sorted(name for name in source.tensors if matches(name))
    except ValueError as error:
        raise RequestError(f"`{option}` {pattern!r} is not a regular expression to use: {error}.") from None
    if not others:
        raise RequestError(f"`{option}` {pattern!r} matches no tensor. `hlwq quantize … --dry-run` lists them.")
    why = idle if others[0].rpartition(".")[0] in chosen or option == "exclude" else "never quantized"
    raise RequestError(f"`{option}` {pattern!r} changes nothing: what it matches, such as {others[0]}, is {why}.")


def _check_fused(layout: ModelLayout, chosen: set[str]) -> None:
    for fused, modules in layout.fusions().items():
        inside = [module for module in modules if module in chosen]
        if inside and len(inside) < len(modules):
            outside, others = [module for module in modules if module not in chosen], _formats("fused_alike", False)
            raise UnsupportedError(
                f"engines run {', '.join(modules)} as one matrix ({fused}), so all or none can be quantized. "
                f"Exclude {', '.join(inside)} too, or include {', '.join(outside)}; or write format {others}.",
                argument="exclude",
            )


def _common_widths(layout: ModelLayout) -> dict[str, int]:
    """What groups of each expert's matrices have to divide, since engines run all of a layer with one scheme."""
    widths: dict[str, int] = {}
    for index, layer in enumerate(layout.layers):
        of_experts = [matrix for matrix in layer.matrices() if matrix.experts]
        common = math.gcd(*{matrix.shape[1] for matrix in of_experts})
        widths |= {layout.layer_prefix(index) + matrix.name: common for matrix in of_experts}
    return widths


def _check_experts(layout: ModelLayout, chosen: set[str]) -> None:
    """Raise UnsupportedError if some experts of a layer are quantized and others are not: they lie in one stack."""
    for index, layer in enumerate(layout.layers):
        for name in layer.experts():
            of_layer = [layout.layer_prefix(index) + each.name for each in layer.matrices() if each.experts == name]
            kept = [module for module in of_layer if module not in chosen]
            if kept and len(kept) < len(of_layer):
                raise UnsupportedError(
                    f"the experts of a layer lie in one stack, so all or none can be quantized, and {kept[0]} would "
                    "not be. Exclude all of them, or none.",
                    argument="exclude",
                )


def _stages(
    recipe: Recipe,
    spec: TensorSpec,
    output_format: Format,
    dtype: str,
    solver: Solver,
    *,
    rotated: bool,
    width: int | None = None,
) -> tuple[Stage, ...]:
    """The stages of a recipe for one matrix: groups and blocks that divide it, the last grid as the format has it.

    Args:
        recipe: the recipe.
        spec: the matrix.
        output_format: the format.
        dtype: the model's.
        solver: the last stage's for this matrix.
        rotated: whether its basis is the recipe's.
        width: what groups have to divide; its input features if None.
    """
    shape, stages = (spec.shape[0], spec.shape[1]), []
    try:
        for stage in recipe.stages:
            grid = stage.grid.fitted(width or shape[1], output_format.default_symmetric)
            basis = stage.basis.fitted(width or shape[1], grid.group_size)
            stages.append(replace(stage, grid=grid, basis=basis))
    except HlwqError as error:
        raise error.about(spec.name) from None
    last = stages[-1] if rotated else replace(stages[-1], basis=Identity())
    grid = output_format.hold(spec.name.rpartition(".")[0], shape, last.grid, last.basis, dtype)
    stages[-1] = replace(last, grid=grid, solver=solver)
    return tuple(stages)


def _fallbacks(stage: Stage, fitted: Stage, width: int, unrotated: str) -> Iterator[str]:
    """What a matrix of this width has in place of what a stage asked for; if it stays unrotated, what is said of it."""
    wanted, size = stage.grid.group_size, fitted.grid.group_size
    if wanted != size:
        yield f"group {size} where in_features is {width}, which {wanted} does not divide"
    if fitted.basis == Identity() != stage.basis:
        yield f"columns as they are in {unrotated}, whose inputs vLLM does not rotate"
    elif stage.basis.fitted(1 << 30, size) != fitted.basis:
        yield f"columns {fitted.basis.summary} where in_features is {width}"


def head_rows(width: int) -> int:
    """Rows of an output head that are solved together."""
    return max(1, HEAD_WEIGHTS // width)


def layer_unit(index: int) -> str:
    """The unit of a decoder layer."""
    return f"layer {index}"


def _unit(name: str, layout: ModelLayout) -> str:
    match = re.match(re.escape(layout.prefix) + r"layers\.(\d+)\.", name)
    return layer_unit(int(match[1])) if match and int(match[1]) < len(layout.layers) else REST


def _why_kept(
    name: str, layout: ModelLayout, matrices: dict[str, Matrix], required: Container[str], output_format: Format
) -> str:
    for beginning, part in layout.beside.items():
        if name.startswith(beginning):
            return part
    module = name.rpartition(".")[0]
    if module == layout.embedding:
        return "embedding" + (" (`include_embeddings` quantizes it)" if output_format.holds_embeddings else "")
    if module == layout.output_head:
        if output_format.holds_head:
            return "output head (`include='lm_head'` quantizes it)"
        return "output head" + (" (`include_embeddings` quantizes it)" if output_format.holds_embeddings else "")
    if module in matrices and name.endswith(".weight"):
        return matrices[module].keep or "excluded"
    if name in required:
        return "not a matrix of a linear layer"
    return UNKNOWN
