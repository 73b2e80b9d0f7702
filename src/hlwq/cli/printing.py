"""What commands print: lines and tables for people or JSON for machines, and progress."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from hlwq.calibration import Calibration
    from hlwq.evaluate.statistics import Estimate
    from hlwq.inspect import Inspection, TensorReport
    from hlwq.pipeline import QuantizeResult
    from hlwq.plan import Plan
    from hlwq.work import Progress as Report

# Where the width is unknown (a pipe, a log), tables get room for tensor names instead of 80 columns.
WIDTH = None if (sys.stdout and sys.stdout.isatty()) or "COLUMNS" in os.environ else 160
READABLE_WIDTH = 12
"""Letters that a column needs at least, if its cells are longer."""
LOG_SECONDS = 30
"""Time between two lines of progress in a log."""
SETTLING_SECONDS, LONG_SECONDS = 5, 60
"""Time after which the whole is estimated, and from which on the estimate is worth a line."""
console = Console(width=WIDTH)
messages = Console(stderr=True)


@dataclass(frozen=True)
class Cells:
    """A table.

    Attributes:
        heads: the names of its columns.
        rows: their cells.
        right: numbers of columns that are aligned to the right.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    right: Sequence[int] = ()


Line = str | Text | Cells


@dataclass(frozen=True)
class Output:
    """What a command prints, with arguments spelled as the library does.

    Attributes:
        value: for machines: made of dataclasses, dictionaries and lists.
        lines: for people.
        status: the exit status.
        afterwards: what is done when it has been printed, and cannot undo that.
    """

    value: Any
    lines: Sequence[Line]
    status: int = 0
    afterwards: Callable[[], None] = lambda: None

    def show(self, as_json: bool, spelled: Callable[[str], str]) -> None:
        """Print it, with every text spelled anew."""
        if as_json:
            ascii_only = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
            print(json.dumps(_plain(self.value, spelled), indent=2, ensure_ascii=ascii_only), flush=True)
            return
        for line in self.lines:
            if isinstance(line, Cells):
                _print_table(line, spelled)
            else:
                text = Text(spelled(line)) if isinstance(line, str) else line
                console.print(text, soft_wrap=True, highlight=False)


def prepare_streams() -> None:
    """Make standard output and errors usable, also if the shell closed them or they cannot print some characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - for as long as we run
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _print_table(cells: Cells, spelled: Callable[[str], str]) -> None:
    """Print a table, or where the terminal is too narrow for its columns, a line for each cell."""
    rows = [[Text(spelled(cell)) if isinstance(cell, str) else cell for cell in row] for row in cells.rows]
    columns = zip(*[[len(head) for head in cells.heads], *([len(cell) for cell in row] for row in rows)], strict=True)
    if sum(3 + min(max(column), READABLE_WIDTH) for column in columns) >= console.width:
        for row in rows:
            for head, cell in zip(cells.heads, row, strict=True):
                if cell.plain:
                    console.print(Text.assemble((f"{head}: " if head else "", "bold"), cell))
            console.print()
        return
    table = Table()
    for number, head in enumerate(cells.heads):
        # Names of tensors are read whole, however long.
        table.add_column(head, justify="right" if number in cells.right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


@contextmanager
def progress(title: str, shorter: str = "") -> Iterator[Report]:
    """Progress with the time left, on standard error: a bar on a terminal, a line every half minute in a log.

    Args:
        title: what is done.
        shorter: what would make it shorter, told with an estimate of the whole as soon as there is one.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[item]}", style="dim", markup=False),
    )
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as bar:
        task = bar.add_task(title, total=None, item="")
        started = last = time.monotonic()
        # When the work began that goes on now, after another phase, or after what an earlier run did.
        begun, begun_done, of, told = started, 0, 0, False

        def say(text: str) -> None:
            bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

        def report(done: int, total: int, item: str) -> None:
            nonlocal last, begun, begun_done, of, told
            now = time.monotonic()
            bar.update(task, completed=done, total=total, item=item)
            if total != of or "earlier run" in item:
                begun, begun_done, of = now, done, total
            since, progressed = now - begun, done - begun_done
            left = since * (total - done) / progressed if progressed > 0 else None
            if not told and left is not None and since > SETTLING_SECONDS:
                told = True
                if since + left > LONG_SECONDS:
                    say(f"{title}: about {_minutes(since + left)} in all. {shorter}".strip())
            if bar.disable and now - last > LOG_SECONDS:
                last = now
                remaining = f", about {left:.0f} s left" if left is not None else ""
                say(f"{title}: {100 * done / total:.0f} %, {now - started:.0f} s{remaining} ({item})")

        yield report


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def interval(estimate: Estimate) -> str:
    """An estimate in words: the mean, the ends of its interval and the number of observations."""
    return f"{estimate.mean:.4f} [{estimate.low:.4f}, {estimate.high:.4f}] (n = {estimate.n})"


