"""Accuracies as a text table, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

Z_95 = 1.96  # two-sided 95 % quantile of the normal distribution

TITLES = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "ff_top1": "FF top-1 %",
    "ff_top5": "FF top-5 %",
    "auroc": "AUROC %",
    "aupr": "AUPR %",
    "fpr95": "FPR95 %",
}


def accuracy_table(prefixes: Mapping[int, Mapping[str, float]], images: int | None = None) -> str:
    """Format {prefix: {column: percent}} as a text table; `-` marks a missing value.

    images: their number adds the 95 % interval of the top-1 accuracy.
    """
    present = set().union(*prefixes.values())
    columns = [key for key in TITLES if key in present]
    header = ["prefix"] + [f"{TITLES[key]:>10}" for key in columns]
    if images is not None:
        header.insert(2, f"{'95 % interval':>14}")
    lines = ["  ".join(header)]
    for dim, row in prefixes.items():
        cells = [f"{row[key]:10.2f}" if key in row else f"{'-':>10}" for key in columns]
        if images is not None:
            low, high = wilson_interval(row["top1"], images)
            interval = f"{low:.1f} to {high:.1f}"
            cells.insert(1, f"{interval:>14}")
        lines.append("  ".join([f"{dim:6d}", *cells]))
    return "\n".join(lines)


def wilson_interval(percent: float, n: int) -> tuple[float, float]:
    """95 % confidence interval, in percent, of an accuracy measured on n images (Wilson 1927).

    Unlike the normal approximation it stays inside 0 to 100 and works for accuracies of 0 and 100.
    """
    z = Z_95
    p = percent / 100
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half_width = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 100 * (centre - half_width), 100 * (centre + half_width)
