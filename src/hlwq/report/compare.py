"""Comparison of several checkpoints of one model, measured alike."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hlwq.decoded import DecodedCheckpoint
from hlwq.devices import usual_device
from hlwq.errors import HlwqWarning, RequestError
from hlwq.evaluate.divergence import divergence
from hlwq.evaluate.generation import PACKED, transformers_generate
from hlwq.evaluate.humaneval import MAX_TOKENS, Prompting, humaneval
from hlwq.evaluate.perplexity import Perplexity, Protocol, paired_difference, perplexity
from hlwq.evaluate.results import (
    divergence_setting,
    engine_of,
    fingerprint,
    hardware,
    humaneval_setting,
    keep,
    kept,
    measured,
    perplexity_setting,
    record_of_programs,
    speed_setting,
)
from hlwq.evaluate.speed import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    RUNS,
    STEADY,
    Speed,
    engine_here,
    in_turn,
    tells_of_format,
)
from hlwq.evaluate.statistics import Estimate, Verdict, paired_verdict, verdict
from hlwq.files import expanded
from hlwq.formats import READABLE_FORMATS
from hlwq.inspect import inspect
from hlwq.manifest import read_manifest
from hlwq.sources import locate

Progress = Callable[[int, int, str], None]
BASE = "(unquantized)"
BYTES_PER_TOKEN, DECODING, PROGRAMS = 4, 16, 164
"""For estimates: in text; how much longer a token takes that is written than one that is read; HumanEval's problems."""


@dataclass(frozen=True)
class Row:
    """One checkpoint. Differences are to the base, on the same chunks or problems.

    Attributes:
        name: name of its directory, or `(unquantized)`.
        checkpoint: hash of its files, see `fingerprint`.
        recipe: the recipe that made it, if recorded.
        format: its format.
        engines: names of the engines that load it.
        nbytes: bytes of its tensors.
        bits_per_weight: mean over quantized matrices; None for the base.
        bits_per_parameter: mean over all parameters.
        perplexity: perplexity on the text.
        standard_error: standard error of the perplexity over chunks.
        loss_above_base: nats per token, paired over chunks; None for the base.
        loss_verdict: whether its loss is measurably better or worse than the base's.
        divergence: KL(base ‖ this), nats per token; None for the base.
        kl_percentile_99: 99th percentile of the KL over tokens.
        top1_agreement: share of tokens whose likeliest successor is the base's.
        humaneval: pass@1 of greedy programs; None if it was not measured.
        humaneval_how: prompting and engine of HumanEval.
        humaneval_p: p-value of McNemar's test against the base; None where the base was not measured alike.
        humaneval_verdict: whether that test tells it better or worse.
        speeds: one for each engine that it was measured in.
        layer_errors: largest relative output error by layer, where the checkpoint records them.
    """

    name: str
    checkpoint: str
    recipe: str | None
    format: str
    engines: tuple[str, ...]
    nbytes: int
    bits_per_weight: float | None
    bits_per_parameter: float
    perplexity: float
    standard_error: float | None
    loss_above_base: Estimate | None
    loss_verdict: Verdict | None
    divergence: Estimate | None
    kl_percentile_99: float | None
    top1_agreement: Estimate | None
    humaneval: Estimate | None
    humaneval_how: str | None
    humaneval_p: float | None
    humaneval_verdict: Verdict | None
    speeds: tuple[Speed, ...]
    layer_errors: dict[int, float]


@dataclass(frozen=True)
class Protocols:
    """The protocols of a comparison.

    Attributes:
        text: the file that perplexity and divergence are measured on.
        protocol: protocol of the perplexity.
        context: tokens in a window or chunk.
        stride: stride of the windowed protocol.
        limit: most chunks to measure, or None for the whole text.
        humaneval: prompting of HumanEval, or None to show only earlier measurements.
        speed: whether to measure speed and memory; earlier measurements are shown in any case.
        device: where models run; by default a GPU if there is one.
    """

    text: Path
    protocol: Protocol = "windowed"
    context: int = 2048
    stride: int = 512
    limit: int | None = None
    humaneval: Prompting | None = None
    speed: bool = True
    device: str = field(default_factory=usual_device)