def inspection_lines(inspection: Inspection, all_tensors: bool) -> list[Line]:
    """A row for each tensor, or one for the same tensor of all layers, and the totals."""
    rows: dict[tuple[str, str, str], list[TensorReport]] = {}
    for tensor in inspection.tensors:
        name = tensor.name if all_tensors else re.sub(r"\.(layers|blocks)\.\d+\.", r".\1.*.", tensor.name)
        stored = f"{tensor.bits} bits, group {tensor.group_size}" if tensor.bits else tensor.dtype
        key = (name.removesuffix(".weight"), "×".join(map(str, tensor.shape)), stored)
        rows.setdefault(key, []).append(tensor)
    cells = []
    for (name, shape, stored), tensors in rows.items():
        errors = [_range([tensor.relative_error for tensor in tensors]), _range([t.output_error for t in tensors])]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        cells.append([name, f"{len(tensors)} ×", shape, stored, f"{nbytes:,}", *errors])
    heads = ["tensor", "", "shape", "stored as", "bytes", "squared error", "output error"]
    bits = inspection.bits_per_quantized_weight
    return [
        Cells(heads, cells, right=(1, 4)),
        "Errors are relative: ‖W − Ŵ‖²/‖W‖², and ‖(W − Ŵ)X‖²/‖WX‖² on the calibration data.",
        f"format {inspection.format}{f', recipe {inspection.recipe}' if inspection.recipe else ''}: "
        f"{inspection.nbytes:,} bytes; "
        + (f"{bits:.3f} bits per quantized weight, " if bits else "nothing quantized, ")
        + f"{inspection.bits_per_parameter:.3f} bits per parameter",
    ]


def plan_output(plan: Plan, calibration: Calibration | None) -> Output:
    """What a plan does to each tensor, and what it costs."""
    summary = {**_plan_summary(plan), "peak_memory_estimate": plan.peak_memory(calibration)}
    tensors = [
        {
            "name": tensor.spec.name,
            "shape": tensor.spec.shape,
            "action": tensor.action,
            "reason": tensor.reason,
            "stages": [stage.record() for stage in tensor.stages],
            "outputs": tensor.outputs,
        }
        for tensor in plan.tensors
    ]
    # The same matrix of all layers is one row, and so is what is kept for one reason.
    rows: dict[tuple[str, str, str, str], list[int]] = {}
    for tensor in plan.tensors:
        how, name, shape = tensor.reason, "", ""
        if tensor.action == "quantize":
            how = " → ".join(stage.summary for stage in tensor.stages)
            name = re.sub(r"\.layers\.\d+\.", ".layers.*.", tensor.spec.name)
            shape = "×".join(map(str, tensor.spec.shape))
        written = sum(spec.nbytes for spec in tensor.outputs)
        rows.setdefault((tensor.action, how, name, shape), []).append(written)
    cells = [
        [action, str(len(nbytes)), how, name, shape, f"{sum(nbytes):,}"]
        for (action, how, name, shape), nbytes in sorted(rows.items(), key=lambda row: row[0][0] != "quantize")
    ]
    lines: list[Line] = [
        Cells(["action", "tensors", "how, or why not", "name", "shape", "bytes"], cells),
        f"{plan.layout.family.name}, recipe {plan.recipe.name}, format {plan.format.name}: "
        f"{plan.output_bytes():,} bytes on disk, {summary['bits_per_quantized_weight']:.3f} bits per quantized weight, "
        f"{summary['bits_per_parameter']:.3f} per parameter; "
        f"about {summary['peak_memory_estimate'] / 1e9:.1f} GB of memory",
        *(f"note: {line}" for line in plan.remarks),
        *(f"warning: {line}" for line in plan.warnings),
    ]
    return Output({**summary, "tensors": tensors}, lines)


