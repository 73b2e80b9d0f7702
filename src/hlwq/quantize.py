"""The pipeline: checkpoint in, smaller checkpoint out. The only module that knows all the others."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hlwq.check import CheckLine, check_directory, has_tokenizer
from hlwq.checkpoint import DEFAULT_SHARD_BYTES, DTYPES, Reader, Writer, read_json, refuse_unless_empty
from hlwq.devices import torch_device
from hlwq.errors import HlwqError
from hlwq.grids import CHUNK_WEIGHTS, Basis, Grid, Parameters, QuantizedMatrix, ScaleMethod
from hlwq.plan import Plan, PlannedTensor, make_plan, plan_decoding
from hlwq.recipes import Recipe, override, recipe_named
from hlwq.solvers.nearest import quantize_nearest
from hlwq.sources import DecodedCheckpoint, locate, open_dense
from hlwq.version import __version__

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
        checks: what each engine demands, and whether it is met.
        seconds: wall-clock time of the work.
        peak_memory: the most memory the process has held, in bytes.
    """

    out: Path
    plan: Plan
    nbytes: int
    relative_errors: dict[str, float]
    checks: list[CheckLine]
    seconds: float
    peak_memory: int


def plan_for(
    source: str | Path,
    recipe: str | Recipe,
    *,
    format: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    scale_method: ScaleMethod | None = None,
    include_embeddings: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    revision: str | None = None,
) -> tuple[Reader, Plan]:
    """Open a source and plan what `quantize` would do with the same arguments, reading no weights.

    Raises:
        HlwqError: see `locate`, `open_dense`, `override` and `make_plan`.
    """
    chosen = recipe_named(recipe) if isinstance(recipe, str) else recipe
    chosen = override(chosen, bits=bits, group_size=group_size, symmetric=symmetric, scale_method=scale_method)
    reader = open_dense(locate(source, revision))
    plan = make_plan(reader, chosen, format, include_embeddings=include_embeddings, include=include, exclude=exclude)
    return reader, plan