def compare(
    directories: Sequence[str | Path], base: str | Path, protocols: Protocols, progress: Progress | None = None
) -> list[Row]:
    """Measure the base and each checkpoint, as far as there are no earlier results.

    Results are kept in `results/` beside each checkpoint (see `measured`).

    Raises:
        RequestError: a directory does not exist, two have one name, or the base is quantized.
        HlwqError: a checkpoint cannot be read or measured.
    """
    source = locate(base)
    paths = [expanded(each) for each in directories]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        raise RequestError(
            "Two of the directories have the same name, which the tables could not tell apart.", argument="directories"
        )
    for path in (source, *paths):  # all of them, before any is measured
        if not path.is_dir():
            raise RequestError(f"{path} is not a directory.", argument="directories", path=path)
        if DecodedCheckpoint(path).quantized_modules() and path == source:
            raise RequestError(
                f"`base={str(base)!r}` is quantized itself. Name the model that the others were made from.",
                argument="base",
                path=path,
            )
    report = progress or (lambda done, total, item: None)
    everything = [(BASE, source), *zip(names, paths, strict=True)]
    share = _shares(protocols, len(everything))
    for done, (_, path) in enumerate(everything):
        fingerprint(path, share(report, "hash", done))  # later calls find the digests
    rows: list[Row] = []
    base_loss: Perplexity | None = None
    programs = _measured_alike(source, paths)
    if protocols.humaneval:
        for done, (name, path) in enumerate(everything):
            programs = _run_humaneval(
                path, protocols.humaneval, protocols.device, share(report, "programs", done, f"{name}: ")
            )
    if protocols.speed:
        _measure_speeds([path for _, path in everything], protocols.device, share(report, "speed", 0))
    for done, (name, path) in enumerate(everything):
        told = share(report, "quality", done, f"{name}: ")
        row, base_loss = _measure(name, path, source, base_loss, programs, protocols, told)
        rows.append(row)
    return rows


