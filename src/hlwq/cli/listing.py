"""What there is: the bundled model's demonstration, and lists of families, recipes and formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from hlwq.cli.printing import Cells, Line, Output, progress
from hlwq.errors import RequestError


def demo(
    out: Annotated[Path, typer.Argument(help="Where the checkpoints are left.")] = Path("hlwq-demo"),
    model: Annotated[str | None, typer.Option(help="Another small model.", show_default="the bundled one")] = None,
) -> Output:
    """Quantize a small model with each recipe into each format, and measure them all."""
    from hlwq.check import check_directory
    from hlwq.demo import BASELINE, run_demo
    from hlwq.usage import commands

    with progress("demo") as report:
        rows = run_demo(out, report, model)
    columns = "recipe", "format", "perplexity", "loss above BF16 (95 %)", "rel. squared error", "bits/weight", "bytes"
    cells = [
        [
            row.recipe,
            row.format,
            f"{row.perplexity:.3f} ± {row.standard_error:.3f}",
            "" if row.difference is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row.difference),
            "" if row.relative_error is None else f"{row.relative_error:.5f}",
            "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}",
            f"{row.nbytes:,}",
        ]
        for row in rows
    ]
    lines: list[Line] = [
        Cells(columns, cells),
        f"Perplexity on held-out text: {rows[0].tokens:,} tokens, protocol {rows[0].protocol}, "
        f"context {rows[0].context}; ± is the standard error over chunks.",
        "Loss above BF16: nats per token, paired over the same chunks. "
        "Bits per weight: quantized matrices, all overhead.",
        "\nTo run them:",
    ]
    for row in rows:
        if row.recipe != BASELINE:
            directory = Path(row.directory)
            refusing = {each.engine for each in check_directory(directory) if not each.passed}
            for engine, command in commands(directory, row.format, without=refusing):
                lines.append(Text.assemble("  ", (f"{engine:>12}", "dim"), f"  {command}"))
    return Output(rows, lines)


def models(
    source: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A directory, a hub id or a .gguf file.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of the hub.")] = None,
) -> Output:
    """List the models that hlwq is tested with, or say what would become of one, of whose weights none are read."""
    from hlwq.models import TESTED, engine_versions, outlook, supported_models

    if source is not None:
        return _outlook(outlook(source, revision))
    if revision is not None:
        raise RequestError("`revision` changes nothing where no model is named.", argument="revision")
    rows, cells, reasons = [], [], []
    engines = list(engine_versions())
    for each in supported_models():
        rows.append({"family": each.family, "architecture": each.architecture, "engines": each.engines})
        tested = [place for place, cell in each.engines.items() if cell == TESTED]
        formats = {engine: [p.partition(", ")[2] for p in tested if p.startswith(f"{engine},")] for engine in engines}
        cells.append([each.family, each.architecture, *(", ".join(formats[engine]) for engine in engines)])
        reasons += [f"{each.architecture}, {p}: {cell}" for p, cell in each.engines.items() if cell != TESTED]
    versions = ", ".join(f"{engine} {version}" for engine, version in engine_versions().items())
    lines: list[Line] = [
        Cells(("family", "architecture", *engines), cells),
        f"Formats in which a small model of each kind was loaded and found to compute what its codes say: {versions}.",
        *reasons,
        "Other decoders that transformers knows are quantized as it describes them.",
    ]
    return Output(rows, lines)


def _outlook(outlooks: list[Any]) -> Output:
    """A row for each format, and what should be known of it."""
    cells, lines = [], []
    for each in outlooks:
        size = "" if each.nbytes is None else f"{each.nbytes / 1e9:.2f}"
        engines = ", ".join(f"{engine} ({cell})" for engine, cell in each.engines.items())
        cells.append([each.format, size, engines or ("" if each.refusal else "not tested")])
        lines += [f"{each.format}: {line}" for line in (each.refusal, *each.remarks) if line]
    return Output(outlooks, [Cells(("format", "GB, rounded to nearest", "engines"), cells), *dict.fromkeys(lines)])


def recipes() -> Output:
    """List the recipes."""
    from hlwq.recipes import RECIPES

    rows = [
        {"recipe": recipe.name, "what it does": recipe.summary, "formats (usual first)": list(recipe.formats)}
        for recipe in RECIPES.values()
    ]
    return _list(rows)


def formats() -> Output:
    """List the formats: engine × format × bits × symmetry."""
    from hlwq.formats import READABLE_FORMATS

    rows = [
        {"engine": engine.name, "format": each.name, "bits": list(engine.bits), "symmetry": engine.symmetry}
        for each in READABLE_FORMATS.values()
        for engine in each.engines
    ]
    return _list(rows)


def _list(rows: list[dict[str, Any]]) -> Output:
    """Rows with the same keys, which head the columns."""
    values = [[value if isinstance(value, list) else [value] for value in row.values()] for row in rows]
    return Output(rows, [Cells(list(rows[0]), [[", ".join(map(str, value)) for value in row] for row in values])])
