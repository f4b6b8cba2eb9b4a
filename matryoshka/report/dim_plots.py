"""Plots of the dims of a model as PNG: accuracy, confusion matrices, maps of embeddings."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from matryoshka.report.dims import in_short
from matryoshka.report.plots import BLUE
from matryoshka.report.tables import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NUMBERED = 12  # classes of a matrix whose cells have room for a number
MAX_NAMED = 40  # classes whose names have room beside a matrix
MAX_LEGEND = 20  # classes that a reader can tell apart by colour


def plot_dims(found: Mapping[str, Any], title: str, against: str = "dim") -> bytes:
    """Top-1 accuracy with 95 % intervals against the dim, or against multiply-adds ("macs").

    found: dims.json.
    """
    dims = list(found["prefixes"])
    x = [int(dim) if against == "dim" else found["macs"][dim] for dim in dims]
    top1 = [found["prefixes"][dim]["top1"] for dim in dims]
    intervals = [wilson_interval(value, found["images"]) for value in top1]
    below = [value - low for value, (low, _) in zip(top1, intervals, strict=True)]
    above = [high - value for value, (_, high) in zip(top1, intervals, strict=True)]

    figure, axes = _figure(6.4, 4.2, title)
    axes.errorbar(x, top1, [below, above], fmt="o-", color=BLUE, capsize=3, elinewidth=1)
    if against == "macs":
        for dim, at, value in zip(dims, x, top1, strict=True):
            axes.annotate(
                f"dim {dim}",
                (at, value),
                (6, -12),
                textcoords="offset points",
                color="0.35",
                size="small",
            )
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, high - 5), min(high, 100.5))  # noise should not look like a trend
    axes.set_xscale("log", base=2)
    labels = [in_short(value).strip() for value in x] if against == "macs" else dims
    axes.set_xticks(x, labels)
    axes.minorticks_off()
    axes.margins(x=0.15 if against == "macs" else 0.08)  # room for the last name
    axes.set_xlabel("multiply-adds of an image" if against == "macs" else "dim")
    axes.set_ylabel("top-1 accuracy (%), 95 % intervals")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def plot_confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], title: str) -> bytes:
    """A confusion matrix, coloured by the share of the true class (the row).

    matrix: images [C][C], by true and predicted class.
    """
    counts = np.asarray(matrix)
    total = counts.sum(1, keepdims=True)
    shares = 100 * counts / np.maximum(total, 1)
    classes = len(counts)
    is_numbered = classes <= MAX_NUMBERED
    is_named = classes <= MAX_NAMED
    side = min(max(4.2, (0.52 if is_numbered else 0.26) * classes + 2.2), 11)

    figure, axes = _figure(side + 0.9, side, title)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    if is_named:
        ticks = range(classes)
        shown = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
        size = "medium" if is_numbered else "x-small"
        axes.set_xticks(ticks, shown, rotation=45, ha="right", size=size, parse_math=False)
        axes.set_yticks(ticks, shown, size=size, parse_math=False)
    if is_numbered:
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share > 55 else "0.15"
            axes.text(
                column, row, f"{share:.0f}", ha="center", va="center", color=colour, size="small"
            )
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(picture, ax=axes, shrink=0.75, pad=0.02)
    bar.set_label("images of the true class (%)")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return _png(figure)


def plot_map(
    points: Sequence[Sequence[float]], labels: Sequence[int], names: Sequence[str], title: str
) -> bytes:
    """A point for each embedding, coloured by its class.

    points: [n][2]. labels: [n], 0 to C - 1. names: [C].
    """
    from matplotlib import colormaps

    at = np.asarray(points, float)
    of = np.asarray(labels)
    has_legend = len(names) <= MAX_LEGEND
    width, height = np.ptp(at, axis=0) if len(at) else (1.0, 1.0)
    shape = min(max(height / max(width, 1e-9), 0.5), 1.2)  # that of the points, within reason
    figure, axes = _figure(7 if has_legend else 5.6, 5.4 * shape + 0.4, title)
    few = len(names) <= 10
    size = min(max(14000 / max(len(at), 1), 7), 24)  # of a point
    colours = colormaps["tab10" if few else "tab20"] if has_legend else colormaps["hsv"]
    for label, name in enumerate(names):
        chosen = of == label
        colour = colours(label) if has_legend else colours(label / len(names))
        # A label that begins with _ would be left out of the legend.
        shown = f" {name[:24]}"
        axes.scatter(
            at[chosen, 0], at[chosen, 1], s=size, color=colour, alpha=0.8, linewidths=0, label=shown
        )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", "datalim")
    axes.spines[:].set_color("0.8")
    if has_legend:
        legend = axes.legend(
            loc="upper left",
            bbox_to_anchor=(1.01, 1),
            frameon=False,
            handlelength=1,
            handletextpad=0.2,
            markerscale=(32 / size) ** 0.5,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return _png(figure)


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", parse_math=False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
