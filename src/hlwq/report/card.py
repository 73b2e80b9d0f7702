"""Model cards: what a checkpoint is, how to run it, what was measured and what was not."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from rich.filesize import decimal

from hlwq.bases import Identity
from hlwq.check import check_directory
from hlwq.errors import CheckpointError, HlwqWarning, RequestError, ResourceError
from hlwq.evaluate.results import fingerprint, kept
from hlwq.evaluate.speed import tells_of_format
from hlwq.files import expanded, is_file
from hlwq.inspect import Inspection, inspect
from hlwq.manifest import read_manifest
from hlwq.options import recorded, references
from hlwq.provenance import base_model_of, is_hub_id, stated_by_sources
from hlwq.recipes import Stage
from hlwq.report.markdown import code, inline
from hlwq.side_files import own_file, printable
from hlwq.usage import commands
from hlwq.version import __version__

KINDS = ("perplexity", "divergence", "humaneval", "speed")
CARD = "README.md"
CHARTS = "charts"
PICTURES = ("layers", "loss", "size", "speed")
"""The charts of a report, by name."""


def write_card(
    directory: Path,
    repository: str | None = None,
    *,
    base_model: str | None = None,
    report: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `README.md` into a checkpoint that `quantize` made, from its manifest and its `results/`.

    Args:
        directory: the checkpoint.
        repository: its future hub id; by default the directory's name.
        base_model: hub id of the model that was quantized; by default the one that was taken from the hub.
        report: directory that `compare` wrote about this checkpoint and others; its table and charts go into the card.
        overwrite: replace an existing `README.md`.

    Returns:
        The file.

    Raises:
        RequestError: the directory was not made by hlwq, has a card already, or is not in the report; or a hub id is
            none.
        CheckpointError: the report is incomplete, or a record of how the checkpoint was made or measured is damaged.
        ResourceError: the card cannot be written.
    """
    directory, report = expanded(directory), report and expanded(report)
    for name, value in (("repository", repository), ("base_model", base_model)):
        if value is not None and not (is_hub_id(value) and "/" in value):
            raise RequestError(f"`{name}` {printable(value)} is no hub id. Write it like Qwen/Qwen3.5-9B.")
    if not is_file(directory / "hlwq.json"):
        raise RequestError(
            f"{directory} has no hlwq.json: only what `hlwq quantize` made can be described.", path=directory
        )
    file = directory / CARD
    if os.path.lexists(file) and not overwrite:
        raise RequestError(f"{file} exists. `overwrite=True` replaces it.", argument="overwrite", path=file)
    try:
        text = _text(directory, repository, base_model, report)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{directory}: hlwq.json or a file in results/ is not what hlwq writes ({error!r}). Delete results/, or "
            "make the checkpoint again.",
            path=directory,
        ) from None
    _replace(file, text.encode())
    return file


def _text(directory: Path, repository: str | None, base_model: str | None, report: Path | None) -> str:
    """The text of a card; see `write_card`."""
    manifest = read_manifest(directory) or {}
    contents = inspect(directory)
    origin = manifest["origin"]
    base = base_model or base_model_of(origin)
    if base is None:
        warnings.warn(
            f"the card names no base model: the source, {printable(origin['source'])}, was not taken from the hub. If "
            "it is there, give its id as `base_model`.",
            HlwqWarning,
            stacklevel=3,
        )
    results = {kind: entry for kind in KINDS if (entry := _fit_to_show(directory, kind, contents.format))}
    title = printable(repository or directory.resolve().name)
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        pipeline_tag="image-text-to-text" if _sees(contents) else "text-generation",
        library_name="mlx" if contents.format == "mlx" else "transformers",
        tags=["hlwq", printable(manifest["recipe"]), contents.format],
        model_name=title.rsplit("/", 1)[-1],
        eval_results=_eval_results(results) or None,
        **stated_by_sources(origin),
    )
    bits = contents.bits_per_quantized_weight
    failing = {line.engine for line in check_directory(directory) if not line.passed}
    runs = [
        f"**{engine}**\n\n    {command}\n"
        for engine, command in commands(directory, contents.format, without=failing, called=title)
    ]
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n",
            f"# {inline(title)}\n",
            f"Made of {inline(origin['source'])} by [hlwq](https://github.com/hlwq/hlwq) {__version__} "
            f"with recipe {code(manifest['recipe'])} in format `{contents.format}`: {decimal(contents.nbytes)}, "
            + (f"{bits:.3f} bits per quantized weight, all overhead counted.\n" if bits else "weights decoded.\n"),
            "## How to run it\n",
            *runs,
            "## How it was made\n",
            *_details(manifest),
            "\n## What was measured\n",
            _measurements(results),
            *(_compared(directory, report) if report else []),
            "## Caveats\n",
            *(f"- {caveat}" for caveat in _caveats(manifest, results)),
            "\n## References\n",
            *(f"- {citation}" for citation in _citations(manifest)),
            "",
        ]
    )


