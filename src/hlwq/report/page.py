"""The report: tables, charts, and one page that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from hlwq.report.charts import layer_chart, loss_chart, size_chart, speed_chart
from hlwq.report.compare import Protocols, Row, save_rows
from hlwq.report.tables import html_table, markdown_table
from hlwq.version import __version__

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .6rem; text-align: left; vertical-align: top; }
th { background: #f3f3f3; }
figure { margin: 2rem 0; }
svg { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 13px; }
"""


def write_report(rows: Sequence[Row], protocols: Protocols, base: str, out: Path) -> list[Path]:
    """Write `report.html` (self-contained), `table.md`, `rows.json`, and the charts as SVG and PNG.

    Args:
        rows: the base first, then the checkpoints.
        protocols: the protocols of their measurements.
        base: name of the base.
        out: the directory; made if need be.

    Returns:
        The files written.

    Raises:
        ResourceError: matplotlib is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    charts = {
        "loss": (loss_chart(rows), "Loss above the unquantized model. Intervals that touch 0 say nothing."),
        "size": (size_chart(rows), "Quality against size; the dashed line joins those that no other beats in both."),
        "speed": (speed_chart(rows), "Speed and memory, batch 1, in engines that run the format as it is stored."),
        "layers": (layer_chart(rows), "Where calibrated checkpoints change their layers' outputs most."),
    }
    drawn = {name: (chart, caption) for name, (chart, caption) in charts.items() if chart}
    figures = "".join(
        f"<figure>{chart.svg}<figcaption>{escape(caption)}</figcaption></figure>" for chart, caption in drawn.values()
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Quantizations of {escape(base)}</title><style>{STYLE}</style>"
        f"<h1>Quantizations of {escape(base)}</h1><div class=wide>{html_table(rows)}</div>"
        f"<p class=note>{escape(describe_protocols(protocols, rows))}</p>{figures}"
        f"<p class=note>Made by hlwq {__version__}.</p></html>\n"
    )
    for picture in (*out.glob("*.png"), *out.glob("*.svg")):  # of an earlier run
        if picture.stem in charts:
            picture.unlink()
    files = {"report.html": page, "table.md": f"{markdown_table(rows)}\n{describe_protocols(protocols, rows)}\n"}
    files |= {f"{name}.svg": chart.svg for name, (chart, _) in drawn.items()}
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    for name, (chart, _) in drawn.items():
        (out / f"{name}.png").write_bytes(chart.png)
    save_rows(rows, out / "rows.json")
    return [out / name for name in (*files, *(f"{name}.png" for name in drawn), "rows.json")]


def describe_protocols(protocols: Protocols, rows: Sequence[Row]) -> str:
    """The protocols of the numbers in a few sentences."""
    stride = f", stride {protocols.stride}" if protocols.protocol == "windowed" else ""
    compared = next((row.loss_above_base for row in rows if row.loss_above_base), None)
    count = f" of {compared.n} chunks" if compared else ""
    text = (
        f"Perplexity on {protocols.text.name}, protocol {protocols.protocol}, context {protocols.context}{stride}, ± "
        f"its standard error over chunks; losses and divergences in nats per token with 95 % intervals{count}, paired "
        "with the unquantized model's. Weights rounded to bfloat16, run by transformers."
    )
    if any(row.humaneval for row in rows):
        text += " HumanEval: greedy, Wilson intervals; McNemar's exact test against the unquantized model's programs."
    speeds = [each for row in rows for each in row.speeds]
    if speeds:
        text += f" Speeds: batch 1, {speeds[0].prompt_tokens} prompt and {speeds[0].new_tokens} new tokens, median of "
        text += f"{speeds[0].runs} runs; memory: of the process, or of the server's."
    return text
