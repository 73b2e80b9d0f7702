"""Model cards: what a checkpoint is, how to run it, what was measured and what was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from rich.filesize import decimal

from hlwq.bases import Identity
from hlwq.check import check_directory
from hlwq.errors import CheckpointError, RequestError, ResourceError, reason
from hlwq.evaluate.results import fingerprint, kept
from hlwq.files import read_json
from hlwq.inspect import inspect
from hlwq.options import recorded, references
from hlwq.recipes import Stage
from hlwq.usage import commands
from hlwq.version import __version__

KINDS = ("perplexity", "divergence", "humaneval", "speed")
CHARTS = "charts"


def write_card(
    directory: Path, repository: str | None = None, *, report: Path | None = None, overwrite: bool = False
) -> Path:
    """Write `README.md` into a checkpoint that `quantize` made, from its manifest and its `results/`.

    Args:
        directory: the checkpoint.
        repository: its future hub id; by default the directory's name.
        report: directory that `compare` wrote about this checkpoint and others; its table and charts go into the card.
        overwrite: replace an existing `README.md`.

    Returns:
        The file.

    Raises:
        RequestError: the directory was not made by hlwq, has a card already, or is not in the report.
        CheckpointError: the report is incomplete.
    """
    if not (directory / "hlwq.json").is_file():
        raise RequestError(
            f"{directory} has no hlwq.json: only what `hlwq quantize` made can be described.", path=directory
        )
    file = directory / "README.md"
    if file.exists() and not overwrite:
        raise RequestError(f"{file} exists. `overwrite=True` replaces it.", argument="overwrite", path=file)
    manifest = read_json(directory / "hlwq.json")
    contents = inspect(directory)
    origin = manifest["origin"]
    stated = dict(origin.get("card", {}))
    if origin.get("revision"):  # a name on the hub; a local one says nothing to readers
        stated["base_model"] = origin["source"]
    results = {kind: entry for kind in KINDS if (entry := _fit_to_show(directory, kind))}
    title = repository or directory.resolve().name
    data = ModelCardData(
        base_model_relation="quantized" if "base_model" in stated else None,
        library_name="mlx" if contents.format == "mlx" else "transformers",
        tags=["hlwq", manifest["recipe"], contents.format],
        model_name=title.rsplit("/", 1)[-1],
        eval_results=_eval_results(results) or None,
        **stated,
    )
    bits = contents.bits_per_quantized_weight
    failing = {line.engine for line in check_directory(directory) if not line.passed}
    runs = [
        f"**{engine}**\n\n    {command}\n"
        for engine, command in commands(directory, contents.format, without=failing, called=title)
    ]
    text = "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n",
            f"# {title}\n",
            f"{origin['source']}, quantized by [hlwq](https://github.com/hlwq/hlwq) {__version__} "
            f"with recipe `{manifest['recipe']}` in format `{contents.format}`: {decimal(contents.nbytes)}, "
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
        ]
    )
    ModelCard(text + "\n").save(file)
    return file


def push(directory: Path, repository: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Upload a checkpoint to the hub, and return its address.

    Args:
        directory: the checkpoint.
        repository: the hub id; made if need be.
        private: make it for yourself alone.
        api: client of another hub than the usual one.

    Raises:
        RequestError: there is no card, or it is of another repository.
        ResourceError: the hub refuses.
    """
    check_card(directory, repository)
    hub = api or HfApi()
    try:
        url = hub.create_repo(repository, private=private, exist_ok=True)
        if private and not hub.repo_info(repository).private:
            raise ValueError("it is there already, and public. Make it private on its page first.")
        message = f"Quantized by hlwq {__version__}"
        # Shards of an earlier upload would be loaded along with these.
        stale = ["*.safetensors"]
        hub.upload_folder(repo_id=repository, folder_path=directory, commit_message=message, delete_patterns=stale)
    except Exception as error:  # of the network, of the hub, of the token
        message = f"The hub did not take {repository}: {reason(error)}. Check the network, and `hf auth login`."
        raise ResourceError(message) from None
    return str(url)


def check_card(directory: Path, repository: str) -> None:
    """Raise RequestError unless a directory has a card under the name it will have on the hub."""
    file = directory / "README.md"
    again = f"hlwq card {directory} --repository {repository}"
    if not file.is_file():
        raise RequestError(f"{directory} has no model card. Write one: {again}", path=directory)
    if f"\n# {repository}\n" not in file.read_text(encoding="utf-8"):
        raise RequestError(
            f"{file} does not call it {repository}, as its commands must. Write it anew: {again} --overwrite",
            argument="repository",
            path=file,
        )


