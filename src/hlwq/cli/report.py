"""Comparing checkpoints, and publishing them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.filesize import decimal

from hlwq.cli.evaluate import Limit, Protocol, Text
from hlwq.cli.options import Device, flag
from hlwq.cli.printing import Cells, Output, interval, progress
from hlwq.devices import usual_device
from hlwq.evaluate.perplexity import default_stride


def compare(
    directories: Annotated[list[Path], typer.Argument(help="Checkpoints made from one model.")],
    base: Annotated[str, flag("The model they were made from.")],
    text: Text,
    out: Annotated[Path, flag("Where the report is written.")] = Path("report"),
    protocol: Annotated[Protocol, flag("Of the perplexity.")] = "windowed",
    context: Annotated[int, flag("Tokens in a window or chunk.")] = 2048,
    limit: Limit = None,
    humaneval: Annotated[
        Literal["chat", "completion"] | None, flag("Measure HumanEval too: chat or completion.")
    ] = None,
    no_speed: Annotated[bool, flag("Leave speed and memory out.", "--no-speed")] = False,
    device: Device = None,
) -> Output:
    """Measure checkpoints of one model and set them side by side: tables, charts and a page."""
    from hlwq.report.charts import check_charts
    from hlwq.report.compare import Protocols, compare
    from hlwq.report.page import write_report

    protocols = Protocols(
        text=text,
        protocol=protocol,
        context=context,
        stride=default_stride(context),
        limit=limit,
        humaneval=humaneval,
        speed=not no_speed,
        device=device or usual_device(),
    )
    check_charts()  # before hours of measuring
    with progress("comparing", "--limit and --no-speed make it shorter.") as report:
        rows = compare(directories, base, protocols, report)
    files = write_report(rows, protocols, Path(base).name, out)
    cells = [
        [
            row.name,
            f"{row.perplexity:.3f}",
            "" if row.loss_above_base is None else interval(row.loss_above_base),
            row.loss_verdict or "",
            decimal(row.nbytes),
            f"{row.bits_per_weight:.3f}" if row.bits_per_weight else "16",
        ]
        for row in rows
    ]
    heads = ["checkpoint", "perplexity", "loss above base (95 %)", "", "size", "bits/weight"]
    return Output(rows, [Cells(heads, cells), f"{files[0]}: open it in a browser"])


def card(
    directory: Annotated[Path, typer.Argument(help="A checkpoint that `hlwq quantize` made.")],
    repository: Annotated[str | None, flag("The hub id it will have.")] = None,
    base_model: Annotated[
        str | None, flag("Hub id of the model that was quantized, where it was not taken from the hub.")
    ] = None,
    report: Annotated[Path | None, flag("What `hlwq compare` wrote: its table and charts go into the card.")] = None,
    overwrite: Annotated[bool, flag("Replace a README.md that is there.", "--overwrite")] = False,
) -> Output:
    """Write a model card into a checkpoint, with what has been measured of it."""
    from hlwq.report.card import write_card

    file = write_card(directory, repository, base_model=base_model, report=report, overwrite=overwrite)
    return Output({"file": file}, [str(file)])


def push(
    directory: Annotated[Path, typer.Argument(help="A checkpoint with a model card.")],
    repository: Annotated[str, typer.Argument(help="The hub id, such as me/Qwen3.5-9B-INT4.")],
    private: Annotated[bool, flag("Make the repository private.", "--private")] = False,
    dry_run: Annotated[bool, flag("List what would be uploaded; upload nothing.", "--dry-run")] = False,
) -> Output:
    """Check a checkpoint and upload what belongs to it to the hub."""
    from hlwq.report.push import prepare_push, send

    with progress("checking") as report:
        upload = prepare_push(directory, repository, progress=report)
    files = upload.sizes()
    total = sum(files.values())
    lines = [f"{nbytes:>15,}  {name}" for name, nbytes in files.items()]
    lines.append(f"{total:>15,}  in all, to {repository}")
    if upload.staying:
        lines.append(f"not sent: {', '.join(upload.staying)}")
    value = {"repository": repository, "files": files, "bytes": total, "not_sent": list(upload.staying)}
    if dry_run:
        return Output(value, lines)
    url = send(upload, repository, private=private)
    return Output({**value, "url": url}, [*lines, url])
