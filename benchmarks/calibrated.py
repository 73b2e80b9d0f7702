"""Calibrated INT4: GPTQModel's FOEM and ours, on the same samples in one run; quality, time and memory as ratios.

    python benchmarks/calibrated.py MODEL --text wikitext-2-raw.test.txt --calibration FILE.txt \
        --gptqmodel .venvs/gptqmodel/bin/python

Each of the two quantizes in its own process; the time and the peak memory are those of the whole process, imports and
saving included. The perplexity of both checkpoints is that of `hlwq eval perplexity`, and their difference is paired
over the chunks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hlwq.calibration import Calibration, load_samples
from hlwq.evaluate import paired_difference, perplexity
from hlwq.sources import locate
from hlwq.transformers_models import load_tokenizer, quiet_transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, a hub id or a .gguf file")
    parser.add_argument("--text", required=True, help="text file measured on")
    parser.add_argument("--calibration", required=True, help="a .txt, .jsonl or .parquet file")
    parser.add_argument("--gptqmodel", required=True, help="Python interpreter of an environment with GPTQModel")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=8, help="chunks of 2048 tokens measured")
    parser.add_argument("--json", help="file that gets the figures as JSON")
    options = parser.parse_args()
    source = locate(options.model).absolute()
    options.calibration, options.gptqmodel = (
        str(Path(each).absolute()) for each in (options.calibration, options.gptqmodel)
    )
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(source, options, Path(folder))
    show(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2))


def measure(source: Path, options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    calibration = Calibration((options.calibration,), options.samples, options.sequence_length, options.seed)
    with quiet_transformers():
        samples = load_samples(calibration, load_tokenizer(source))
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps(samples.tokens.tolist()))
    script = Path(__file__).with_name("gptqmodel_quantize.py")
    theirs, ours, report = folder / "gptqmodel", folder / "hlwq-v7", folder / "report.json"
    their_seconds = run([options.gptqmodel, script, source, tokens, theirs, report], folder)
    their_memory = json.loads(report.read_text())["peak_memory"]
    arguments = ["quantize", source, ours, "--recipe", "hlwq-v7", "--calibration", options.calibration, "--json"]
    arguments += ["--samples", options.samples, "--sequence-length", options.sequence_length, "--seed", options.seed]
    our_seconds = run([sys.executable, "-m", "hlwq.cli", *arguments], folder, stdout=report)
    result = json.loads(report.read_text())
    made_with = json.loads((ours / "hlwq.json").read_text())["calibration"]["tokens_sha256"]
    assert made_with == samples.origin["tokens_sha256"], "the two checkpoints were not calibrated on the same samples"
    measured = {
        name: perplexity(directory, options.text, protocol="chunked", limit=options.limit)
        for name, directory in (("BF16", source), ("GPTQModel", theirs), ("hlwq-v7", ours))
    }
    mean, low, high = paired_difference(measured["GPTQModel"], measured["hlwq-v7"])
    return {
        "perplexity": {name: each.perplexity for name, each in measured.items()},
        "seconds": {"GPTQModel": their_seconds, "hlwq-v7": our_seconds},
        "peak_memory": {"GPTQModel": their_memory, "hlwq-v7": result["peak_memory"]},
        "loss_difference": {"mean": mean, "low": low, "high": high},
    }


def run(command: list[object], folder: Path, stdout: Path | None = None) -> float:
    """Seconds that a command takes; `folder` is its working directory, since GPTQModel writes logs there."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": str(os.cpu_count())}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # CPU for both: their peak memory is then one comparable figure
    started = time.monotonic()
    process = subprocess.run(
        [str(each) for each in command], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    if process.returncode:
        sys.exit(f"{command[0]} failed:\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}")
    if stdout is not None:
        stdout.write_text(process.stdout)
    return time.monotonic() - started


def show(figures: dict[str, dict[str, float]]) -> None:
    table = Table("", "BF16", "GPTQModel, FOEM", "hlwq-v7", "ours ÷ theirs")
    for name, unit, digits in (("perplexity", 1, 2), ("seconds", 1, 0), ("peak_memory", 1e9, 2)):
        row = figures[name]
        values = [f"{row[key] / unit:.{digits}f}" if key in row else "" for key in ("BF16", "GPTQModel", "hlwq-v7")]
        table.add_row(name.replace("_", " "), *values, f"{row['hlwq-v7'] / row['GPTQModel']:.3f}")
    Console().print(table)
    difference = figures["loss_difference"]
    print(
        f"loss of hlwq-v7 above GPTQModel's, nats per token, 95 %: {difference['mean']:+.4f} "
        f"[{difference['low']:+.4f}, {difference['high']:+.4f}]"
    )


if __name__ == "__main__":
    main()
