"""The three charts: loss by method, loss against size, speed and memory. Readable in print and by the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Any

from hlwq.errors import HlwqError
from hlwq.report.compare import BASE, Row

# Okabe and Ito's colours, which are told apart with any kind of colour vision and in grey.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#7F7F7F"


def loss_chart(rows: Sequence[Row]) -> str:
    """Loss above the base with its interval, the best first; an SVG."""
    plt = _pyplot()
    compared = sorted((row for row in rows if row.loss_above_base), key=lambda row: -_mean(row))
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(compared) + 1.2))
    for place, row in enumerate(compared):
        estimate = row.loss_above_base
        assert estimate is not None
        error = [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]
        axes.errorbar(estimate.mean, place, xerr=error, fmt="o", color=BLUE, capsize=4)
        axes.annotate(
            f"  {row.perplexity:.2f}",
            (estimate.high, place),
            va="center",
            fontsize=8,
            color=GREY,
            annotation_clip=False,
        )
    axes.set_yticks(range(len(compared)), [row.name for row in compared])
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("loss above the unquantized model, nats per token (95 % paired interval); in grey: perplexity")
    axes.margins(x=0.12)
    return _svg(figure)


def size_chart(rows: Sequence[Row]) -> str:
    """Loss above the base against bytes, with the front of those that no other beats in both; an SVG."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5))
    compared = [row for row in rows if row.loss_above_base]
    for row in compared:
        estimate = row.loss_above_base
        assert estimate is not None
        error = [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]
        axes.errorbar(row.nbytes / 1e9, estimate.mean, yerr=error, fmt="o", color=BLUE, capsize=3)
        axes.annotate(f" {row.name}", (row.nbytes / 1e9, estimate.mean), fontsize=8, va="bottom")
    front = pareto_front(compared)
    axes.step(
        [row.nbytes / 1e9 for row in front], [_mean(row) for row in front], where="post", color=ORANGE, linestyle="--"
    )
    axes.set_xlabel("size on disk, GB")
    axes.set_ylabel("loss above the unquantized model, nats per token")
    axes.margins(x=0.2)
    return _svg(figure)


def speed_chart(rows: Sequence[Row]) -> str | None:
    """Decode speed with its spread over runs, and peak memory; an SVG, or None if neither was measured."""
    timed = [row for row in rows if row.decode and row.peak_memory]
    if not timed:
        return None
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 0.4 * len(timed) + 1.2), sharey=True)
    for place, row in enumerate(reversed(timed)):
        assert row.decode is not None
        assert row.peak_memory is not None
        middle, least, most = row.decode
        left.barh(place, middle, color=BLUE, xerr=[[middle - least], [most - middle]], capsize=3)
        right.barh(place, row.peak_memory / 1e9, color=ORANGE, hatch="//", edgecolor="white")
    left.set_yticks(range(len(timed)), [row.name for row in reversed(timed)])
    left.set_xlabel("decode, tokens/s (median; least to most)")
    right.set_xlabel("peak memory, GB")
    figure.suptitle("in transformers, weights decoded to bfloat16", fontsize=9)
    return _svg(figure)


def layer_chart(rows: Sequence[Row]) -> str | None:
    """The largest relative output error of each layer; an SVG, or None if no checkpoint records any."""
    recorded = [row for row in rows if row.layer_errors]
    if not recorded:
        return None
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.5))
    for row, style in zip(recorded, ("-", "--", ":", "-.") * len(recorded), strict=False):
        axes.plot(range(len(row.layer_errors)), row.layer_errors, style, marker=".", label=row.name)
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("largest relative output error")
    axes.legend(fontsize=8)
    return _svg(figure)


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """The checkpoints for which no other is both smaller and closer to the base, by size."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.nbytes, _mean(row))):
        if row.name != BASE and (not front or _mean(row) < _mean(front[-1])):
            front.append(row)
    return front


def _mean(row: Row) -> float:
    assert row.loss_above_base is not None
    return row.loss_above_base.mean


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise HlwqError("Charts need matplotlib. Run: pip install 'hlwq[report]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False})
    return plt


def _svg(figure: Any) -> str:
    import matplotlib.pyplot as plt

    stream = StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return stream.getvalue()[stream.getvalue().index("<svg") :]