def _sees(contents: Inspection) -> bool:
    """Whether engines give the model pictures, too; mlx-lm loads the decoder alone."""
    tower = any(tensor.name.startswith("model.visual.") for tensor in contents.tensors)
    return tower and contents.format != "mlx"


def _replace(file: Path, content: bytes) -> None:
    """Write a file whole or not at all, and never through a link. Raises ResourceError if it cannot be written."""
    partial = file.with_name(file.name + ".tmp")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as stream:
            stream.write(content)
        partial.replace(file)
    except OSError as error:
        raise ResourceError(f"{file} cannot be written: {error.strerror}.", path=file) from None


def _fit_to_show(directory: Path, kind: str, format_name: str) -> dict[str, Any] | None:
    """The latest measurement of a kind; of HumanEval, of greedy programs for all problems; of speed, of the format."""
    for entry in kept(directory, kind):
        setting = entry["setting"]
        if kind == "speed" and not tells_of_format(setting["engine"], format_name):
            continue
        if kind != "humaneval" or (setting["limit"] is None and setting["samples"] == 1 and not setting["temperature"]):
            return entry
    return None


def _compared(directory: Path, report: Path) -> list[str]:
    """The table and the charts of a report; its pictures are copied beside the card."""
    rows, table = report / "rows.json", report / "table.md"
    wrong = f"`report={str(report)!r}` is not what `hlwq compare` wrote"
    if not (is_file(rows) and is_file(table)):
        message = f"{wrong}: it has no rows.json and table.md."
        raise CheckpointError(message, argument="report", path=report)
    try:
        compared = {row["checkpoint"] for row in json.loads(own_file(rows, report).read_text(encoding="utf-8"))}
        lines = ["## Compared with others\n", own_file(table, report).read_text(encoding="utf-8")]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{wrong} ({error!r}).", argument="report", path=report) from None
    if fingerprint(directory) not in compared:
        raise RequestError(
            f"`report={str(report)!r}` does not compare {directory} as it is. Run `hlwq compare` with it.",
            argument="report",
            path=report,
        )
    charts = directory / CHARTS
    if charts.is_symlink() or (charts.exists() and not charts.is_dir()):
        raise RequestError(f"{charts} is not a directory of its own. Delete it.", path=charts)
    charts.mkdir(exist_ok=True)
    for name in PICTURES:
        if is_file(picture := report / f"{name}.png"):
            _replace(charts / picture.name, own_file(picture, report).read_bytes())
            lines.append(f"![{name}]({CHARTS}/{picture.name})\n")
    return lines


def _eval_results(results: dict[str, dict[str, Any]]) -> list[EvalResult]:
    evaluations = []
    if "perplexity" in results:
        result, setting = results["perplexity"]["result"], results["perplexity"]["setting"]
        evaluations.append(
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=f"{setting['text']} ({result['protocol']}, context {result['context']})",
                metric_type="perplexity",
                metric_value=round(result["perplexity"], 4),
            )
        )
    if "humaneval" in results:
        estimate = results["humaneval"]["result"]["pass_at"]["1"]
        evaluations.append(
            EvalResult(
                task_type="text-generation",
                dataset_type="openai_humaneval",
                dataset_name="HumanEval",
                metric_type="pass@1",
                metric_value=round(estimate["mean"], 4),
            )
        )
    return evaluations


def _details(manifest: dict[str, Any]) -> list[str]:
    lines = []
    budget = manifest.get("origin", {}).get("budget")
    widths = sorted({module["bits"] for module in manifest["modules"].values()}) if budget else []
    for record in manifest["stages"]:
        stage = Stage.recorded(record)
        basis = "" if stage.basis == Identity() else f"{stage.basis.title}, "
        bits = ", ".join(map(str, widths)) or stage.grid.bits
        lines.append(f"- {basis}{stage.grid.title}, {bits} bits, groups of {stage.grid.group_size}")
        if stage.solver.needs:
            values = {name: value for name, value in recorded(stage.solver).items() if name != "name"}
            options = ", ".join(f"{name} {value}" for name, value in values.items())
            lines.append(f"- {stage.solver.title}; {options}")
    if budget:
        measured = ", ".join(inline(Path(each["source"]).name) for each in budget["measured_on"]["sources"])
        lines.append(f"- bits of each matrix by what its rounding does to the model's predictions, on {measured}")
    calibration = manifest.get("calibration")
    if calibration:
        sources = ", ".join(inline(Path(each["source"]).name) for each in calibration["sources"])
        digest = inline(calibration["tokens_sha256"][:16])
        generated = calibration.get("generated_samples")
        own = f" and {generated} that the model wrote" if generated else ""
        lines.append(
            f"- calibrated on {calibration['samples']} samples of {calibration['sequence_length']} tokens from "
            f"{sources}{own}, seed {calibration['seed']} (SHA-256 of the tokens {digest}…)"
        )
    versions = ", ".join(f"{name} {value}" for name, value in manifest["versions"].items())
    return [*lines, f"- {inline(versions)}; everything is in `hlwq.json`"]


