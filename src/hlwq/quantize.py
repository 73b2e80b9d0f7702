"""The pipeline: checkpoint in, smaller checkpoint out. The only module that knows all the others."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor, nn

from hlwq.calibration import Calibration, Samples, load_samples
from hlwq.check import CheckLine, check_directory, has_tokenizer
from hlwq.checkpoint import DEFAULT_SHARD_BYTES, DTYPES, Reader, Writer, check_disk, read_json, refuse_unless_empty
from hlwq.devices import available_memory, peak_memory, torch_device
from hlwq.errors import HlwqError, HlwqWarning
from hlwq.grids import CHUNK_WEIGHTS, Basis, Grid, Parameters, QuantizedMatrix
from hlwq.layers import LayerRunner, default_batch_size
from hlwq.models import ModelLayout, describe
from hlwq.plan import Plan, PlannedTensor, layer_unit, make_plan, plan_decoding, usual_modules
from hlwq.recipes import Overrides, Recipe, override, recipe_named
from hlwq.solvers.gptq import Gram, output_error, quantize_gptq
from hlwq.solvers.nearest import quantize_nearest
from hlwq.sources import DecodedCheckpoint, locate, open_dense, stated_by_card
from hlwq.transformers_models import load_tokenizer, quiet_transformers, require_transformers
from hlwq.version import __version__

SPILL_FILE = "activations"
"""Calibration samples between two layers, inside `OUT.partial`."""
Progress = Callable[[int, int, str], None]
"""Called with the parameters done, the parameters in all, and what is being worked on."""


@dataclass(frozen=True)
class QuantizeResult:
    """What a run made.

    Attributes:
        out: the directory.
        plan: what was done to each tensor.
        nbytes: bytes of the safetensors files.
        relative_errors: ‖W − Ŵ‖² / ‖W‖² of each quantized module.
        output_errors: ‖(W − Ŵ) X‖² / ‖W X‖² on the calibration data, of each module that was calibrated.
        checks: what each engine demands, and whether it is met.
        seconds: wall-clock time of the work.
        peak_memory: the most memory the process has held, in bytes.
    """

    out: Path
    plan: Plan
    nbytes: int
    relative_errors: dict[str, float]
    output_errors: dict[str, float]
    checks: list[CheckLine]
    seconds: float
    peak_memory: int


def plan_for(
    source: str | Path,
    recipe: str | Recipe,
    *,
    format: str | None = None,
    include_embeddings: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    revision: str | None = None,
    calibration: Calibration | None = None,
    **overrides: Unpack[Overrides],
) -> tuple[Reader, Plan]:
    """Open a source and plan what `quantize` would do with the same arguments, reading no weights.

    Raises:
        HlwqError: see `locate`, `open_dense`, `override` and `make_plan`.
    """
    chosen = override(recipe_named(recipe) if isinstance(recipe, str) else recipe, **overrides)
    if calibration is not None and chosen.gptq is None:
        raise HlwqError(f"Calibration data changes nothing: recipe {chosen.name} rounds to nearest.")
    if chosen.gptq is not None:
        require_transformers()
    reader = open_dense(locate(source, revision))
    plan = make_plan(reader, chosen, format, include_embeddings=include_embeddings, include=include, exclude=exclude)
    return reader, plan


def quantize(
    source: str | Path,
    out: str | Path,
    recipe: str | Recipe = "rtn",
    *,
    format: str | None = None,
    include_embeddings: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    revision: str | None = None,
    calibration: Calibration | None = None,
    device: str = "cpu",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    **overrides: Unpack[Overrides],
) -> QuantizeResult:
    """Quantize a checkpoint into a new directory.

    Args:
        source: a directory, a hub id, or a `.gguf` file that transformers can dequantize.
        out: the directory to make; absent or empty. It appears when it is complete and checked.
        recipe: a name of `RECIPES`, or a `Recipe` of your own.
        format: `gptq`, `mlx`, `hlwq` or `dense`; by default the recipe's usual one.
        include_embeddings: quantize the embedding and the output head too.
        include: regular expressions of modules, kept by default, to quantize.
        exclude: regular expressions of modules to keep.
        revision: of the hub id.
        calibration: which data a calibrated recipe uses.
        device: where to compute: `cpu`, `cuda`, `mps`.
        shard_bytes: the most that one safetensors file holds.
        progress: told how far the work is.
        overrides: parameters of the codes in the file, see `Overrides`.

    Raises:
        HlwqError: the request cannot be met; the message says why and what to do.
    """
    refuse_unless_empty(Path(out))
    reader, plan = plan_for(
        source,
        recipe,
        format=format,
        include_embeddings=include_embeddings,
        include=include,
        exclude=exclude,
        revision=revision,
        calibration=calibration,
        **overrides,
    )
    # Where a file lies on this machine says nothing to others, and is nobody's business; a hub snapshot's directory is
    # named after its commit.
    local = Path(source).expanduser()
    commit = None if local.exists() else reader.path.name
    origin = {
        "source": local.resolve().name if local.exists() else str(source),
        "revision": commit,
        "card": stated_by_card(reader.path),
        "include_embeddings": include_embeddings,
        "include": list(include),
        "exclude": list(exclude),
    }
    return run_plan(
        reader,
        plan,
        Path(out),
        origin=origin,
        calibration=calibration,
        device=device,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def convert(
    directory: str | Path,
    out: str | Path,
    format: str,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    **overrides: Unpack[Overrides],
) -> QuantizeResult:
    """Turn a quantized directory into another format, without the model it was made from.

    To `dense` the codes are only decoded. To `gptq` and `mlx` they are decoded and rounded again (recipe `rtn`), with
    the result of the chain HLWQ → INT4; relative errors are then against the decoded weights.

    Args:
        directory: what `quantize` wrote, or a PolarQuant or early HLWQ directory; any format can be decoded.
        out: the directory to make; absent or empty.
        format: `gptq`, `mlx`, `compressed-tensors` or `dense`.
        device: where to compute.
        progress: told how far the work is.
        overrides: parameters of the codes in the new file, see `Overrides`.

    Raises:
        HlwqError: the directory cannot be read, or the format cannot be made from it.
    """
    refuse_unless_empty(Path(out))
    path = Path(directory)
    if not path.is_dir():
        raise HlwqError(f"{directory} is not a directory.")
    decoded = DecodedCheckpoint(path)
    if decoded.format.NAME == "dense":
        raise HlwqError(f"{directory} is not quantized. Use `hlwq quantize`.")
    if format == decoded.format.NAME:
        raise HlwqError(f"{directory} is in format {format} already.")
    if format == "hlwq":
        raise HlwqError("To make an HLWQ checkpoint, quantize the original: hlwq quantize SOURCE OUT --recipe hlwq.")
    if format == "dense":
        if given := [name for name, value in overrides.items() if value is not None]:
            raise HlwqError(f"{given[0]} changes nothing: to format dense, codes are only decoded.")
        plan = plan_decoding(decoded)
    else:
        for name in ("calibrate", "desc_act", "foem_beta", "gptaq_alpha", "damping"):
            if overrides.get(name) is not None:
                raise HlwqError(
                    f"{name} is for calibrated recipes, and a conversion only rounds. Quantize the original."
                )
        recipe = override(recipe_named("rtn"), **overrides)
        modules = decoded.quantized_modules()
        if decoded.format.NAME == "polar":  # which has gates of the recurrence as codes, too
            layout = describe(decoded.config, decoded.tensors)
            wanted = {*usual_modules(layout), layout.embedding, "lm_head"}
            modules = [module for module in modules if module in wanted]
        plan = make_plan(decoded, recipe, format, modules=modules)
        warnings.warn(
            f"the weights of {path.resolve().name} are rounded a second time, and errors are told against them as they "
            "are. Quantize the original if you have it.",
            HlwqWarning,
            stacklevel=2,
        )
    manifest = path / "hlwq.json"
    origin = {
        "source": path.resolve().name,
        "card": stated_by_card(path),
        "made_by": read_json(manifest) if manifest.is_file() else None,
    }
    return run_plan(decoded, plan, Path(out), origin=origin, device=device, progress=progress)


class WeightSource(Protocol):
    """A checkpoint to read from: dense, or decoded as it is read."""

    path: Path
    config: dict[str, Any]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""

    def side_files(self) -> dict[str, Path]:
        """The files that go along unchanged."""


def run_plan(
    reader: WeightSource,
    plan: Plan,
    out: Path,
    *,
    origin: dict[str, Any],
    calibration: Calibration | None = None,
    device: str = "cpu",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Do what a plan says: the work behind `quantize` and `convert`.

    Args:
        reader: the checkpoint that the plan was made for.
        plan: what becomes of each tensor.
        out: the directory to make.
        origin: where the checkpoint came from, for `hlwq.json`.
        calibration: which data a calibrated recipe uses.
        device: where to compute.
        shard_bytes: the most that one safetensors file holds.
        progress: told how far the work is.

    Raises:
        HlwqError: a tensor is not finite, a group overflows its format, the disk is full, or no engine could load
            the result.
    """
    started = time.monotonic()
    if not has_tokenizer(reader.path):
        raise HlwqError(f"{reader.path} has no tokenizer, which engines need. Copy the original's beside the weights.")
    target = torch_device(device)
    report = progress or _silent
    for warning in plan.warnings:
        warnings.warn(warning, HlwqWarning, stacklevel=2)
    samples: Samples | None = None
    if plan.recipe.gptq is not None:
        calibration = calibration or Calibration()
        report(0, 1, "reading calibration data")
        samples = _samples_for(plan.layout, calibration, load_tokenizer(reader.path))
        batch_size = calibration.batch_size or default_batch_size(plan.layout, calibration.sequence_length)
        calibration = replace(calibration, batch_size=min(batch_size, len(samples.tokens)))
    _warn_of_memory(plan, calibration)
    recipe = {
        "origin": origin,
        "recipe": plan.recipe.name,
        "stages": [asdict(stage) for stage in plan.recipe.stages],
        # The size of a batch decides in which order sums are taken, and so their last bits.
        "calibration": {**samples.origin, "batch_size": calibration.batch_size} if samples and calibration else None,
        "format": plan.format.NAME,
        "kept": [tensor.module for tensor in plan.tensors if tensor.action == "copy" and tensor.reason == "excluded"],
        "device": target.type,
        "versions": _versions(calibrated=samples is not None),
    }
    arguments = {
        **recipe,
        "shard_bytes": shard_bytes,
        "config": reader.config,
        "tensors": _digest(plan),
        "files": _stamps(reader.path),
    }
    json_files = plan.format.json_files(reader.config, plan.contents())
    writer = Writer(out, plan.outputs(), arguments, shard_bytes, json_files)
    _check_dropped(reader, plan)
    work = _Work(reader, plan, writer, target, report)
    calibrated: _CalibratedLayers | None = None
    if samples is not None and calibration is not None:
        calibrated = _CalibratedLayers(work, samples.tokens, calibration)
    layers = {layer_unit(index): index for index in range(len(plan.layout.layers))}
    errors: dict[str, dict[str, float]] = {}
    for unit in plan.units():
        tensors = [tensor for tensor in plan.tensors if tensor.unit == unit and tensor.action != "drop"]
        record: dict[str, dict[str, float]] | None = writer.committed(unit)
        if record is None:
            record = calibrated.quantize(layers[unit], tensors) if calibrated and unit in layers else {}
            for tensor in tensors:
                if tensor.action == "copy":
                    work.copy(tensor)
                elif tensor.module not in record:
                    record[tensor.module] = work.quantize_nearest(tensor)
            writer.commit(unit, [spec.name for tensor in tensors for spec in tensor.outputs], record)
        else:
            work.done += sum(tensor.spec.parameters for tensor in tensors)
        errors |= record
    report(work.total, work.total, "checking")
    schemes = plan.contents().quantized
    modules = {module: {**asdict(schemes[module]), **errors[module]} for module in schemes}
    _remove_spilled(writer)
    writer.finish(reader.side_files(), {"hlwq.json": {**recipe, "modules": modules}})
    checks = check_directory(writer.partial)
    _refuse_if_unusable(checks)
    writer.publish()
    return QuantizeResult(
        out=out,
        plan=plan,
        nbytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        relative_errors={module: each["relative_squared_error"] for module, each in errors.items()},
        output_errors={
            module: each["relative_output_error"] for module, each in errors.items() if "relative_output_error" in each
        },
        checks=checks,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
    )


