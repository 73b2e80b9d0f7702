"""The main job on a small model: every recipe, every format, every number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hlwq.calibration import EMBEDDED, Calibration
from hlwq.errors import RequestError
from hlwq.evaluate.perplexity import Perplexity, paired_difference, perplexity
from hlwq.inspect import inspect
from hlwq.manifest import read_manifest
from hlwq.provenance import origin_of
from hlwq.quantize import quantize
from hlwq.recipes import RECIPES
from hlwq.sources import locate

BASELINE = "(unquantized)"
CONTEXT = 512
"""Tokens per chunk: what the bundled model was trained with."""
CHUNKS = 64
CALIBRATION = Calibration((EMBEDDED,), samples=64, sequence_length=CONTEXT, generated_samples=0)
"""Without samples that the model writes, which would double the time that this takes."""
JOBS = [
    (recipe, format_name, calibrate)
    for recipe in RECIPES.values()
    for calibrate in ((False, True) if recipe.name == "hlwq" else (False,))
    for format_name in recipe.formats
    if format_name not in ("dense", "compressed-tensors") or format_name in recipe.stages_in
]
"""Recipe, format, and whether a recipe that rounds to nearest is calibrated.

Formats dense and compressed-tensors would repeat the others, but where a recipe has stages of its own for them.
"""


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table; see `Perplexity` and `Inspection` for the numbers."""

    recipe: str
    format: str
    directory: str
    protocol: str
    context: int
    tokens: int
    perplexity: float
    standard_error: float | None
    difference: tuple[float, float, float] | None
    relative_error: float | None
    bits_per_weight: float | None
    nbytes: int


def bundled_model() -> Path:
    """The directory of the small Qwen3.5 hybrid that comes with the package."""
    return Path(str(files("hlwq") / "bundled" / "model"))


def held_out_text() -> Path:
    """Text like that which the bundled model was trained on, but not shown to it."""
    return Path(str(files("hlwq") / "bundled" / "held_out.txt"))


def run_demo(out: Path, progress: Callable[[int, int, str], None], source: str | Path | None = None) -> list[DemoRow]:
    """Quantize a small model with each recipe into each of its formats but two, and measure each result.

    Dense ones and those of compressed-tensors would measure the same. Calibrated ones use the reference documentation
    of Python.

    Args:
        out: where the directories are left, one for each. Those already there are measured as they are.
        progress: told how far the work is.
        source: the model; the bundled one unless given. See `hlwq.quantize`.

    Returns:
        One row for the unquantized model, then one for each recipe and format.

    Raises:
        RequestError: a directory there was made from another model.
        HlwqError: the disk is full, a directory there cannot be read, or the model cannot be quantized.
    """
    model = bundled_model() if source is None else locate(source)
    origin = origin_of(source or model, model)
    jobs = []
    for recipe, format_name, calibrate in JOBS:
        label = f"{recipe.name} --calibrate" if calibrate else recipe.name
        directory = out / f"{label.replace(' --', '-')}-{format_name}"
        _refuse_another(directory, origin)
        jobs.append((label, recipe, format_name, calibrate, directory))
    total = len(jobs) + 1
    progress(0, total, BASELINE)
    base = _measure(model)
    rows = [_row(BASELINE, "dense", model, None, base)]
    for done, (label, recipe, format_name, calibrate, directory) in enumerate(jobs, 1):
        progress(done, total, f"{label} → {format_name}")
        if not directory.exists():
            calibration = CALIBRATION if calibrate or recipe.calibrated else None
            quantize(model, directory, recipe, format=format_name, calibrate=calibrate or None, calibration=calibration)
        rows.append(_row(label, format_name, directory, model, _measure(directory), base))
    progress(total, total, "done")
    return rows


def _refuse_another(directory: Path, origin: dict[str, Any]) -> None:
    """Raise RequestError if a directory is there, and is of another model."""
    if not directory.exists():
        return
    found = (read_manifest(directory) or {"origin": {}})["origin"]
    if any(found.get(key) != origin[key] for key in ("source", "revision")):
        what = found.get("source") or "something else"
        raise RequestError(f"{directory} was made from {what}. Name another folder.", argument="out")


def _measure(directory: Path) -> Perplexity:
    return perplexity(directory, held_out_text(), protocol="chunked", context=CONTEXT, limit=CHUNKS)


def _row(
    recipe: str,
    format_name: str,
    directory: Path,
    model: Path | None,
    measured: Perplexity,
    base: Perplexity | None = None,
) -> DemoRow:
    inspection = inspect(directory, model)
    errors = [
        (tensor.relative_error, tensor.shape[0] * tensor.shape[1])
        for tensor in inspection.tensors
        if tensor.relative_error
    ]
    weights = sum(count for _, count in errors)
    return DemoRow(
        recipe=recipe,
        format=format_name,
        directory=str(directory),
        protocol=measured.protocol,
        context=measured.context,
        tokens=measured.tokens,
        perplexity=measured.perplexity,
        standard_error=measured.standard_error,
        difference=paired_difference(base, measured) if base else None,
        relative_error=sum(error * count for error, count in errors if error) / weights if weights else None,
        bits_per_weight=inspection.bits_per_quantized_weight,
        nbytes=inspection.nbytes,
    )