def _fit_to_show(directory: Path, kind: str) -> dict[str, Any] | None:
    """The latest measurement of a kind; of HumanEval, the latest of greedy programs for all problems."""
    for entry in kept(directory, kind):
        setting = entry["setting"]
        if kind != "humaneval" or (setting["limit"] is None and setting["samples"] == 1 and not setting["temperature"]):
            return entry
    return None


def files_to_push(directory: Path) -> list[tuple[str, int]]:
    """Files that `push` would upload: paths inside the directory, and bytes."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return [(file.relative_to(directory).as_posix(), file.stat().st_size) for file in files]


def _compared(directory: Path, report: Path) -> list[str]:
    """The table and the charts of a report; its pictures are copied beside the card."""
    rows, table = report / "rows.json", report / "table.md"
    if not (rows.is_file() and table.is_file()):
        raise CheckpointError(
            f"`report={str(report)!r}` is not what `hlwq compare` wrote: it has no rows.json and table.md.",
            argument="report",
            path=report,
        )
    if fingerprint(directory) not in (row["checkpoint"] for row in json.loads(rows.read_text(encoding="utf-8"))):
        raise RequestError(
            f"`report={str(report)!r}` does not compare {directory} as it is. Run `hlwq compare` with it.",
            argument="report",
            path=report,
        )
    (directory / CHARTS).mkdir(exist_ok=True)
    lines = ["## Compared with others\n", table.read_text(encoding="utf-8")]
    for picture in sorted(report.glob("*.png")):
        shutil.copyfile(picture, directory / CHARTS / picture.name)
        lines.append(f"![{picture.stem}]({CHARTS}/{picture.name})\n")
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
    for record in manifest["stages"]:
        stage = Stage.recorded(record)
        basis = "" if stage.basis == Identity() else f"{stage.basis.title}, "
        lines.append(f"- {basis}{stage.grid.title}, {stage.grid.bits} bits, groups of {stage.grid.group_size}")
        if stage.solver.needs:
            values = {name: value for name, value in recorded(stage.solver).items() if name != "name"}
            options = ", ".join(f"{name} {value}" for name, value in values.items())
            lines.append(f"- {stage.solver.title}; {options}")
    calibration = manifest.get("calibration")
    if calibration:
        sources = ", ".join(Path(each["source"]).name for each in calibration["sources"])
        lines.append(
            f"- calibrated on {calibration['samples']} samples of {calibration['sequence_length']} tokens from "
            f"{sources}, seed {calibration['seed']} (SHA-256 of the tokens {calibration['tokens_sha256'][:16]}…)"
        )
    versions = ", ".join(f"{name} {value}" for name, value in manifest["versions"].items())
    return [*lines, f"- {versions}; everything is in `hlwq.json`"]


def _measurements(results: dict[str, dict[str, Any]]) -> str:
    lines = []
    for kind, entry in results.items():
        result = entry["result"]
        if kind == "perplexity":
            error = f" ± {result['standard_error']:.3f}" if result["standard_error"] is not None else ""
            value = (
                f"{result['perplexity']:.4f}{error} ({entry['setting']['text']}, {result['protocol']}, context "
                f"{result['context']}, {len(result['chunk_losses'])} chunks, {result['tokens']:,} tokens)"
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
                f"{entry['setting']['prompting']}, at most {result['max_tokens']} tokens)"
            )
        else:
            prefill, decode = result["prefill"], result["decode"]
            value = (
                f"prefill {prefill[0]:.1f} ({prefill[1]:.1f} to {prefill[2]:.1f}), decode {decode[0]:.1f} "
                f"({decode[1]:.1f} to {decode[2]:.1f}) tokens/s (n = {result['runs']} runs)"
            )
            if result["peak_memory"]:
                value += f"; peak memory {decimal(result['peak_memory'])}"
        lines.append(f"| {kind} | {value} | {entry['setting']['engine']} | {entry['hardware']} |")
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
    calibration = (manifest.get("calibration") or {}).get("sources", ())
    first = manifest.get("origin", {}).get("made_by")
    if first and manifest.get("stages"):
        caveats.append(f"The weights were rounded twice: by recipe `{first['recipe']}`, then as described above.")
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
