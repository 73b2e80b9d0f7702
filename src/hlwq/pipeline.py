"""Running a plan: checkpoint in, smaller checkpoint out."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hlwq.cache import cached_tensor
from hlwq.calibration import (
    GENERATION_BYTES,
    Calibration,
    Samples,
    continued,
    default_batch_size,
    kv_bytes_per_token,
    load_samples,
    prompts_from,
)
from hlwq.check import check_directory, has_tokenizer, refuse_unless_usable
from hlwq.containers import DEFAULT_SHARD_BYTES, Source, Writer, arguments_before, partial_of
from hlwq.devices import available_memory, compute_dtype, memory_errors, peak_memory, torch_device
from hlwq.errors import CheckpointError, HlwqWarning, RequestError
from hlwq.evaluate.model import load_model
from hlwq.evaluate.results import fingerprint
from hlwq.families import with_tying
from hlwq.files import locked
from hlwq.formats import Demand, without_sections
from hlwq.layerwise import CalibratedLayers
from hlwq.manifest import MANIFEST
from hlwq.plan import Plan, PlannedTensor, layer_unit
from hlwq.transformers_models import load_tokenizer, quiet_transformers
from hlwq.version import __version__
from hlwq.work import Progress, Work, cost

SHARED = "shared tensors"
"""The unit of what a format writes beside the tensors of modules."""
CACHED_BATCHES = 64
"""Batches of generated samples that the cache holds: some hundred kilobytes each."""


@dataclass(frozen=True)
class QuantizeResult:
    """What a run made.

    Attributes:
        out: the directory.
        plan: what was done to each tensor.
        nbytes: bytes of the weight files.
        relative_errors: ‖W − Ŵ‖² / ‖W‖² of each quantized module.
        output_errors: ‖(W − Ŵ) X‖² / ‖W X‖² on the calibration data, of each module that was calibrated.
        checks: what each engine demands, and whether it is met.
        device: where it was computed.
        seconds: wall-clock time of the work.
        peak_memory: the most memory the process has held, in bytes; None where the system does not say.
    """

    out: Path
    plan: Plan
    nbytes: int
    relative_errors: dict[str, float]
    output_errors: dict[str, float]
    checks: list[Demand]
    device: str
    seconds: float
    peak_memory: int | None


def run_plan(
    source: Source,
    plan: Plan,
    out: Path,
    *,
    origin: dict[str, Any],
    calibration: Calibration | None = None,
    device: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Do what a plan says: the work behind `quantize` and `convert`.

    Args:
        source: the checkpoint that the plan was made for.
        plan: what becomes of each tensor.
        out: the directory to make.
        origin: where the checkpoint came from, for `hlwq.json`.
        calibration: which data a calibrated recipe uses.
        device: where to compute; by default a GPU if there is one.
        shard_bytes: the most that one safetensors file holds.
        progress: told how far the work is.

    Raises:
        RequestError: an argument is wrong, or the directory is not empty.
        CheckpointError: a tensor is not finite, or an output head is not what it is tied to.
        UnsupportedError: a group overflows its format, or no engine could load the result.
        ResourceError: the disk is full, or a package or memory is lacking.
    """
    # From before anything of an earlier run is discarded until the directory is in its place.
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(partial_of(out)):
        return _run(source, plan, out, origin, calibration, torch_device(device), shard_bytes, progress or _silent)


