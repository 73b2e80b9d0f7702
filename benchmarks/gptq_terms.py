"""GPTQ's loop with and without its terms, in columns as they are and rotated, and calibrated HLWQ, over several seeds.

    python benchmarks/gptq_terms.py MODEL --text wikitext-2-raw.test.txt --calibration FILE.txt --json terms.json

Perplexities are means over the seeds. The difference from plain GPTQ is paired over the seeds and has a 95 % interval
of Student's t. A seed selects the calibration samples, so the interval shows whether the difference exceeds the effect
of that selection.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.special import stdtrit

import hlwq

INT4: dict[str, Any] = {"recipe": "gptq", "group_size": 64}
ROTATED: dict[str, Any] = {**INT4, "format": "compressed-tensors", "basis": "hadamard"}
HLWQ: dict[str, Any] = {"recipe": "hlwq", "calibrate": True, "include_embeddings": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "GPTQ": INT4,
    "FOEM, β 0.2 (hlwq-v7)": {**INT4, "foem_beta": 0.2},
    "GPTAQ, α 0.25": {**INT4, "gptaq_alpha": 0.25},
    "FOEM and GPTAQ": {**INT4, "foem_beta": 0.2, "gptaq_alpha": 0.25},
    "mismatch 0.5": {**INT4, "mismatch": 0.5},
    "rotated": ROTATED,
    "rotated, GPTAQ, α 0.25": {**ROTATED, "gptaq_alpha": 0.25},
    "rotated, mismatch 0.5": {**ROTATED, "mismatch": 0.5},
    "calibrated HLWQ, 4 bits, without GPTAQ": {**HLWQ, "bits": 4, "gptaq_alpha": 0.0},
    "calibrated HLWQ, 4 bits": {**HLWQ, "bits": 4},
    "calibrated HLWQ, 5 bits, without GPTAQ": {**HLWQ, "bits": 5, "gptaq_alpha": 0.0},
    "calibrated HLWQ, 5 bits": {**HLWQ, "bits": 5},
}
BASELINE = "GPTQ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, a hub id or a .gguf file")
    parser.add_argument("--text", required=True, help="text file measured on")
    parser.add_argument("--calibration", required=True, help="a .txt, .jsonl or .parquet file, or `embedded`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=8, help="number of chunks measured")
    parser.add_argument("--json", type=Path, required=True, help="file of figures; those in it are not measured again")
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error("an interval needs at least two --seeds")
    setting = {key: value for key, value in vars(options).items() if key not in ("seeds", "json")}
    figures: dict[str, Any] = {"setting": setting, "runs": {}}
    if options.json.is_file():
        figures = json.loads(options.json.read_text())
        if figures["setting"] != setting:
            parser.error(f"{options.json} was measured with {figures['setting']}, not {setting}")
    runs = figures["runs"]
    work = [(name, seed) for seed in options.seeds for name in VARIANTS if f"{name}, seed {seed}" not in runs]
    for name, seed in track(work, "measuring", console=Console(stderr=True)):
        runs[f"{name}, seed {seed}"] = measure(VARIANTS[name], seed, options)
        options.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False))
    show({name: [runs[f"{name}, seed {seed}"] for seed in options.seeds] for name in VARIANTS})


def measure(variant: dict[str, Any], seed: int, options: argparse.Namespace) -> dict[str, float]:
    calibration = hlwq.Calibration((options.calibration,), options.samples, options.sequence_length, seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        hlwq.quantize(options.model, out, calibration=calibration, **variant)
        measured = hlwq.evaluate.perplexity(
            out, options.text, protocol="chunked", context=options.context, limit=options.limit
        )
        bits = hlwq.inspect(out).bits_per_quantized_weight
    assert bits is not None
    return {"loss": math.log(measured.perplexity), "bits": bits}


def show(rows: dict[str, list[dict[str, float]]]) -> None:
    table = Table("", "bits per weight", "perplexity", "per seed", "loss above GPTQ (95 %)")
    for name, runs in rows.items():
        losses = [run["loss"] for run in runs]
        difference = ""
        if name != BASELINE:
            pairs = [loss - other["loss"] for loss, other in zip(losses, rows[BASELINE], strict=True)]
            margin = stdtrit(len(pairs) - 1, 0.975) * stdev(pairs) / math.sqrt(len(pairs))
            difference = f"{fmean(pairs):+.4f} ± {margin:.4f}"
        table.add_row(
            name,
            f"{runs[0]['bits']:.3f}",
            f"{fmean(math.exp(loss) for loss in losses):.2f}",
            ", ".join(f"{math.exp(loss):.2f}" for loss in losses),
            difference,
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
