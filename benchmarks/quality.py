"""Recipe `best`, each of its ingredients, and other tools on the same samples in one run: divergence, perplexity, time.

    python benchmarks/quality.py MODEL --text FILE.txt --calibration FILE.txt --json quality.json \
        --autoround .venvs/autoround/bin/python --gptqmodel .venvs/gptqmodel/bin/python --mlx .venvs/mlx/bin/python

Each row quantizes in its own process, whose seconds, those of the first seed, are the whole process's. Samples that the
model writes are in the cache of Hugging Face's libraries after the first row that uses them. Figures are kept in the
JSON file, and a second run measures only what it lacks. Differences are paired over the chunks of a text, each chunk's
figure being the mean over the seeds, with 95 % intervals of Student's t.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from hlwq.calibration import Calibration, load_samples
from hlwq.evaluate.divergence import divergence
from hlwq.evaluate.model import load_model
from hlwq.evaluate.statistics import mean_estimate
from hlwq.sources import locate
from hlwq.transformers_models import load_tokenizer, quiet_transformers

ROTATED = ["--format", "compressed-tensors"]
KEPT = "--no-include-embeddings"
BEST = {
    "best, compressed-tensors": ROTATED,
    "best, gptq": ["--format", "gptq"],
    "best, hlwq, 4 bits": ["--format", "hlwq", "--bits", "4", KEPT],
    "best, hlwq, 5 bits": ["--format", "hlwq", "--bits", "5", KEPT],
    "best, mlx": ["--format", "mlx"],
}
NO_MISMATCH, NO_STREAM_CHANGE, LESS_DAMPING = ["--mismatch", "0"], ["--stream-change", "0"], ["--damping", "0.01"]
NO_GENERATED, ONE_SCALE, NO_SWEEPS = ["--generated-samples", "0"], ["--scale-candidates", "1"], ["--sweeps", "0"]
PLAIN = [*ROTATED, *NO_GENERATED, *ONE_SCALE, *NO_SWEEPS]
GPTQ = [*ROTATED, *NO_MISMATCH, *NO_STREAM_CHANGE, *LESS_DAMPING]
INGREDIENTS = {
    "rotated, rounded to nearest": [*ROTATED, "--recipe", "rtn", "--basis", "hadamard"],
    "rotated, GPTQ": [*GPTQ, *NO_GENERATED, *ONE_SCALE, *NO_SWEEPS],
    "rotated, GPTQ + damping 0.1": [*PLAIN, *NO_MISMATCH, *NO_STREAM_CHANGE],
    "rotated, GPTQ + mismatch": [*PLAIN, *NO_STREAM_CHANGE, *LESS_DAMPING],
    "rotated, GPTQ + stream change": [*PLAIN, *NO_MISMATCH, *LESS_DAMPING],
    "rotated, GPTQ + scale candidates": [*GPTQ, *NO_GENERATED, *NO_SWEEPS],
    "rotated, GPTQ + sweeps": [*GPTQ, *NO_GENERATED, *ONE_SCALE],
    "rotated, GPTQ + generated samples": [*GPTQ, *ONE_SCALE, *NO_SWEEPS],
    "best without damping 0.1": [*ROTATED, *LESS_DAMPING],
    "best without mismatch": [*ROTATED, *NO_MISMATCH],
    "best without stream change": [*ROTATED, *NO_STREAM_CHANGE],
    "best without scale candidates": [*ROTATED, *ONE_SCALE],
    "best without sweeps": [*ROTATED, *NO_SWEEPS],
    "best without generated samples": [*ROTATED, *NO_GENERATED],
    "best without rotation": [*ROTATED, "--basis", "identity"],
}
ROUNDED = ["--recipe", "hlwq", KEPT]
OWN_BITS = {
    "HLWQ, 4 bits": [*ROUNDED, "--bits", "4"],
    "HLWQ, each matrix its own bits, 3.999 in the mean": [*ROUNDED, "--bits", "3.999"],
    "HLWQ, each matrix its own bits, 4.5 in the mean": [*ROUNDED, "--bits", "4.5"],
    "HLWQ, 5 bits": [*ROUNDED, "--bits", "5"],
    "best, mlx, each matrix its own bits, 3.999 in the mean": ["--format", "mlx", "--bits", "3.999"],
    "best, mlx, each matrix its own bits, 4.5 in the mean": ["--format", "mlx", "--bits", "4.5"],
}
OURS = {**BEST, **INGREDIENTS, **OWN_BITS}
AUTOROUND, GPTQMODEL, MLX = "AutoRound, 200 iterations", "GPTQModel, FOEM", "mlx-lm convert"
Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, a hub id or a .gguf file")
    parser.add_argument("--text", required=True, action="append", help="text file measured on; several in turn")
    parser.add_argument("--calibration", required=True, help="a .txt, .jsonl or .parquet file, or `embedded`")
    parser.add_argument("--autoround", type=Path, help="Python interpreter of an environment with AutoRound")
    parser.add_argument("--gptqmodel", type=Path, help="Python interpreter of an environment with GPTQModel")
    parser.add_argument("--mlx", type=Path, help="Python interpreter of an environment with mlx-lm")
    parser.add_argument("--only", default="", help="regular expression of the rows to measure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=8, help="number of chunks measured")
    parser.add_argument("--json", type=Path, required=True, help="file of figures; those in it are not measured again")
    parser.add_argument("--markdown", type=Path, help="file to write the tables to")
    options = parser.parse_args()
    if Path(options.calibration).is_file():
        options.calibration = str(Path(options.calibration).absolute())  # commands run in other folders
    setting = {name: getattr(options, name) for name in ("samples", "sequence_length", "context", "limit")}
    setting |= {"model": Path(options.model).name, "calibration": Path(options.calibration).name}
    figures: Figures = {"setting": setting, "runs": {}}
    if options.json.is_file():
        figures = json.loads(options.json.read_text())
        if figures["setting"] != setting:
            parser.error(f"{options.json} was measured with {figures['setting']}, not {setting}")
    peers = {AUTOROUND: options.autoround, GPTQMODEL: options.gptqmodel, MLX: options.mlx}
    names = [*OURS, *(name for name, python in peers.items() if python)]
    work = [(name, seed) for seed in options.seeds for name in names if re.search(options.only, name)]
    if not work:
        parser.error(f"--only {options.only} names none of: {'; '.join(names)}")
    if len({Path(text).name for text in options.text}) < len(options.text):
        parser.error("two --text files have one name, by which figures are kept")
    for name, seed in track(work, "measuring", console=Console(stderr=True)):
        run = figures["runs"].setdefault(f"{name}, seed {seed}", {})
        texts = [text for text in options.text if Path(text).name not in run.get("texts", {})]
        if texts:
            measure(name, seed, texts, peers, options, run)
            options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False))
    show(figures, options.markdown)


def measure(
    name: str, seed: int, texts: list[str], peers: dict[str, Path | None], options: argparse.Namespace, run: Figures
) -> None:
    """Make a row's checkpoint and compare it with the original on texts."""
    source = locate(options.model).absolute()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        out = folder / "out"
        if name in peers:
            command = peer(name, seed, source, out, folder, peers[name], options)
        else:
            changes = OURS[name]
            command = [sys.executable, "-m", "hlwq.cli", "quantize", source, out, *changes]
            if "--recipe" not in changes or any(re.fullmatch(r"\d\.\d+", word) for word in changes):
                command += ["--calibration", options.calibration, "--samples", options.samples]
                command += ["--sequence-length", options.sequence_length, "--seed", seed]
        run["seconds"] = timed(command, folder)
        if not (out / "config.json").is_file():  # AutoRound's, in a folder named after the scheme
            out = next(out.glob("*/config.json")).parent
        run["bytes"] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        for text in texts:
            result = divergence(out, source, text, context=options.context, limit=options.limit)
            run.setdefault("texts", {})[Path(text).name] = {
                "divergences": result.chunk_means,
                "losses": result.perplexity.chunk_losses,
            }