def _run(
    source: Source,
    plan: Plan,
    out: Path,
    origin: dict[str, Any],
    calibration: Calibration | None,
    device: torch.device,
    shard_bytes: int,
    report: Progress,
) -> QuantizeResult:
    started = time.monotonic()
    side_files = source.side_files()
    if not has_tokenizer(source.path):
        message = f"{source.path} has no tokenizer, which engines need. Copy the original's beside the weights."
        raise CheckpointError(message, path=source.path)
    for warning in plan.warnings:
        warnings.warn(warning, HlwqWarning, stacklevel=2)
    check_dropped(source, plan)
    samples = None
    if plan.recipe.calibrated:
        calibration = calibration or Calibration()
        report(0, 1, "reading calibration data")
        samples = samples_for(plan, calibration, load_tokenizer(source.path))
        calibration = _with_generated_count(replace(calibration, samples=len(samples.tokens)), plan, out, device)
        _warn_of_memory(plan, calibration, device)
        if calibration.generated_samples:
            samples = _with_generated(samples, source, plan, calibration, device, report)
        batch_size = calibration.batch_size or default_batch_size(plan.layout, calibration.sequence_length)
        calibration = replace(calibration, batch_size=min(batch_size, len(samples.tokens)))
    else:
        _warn_of_memory(plan, calibration, device)
    made_by = _made_by(plan, origin, device, samples, calibration)
    arguments = {
        **made_by,
        "shard_bytes": shard_bytes,
        "config": source.config,
        "tensors": _digest(plan),
        "files": source.stamps(),
        "machine": _machine(calibrated=plan.recipe.calibrated),
    }
    json_files = plan.format.json_files(with_tying(without_sections(source.config), plan.layout.tied), plan.contents())
    writer = Writer(out, plan.outputs(), arguments, shard_bytes, json_files, plan.parts())
    if lost := writer.verify(report):
        warnings.warn(
            f"{writer.partial}: {', '.join(lost[:3])}{' and more' if len(lost) > 3 else ''} had been written, and is "
            "damaged. It is done again.",
            HlwqWarning,
            stacklevel=2,
        )
    if writer.committed(SHARED) is None and (shared := plan.shared_tensors()):
        for name, values in shared.items():  # first, since what is read back of a layer may need them
            writer.write(name, values)
        writer.commit(SHARED, list(shared), {})
    work = Work(source, plan, writer, device, report)
    layers = CalibratedLayers(work, samples.tokens, calibration) if samples and calibration else None
    errors = _run_units(work, layers)
    if layers:
        layers.remove_spilled()
    schemes = plan.contents().quantized
    modules = {module: {**asdict(schemes[module]), **errors[module]} for module in schemes}
    manifest = {**made_by, "modules": modules, "sha256": writer.digests()}
    writer.finish(side_files, {MANIFEST: manifest})
    checks = check_directory(writer.directory, lambda done, total, name: report(work.total, work.total, "checking"))
    refuse_unless_usable(checks)
    writer.publish()
    output = "relative_output_error"
    return QuantizeResult(
        out=out,
        plan=plan,
        nbytes=writer.nbytes,
        relative_errors={module: each["relative_squared_error"] for module, each in errors.items()},
        output_errors={module: each[output] for module, each in errors.items() if output in each},
        checks=checks,
        device=str(device),
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
    )


def _run_units(work: Work, layers: CalibratedLayers | None) -> dict[str, dict[str, float]]:
    """Do, or find done, each unit of the plan and record it; returns the errors of each quantized module."""
    plan, writer = work.plan, work.writer
    indices = {layer_unit(index): index for index in range(len(plan.layout.layers))}
    errors: dict[str, dict[str, float]] = {}
    for unit in plan.units():
        tensors = [tensor for tensor in plan.tensors if tensor.unit == unit and tensor.action != "drop"]
        record = writer.committed(unit)
        if record is None:
            found = layers.quantize(indices[unit], tensors) if layers and unit in indices else {}
            for tensor in tensors:
                if tensor.action == "copy":
                    work.copy(tensor)
                elif layers and tensor.module == plan.layout.head and tensor.calibrated:
                    found[tensor.module] = layers.quantize_head(tensor)
                elif tensor.module not in found:
                    found[tensor.module] = work.quantize(tensor)
            record = {"errors": found, "source": work.checksums(tensors)}
            writer.commit(unit, [spec.name for tensor in tensors for spec in tensor.outputs], record)
        else:
            work.report(work.done, work.total, f"{unit}: done by an earlier run")
            _check_unchanged(work, tensors, record["source"])
            work.done += sum(map(cost, tensors))
        errors |= record["errors"]
    return errors


def _check_unchanged(work: Work, tensors: Sequence[PlannedTensor], before: dict[str, int]) -> None:
    """Raise CheckpointError if the source is another than when an earlier run read these tensors of it."""
    now = work.checksums(tensors)
    for name, found in before.items():
        if now[name] != found:
            raise CheckpointError(
                f"{work.source.path}: tensor {name} has changed since the run began that left {work.writer.partial}. "
                f"Put the source back as it was, or delete {work.writer.partial} to start afresh.",
                path=work.source.path,
                tensor=name,
            )


def check_dropped(source: Source, plan: Plan) -> None:
    """Raise CheckpointError if an output head to be dropped is not the embedding it is said to be tied to."""
    for tensor in plan.tensors:
        if tensor.action == "drop":
            head, embedding = source.read(tensor.spec.name), source.read(f"{plan.layout.embedding}.weight")
            if not torch.equal(head, embedding):
                raise CheckpointError(
                    f"config.json ties {tensor.spec.name} to the embedding, but the two differ. "
                    "Set tie_word_embeddings to false there, or delete the tensor.",
                    tensor=tensor.spec.name,
                )


def samples_for(plan: Plan, calibration: Calibration, tokenizer: Any) -> Samples:
    """Calibration samples that the model can be given."""
    config = plan.layout.text_config
    longest, vocabulary = config.get("max_position_embeddings"), config["vocab_size"]
    if longest is not None and calibration.sequence_length > longest:
        message = f"`sequence_length` {calibration.sequence_length} exceeds the model's own limit of {longest}."
        raise RequestError(message)
    with quiet_transformers():
        samples = load_samples(calibration, tokenizer)
    if int(samples.tokens.max()) >= vocabulary:
        raise CheckpointError(
            f"The tokenizer gives the token {int(samples.tokens.max())}, but the model has {vocabulary}. "
            "They do not belong together: copy the original's tokenizer."
        )
    if samples.warning:
        warnings.warn(samples.warning, HlwqWarning, stacklevel=3)
    return samples