class _Work:
    """Doing what a plan says to single tensors, and telling how far it is.

    Attributes:
        done: parameters handled so far, of `total`.
    """

    def __init__(
        self, reader: WeightSource, plan: Plan, writer: Writer, device: torch.device, report: Progress
    ) -> None:
        self.reader, self.plan, self.writer, self.device, self.report = reader, plan, writer, device, report
        self.done = 0
        self.total = sum(tensor.spec.parameters for tensor in plan.tensors if tensor.action != "drop")

    def copy(self, tensor: PlannedTensor) -> None:
        """Write a tensor as it is."""
        self.report(self.done, self.total, tensor.spec.name)
        values = self.reader.read(tensor.spec.name)
        with _naming(tensor):
            for chunk in values.reshape(-1).split(CHUNK_WEIGHTS):
                _check_finite(chunk)
        # The dtype changes only where the source decodes codes; then the file gets the model's own.
        self.writer.write(tensor.spec.name, values.to(DTYPES[tensor.spec.dtype]))
        self.done += tensor.spec.parameters

    def quantize_nearest(self, tensor: PlannedTensor) -> dict[str, float]:
        """Quantize a tensor without calibration; returns its errors."""
        self.report(self.done, self.total, tensor.module)
        with _naming(tensor):
            matrix, error = quantize_matrix(
                self.reader.read(tensor.spec.name), tensor.steps, self.device, self.stored_dtype
            )
        self.write(tensor, matrix)
        return {"relative_squared_error": error}

    def write(self, tensor: PlannedTensor, matrix: QuantizedMatrix) -> None:
        """Write a quantized tensor as the format has it."""
        for name, part in self.plan.format.encode(tensor.module, matrix, self.plan.dtype).items():
            self.writer.write(name, part)
        self.done += tensor.spec.parameters

    @property
    def stored_dtype(self) -> torch.dtype:
        """What decoded weights are rounded to where they are stored decoded."""
        return DTYPES[self.plan.dtype] if self.plan.format.STORES_DECODED else torch.float32


