"""Contents of a directory, tensor by tensor and in all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hlwq.decoded import DecodedCheckpoint
from hlwq.errors import RequestError
from hlwq.families import describe, family_of
from hlwq.files import expanded, is_folder
from hlwq.manifest import read_manifest
from hlwq.matrix import CHUNK_WEIGHTS
from hlwq.sources import locate


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the model as the directory stores it.

    Attributes:
        name: its Hugging Face name.
        shape: shape of the dense tensor.
        dtype: dtype of the dense tensor, as safetensors spells it.
        bits: width of a code; None where the tensor is not quantized.
        group_size: weights that share parameters; None where the tensor is not quantized.
        nbytes: bytes on disk, all parts counted.
        relative_error: ‖W − Ŵ‖²/‖W‖² against the source, recorded when the directory was made, or measured anew where
            a source is given; None if unknown.
        output_error: ‖(W − Ŵ) X‖²/‖W X‖² on the calibration data, as recorded; None where it was not calibrated.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bits: int | None
    group_size: int | None
    nbytes: int
    relative_error: float | None
    output_error: float | None


@dataclass(frozen=True)
class Inspection:
    """A directory's tensors and totals.

    Attributes:
        path: the directory.
        format: its format of quantized matrices.
        recipe: the recipe that made it, if recorded.
        tensors: one report per tensor.
        nbytes: bytes of all tensors.
        bits_per_quantized_weight: mean over the quantized matrices, all overhead counted; None if there are none.
        bits_per_parameter: mean over all parameters.
    """

    path: Path
    format: str
    recipe: str | None
    tensors: tuple[TensorReport, ...]
    nbytes: int
    bits_per_quantized_weight: float | None
    bits_per_parameter: float


def inspect(
    directory: str | Path,
    against: str | Path | None = None,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Inspection:
    """Report the tensors of a directory.

    Args:
        directory: a model directory of any format.
        against: the source it was made from; if given, errors are measured anew, of unquantized tensors too.
        progress: told how many tensors are done.

    Raises:
        RequestError: there is no such directory, or the two are not of the same model.
        HlwqError: a directory cannot be read.
    """
    path = expanded(directory)
    if not is_folder(path):
        raise RequestError(f"{directory} is not a directory.", argument="directory", path=path)
    checkpoint = DecodedCheckpoint(path)
    if family_of(checkpoint.config):  # other models are reported too, as far as their files say what they hold
        describe(checkpoint.config, checkpoint.tensors)
    source = DecodedCheckpoint(locate(against)) if against is not None else None
    manifest = read_manifest(path) or {"origin": {}, "modules": {}, "recipe": None}
    # After a conversion the recorded errors are against its input, not against the original.
    converted = "made_by" in manifest["origin"]
    recorded = {} if converted else manifest["modules"]
    reports = []
    for done, (name, spec) in enumerate(checkpoint.tensors.items()):
        if progress:
            progress(done, len(checkpoint.tensors), name)
        scheme = checkpoint.scheme_of(name)
        errors = recorded.get(name.removesuffix(".weight"), {})
        if source is not None:
            error = _relative_error(source, checkpoint, name)
        else:
            error = errors.get("relative_squared_error")
        output_error = errors.get("relative_output_error")
        bits, group_size = (scheme.bits, scheme.group_size) if scheme else (None, None)
        reports.append(
            TensorReport(
                name, spec.shape, spec.dtype, bits, group_size, checkpoint.stored_bytes(name), error, output_error
            )
        )
    total = sum(report.nbytes for report in reports)
    coded = [(checkpoint.tensors[report.name].parameters, report.nbytes) for report in reports if report.bits]
    weights = sum(parameters for parameters, _ in coded)
    return Inspection(
        path=path,
        format=checkpoint.format.name,
        recipe=manifest["recipe"],
        tensors=tuple(reports),
        nbytes=total,
        bits_per_quantized_weight=8 * sum(nbytes for _, nbytes in coded) / weights if weights else None,
        bits_per_parameter=8 * total / sum(spec.parameters for spec in checkpoint.tensors.values()),
    )


def _relative_error(source: DecodedCheckpoint, checkpoint: DecodedCheckpoint, name: str) -> float:
    if name not in source.tensors or source.tensors[name].shape != checkpoint.tensors[name].shape:
        raise RequestError(
            f"tensor {name} is not in {source.path}, or has another shape there. Is it the source?",
            argument="against",
            path=source.path,
            tensor=name,
        )
    original, stored = source.read(name).reshape(-1), checkpoint.read(name).reshape(-1)
    error, norm = 0.0, 0.0
    for a, b in zip(original.split(CHUNK_WEIGHTS), stored.split(CHUNK_WEIGHTS), strict=True):
        error += float((a.double() - b.double()).square().sum())
        norm += float(a.double().square().sum())
    return error / norm if norm else error