def peer(
    name: str, seed: int, source: Path, out: Path, folder: Path, python: Path | None, options: argparse.Namespace
) -> list[object]:
    """The command by which another tool quantizes the same model on the same samples."""
    assert python is not None
    python = python.absolute()
    if source.is_file():
        model, tokenizer = load_model(source)
        source = folder / "dense"
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
    if name == MLX:
        arguments = ["--hf-path", source, "--mlx-path", out, "--quantize", "--q-bits", "4", "--q-group-size", "64"]
        return [python, "-m", "mlx_lm", "convert", *arguments]
    calibration = Calibration((options.calibration,), options.samples, options.sequence_length, seed)
    with quiet_transformers():
        samples = load_samples(calibration, load_tokenizer(source))
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps(samples.tokens.tolist()))
    script = Path(__file__).with_name("autoround_quantize.py" if name == AUTOROUND else "gptqmodel_quantize.py")
    return [python, script, source, tokens, out, *([folder / "report.json"] if name == GPTQMODEL else [])]


def timed(command: list[object], folder: Path) -> float:
    """Seconds that a command takes; `folder` is its working directory, since some tools write logs there."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": str(os.cpu_count())}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the CPU for all
    started = time.monotonic()
    words = [str(word) for word in command]
    process = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"{' '.join(words[:4])} failed:\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}")
    return time.monotonic() - started


def show(figures: Figures, markdown: Path | None) -> None:
    """One table per text; differences are from AutoRound, or of MLX's files from mlx-lm's."""
    heads = ["", "KL", "KL above the peer's", "perplexity", "loss above the peer's", "MB", "s"]
    rows: dict[str, list[Figures]] = {}
    for name, run in figures["runs"].items():
        rows.setdefault(name.rpartition(", seed ")[0], []).append(run)
    lines = [", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures["setting"].items()) + "."]
    for text in sorted({text for run in figures["runs"].values() for text in run["texts"]}):
        table = Table(*heads, title=text)
        lines += ["", f"{text}:", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        measured = {name: [run for run in each if text in run["texts"]] for name, each in rows.items()}
        for name, each in measured.items():
            if not each:
                continue
            other = measured.get(MLX if "mlx" in name else AUTOROUND, [])
            cells = [
                name if len(each) == 1 else f"{name} ({len(each)} seeds)",
                f"{fmean(chunks(each, text, 'divergences')):.4f}",
                above(each, other, text, "divergences"),
                f"{fmean(math.exp(fmean(run['texts'][text]['losses'])) for run in each):.2f}",
                above(each, other, text, "losses"),
                f"{each[0]['bytes'] / 1e6:.0f}",
                f"{each[0]['seconds']:.0f}",
            ]
            table.add_row(*cells)
            lines.append(f"| {' | '.join(cells)} |")
        Console(width=140).print(table)
    if markdown:
        markdown.write_text("\n".join(lines) + "\n")


def chunks(runs: list[Figures], text: str, figure: str) -> list[float]:
    """A figure of each chunk, mean over the seeds."""
    return [fmean(values) for values in zip(*(run["texts"][text][figure] for run in runs), strict=True)]


def above(runs: list[Figures], others: list[Figures], text: str, figure: str) -> str:
    """The paired difference of a figure, with its interval."""
    if not others or runs is others:
        return ""
    pairs = zip(chunks(runs, text, figure), chunks(others, text, figure), strict=True)
    difference = mean_estimate([ours - theirs for ours, theirs in pairs])
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


if __name__ == "__main__":
    main()