def quantize(
    source: str | Path,
    out: str | Path,
    recipe: str | Recipe = "rtn",
    *,
    format: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    scale_method: ScaleMethod | None = None,
    include_embeddings: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    revision: str | None = None,
    device: str = "cpu",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantize a checkpoint into a new directory.

    Args:
        source: a directory, a hub id, or a `.gguf` file that transformers can dequantize.
        out: the directory to make; absent or empty. It appears when it is complete and checked.
        recipe: a name of `RECIPES`, or a `Recipe` of your own.
        format: `gptq`, `mlx`, `hlwq` or `dense`; by default the recipe's usual one.
        bits: of the codes in the file (the recipe's last stage).
        group_size: of the codes in the file.
        symmetric: of the codes in the file; by default GPTQ is symmetric and MLX is not.
        scale_method: `signed` or `absmax`, for symmetric uniform codes.
        include_embeddings: quantize the embedding and the output head too.
        include: regular expressions of modules, kept by default, to quantize.
        exclude: regular expressions of modules to keep.
        revision: of the hub id.
        device: where to compute: `cpu`, `cuda`, `mps`.
        shard_bytes: the most that one safetensors file holds.
        progress: told how far the work is.

    Raises:
        HlwqError: the request cannot be met; the message says why and what to do.
    """
    refuse_unless_empty(Path(out))
    reader, plan = plan_for(
        source,
        recipe,
        format=format,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_method=scale_method,
        include_embeddings=include_embeddings,
        include=include,
        exclude=exclude,
        revision=revision,
    )
    # A hub snapshot's directory is named after its commit.
    commit = reader.path.name if not Path(source).exists() else None
    origin = {
        "source": str(source),
        "revision": commit,
        "include_embeddings": include_embeddings,
        "include": list(include),
        "exclude": list(exclude),
    }
    return run_plan(reader, plan, Path(out), origin=origin, device=device, shard_bytes=shard_bytes, progress=progress)


def convert(
    directory: str | Path,
    out: str | Path,
    format: str,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    scale_method: ScaleMethod | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> QuantizeResult:
    """Turn a quantized directory into another format, without the model it was made from.

    To `dense` the codes are only decoded. To `gptq` and `mlx` they are decoded and rounded again (recipe `rtn`), with
    the result of the chain HLWQ → INT4; relative errors are then against the decoded weights.

    Args:
        directory: what `quantize` wrote; any format can be decoded.
        out: the directory to make; absent or empty.
        format: `gptq`, `mlx` or `dense`.
        bits: of the codes in the new file.
        group_size: of the codes in the new file.
        symmetric: of the codes in the new file.
        scale_method: `signed` or `absmax`, for symmetric codes.
        device: where to compute.
        progress: told how far the work is.

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
    options = dict(bits=bits, group_size=group_size, symmetric=symmetric, scale_method=scale_method)
    if format == "dense":
        if given := [name for name, value in options.items() if value is not None]:
            raise HlwqError(f"{given[0]} changes nothing: to format dense, codes are only decoded.")
        plan = plan_decoding(decoded)
    else:
        recipe = override(
            recipe_named("rtn"), bits=bits, group_size=group_size, symmetric=symmetric, scale_method=scale_method
        )
        plan = make_plan(decoded, recipe, format, modules=decoded.quantized_modules())
    manifest = path / "hlwq.json"
    origin = {"source": str(directory), "made_by": read_json(manifest) if manifest.is_file() else None}
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
    recipe = {
        "origin": origin,
        "recipe": plan.recipe.name,
        "stages": [asdict(stage) for stage in plan.recipe.stages],
        "format": plan.format.NAME,
        "kept": [tensor.module for tensor in plan.tensors if tensor.action == "copy" and tensor.reason == "excluded"],
        "device": target.type,
        "versions": {"hlwq": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    arguments = {**recipe, "shard_bytes": shard_bytes, "tensors": _digest(plan), "files": _stamps(reader.path)}
    writer = Writer(out, plan.outputs(), arguments, shard_bytes)
    _check_dropped(reader, plan)
    errors: dict[str, float] = {}
    done, total = 0, sum(tensor.spec.parameters for tensor in plan.tensors if tensor.action != "drop")
    for unit in plan.units():
        tensors = [tensor for tensor in plan.tensors if tensor.unit == unit and tensor.action != "drop"]
        record: dict[str, float] | None = writer.committed(unit)
        if record is None:
            record = {}
            for tensor in tensors:
                if progress:
                    progress(done, total, tensor.module)
                values = reader.read(tensor.spec.name)
                if tensor.action == "copy":
                    _write_copy(writer, tensor, values)
                else:
                    record[tensor.module] = _write_quantized(writer, plan, tensor, values, target)
                done += tensor.spec.parameters
            writer.commit(unit, [spec.name for tensor in tensors for spec in tensor.outputs], record)
        else:
            done += sum(tensor.spec.parameters for tensor in tensors)
        errors |= record
    if progress:
        progress(total, total, "checking")
    schemes = plan.contents().quantized
    manifest = {
        **recipe,
        "modules": {
            module: {**asdict(schemes[module]), "relative_squared_error": errors[module]} for module in schemes
        },
    }
    json_files = plan.format.json_files(reader.config, plan.contents())
    writer.finish(reader.side_files(), {**json_files, "hlwq.json": manifest})
    checks = check_directory(writer.partial)
    _refuse_if_unusable(checks)
    writer.publish()
    return QuantizeResult(
        out=out,
        plan=plan,
        nbytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        relative_errors=errors,
        checks=checks,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
    )


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


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: getrusage starts from the peak of the process that started this one
        peak_line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak_line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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


def _write_copy(writer: Writer, tensor: PlannedTensor, values: Tensor) -> None:
    with _naming(tensor):
        for chunk in values.reshape(-1).split(CHUNK_WEIGHTS):
            _check_finite(chunk)
    # The dtype changes only where the source decodes codes; then the file gets the model's own.
    writer.write(tensor.spec.name, values.to(DTYPES[tensor.spec.dtype]))


def _write_quantized(writer: Writer, plan: Plan, tensor: PlannedTensor, values: Tensor, device: torch.device) -> float:
    stored_dtype = DTYPES[plan.dtype] if plan.format.STORES_DECODED else torch.float32
    with _naming(tensor):
        matrix, error = quantize_matrix(values, tensor.steps, device, stored_dtype)
    for name, part in plan.format.encode(tensor.module, matrix, plan.dtype).items():
        writer.write(name, part)
    return error


@contextmanager
def _naming(tensor: PlannedTensor) -> Iterator[None]:
    try:
        yield
    except HlwqError as error:
        raise HlwqError(f"tensor {tensor.spec.name}: {error}") from None


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
