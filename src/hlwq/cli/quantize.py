"""Making quantized directories, and looking into them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from hlwq.bases import BASES
from hlwq.calibration import Calibration
from hlwq.cli.options import flag, flags_of, one_of, parameter, with_flags
from hlwq.cli.printing import Cells, Output, inspection_lines, plan_output, progress, result_output
from hlwq.grids import UniformGrid
from hlwq.options import Option
from hlwq.recipes import PARTS
from hlwq.request import Request, Selection

STAGE_PARTS = [kind for table in PARTS.values() for kind in table.values()]
BASIS = Option(f"Coordinates to round in: {' or '.join(BASES)}.")
BITS = Option("Bits of a code in the file. A fraction is a mean of what matrices get.")
CALIBRATE = Option("Calibrate a recipe that rounds to nearest: GPTQ's loop with GPTAQ.")
QUANTIZE_FLAGS = {
    **flags_of(Request, *STAGE_PARTS),
    "bits": parameter("bits", float, BITS),
    "basis": parameter("basis", one_of(BASES), BASIS),
    **flags_of(Selection),
    "calibrate": parameter("calibrate", bool, CALIBRATE),
    **flags_of(Calibration),
}
CONVERT_FLAGS = {**flags_of(UniformGrid), **{name: QUANTIZE_FLAGS[name] for name in ("exclude", "device")}}

Out = Annotated[Path, typer.Argument(help="The directory to make.")]
Directory = Annotated[Path, typer.Argument(help="A model directory of any format.")]


@with_flags(QUANTIZE_FLAGS)
def quantize(
    source: Annotated[str, typer.Argument(help="A model directory, a hub id, or a .gguf file.")],
    out: Out,
    *,
    dry_run: Annotated[bool, flag("Print the plan and its cost; write nothing.", "--dry-run")] = False,
    **options: Any,
) -> Output:
    """Quantize a model into a new directory."""
    from hlwq.quantize import plan_for, run_request

    request = Request.of(source, **options)
    if dry_run:
        _, plan = plan_for(request)
        return plan_output(plan, request.calibration)
    shorter = (
        "Fewer --samples make it shorter; --recipe rtn takes seconds." if request.changed_recipe().calibrated else ""
    )
    with progress("quantizing", shorter) as report:
        result = run_request(request, out, report)
    return result_output(result)


@with_flags(CONVERT_FLAGS)
def convert(
    directory: Annotated[Path, typer.Argument(help="A quantized directory.")],
    out: Out,
    format: Annotated[str, flag("What to write: gptq, mlx, compressed-tensors, dense.")],
    **options: Any,
) -> Output:
    """Turn an HLWQ checkpoint, or an older PolarQuant one, into another format, without the model it was made from."""
    from hlwq.quantize import convert

    with progress("converting") as report:
        result = convert(directory, out, format, progress=report, **options)
    return result_output(result)


def inspect(
    directory: Directory,
    against: Annotated[str | None, flag("The source it was made from: measures the errors anew.")] = None,
    all_tensors: Annotated[
        bool, flag("A row for each tensor, instead of one for the same tensor of all layers.", "--all")
    ] = False,
) -> Output:
    """Show what a directory holds, tensor by tensor and in all."""
    from hlwq.inspect import inspect

    with progress("reading") as report:
        inspection = inspect(directory, against, progress=report)
    return Output(inspection, inspection_lines(inspection, all_tensors))


def check(directory: Directory) -> Output:
    """Check what each engine demands of a directory. Exit status 1 if no engine would load it."""
    from hlwq.check import check_directory

    with progress("checking") as report:
        demands = check_directory(directory, report)
    verdicts = {True: Text("pass", "green"), False: Text("fail", "red")}
    rows: list[list[str | Text]] = [
        [each.engine, each.requirement, verdicts[each.passed], f"{each.detail} {each.remedy}".strip()]
        for each in demands
    ]
    failing = {each.engine for each in demands if not each.passed}
    status = 1 if failing == {each.engine for each in demands} else 0
    return Output(demands, [Cells(["engine", "demand", "", "what to do"], rows)], status)