class _CalibratedLayers:
    """Quantizing decoder layers in their order, the calibration samples going through what is quantized already."""

    def __init__(self, work: _Work, tokens: Tensor, calibration: Calibration) -> None:
        self._work, self._tokens, self._calibration = work, tokens, calibration
        # What is written is read back: the next layer is given what engines will compute with, and a run that was
        # interrupted goes on from the same weights.
        self._written = DecodedCheckpoint(work.writer.partial)
        self._runner: LayerRunner | None = None

    def quantize(self, index: int, tensors: Sequence[PlannedTensor]) -> dict[str, dict[str, float]]:
        """Quantize one layer, running those that an earlier run wrote before it; returns each module's errors."""
        runner = self._runner = self._runner or self._started()
        while runner.index < index:
            self._work.report(self._work.done, self._work.total, f"catching up: layer {runner.index}")
            runner.advance(self._written.read, self._work.reader.read)
        layout = self._work.plan.layout
        prefix = layout.layer_prefix(index)
        planned = {tensor.module.removeprefix(prefix): tensor for tensor in tensors if tensor.action == "quantize"}
        errors: dict[str, dict[str, float]] = {}

        def solve(layer: nn.Module, names: Sequence[str], gram: Gram) -> None:
            errors.update(self._solve(layer, {name: planned[name] for name in names}, gram))

        steps = [[matrix.name for matrix in step if matrix.name in planned] for step in layout.layers[index].steps]
        self._work.report(self._work.done, self._work.total, f"layer {index}")
        try:
            runner.quantize(self._work.reader.read, [step for step in steps if step], solve)
        except torch.OutOfMemoryError:
            raise HlwqError(f"layer {index}: the device has too little memory. Lower --batch-size.") from None
        return errors

    def _solve(self, layer: nn.Module, matrices: dict[str, PlannedTensor], gram: Gram) -> dict[str, dict[str, float]]:
        """Quantize matrices that share an input, write them, and put into the layer what the file then says."""
        weights = []
        for name, tensor in matrices.items():
            # Detached: a parameter that is float32 already would become what is put into it below.
            weights.append(layer.get_parameter(f"{name}.weight").detach().float())
            with _naming(tensor):
                _check_finite(weights[-1])
        first = next(iter(matrices.values()))
        with _naming(*matrices.values()):
            solved = quantize_gptq(torch.cat(weights), gram, *first.steps[-1], first.gptq)
        parts = solved.split_rows([len(values) for values in weights])
        errors = {}
        for (name, tensor), values, part in zip(matrices.items(), weights, parts, strict=True):
            self._work.write(tensor, part.cpu())
            stored = self._written.read(tensor.spec.name)
            parameter = layer.get_parameter(f"{name}.weight")
            difference = stored.to(values) - values
            parameter.data = stored.to(parameter)
            signal, squared = output_error(values, gram.hessian), _sum_of_squares(values)
            loss = output_error(difference, gram.hessian) / signal if signal else 0.0
            errors[tensor.module] = {
                "relative_squared_error": _sum_of_squares(difference) / squared if squared else 0.0,
                "relative_output_error": loss,
            }
            self._work.report(self._work.done, self._work.total, f"{tensor.module}, output error {loss:.2e}")
        return errors

    def _started(self) -> LayerRunner:
        work, calibration, tokens = self._work, self._calibration, self._tokens
        gptq = work.plan.recipe.gptq
        assert gptq is not None
        assert calibration.batch_size is not None
        spill = None
        if calibration.offload_activations:
            copies = 2 if gptq.gptaq_alpha else 1
            width = work.plan.layout.text_config["hidden_size"] * 4
            # The output's files are laid out already, but take their space only as they are written.
            check_disk(work.writer.partial, copies * tokens.numel() * width + work.plan.output_bytes())
            spill = work.writer.partial / SPILL_FILE
        return LayerRunner(
            work.reader.config,
            work.plan.layout,
            tokens,
            self._embed,
            device=work.device,
            dtype=DTYPES[work.plan.dtype],
            batch_size=calibration.batch_size,
            spill=spill,
            keep_original=gptq.gptaq_alpha > 0,
        )

    def _embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, as the file will hold it."""
        name = f"{self._work.plan.layout.embedding}.weight"
        rows = self._work.reader.read(name)[ids]
        planned = next(tensor for tensor in self._work.plan.tensors if tensor.spec.name == name)
        if planned.action == "quantize":
            matrix, _ = quantize_matrix(rows, planned.steps, self._work.device)
            rows = matrix.dequantize(DTYPES[self._work.plan.dtype])
        return rows


def _warn_of_memory(plan: Plan, calibration: Calibration | None) -> None:
    """An estimate is no reason to refuse, but one to be told before hours of work."""
    needed, available = plan.peak_memory(calibration), available_memory()
    if needed > available:
        remedy = "Lower --batch-size or --samples, or use --offload-activations." if calibration else "Close programs."
        warnings.warn(
            f"this may need {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available. {remedy}",
            HlwqWarning,
            stacklevel=3,
        )


def _samples_for(layout: ModelLayout, calibration: Calibration, tokenizer: Any) -> Samples:
    """Calibration samples that the model can be given."""
    longest = layout.text_config.get("max_position_embeddings")
    if longest is not None and calibration.sequence_length > longest:
        raise HlwqError(f"--sequence-length {calibration.sequence_length} exceeds the model's own limit of {longest}.")
    with quiet_transformers():
        samples = load_samples(calibration, tokenizer)
    vocabulary = layout.text_config["vocab_size"]
    if int(samples.tokens.max()) >= vocabulary:
        raise HlwqError(
            f"The tokenizer gives the token {int(samples.tokens.max())}, but the model has {vocabulary}. "
            "They do not belong together: copy the original's tokenizer."
        )
    if samples.warning:
        warnings.warn(samples.warning, HlwqWarning, stacklevel=2)
    return samples


def _remove_spilled(writer: Writer) -> None:
    for file in writer.partial.glob(SPILL_FILE + "*"):
        file.unlink()


def _silent(done: int, total: int, item: str) -> None:
    pass


def _versions(*, calibrated: bool) -> dict[str, str]:
    """Of everything that has a say in the bytes."""
    found = {"hlwq": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if calibrated:
        found["transformers"] = version("transformers")
    return found


def quantize_matrix(
    weights: Tensor,
    steps: Sequence[tuple[Grid, Basis]],
    device: torch.device,
    stored_dtype: torch.dtype = torch.float32,
) -> tuple[QuantizedMatrix, float]:
    """Run a chain of stages over one matrix, a chunk of rows at a time.

    Args:
        weights: (out, in), any floating dtype, on the CPU.
        steps: grid and basis of each stage.
        device: where to compute.
        stored_dtype: what decoded weights are rounded to where they are stored decoded.

    Returns:
        The codes of the last stage, on the CPU, and the relative squared error ‖W − Ŵ‖²/‖W‖² of the whole chain.

    Raises:
        HlwqError: a weight is not finite, or a group's parameters overflow.
    """
    parts: list[QuantizedMatrix] = []
    squared_error, squared_norm = 0.0, 0.0
    for rows in weights.split(max(1, CHUNK_WEIGHTS // weights.shape[1])):
        original = values = rows.to(device, torch.float32)
        _check_finite(original)
        for grid, basis in steps:
            part = quantize_nearest(values, grid, basis)
            values = part.dequantize()
        squared_error += _sum_of_squares(values.to(stored_dtype) - original)
        squared_norm += _sum_of_squares(original)
        parts.append(part)
    return _joined(parts), squared_error / squared_norm if squared_norm else 0.0


def _sum_of_squares(values: Tensor) -> float:
    """Summed by rows in float32, then in float64 on the CPU, since not every device has it."""
    return float(values.square().sum(-1).cpu().sum(dtype=torch.float64))


def _check_dropped(reader: WeightSource, plan: Plan) -> None:
    """Refuse to drop an output head that is not the embedding it is said to be tied to."""
    for tensor in plan.tensors:
        if tensor.action == "drop":
            head, embedding = reader.read(tensor.spec.name), reader.read(f"{plan.layout.embedding}.weight")
            if not torch.equal(head, embedding):
                raise HlwqError(
                    f"config.json ties {tensor.spec.name} to the embedding, but the two differ. "
                    "Set tie_word_embeddings to false there, or delete the tensor."
                )


@contextmanager
def _naming(*tensors: PlannedTensor) -> Iterator[None]:
    """Say in errors which tensor they are about, or which of several it is one of."""
    try:
        yield
    except HlwqError as error:
        which = "tensor" if len(tensors) == 1 else "one of"
        raise HlwqError(f"{which} {', '.join(tensor.spec.name for tensor in tensors)}: {error}") from None


def _check_finite(values: Tensor) -> None:
    if values.is_floating_point() and not torch.isfinite(values).all():
        kind = "NaN" if torch.isnan(values).any() else "infinite"
        raise HlwqError(f"it holds a value that is {kind}. The checkpoint is damaged: download or export it again.")


def _joined(parts: list[QuantizedMatrix]) -> QuantizedMatrix:
    """Chunks of rows as one matrix, on the CPU."""
    scale = torch.cat([part.parameters.scale.cpu() for part in parts])
    biases = [part.parameters.bias.cpu() for part in parts if part.parameters.bias is not None]
    parameters = Parameters(scale, torch.cat(biases) if biases else None)
    return QuantizedMatrix(torch.cat([part.codes.cpu() for part in parts]), parameters, parts[0].grid, parts[0].basis)


def _digest(plan: Plan) -> str:
    """A short hash of what becomes of every tensor, to tell a run from another."""
    text = "\n".join(f"{tensor.spec} {tensor.action} {tensor.steps} {tensor.outputs}" for tensor in plan.tensors)
    return sha256(text.encode()).hexdigest()[:16]


def _stamps(directory: Path) -> list[list[Any]]:
    """Name, size and time of each weight file: hashing them would take as long as the work."""
    files = sorted(directory.glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _refuse_if_unusable(checks: list[CheckLine]) -> None:
    engines = dict.fromkeys(line.engine for line in checks)
    usable = [engine for engine in engines if all(line.passed for line in checks if line.engine == engine)]
    if not usable:
        first = next(line for line in checks if not line.passed)
        raise HlwqError(
            f"No engine would load the result. {first.engine}: {first.requirement}: {first.detail} {first.remedy}"
        )