def _shares(protocols: Protocols, checkpoints: int) -> Callable[..., Progress]:
    """How much of all the work each part is, in the tokens that a model is run on.

    Returns:
        A function that gives a part its progress, given that of the whole, the part's kind and its number, and what to
        put before its words.
    """
    text = protocols.text.stat().st_size // BYTES_PER_TOKEN if protocols.text.is_file() else 0
    overlap = protocols.context / protocols.stride if protocols.protocol == "windowed" else 1
    tokens = text if protocols.limit is None else min(text, protocols.limit * protocols.context)
    one_speed = RUNS * 2 * (PROMPT_TOKENS + DECODING * NEW_TOKENS)
    parts = {
        "hash": [1] * checkpoints,
        "programs": [PROGRAMS * DECODING * MAX_TOKENS // 4] * checkpoints if protocols.humaneval else [],
        "speed": [one_speed * checkpoints] if protocols.speed else [],
        "quality": [int(tokens * overlap) + 1] + [int(tokens * (overlap + 1)) + 1] * (checkpoints - 1),
    }
    whole = sum(map(sum, parts.values()))
    before = {kind: sum(sum(parts[each]) for each in list(parts)[:place]) for place, kind in enumerate(parts)}

    def share(report: Progress, kind: str, number: int, words: str = "") -> Progress:
        start, size = before[kind] + sum(parts[kind][:number]), parts[kind][number]
        return lambda done, total, item: report(start + size * done // max(total, 1), whole, words + item)

    return share


def _measure(
    name: str,
    path: Path,
    source: Path,
    base_loss: Perplexity | None,
    programs: dict[str, Any] | None,
    protocols: Protocols,
    report: Progress,
) -> tuple[Row, Perplexity]:
    """The row of one checkpoint, and the perplexity of the base, which comes first.

    `programs` is HumanEval's setting.
    """
    contents = inspect(path)
    kl = _divergence(path, source, protocols, _half(report, 0, "divergence, ")) if base_loss else None
    scored = _perplexity(path, protocols, kl, _half(report, 1, "perplexity, ") if base_loss else report)
    difference = (
        Estimate(*paired_difference(base_loss, scored), len(scored.chunk_losses)) if base_loss is not None else None
    )
    entry, p_value, humaneval_verdict = _humaneval(path, source, programs)
    row = Row(
        name=name,
        checkpoint=fingerprint(path),
        recipe=contents.recipe,
        format=contents.format,
        engines=tuple(engine.name for engine in READABLE_FORMATS[contents.format].engines),
        nbytes=contents.nbytes,
        bits_per_weight=contents.bits_per_quantized_weight,
        bits_per_parameter=contents.bits_per_parameter,
        perplexity=scored.perplexity,
        standard_error=scored.standard_error,
        loss_above_base=difference,
        loss_verdict=verdict(difference, higher_is_better=False) if difference else None,
        divergence=Estimate(**kl["mean"]) if kl else None,
        kl_percentile_99=kl["percentile_99"] if kl else None,
        top1_agreement=Estimate(**kl["top1_agreement"]) if kl else None,
        humaneval=Estimate(**entry["result"]["pass_at"]["1"]) if entry else None,
        humaneval_how="{prompting}, {engine}".format(**entry["setting"]) if entry else None,
        humaneval_p=p_value,
        humaneval_verdict=humaneval_verdict,
        speeds=speeds_of(path, contents.format),
        layer_errors=_layer_errors(path),
    )
    return row, base_loss or scored


def _half(report: Progress, number: int, words: str) -> Progress:
    return lambda done, total, item: report(number * total + done, 2 * total, words + item)


def _perplexity(path: Path, protocols: Protocols, kl: dict[str, Any] | None, report: Progress) -> Perplexity:
    options: dict[str, Any] = dict(
        protocol=protocols.protocol, context=protocols.context, stride=protocols.stride, limit=protocols.limit
    )
    setting = perplexity_setting(protocols.text, **options, engine=engine_of(path, protocols.device))

    def measure() -> dict[str, Any]:
        if kl and protocols.protocol == "chunked":  # of the same chunks
            result: dict[str, Any] = kl["perplexity"]
            return result
        return asdict(perplexity(path, protocols.text, **options, device=protocols.device, progress=report))

    return Perplexity(**_tuples(measured(path, "perplexity", setting, measure)["result"]))


def _divergence(path: Path, source: Path, protocols: Protocols, report: Progress) -> dict[str, Any]:
    options: dict[str, Any] = dict(context=protocols.context, limit=protocols.limit)
    setting = divergence_setting(protocols.text, **options, engine=engine_of(path, protocols.device), base=source)

    def measure() -> dict[str, Any]:
        found = divergence(path, source, protocols.text, **options, device=protocols.device, progress=report)
        return asdict(found)

    result: dict[str, Any] = measured(path, "divergence", setting, measure)["result"]
    return result


def _run_humaneval(path: Path, prompting: Prompting, device: str, report: Progress) -> dict[str, Any]:
    """Measure HumanEval, unless it was, and return its setting."""
    setting = humaneval_setting(prompting, 1, 0.0, MAX_TOKENS, None, engine_of(path, device))

    def measure() -> dict[str, Any]:
        record, weights = record_of_programs(path, setting), fingerprint(path)[:16]
        generate = transformers_generate(path, device)
        return asdict(humaneval(generate, prompting=prompting, record=record, model=weights, progress=report))

    measured(path, "humaneval", setting, measure)
    return setting


def _measured_alike(source: Path, paths: Sequence[Path]) -> dict[str, Any] | None:
    """The latest setting of greedy programs, perhaps through a server, that the base and a checkpoint share."""
    others = [entry["setting"] for path in paths for entry in kept(path, "humaneval")]
    settings = [entry["setting"] for entry in kept(source, "humaneval")]
    return next(
        (each for each in settings if each in others and each["samples"] == 1 and not each["temperature"]), None
    )


def _humaneval(
    path: Path, source: Path, setting: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, float | None, Verdict | None]:
    """The measurement in a setting, if there is one, and McNemar's test against that of the base."""
    entry, base = (
        next((each for each in kept(where, "humaneval") if each["setting"] == setting), None)
        for where in (path, source)
    )
    if entry is None or base is None or path == source:
        return entry, None, None
    ours, theirs = entry["result"]["solved"], base["result"]["solved"]
    return entry, *paired_verdict([bool(ours[task]) for task in theirs], [bool(theirs[task]) for task in theirs])


ALIKE = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "runs": RUNS}
"""What the speeds in a table have in common."""


def _measure_speeds(paths: Sequence[Path], device: str, report: Progress) -> None:
    """Time the checkpoints that an engine here runs as they are stored, and that have not been timed on this machine.

    What the machine was too busy for is not kept.
    """
    wanted = {}
    for path in paths:
        engine = engine_here(DecodedCheckpoint(path).format.name)
        if engine and not any(
            each["setting"] == _speed_setting(engine, device) and each["hardware"] == hardware()
            for each in kept(path, "speed")
        ):
            wanted[path] = engine == PACKED
    for path, found in in_turn(wanted, device, report).items():
        if found.unsteadiness > STEADY:
            warnings.warn(
                f"the speed of {path.name} is not kept: the fastest of {found.runs} rounds was "
                f"{found.unsteadiness:.1f} times as fast as the slowest (at most {STEADY}). The machine was busy.",
                HlwqWarning,
                stacklevel=2,
            )
        else:
            keep(path, "speed", _speed_setting(found.engine, device), asdict(found))


def _speed_setting(engine: str, device: str) -> dict[str, Any]:
    return speed_setting(**ALIKE, engine=f"{engine}, {device}")


def speeds_of(path: Path, format_name: str) -> tuple[Speed, ...]:
    """Speeds of one protocol by engine, and by machine where it is another one.

    Those of decoded weights in transformers say nothing of a format, and are left out.
    """
    speeds: dict[str, Speed] = {}
    for entry in kept(path, "speed"):
        engine = entry["setting"].get("engine", "")
        if ALIKE.items() <= entry["setting"].items() and tells_of_format(engine, format_name):
            name = engine if entry["hardware"] == hardware() else f"{engine} on {entry['hardware']}"
            speeds.setdefault(name, replace(Speed(**_tuples(entry["result"])), engine=name))
    return tuple(speeds[name] for name in sorted(speeds))


def _tuples(result: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in result.items()}


def _layer_errors(path: Path) -> dict[int, float]:
    """The largest relative output error by layer, where `hlwq.json` records them."""
    layers: dict[int, float] = {}
    for module, entry in (read_manifest(path) or {"modules": {}})["modules"].items():
        if "relative_output_error" in entry and ".layers." in module:
            layer = int(module.split(".layers.")[1].split(".")[0])
            layers[layer] = max(layers.get(layer, 0.0), entry["relative_output_error"])
    return dict(sorted(layers.items()))


def save_rows(rows: Sequence[Row], file: Path) -> None:
    """Write the rows as JSON."""
    file.write_text(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
