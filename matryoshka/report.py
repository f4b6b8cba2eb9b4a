"""Results as text and pictures: accuracies in, table or file out."""

from __future__ import annotations

from collections.abc import Mapping
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


def plot_accuracy(path: str | Path, prefixes: Mapping[int, Mapping[str, float]], title: str) -> None:
    """Top-1 against prefix length (log scale) as PNG, with the fixed-feature baselines where `ff_top1` is given."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(6.4, 4), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    dims = list(prefixes)
    axes.plot(dims, [prefixes[d]["top1"] for d in dims], "o-", color="#1f5fa8", label="MRL, one model", zorder=3)
    baselines = [d for d in dims if "ff_top1" in prefixes[d]]
    if baselines:
        values = [prefixes[d]["ff_top1"] for d in baselines]
        axes.plot(baselines, values, "s", color="#d1495b", label="fixed feature, one model each", zorder=4)
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
