"""Rows of a comparison as a table: in Markdown for cards, in HTML for the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rich.filesize import decimal

from hlwq.evaluate.speed import Speed
from hlwq.evaluate.statistics import Estimate
from hlwq.report.compare import Row
from hlwq.report.markdown import inline

HEADINGS = (
    "checkpoint",
    "recipe, format",
    "perplexity",
    "loss above base (95 %)",
    "KL (95 %)",
    "top-1 agreement",
    "HumanEval pass@1 (95 %)",
    "size",
    "bits per weight",
    "prefill, tokens/s (least to most)",
    "decode, tokens/s (least to most)",
    "peak memory",
    "engines",
)


def cells(row: Row) -> tuple[str, ...]:
    """Entries of a row under `HEADINGS`; empty where nothing was measured."""
    spread = f" ± {row.standard_error:.2f}" if row.standard_error is not None else ""
    loss = f"{_interval(row.loss_above_base, signed=True)}: {row.loss_verdict}" if row.loss_above_base else ""
    programs = f"{_interval(row.humaneval)} ({row.humaneval_how})" if row.humaneval else ""
    if row.humaneval_p is not None:
        programs += f": {row.humaneval_verdict} (McNemar p = {row.humaneval_p:.2g})"
    tail = f"; 99th percentile {row.kl_percentile_99:.3f}" if row.kl_percentile_99 is not None else ""
    return (
        row.name,
        ", ".join(filter(None, (row.recipe, row.format))),
        f"{row.perplexity:.3f}{spread}",
        loss,
        _interval(row.divergence) + tail,
        _interval(row.top1_agreement),
        programs,
        decimal(row.nbytes),
        f"{row.bits_per_weight:.3f}" if row.bits_per_weight else "16",
        "; ".join(f"{_spread(each.prefill)} ({each.engine})" for each in row.speeds),
        "; ".join(f"{_spread(each.decode)} ({each.engine})" for each in row.speeds),
        "; ".join(f"{_memory(each)} ({each.engine})" for each in row.speeds if each.peak_memory),
        ", ".join(row.engines),
    )


def markdown_table(rows: Sequence[Row]) -> str:
    """A Markdown table; columns that are empty throughout are left out."""
    headings, body = _filled(rows)
    lines = [headings, ["---"] * len(headings), *([inline(entry) for entry in line] for line in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def html_table(rows: Sequence[Row]) -> str:
    """An HTML table; columns that are empty throughout are left out."""
    headings, body = _filled(rows)
    head = "".join(f"<th>{escape(entry)}</th>" for entry in headings)
    lines = ["".join(f"<td>{escape(entry)}</td>" for entry in line) for line in body]
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table>"
    )


def _filled(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    body = [cells(row) for row in rows]
    used = [place for place in range(len(HEADINGS)) if any(line[place] for line in body)]
    return [HEADINGS[place] for place in used], [[line[place] for place in used] for line in body]


def _interval(estimate: Estimate | None, *, signed: bool = False) -> str:
    if estimate is None:
        return ""
    sign = "+" if signed else ""
    return f"{estimate.mean:{sign}.4f} [{estimate.low:{sign}.4f}, {estimate.high:{sign}.4f}], n = {estimate.n}"


def _memory(speed: Speed) -> str:
    device = f" + {decimal(speed.device_memory)} of the device's" if speed.device_memory else ""
    return f"{decimal(speed.peak_memory or 0)}{device}"


def _spread(values: tuple[float, float, float]) -> str:
    middle, least, most = values
    return f"{middle:.1f}" if least == most else f"{middle:.1f} ({least:.1f} to {most:.1f})"