def result_output(result: QuantizeResult) -> Output:
    """What was made, its largest errors and how to run it."""
    from hlwq.usage import commands

    summary = _plan_summary(result.plan)
    named = ("out", "device", "seconds", "peak_memory", "relative_errors", "output_errors", "checks")
    value = {**summary, "file_bytes": result.nbytes, **{name: getattr(result, name) for name in named}}
    lines: list[Line] = []
    if result.output_errors:
        lines += _layer_lines(result.output_errors)
    elif result.relative_errors:
        worst = sorted(result.relative_errors.items(), key=lambda item: -item[1])[:3]
        rows = [[module, f"{error:.4g}"] for module, error in worst]
        lines.append(Cells(["largest relative squared errors", ""], rows))
    lines += [f"note: {line}" for line in result.plan.remarks]
    for each in result.checks:
        if not each.passed:
            refusal = f"{each.engine} would not load it; it wants: {each.requirement}."
            lines.append(f"warning: {refusal} `hlwq check` says more.")
    per_weight = summary["bits_per_quantized_weight"]
    made = (
        f"{result.out}: format {result.plan.format.name}, {result.nbytes:,} bytes"
        + (f", {per_weight:.3f} bits per quantized weight" if per_weight else "")
        + f", {result.seconds:.1f} s on {result.device}"
        + (f", peak memory {result.peak_memory / 1e9:.2f} GB" if result.peak_memory else "")
    )
    lines.append(Text(made))  # a path may look like an argument
    refusing = {each.engine for each in result.checks if not each.passed}
    engines = commands(result.out, result.plan.format.name, without=refusing)
    lines += [Text(f"  {engine}: {command}") for engine, command in engines]  # pasted, so not spelled anew
    return Output(value, lines)


def _plan_summary(plan: Plan) -> dict[str, Any]:
    per_weight, per_parameter = plan.bits_per_weight()
    return {
        "family": plan.layout.family.name,
        "recipe": plan.recipe.name,
        "format": plan.format.name,
        "output_bytes": plan.output_bytes(),
        "bits_per_quantized_weight": per_weight,
        "bits_per_parameter": per_parameter,
        "remarks": [*plan.remarks, *plan.warnings],
    }


def _layer_lines(output_errors: dict[str, float]) -> list[Line]:
    """A row for each layer, that whose outputs changed most first."""
    layers: dict[str, dict[str, float]] = {}
    for module, error in output_errors.items():
        inside = re.search(r"layers\.(\d+)\.(.+)", module)
        layer, name = inside.groups() if inside else ("head", module)
        layers.setdefault(layer, {})[name] = error
    rows = []
    for layer, errors in sorted(layers.items(), key=lambda item: -max(item[1].values())):
        name, error = max(errors.items(), key=lambda item: item[1])
        rows.append([layer, f"{error:.2e}", name, f"{sum(errors.values()) / len(errors):.2e}"])
    return [
        Cells(["layer", "largest relative output error", "in", "mean over its matrices"], rows),
        "Relative output error: ‖(W − Ŵ) X‖² / ‖W X‖² on the calibration data.",
    ]


def _range(values: list[float | None]) -> str:
    """The least and the largest of some errors, where they are known."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{known[0]:.2g}" if len(known) == 1 else f"{min(known):.2g} … {max(known):.2g}"


def _plain(value: Any, spelled: Callable[[str], str]) -> Any:
    """JSON's form of a value: dataclasses become objects, and infinities null."""
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name), spelled) for each in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(each, spelled) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, spelled) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int) else spelled(str(value))
