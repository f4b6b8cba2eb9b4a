"""Results of a sweep as text, as JSON and as a plot."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from matryoshka.retrieval.sweep import Measured, highest_bound, queries_needed

LOWEST_HINT = 0.5  # a lower target is not worth a hint
COLOURS = {"scan": "#2a6fbb", "ivf": "#d1662a", "binary": "#3c8f5a", "hnsw": "#8a56a8"}


def finite(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None


# ---------------------------------------------------------------- text


def frontier_table(
    best: Sequence[Measured], chosen: Measured | None, *, exact_rate: float, rows: int
) -> str:
    """The frontier, with the certified search if it is not part of it, fastest first."""
    shown = list(best)
    if chosen is not None and all(m is not chosen for m in best):
        shown.append(chosen)
    shown.sort(key=lambda m: -m.speed)
    lines = [
        "",
        f"The frontier: no other setting is faster and finds more (batch {best[0].batch})",
        f"{'setting':52} {'recall':>7} {'at least':>8} {'queries/s':>10} {'x exact':>8} "
        f"{'MFLOPs':>9}",
    ]
    for m in shown:
        lines.append(
            f"{m.params!s:52} {m.recall.mean:7.4f} {m.recall.lower:8.4f} {m.speed:10,.0f} "
            f"{m.speed / exact_rate:8,.1f} {m.params.mflops(rows):9,.2f}"
            + ("  <- certified" if m is chosen else "")
        )
    return "\n".join([*lines, ""])


def outlook(*, target: float, tried: int, queries: int, available: int) -> str:
    """What `queries` of the `available` queries can certify, in one line, before the sweep runs."""
    bound = highest_bound(queries, tried)
    if target == 1:
        return f"certify  no number of queries certifies recall 1; {queries:,} reach {bound:.4f}"
    needed = queries_needed(target, tried)
    text = f"certify  recall {target} needs {needed:,} queries or more for {tried} settings; "
    if needed <= queries:
        return f"{text}measured: {queries:,}"
    remedy = f"--truth {needed}"
    if needed > available:
        remedy = "give more queries"
        if bound >= LOWEST_HINT:
            remedy += f", or --target-recall {_rounded_down(bound, 2)}"
    return f"{text}{queries:,} certify {_rounded_down(bound, 4)} at most: {remedy}"


def _rounded_down(value: float, digits: int) -> float:
    # A bound must not be rounded up. 1e-9: in floating point, 0.29 * 100 is 28.999999999999996.
    return math.floor(value * 10**digits + 1e-9) / 10**digits


def certificate_text(
    measured: Sequence[Measured],
    chosen: Measured | None,
    *,
    target: float,
    k: int,
    queries: int,
    available: int,
    seed: int = 0,
) -> str:
    """The certificate in words, or the reason why there is not one.

    queries: number that was measured, of `available`.
    """
    tried = len(measured)
    if chosen is not None:
        return (
            f"certificate: recall@{k} of the exact neighbours is {chosen.recall.lower:.4f} or more "
            "with 95 % confidence\n"
            f"             measured {chosen.recall.mean:.4f} on {queries:,} random queries, "
            f"{tried} settings tried (Bonferroni)\n"
            f"options:     {chosen.params.as_options(seed)}"
        )
    best = max(measured, key=lambda m: (m.recall.lower, m.speed))
    return (
        f"no certificate: no setting has recall@{k} of {target} or more with 95 % confidence; the "
        f"best is {best.params}: {best.recall.mean:.4f}, at least {best.recall.lower:.4f}\n"
        f"                {_remedy(target, tried, queries, available)}"
    )


def _remedy(target: float, tried: int, queries: int, available: int) -> str:
    """How to get a certificate."""
    needed = queries_needed(target, tried) if target < 1 else 0
    if needed > queries:
        remedy = f"--truth {needed}"
        if needed > available:
            remedy = f"these are all {available:,}, give more, or a lower target"
        return f"even a setting without any loss needs {needed:,} queries: {remedy}"
    if queries < available:
        return "more queries (--truth), or a longer shortlist, may help"
    return "more queries may help"


def certificate_summary(chosen: Measured, queries: int) -> str:
    """The certificate in one line, for `matryoshka index info` and the search page."""
    return f"{chosen.recall.lower:.4f} or more, with 95 % confidence ({queries:,} queries)"


# ---------------------------------------------------------------- JSON


def certificate(
    chosen: Measured, *, target: float, queries: int, tried: int, seed: int
) -> dict[str, Any]:
    """The certificate as sweep.json and index.json have it."""
    return {
        "setting": chosen.params.as_dict(),
        "options": chosen.params.as_options(seed),
        "recall": finite(chosen.recall.mean),
        "lower": finite(chosen.recall.lower),
        "confidence": 0.95,
        "queries": queries,
        "settings_tried": tried,
        "target": target,
        "seed": seed,
    }


def measurement(m: Measured, rows: int) -> dict[str, Any]:
    """One measurement as sweep.json has it."""
    return {
        "setting": m.params.as_dict(),
        "recall": finite(m.recall.mean),
        "lower": finite(m.recall.lower),
        "perfect": finite(m.recall.perfect),
        "rate": m.speed,
        "rates": list(m.rates),
        "mflops": m.params.mflops(rows),
    }


# ---------------------------------------------------------------- plot


def frontier_plot(
    measured: Sequence[Measured],
    best: Sequence[Measured],
    chosen: Measured | None,
    *,
    target: float,
    title: str,
) -> bytes:
    """A PNG of speed against recall.

    The recall axis shows the loss 1 - recall in logarithmic scale, because the interesting range is
    0.99 to 0.999.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()

    # A recall of 1 has no logarithm: it is drawn at half of the smallest loss.
    losses = [1 - m.recall.mean for m in measured if m.recall.mean < 1]
    floor = 0.5 * min(losses, default=1e-3)

    def loss(m: Measured) -> float:
        return max(1 - m.recall.mean, floor)

    # ---- points, strong where the target is certain ----
    for index in dict.fromkeys(m.params.index for m in measured):
        own = [m for m in measured if m.params.index == index]
        for is_certain, alpha in ((False, 0.25), (True, 0.9)):
            shown = [m for m in own if (m.recall.lower >= target) == is_certain]
            label = f"{index}, certainly {target:g} or more" if is_certain else index
            axes.scatter(
                [loss(m) for m in shown],
                [m.speed for m in shown],
                s=16,
                alpha=alpha,
                linewidths=0,
                color=COLOURS[index],
                label=label if shown else None,
            )

    # ---- frontier, target, certified search ----
    line = sorted(best, key=loss)
    axes.plot(
        [loss(m) for m in line],
        [m.speed for m in line],
        color="#333333",
        linewidth=1.2,
        label="frontier",
    )
    if target < 1:
        axes.axvline(1 - target, color="#999999", linestyle="--", linewidth=1)
        axes.annotate(
            f"recall {target:g}",
            (1 - target, 0.98),
            xycoords=("data", "axes fraction"),
            rotation=90,
            xytext=(3, 0),
            textcoords="offset points",
            va="top",
            color="#666666",
            fontsize=9,
        )
    if chosen is not None:
        axes.scatter(
            [loss(chosen)],
            [chosen.speed],
            s=130,
            facecolors="none",
            edgecolors="#c02020",
            linewidths=2,
            label=f"certified: {chosen.params}",
        )

    # ---- axes ----
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("recall of the exact neighbours")
    axes.set_ylabel(f"queries per second, batch {best[0].batch}")
    largest = max(loss(m) for m in measured)
    ticks = [10.0**i for i in range(-6, 1) if 1.5 * floor < 10.0**i < 1.1 * largest]
    if any(m.recall.mean == 1 for m in measured):
        ticks.append(floor)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(lambda x, _: f"{1 - x:.6g}" if x > floor * 1.01 else "1")
    axes.xaxis.set_minor_formatter("")
    # Labels at 1, 2 and 5 only: a speed axis often spans less than one power of ten.
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(lambda y, _: f"{y:,.0f}" if f"{y:.0e}"[0] in "125" else "")
    axes.set_title(title, fontsize=11)
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", fontsize=9, frameon=True)

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()
