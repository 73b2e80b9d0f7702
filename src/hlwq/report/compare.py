"""Several checkpoints of one model, measured alike and set side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hlwq.checkpoint import read_json
from hlwq.errors import HlwqError
from hlwq.evaluate.divergence import divergence
from hlwq.evaluate.generation import transformers_generate
from hlwq.evaluate.humaneval import Prompting, humaneval
from hlwq.evaluate.perplexity import Perplexity, Protocol, paired_difference, perplexity
from hlwq.evaluate.results import divergence_setting, measured, perplexity_setting, speed_setting
from hlwq.evaluate.speed import speed
from hlwq.evaluate.statistics import Estimate, Verdict, mcnemar, verdict
from hlwq.formats import format_named
from hlwq.inspect import inspect
from hlwq.sources import DecodedCheckpoint, locate

Progress = Callable[[int, int, str], None]
BASE = "(unquantized)"


@dataclass(frozen=True)
class Row:
    """What is known of one checkpoint. Differences are to the base, on the same chunks or problems.

    Attributes:
        name: of its directory, or `(unquantized)`.
        directory: where it lies.
        recipe: by which it was made, if it says.
        format: how it is stored.
        engines: that load it.
        nbytes: of its tensors.
        bits_per_weight: over quantized matrices; None for the base.
        bits_per_parameter: over all parameters.
        perplexity: with its standard error over chunks.
        standard_error: of the perplexity.
        loss_above_base: nats per token, paired over chunks; None for the base.
        loss_verdict: whether its loss is measurably better or worse than the base's.
        divergence: KL(base ‖ this), nats per token; None for the base.
        top1_agreement: share of tokens whose likeliest successor is the base's.
        humaneval: pass@1; None if it was not measured.
        humaneval_p: of McNemar's test against the base.
        decode: new tokens per second: median, least, most; None if it was not measured.
        prefill: prompt tokens per second.
        peak_memory: bytes, in the run that measured speed.
        layer_errors: largest relative output error of each layer, where the checkpoint records them.
    """

    name: str
    directory: str
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
    top1_agreement: Estimate | None
    humaneval: Estimate | None
    humaneval_p: float | None
    decode: tuple[float, float, float] | None
    prefill: tuple[float, float, float] | None
    peak_memory: int | None
    layer_errors: tuple[float, ...]


@dataclass(frozen=True)
class Protocols:
    """How everything is measured.

    Attributes:
        text: the file that perplexity and divergence are measured on.
        protocol: of the perplexity.
        context: tokens in a chunk.
        stride: of the windowed protocol.
        limit: chunks, or None for the whole text.
        humaneval: how programs are asked for, or None to leave HumanEval out.
        speed: whether speed and memory are measured.
        device: where.
    """

    text: Path
    protocol: Protocol = "windowed"
    context: int = 2048
    stride: int = 512
    limit: int | None = None
    humaneval: Prompting | None = None
    speed: bool = True
    device: str = "cpu"


def compare(
    directories: Sequence[str | Path], base: str | Path, protocols: Protocols, progress: Progress | None = None
) -> list[Row]:
    """Measure what is missing and read what is there, for the base and each checkpoint.

    Results are kept in `results/` beside each checkpoint (see `measured`).

    Raises:
        HlwqError: a checkpoint cannot be read or measured, or two directories have one name.
    """
    source = locate(base)
    paths = [Path(each) for each in directories]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        raise HlwqError("Two of the directories have the same name, which the tables could not tell apart.")
    for path in (source, *paths):  # all of them, before any is measured
        if not path.is_dir():
            raise HlwqError(f"{path} is not a directory.")
        stored = DecodedCheckpoint(path)
        if path == source and stored.quantized_modules():
            raise HlwqError(f"--base {base} is quantized itself. Name the model that the others were made from.")
    report = progress or (lambda done, total, item: None)
    everything = [(BASE, source), *zip(names, paths, strict=True)]
    rows: list[Row] = []
    first: tuple[Perplexity, dict[str, int] | None] | None = None
    for done, (name, path) in enumerate(everything):
        report(done, len(everything), name)
        row, scored, solved = _measure(name, path, source, protocols, first)
        first = first or (scored, solved)
        rows.append(row)
    report(len(everything), len(everything), "measured")
    return rows


def _measure(
    name: str,
    path: Path,
    source: Path,
    protocols: Protocols,
    base: tuple[Perplexity, dict[str, int] | None] | None,
) -> tuple[Row, Perplexity, dict[str, int] | None]:
    found = inspect(path)
    text = str(protocols.text)
    windows = perplexity_setting(
        protocols.text, protocols.protocol, protocols.context, protocols.stride, protocols.limit, protocols.device
    )
    scored = Perplexity(
        **_tuples(
            measured(
                path,
                "perplexity",
                windows,
                lambda: asdict(
                    perplexity(
                        path,
                        text,
                        protocol=protocols.protocol,
                        context=protocols.context,
                        stride=protocols.stride,
                        limit=protocols.limit,
                        device=protocols.device,
                    )
                ),
            )["result"]
        )
    )
    kl: dict[str, Any] | None = None
    difference: Estimate | None = None
    if base is not None:
        difference = Estimate(*paired_difference(base[0], scored), len(scored.chunk_losses))
        kl = measured(
            path,
            "divergence",
            divergence_setting(protocols.text, protocols.context, protocols.limit, protocols.device),
            lambda: asdict(
                divergence(
                    path,
                    source,
                    text,
                    context=protocols.context,
                    limit=protocols.limit,
                    device=protocols.device,
                )
            ),
        )["result"]
    programs = _humaneval(path, protocols) if protocols.humaneval else None
    solved = programs["solved"] if programs else None
    fast = (
        measured(
            path,
            "speed",
            speed_setting(512, 64, 3, protocols.device),
            lambda: asdict(speed(path, device=protocols.device)),
        )["result"]
        if protocols.speed
        else None
    )
    p_value = None
    if base is not None and base[1] is not None and solved is not None:
        p_value = mcnemar([bool(base[1][task]) for task in solved], [bool(solved[task]) for task in solved])
    row = Row(
        name=name,
        directory=str(path),
        recipe=found.recipe,
        format=found.format,
        engines=tuple(engine.name for engine in format_named(found.format).ENGINES),
        nbytes=found.nbytes,
        bits_per_weight=found.bits_per_quantized_weight,
        bits_per_parameter=found.bits_per_parameter,
        perplexity=scored.perplexity,
        standard_error=scored.standard_error,
        loss_above_base=difference,
        loss_verdict=verdict(difference, higher_is_better=False) if difference else None,
        divergence=Estimate(**kl["mean"]) if kl else None,
        top1_agreement=Estimate(**kl["top1_agreement"]) if kl else None,
        humaneval=Estimate(**programs["pass_at"]["1"]) if programs else None,
        humaneval_p=p_value,
        decode=tuple(fast["decode"]) if fast else None,
        prefill=tuple(fast["prefill"]) if fast else None,
        peak_memory=fast["peak_memory"] if fast else None,
        layer_errors=_layer_errors(path),
    )
    return row, scored, solved


def _humaneval(path: Path, protocols: Protocols) -> dict[str, Any]:
    prompting = protocols.humaneval
    assert prompting is not None

    def measure() -> dict[str, Any]:
        generate, _ = transformers_generate(path, protocols.device)
        return asdict(humaneval(generate, prompting=prompting))

    result: dict[str, Any] = measured(
        path, "humaneval", {"prompting": prompting, "engine": "transformers", "device": protocols.device}, measure
    )["result"]
    return result


def _tuples(result: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in result.items()}


def _layer_errors(path: Path) -> tuple[float, ...]:
    """The largest relative output error of each layer, in order, where `hlwq.json` records them."""
    manifest = read_json(path / "hlwq.json") if (path / "hlwq.json").is_file() else {}
    layers: dict[int, float] = {}
    for module, entry in manifest.get("modules", {}).items():
        if "relative_output_error" in entry and ".layers." in module:
            layer = int(module.split(".layers.")[1].split(".")[0])
            layers[layer] = max(layers.get(layer, 0.0), entry["relative_output_error"])
    return tuple(layers[index] for index in sorted(layers))


def save_rows(rows: Sequence[Row], file: Path) -> None:
    """Write the rows as JSON."""
    file.write_text(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
