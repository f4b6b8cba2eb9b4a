"""Plots of accuracies and of training runs, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from matryoshka.files import write_atomically
from matryoshka.report.run import Run, best_of, read_run, short_dims
from matryoshka.report.tables import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE = "#1f5fa8"
RED = "#d1495b"
SHADES = ("#9a9a9a", BLUE, "#66a182", "#8d6a9f")
MARKERS = ("o", "s", "^", "D", "v")


def plot_accuracy(
    path: str | Path, prefixes: Mapping[int, Mapping[str, float]], title: str, images: int
) -> None:
    """Plot top-1 accuracy against prefix length (log scale) as PNG.

    prefixes: {prefix: {"top1": percent, "ff_top1": percent}}; ff_top1, the fixed-feature baseline,
    is optional. Error bars are 95 % intervals of each accuracy on its own, from `images` images.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(6.4, 4), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    _plot_curve(axes, prefixes, "top1", images, label="MRL: one model for all", colour=BLUE)
    _plot_curve(
        axes,
        prefixes,
        "ff_top1",
        images,
        label="fixed feature: a model each",
        colour=RED,
        style="s",
        shift=1.06,  # beside the MRL points, not on top of them
    )
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, high - 5), min(high, 100.5))  # noise should not look like a trend
    axes.set_xscale("log", base=2)
    dims = list(prefixes)
    axes.set_xticks(dims, [str(d) for d in dims])
    axes.minorticks_off()
    axes.set_xlabel("prefix of the embedding (numbers)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    _save(figure, path)


def plot_methods(
    path: str | Path | IO[bytes],
    methods: Mapping[str, Mapping[int, tuple[float, float, float]]],
    metric: str,
    title: str,
) -> None:
    """Plot a metric of several methods against prefix length (log scale) as PNG.

    methods: {name: {prefix: (percent, lower, upper end of its interval)}}; the last one stands out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(methods.items()):
        is_last = number == len(methods) - 1
        dims = list(points)
        values = [points[d][0] for d in dims]
        # At 0 and 100 percent, rounding can leave a value outside of its interval.
        below = [max(points[d][0] - points[d][1], 0) for d in dims]
        above = [max(points[d][2] - points[d][0], 0) for d in dims]
        axes.errorbar(
            dims,
            values,
            [below, above],
            fmt=f"{MARKERS[number % len(MARKERS)]}-",
            color=RED if is_last else SHADES[number % len(SHADES)],
            capsize=3,
            elinewidth=1,
            linewidth=2 if is_last else 1.2,
            markersize=5,
            label=name,
        )
    dims = sorted({d for points in methods.values() for d in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [str(d) for d in dims])
    axes.minorticks_off()
    axes.set_xlabel("prefix of the embedding (numbers)")
    axes.set_ylabel(metric)
    axes.set_title(title, loc="left", parse_math=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    _save(figure, path)


def plot_importances(path: str | Path, shares: Mapping[str, float], title: str) -> None:
    """Plot how much of a metric's variance each option explains as PNG.

    shares: {option: 0 to 1}, from top to bottom.
    """
    from matplotlib.figure import Figure

    names = list(shares)[::-1]  # a bar chart begins at the bottom
    percent = [100 * shares[name] for name in names]
    height = 1.2 + 0.36 * len(names)
    figure = Figure(figsize=(6.4, height), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    bars = axes.barh(range(len(names)), percent, color=BLUE, height=0.6)
    axes.bar_label(bars, [f"{value:.0f} %" for value in percent], padding=4, fontsize="small")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 110)
    axes.set_xticks(list(range(0, 101, 20)))
    axes.set_xlabel("share of the variance (%)")
    axes.set_title(title, loc="left", parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Figure, path: str | Path | IO[bytes]) -> None:
    """Write a figure as a whole file, of the format that its name ends in, or PNG."""
    if not isinstance(path, str | Path):
        figure.savefig(path, format="png")
        return
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix.removeprefix(".") or "png")
    write_atomically(path, picture.getbuffer())


def _plot_curve(
    axes: Axes,
    prefixes: Mapping[int, Mapping[str, float]],
    key: str,
    images: int,
    *,
    label: str,
    colour: str,
    style: str = "o-",
    shift: float = 1.0,
) -> None:
    """Draw one column of `prefixes` with error bars; shift: factor on the x positions."""
    shown = [d for d in prefixes if key in prefixes[d]]
    if not shown:
        return
    values = [prefixes[d][key] for d in shown]
    intervals = [wilson_interval(value, images) for value in values]
    below = [value - low for value, (low, _) in zip(values, intervals, strict=True)]
    above = [high - value for value, (_, high) in zip(values, intervals, strict=True)]
    axes.errorbar(
        [d * shift for d in shown],
        values,
        [below, above],
        fmt=style,
        color=colour,
        capsize=3,
        elinewidth=1,
        label=label,
    )


# ---------------------------------------------------------------- a training run


def plot_run(folder: str | Path, path: str | Path) -> Figure:
    """Plot a run as PNG: top-1 of every prefix by epoch (of neighbours, in a run without labels);
    below it training loss and learning rate.

    Raises OSError without params.json or log, RunError if params.json does not belong to a
    training run.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    run = read_run(folder)
    (run.path / "log").stat()  # raises: without a log the picture would be empty

    figure = Figure(figsize=(8, 6.5), layout="constrained", dpi=150)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    words = [run.arch, run.head, short_dims(run.dims)]
    above.set_title(" ".join(word for word in words if word), loc="left", parse_math=False)
    above.set_title(
        run.path.resolve().name[:60], loc="right", fontsize="small", color="0.4", parse_math=False
    )
    _plot_top1(above, run)

    rate = below.twinx()
    for axes, key, label, colour in (
        (below, "train_loss", "training loss", BLUE),
        (rate, "current_lr", "learning rate", RED),
    ):
        values = run.column(key)
        axes.plot(
            list(values), list(values.values()), marker=_marker(values), markersize=3, color=colour
        )
        axes.set_ylabel(label, color=colour)
        axes.tick_params(axis="y", colors=colour)
        axes.spines["top"].set_visible(False)
    rate.set_ylim(bottom=0)

    below.set_xlabel("epoch")
    below.set_xlim(min(run.epochs, default=0) - 0.5, max(run.epochs, default=0) + 0.5)
    below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    below.grid(alpha=0.3)
    _save(figure, path)
    return figure


def _plot_top1(axes: Axes, run: Run) -> None:
    from matplotlib import colormaps

    top1, what = run.top1(), "top-1 accuracy (%)"
    if not top1 and run.neighbours():
        top1, what = run.neighbours(), "top-1 (%) of 20 neighbours"
    epoch, best = best_of(top1)
    averaged = run.top1("ema_")
    shades = colormaps["viridis_r"]
    # Longest prefix first: the legend lists the curves from top to bottom.
    for i, (name, values) in reversed(list(enumerate(top1.items()))):
        # The palest end of the colour map is unreadable on white.
        colour = shades(1 - 0.88 * (len(top1) - 1 - i) / max(len(top1) - 1, 1))
        label = f"{name:>4}: {best[name]:5.1f}" if name in best else f"{name:>4}"
        axes.plot(
            list(values),
            list(values.values()),
            marker=_marker(values),
            markersize=3,
            color=colour,
            label=label,
        )
        points = averaged.get(name)
        if points:
            axes.plot(list(points), list(points.values()), "--", linewidth=1, color=colour)
    if averaged:
        axes.plot([], [], "--", linewidth=1, color="0.4", label="average\nof weights")
    if epoch is not None:
        axes.axvline(epoch, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        axes.legend(
            title=f"prefix: top-1 %\nat epoch {epoch}",
            title_fontsize="small",
            alignment="left",
            prop={"family": "monospace", "size": "small"},
            loc="upper left",
            bbox_to_anchor=(1.01, 1),
            frameon=False,
        )
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _marker(values: Mapping[int, float]) -> str:
    return "o" if len(values) <= 30 else ""  # a single value would be invisible without a marker
