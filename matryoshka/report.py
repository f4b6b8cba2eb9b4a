"""Results as text and pictures: accuracies in, table or file out."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from pathlib import Path


def accuracy_table(prefixes: Mapping[int, Mapping[str, float]]) -> str:
    """A plain text table of {prefix: {column: percent}}; `-` where a column has no value for a prefix."""
    titles = {"top1": "top-1 %", "top5": "top-5 %", "ff_top1": "FF top-1 %", "ff_top5": "FF top-5 %"}
    columns = [key for key in titles if any(key in row for row in prefixes.values())]
    lines = ["  ".join(["prefix", *(f"{titles[key]:>10}" for key in columns)])]
    for dim, row in prefixes.items():
        cells = (f"{row[key]:10.2f}" if key in row else f"{'-':>10}" for key in columns)
        lines.append("  ".join([f"{dim:6d}", *cells]))
    return "\n".join(lines)


def wilson_interval(percent: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of an accuracy in percent that was measured on n images (Wilson 1927)."""
    z, p = 1.96, percent / 100
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 100 * (centre - half), 100 * (centre + half)


def plot_accuracy(path: str | Path, prefixes: Mapping[int, Mapping[str, float]], title: str, images: int) -> None:
    """Top-1 against prefix length (log scale) as PNG, with fixed-feature baselines where `ff_top1` is given.

    Bars are 95 % intervals for `images` evaluated images: differences inside them mean nothing.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(6.4, 4), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    dims = list(prefixes)
    for key, label, colour, shift, style in (
        ("top1", "MRL: one model for all", "#1f5fa8", 1.0, "o-"),
        ("ff_top1", "fixed feature: a model each", "#d1495b", 1.06, "s"),
    ):
        shown = [d for d in dims if key in prefixes[d]]
        values = [prefixes[d][key] for d in shown]
        intervals = [wilson_interval(value, images) for value in values]
        errors = [[v - low for v, (low, _) in zip(values, intervals, strict=True)],
                  [high - v for v, (_, high) in zip(values, intervals, strict=True)]]  # fmt: skip
        if shown:
            places = [d * shift for d in shown]  # side by side, not on top of each other
            axes.errorbar(places, values, errors, fmt=style, color=colour, capsize=3, elinewidth=1, label=label)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, high - 5), min(high, 100.5))  # noise should not look like a trend
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [str(d) for d in dims])
    axes.minorticks_off()
    axes.set_xlabel("prefix of the embedding (numbers)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)