def _measurements(results: dict[str, dict[str, Any]]) -> str:
    lines = []
    for kind, entry in results.items():
        result = entry["result"]
        if kind == "perplexity":
            error = f" ± {result['standard_error']:.3f}" if result["standard_error"] is not None else ""
            value = (
                f"{result['perplexity']:.4f}{error} ({inline(entry['setting']['text'])}, {inline(result['protocol'])}, "
                f"context {result['context']}, {len(result['chunk_losses'])} chunks, {result['tokens']:,} tokens)"
            )
        elif kind == "divergence":
            mean = result["mean"]
            same = result["top1_agreement"]
            least = "at least " if result["lower_bound"] else ""
            value = (
                f"KL {least}{mean['mean']:.4f} [{mean['low']:.4f}, {mean['high']:.4f}] nats per token, 99th percentile "
                f"{result['percentile_99']:.3f}; top-1 agreement {same['mean']:.4f} [{same['low']:.4f}, "
                f"{same['high']:.4f}] (n = {mean['n']} chunks)"
            )
        elif kind == "humaneval":
            one = result["pass_at"]["1"]
            value = (
                f"pass@1 {one['mean']:.4f} [{one['low']:.4f}, {one['high']:.4f}] (n = {one['n']}; greedy, "
                f"{inline(entry['setting']['prompting'])}, at most {result['max_tokens']} tokens)"
            )
        else:
            prefill, decode = result["prefill"], result["decode"]
            value = (
                f"prefill {prefill[0]:.1f} ({prefill[1]:.1f} to {prefill[2]:.1f}), decode {decode[0]:.1f} "
                f"({decode[1]:.1f} to {decode[2]:.1f}) tokens/s (n = {result['runs']} runs)"
            )
            if result["peak_memory"]:
                value += f"; peak memory {decimal(result['peak_memory'])}"
        lines.append(f"| {kind} | {value} | {inline(entry['setting']['engine'])} | {inline(entry['hardware'])} |")
    if not lines:
        return "Nothing yet.\n"
    head = "| | value, with its 95 % interval, standard error (±) or range | engine | on |\n|---|---|---|---|\n"
    return head + "\n".join(lines) + "\n"


def _caveats(manifest: dict[str, Any], results: dict[str, dict[str, Any]]) -> list[str]:
    caveats = []
    missing = [kind for kind in KINDS if kind not in results]
    if missing:
        caveats.append(f"Not measured: {', '.join(missing)}.")
    if "humaneval" in results:
        caveats.append("HumanEval has 164 problems: differences of a few points are within its interval.")
        if unfinished := results["humaneval"]["result"].get("unfinished"):
            caveats.append(f"{unfinished} answers to HumanEval were still going on at their last token.")
    calibration = list((manifest.get("calibration") or {}).get("sources", ()))
    calibration += (manifest.get("origin", {}).get("budget") or {}).get("measured_on", {}).get("sources", ())
    first = manifest.get("origin", {}).get("made_by")
    if first and manifest.get("stages"):
        caveats.append(f"The weights were rounded twice: by recipe {code(first['recipe'])}, then as described above.")
    own = {source["sha256"][:16] for source in calibration if "sha256" in source}
    seen = [kind for kind in KINDS if kind in results and results[kind]["setting"].get("text_sha256") in own]
    if seen:
        caveats.append(f"Measured on its own calibration data, which flatters it: {', '.join(seen)}.")
    if manifest.get("calibration"):
        caveats.append("Calibrated checkpoints are best on text like their calibration data.")
    caveats.append("Perplexities of different protocols or texts cannot be compared.")
    return caveats


def _citations(manifest: dict[str, Any]) -> list[str]:
    stages = [Stage.recorded(record) for record in manifest["stages"]]
    cited = [text for stage in stages for part in (stage.solver, stage.grid, stage.basis) for text in references(part)]
    return list(dict.fromkeys(cited)) or ["Rounding to nearest needs none."]