def _with_generated_count(calibration: Calibration, plan: Plan, out: Path, device: torch.device) -> Calibration:
    """A calibration that says how many samples the model writes: as an interrupted run had it, or as memory allows."""
    if calibration.generated_samples is None and (before := arguments_before(out).get("calibration")):
        return replace(calibration, generated_samples=before.get("generated_samples", 0))
    decided = plan.with_generated_samples(calibration, device)
    wanted = calibration.generated_samples is None and any(plan.recipe.generated)
    if wanted and calibration.sequence_length > 1 and not decided.generated_samples:
        warnings.warn(
            "the whole model does not fit in the memory that is available, so it writes no calibration samples itself, "
            "and the texts are all there is.",
            HlwqWarning,
            stacklevel=4,
        )
    return decided


def _with_generated(
    samples: Samples, source: Source, plan: Plan, calibration: Calibration, device: torch.device, report: Progress
) -> Samples:
    """Samples of texts, and behind them those that the model writes, from the cache where an earlier run left them."""
    count, length, seed = calibration.generated_samples or 0, calibration.sequence_length, calibration.seed
    prompts = prompts_from(samples.tokens, count)
    dtype = compute_dtype(device)
    depends_on = fingerprint(source.path, report), str(dtype), device.type, length, seed
    together = max(1, GENERATION_BYTES // (kv_bytes_per_token(plan.layout, dtype) * length))
    starts = range(0, count, together)

    @cache
    def model() -> Any:
        report(0, 1, "loading the whole model, which writes samples")
        return load_model(source.path, str(device), dtype)[0]

    def write(batch: Tensor, start: int) -> Tensor:
        def told(tokens: int) -> None:
            report(start * length + len(batch) * tokens, count * length, f"the model writes {count} samples")

        return continued(model(), batch, length, seed + start, told)

    written: list[Tensor] = []
    lacking = "There is too little memory for the whole model, which writes calibration samples. "
    with memory_errors(f"{lacking}Use `generated_samples=0`."):
        for start in starts:
            batch = prompts[start : start + together]
            key = sha256(repr((depends_on, start, batch.tolist())).encode()).hexdigest()[:24]
            keep = max(CACHED_BATCHES, len(starts))
            written.append(cached_tensor("generated-samples", key, partial(write, batch, start), keep=keep))
    tokens = torch.cat([samples.tokens, *written])
    facts = {"generated_samples": count, "tokens_sha256": sha256(tokens.numpy().tobytes()).hexdigest()}
    return replace(samples, tokens=tokens, origin=samples.origin | facts)


def _warn_of_memory(plan: Plan, calibration: Calibration | None, device: torch.device) -> None:
    """An estimate is no reason to refuse, but one to be told before hours of work."""
    needed, available = plan.peak_memory(calibration, device), available_memory()
    if available is None or needed <= available:
        return
    remedy = "Close programs."
    if calibration:
        remedy = "Lower `batch_size` or `samples`, or use `offload_activations=True`."
        if calibration.generated_samples and plan.generation_memory(calibration, device) > available:
            remedy = "Use `generated_samples=0`."
    warnings.warn(
        f"this may need {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available. {remedy}",
        HlwqWarning,
        stacklevel=3,
    )


def _made_by(
    plan: Plan,
    origin: dict[str, Any],
    device: torch.device,
    samples: Samples | None,
    calibration: Calibration | None,
) -> dict[str, Any]:
    """What `hlwq.json` says of how a checkpoint was made, which also tells a run from another."""
    versions = {"hlwq": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if samples:
        versions["transformers"] = version("transformers")
    return {
        "origin": origin,
        "recipe": plan.recipe.name,
        "stages": [stage.record() for stage in plan.recipe.stages],
        # The size of a batch decides in which order sums are taken, and so their last bits.
        "calibration": {**samples.origin, "batch_size": calibration.batch_size} if samples and calibration else None,
        "format": plan.format.name,
        "kept": [tensor.module for tensor in plan.tensors if tensor.action == "copy" and tensor.reason == "excluded"],
        "device": device.type,
        "versions": versions,
    }


def _machine(*, calibrated: bool) -> dict[str, Any]:
    """What a run's last bits may depend on: the processor's instructions, and how many threads share a sum."""
    machine: dict[str, Any] = {"capability": torch.backends.cpu.get_cpu_capability()}
    return {**machine, "threads": torch.get_num_threads()} if calibrated else machine


def _digest(plan: Plan) -> str:
    """A short hash of what becomes of every tensor, to tell a run from another."""
    text = "\n".join(f"{tensor.spec} {tensor.action} {tensor.stages} {tensor.outputs}" for tensor in plan.tensors)
    return sha256(text.encode()).hexdigest()[:16]


def _silent(done: int, total: int, item: str) -> None:
    pass
