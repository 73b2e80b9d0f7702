"""What there is: the bundled model's demonstration, and lists of families, recipes and formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from hlwq.cli.printing import Cells, Line, Output, progress


def demo(
    out: Annotated[Path, typer.Argument(help="Where the checkpoints are left.")] = Path("hlwq-demo"),
) -> Output:
    """Quantize the bundled model with each recipe into each format, and measure them all."""
    from hlwq.check import check_directory
    from hlwq.demo import BASELINE, run_demo
    from hlwq.usage import commands

    with progress("demo") as report:
        rows = run_demo(out, report)
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


def models() -> Output:
    """List the supported model families."""
    from hlwq.families import FAMILIES

    rows = [{"family": family.name, "architectures": list(family.architectures)} for family in FAMILIES]
    return _list(rows)


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
