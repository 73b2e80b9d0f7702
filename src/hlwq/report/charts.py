"""Charts: loss by method, loss against size, speed and memory, layers. Legible in print and to the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from typing import Any

from hlwq.errors import ResourceError
from hlwq.evaluate.experts import HitRates
from hlwq.evaluate.statistics import Estimate
from hlwq.report.compare import Row

# Okabe and Ito's colours, which any kind of colour vision can tell apart, and in grey.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#7F7F7F"
LOOKS = [
    {"facecolor": BLUE},
    {"facecolor": ORANGE, "hatch": "//"},
    {"facecolor": "#56B4E9", "hatch": ".."},
    {"facecolor": GREY},
]
"""Styles of the engines' bars."""
LINES = {"lru": "s-", "lfu": "^-", "lfru": "o-", "belady": "--"}
"""Marks of policies, the bound without any."""


@dataclass(frozen=True)
class Chart:
    """One chart as SVG for pages, and as PNG for cards, since the hub shows no SVG."""

    svg: str
    png: bytes


def loss_chart(rows: Sequence[Row]) -> Chart:
    """Loss above the base with its interval, the best on top."""
    plt = _pyplot()
    compared = sorted(_compared(rows), key=lambda pair: -pair[1].mean)
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(compared) + 1.2))
    for place, (row, estimate) in enumerate(compared):
        error = [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]
        axes.errorbar(estimate.mean, place, xerr=error, fmt="o", color=BLUE, capsize=4)
        axes.annotate(
            f"{row.perplexity:.2f}",
            (estimate.high, place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=GREY,
            annotation_clip=False,
        )
    axes.set_yticks(range(len(compared)), [row.name for row, _ in compared])
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("loss above the unquantized model, nats per token (95 % paired interval); in grey: perplexity")
    axes.margins(x=0.12)
    return _drawn(figure)


def size_chart(rows: Sequence[Row]) -> Chart:
    """Loss above the base against bytes, with the Pareto front."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5))
    compared = _compared(rows)
    unit, unit_name = (1e9, "GB") if any(row.nbytes >= 1e9 for row, _ in compared) else (1e6, "MB")
    for row, estimate in compared:
        error = [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]
        axes.errorbar(row.nbytes / unit, estimate.mean, yerr=error, fmt="o", color=BLUE, capsize=3)
        place = (row.nbytes / unit, estimate.mean)
        axes.annotate(row.name, place, xytext=(6, 3), textcoords="offset points", fontsize=8)
    front = _compared(pareto_front(rows))
    sizes, losses = [row.nbytes / unit for row, _ in front], [estimate.mean for _, estimate in front]
    axes.step(sizes, losses, where="post", color=ORANGE, linestyle="--")
    axes.set_xlabel(f"size on disk, {unit_name}")
    axes.set_ylabel("loss above the unquantized model, nats per token")
    axes.margins(x=0.2)
    return _drawn(figure)


def speed_chart(rows: Sequence[Row]) -> Chart | None:
    """Decode speed with its spread over runs, and peak memory, by engine; None if neither was measured."""
    timed = [(row.name, each) for row in reversed(rows) for each in reversed(row.speeds)]
    if not timed:
        return None
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 0.35 * len(timed) + 1.2), sharey=True)
    engines = sorted({each.engine for _, each in timed})
    looks = dict(zip(engines, LOOKS * len(engines), strict=False))
    for place, (_, each) in enumerate(timed):
        middle, least, most = each.decode
        look: dict[str, Any] = {"edgecolor": "white", **looks[each.engine]}
        left.barh(place, middle, xerr=[[middle - least], [most - middle]], capsize=3, **look)
        right.barh(place, (each.peak_memory or 0) / 1e9, **look)
    left.set_yticks(range(len(timed)), [name for name, _ in timed])
    left.set_xlabel("decode, tokens/s (median; least to most)")
    right.set_xlabel("peak memory, GB")
    handles = [plt.Rectangle((0, 0), 1, 1, edgecolor="white", **looks[engine]) for engine in engines]
    figure.legend(handles, engines, loc="lower center", bbox_to_anchor=(0.5, 0.92), ncols=len(engines), frameon=False)
    return _drawn(figure)


def layer_chart(rows: Sequence[Row]) -> Chart | None:
    """The largest relative output error of each layer; None if no checkpoint records any."""
    recorded = [row for row in rows if row.layer_errors]
    if not recorded:
        return None
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.5))
    for row, style in zip(recorded, ("-", "--", ":", "-.") * len(recorded), strict=False):
        axes.plot(list(row.layer_errors), list(row.layer_errors.values()), style, marker=".", label=row.name)
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("largest relative output error")
    axes.legend(fontsize=8)
    return _drawn(figure)


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """The checkpoints for which no other is both smaller and closer to the base, by size."""
    front: list[tuple[Row, Estimate]] = []
    for row, estimate in sorted(_compared(rows), key=lambda pair: (pair[0].nbytes, pair[1].mean)):
        if not front or estimate.mean < front[-1][1].mean:
            front.append((row, estimate))
    return [row for row, _ in front]


def _compared(rows: Sequence[Row]) -> list[tuple[Row, Estimate]]:
    """All rows but the base's, with their losses above it."""
    return [(row, row.loss_above_base) for row in rows if row.loss_above_base]


def hit_rate_chart(rates: Sequence[HitRates]) -> Chart:
    """What caches of experts have there, by policy, against what they take."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.5))
    gigabytes = all(row.nbytes is not None for row in rates)
    places = [(row.nbytes or 0) / 1e9 if gigabytes else row.capacity for row in rates]
    for (name, looks), colour in zip(LINES.items(), (ORANGE, "#56B4E9", BLUE, GREY), strict=True):
        axes.plot(places, [100 * row.rates[name] for row in rates], looks, color=colour, label=name)
    axes.set_xlabel("cache of all layers, GB" if gigabytes else "experts of each layer that fit")
    axes.set_ylabel("uses that find their expert there, %")
    axes.legend(frameon=False)
    return _drawn(figure)


def check_charts() -> None:
    """Raise ResourceError if no charts can be drawn here."""
    _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ResourceError("Charts need matplotlib. Run: pip install 'hlwq[report]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False})
    return plt


def _drawn(figure: Any) -> Chart:
    import matplotlib.pyplot as plt

    svg, png = StringIO(), BytesIO()
    figure.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None})
    figure.savefig(png, format="png", bbox_inches="tight", dpi=160)
    plt.close(figure)
    return Chart(svg.getvalue()[svg.getvalue().index("<svg") :], png.getvalue())
