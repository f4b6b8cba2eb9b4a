"""Results as text and pictures: accuracies or a run folder in, table or file out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class RunError(ValueError):
    """A folder that is no run, or not to be read as one; the message names it."""

    user_error = True


def accuracy_table(prefixes: Mapping[int, Mapping[str, float]]) -> str:
    """A plain text table of {prefix: {column: percent}}; `-` where a column has no value for a
    prefix.
    """
    titles = {
        "top1": "top-1 %",
        "top5": "top-5 %",
        "ff_top1": "FF top-1 %",
        "ff_top5": "FF top-5 %",
        "auroc": "AUROC %",
        "aupr": "AUPR %",
        "fpr95": "FPR95 %",
    }
    columns = [key for key in titles if any(key in row for row in prefixes.values())]
    lines = ["  ".join(["prefix", *(f"{titles[key]:>10}" for key in columns)])]
    for dim, row in prefixes.items():
        cells = (f"{row[key]:10.2f}" if key in row else f"{'-':>10}" for key in columns)
        lines.append("  ".join([f"{dim:6d}", *cells]))
    return "\n".join(lines)


def wilson_interval(percent: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of an accuracy in percent that was measured on n images (Wilson
    1927).
    """
    z, p = 1.96, percent / 100
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 100 * (centre - half), 100 * (centre + half)


def plot_accuracy(
    path: str | Path, prefixes: Mapping[int, Mapping[str, float]], title: str, images: int
) -> None:
    """Top-1 against prefix length (log scale) as PNG, with fixed-feature baselines where `ff_top1`
    is given.

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
        errors = [
            [v - low for v, (low, _) in zip(values, intervals, strict=True)],
            [high - v for v, (_, high) in zip(values, intervals, strict=True)],
        ]
        if shown:
            places = [d * shift for d in shown]  # side by side, not on top of each other
            axes.errorbar(
                places,
                values,
                errors,
                fmt=style,
                color=colour,
                capsize=3,
                elinewidth=1,
                label=label,
            )
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


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """A run folder as it was read. params: flat options; epochs: {epoch: its line of `log`};
    events: events.jsonl.

    head: mrl, mrl-e or ff<width>. dims: prefix lengths; empty where neither a checkpoint, options
    nor log tell them.
    """

    path: Path
    params: dict[str, Any]
    arch: str
    head: str
    dims: tuple[int, ...]
    epochs: dict[int, dict[str, Any]]
    events: list[dict[str, Any]]

    def column(self, key: str, factor: float = 1.0) -> dict[int, float]:
        """{epoch: value} of a key of `log`, where there is one."""
        values = {epoch: line.get(key) for epoch, line in self.epochs.items()}
        return {
            epoch: factor * v
            for epoch, v in values.items()
            if isinstance(v, int | float) and isfinite(v)
        }

    def top1(self, of: str = "") -> dict[str, dict[int, float]]:
        """{prefix: {epoch: percent}}, the shortest prefix first; of: `ema_` for the average of the
        weights.
        """
        names = [str(d) for d in self.dims] or ["feature"]
        keys = {name: f"{of}top_1_{name}" if len(names) > 1 else f"{of}top_1" for name in names}
        found = {name: self.column(key, 100) for name, key in keys.items()}
        return {name: values for name, values in found.items() if values}

    def best(self) -> tuple[int | None, dict[str, float]]:
        """(the first epoch in which the longest prefix was most accurate, top-1 % of every prefix
        then).
        """
        top1 = self.top1()
        if not top1:
            return None, {}
        longest = list(top1.values())[-1]
        epoch = max(longest, key=lambda e: (longest[e], -e))
        return epoch, {name: values[epoch] for name, values in top1.items() if epoch in values}


def short_dims(dims: Sequence[int]) -> str:
    """`8-2048` where each is twice the one before, `8,32,512` or `8,12..512` for others; empty for
    a single length.
    """
    if len(dims) < 2:
        return ""
    if all(b == 2 * a for a, b in pairwise(dims)):
        return f"{dims[0]}-{dims[-1]}"
    return ",".join(map(str, dims)) if len(dims) < 4 else f"{dims[0]},{dims[1]}..{dims[-1]}"


def read_run(folder: str | Path) -> Run:
    """A run folder, also one that is being written: lines torn by a kill are left out, as are files
    not yet there.

    OSError without params.json, RunError where it is not that of a training.
    """
    folder = Path(folder)
    file = folder / "params.json"
    try:
        params = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise RunError(f"{file}: damaged") from None
    if not isinstance(params, dict) or not isinstance(params.get("model.arch"), str):
        raise RunError(f"{file}: not of a training, it has no model.arch")
    lines = {
        line["epoch"]: line for line in _lines(folder / "log") if type(line.get("epoch")) is int
    }
    epochs = {epoch: lines[epoch] for epoch in sorted(lines)}
    arch, head, dims = _model(folder, params, epochs)
    return Run(folder, params, arch, head, dims, epochs, _lines(folder / "events.jsonl"))


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in (
        path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ()
    ):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _model(
    folder: Path, params: dict[str, Any], epochs: dict[int, dict[str, Any]]
) -> tuple[str, str, tuple[int, ...]]:
    """(arch, head, dims) as a checkpoint says; without one what log and options say."""
    for name in ("model.safetensors", "checkpoints/last.safetensors"):
        try:
            with safe_open(
                folder / name, "numpy"
            ) as file:  # not read by way of PyTorch: that takes seconds to import
                spec = json.loads(file.metadata()["matryoshka"])["model"]
            arch, dims, efficient, nested = (
                spec["arch"],
                tuple(spec["dims"]),
                spec["efficient"],
                True,
            )
            break
        except (OSError, SafetensorError, ValueError, LookupError, TypeError):
            continue
    else:
        logged = {
            int(m[1])
            for line in epochs.values()
            for key in line
            if (m := re.fullmatch(r"top_1_(\d+)", key))
        }
        arch, efficient = params["model.arch"], bool(params.get("model.efficient"))
        nested, width = (
            efficient or bool(params.get("model.mrl")),
            params.get("model.fixed_feature"),
        )
        given = params.get("model.dims") if nested else [width] if width else None
        dims = tuple(sorted(logged)) or tuple(given if isinstance(given, list) else ())
    if len(dims) == 1 or not nested:
        return arch, f"ff{dims[0] if dims else ''}", dims
    return arch, "mrl-e" if efficient else "mrl", dims


def plot_run(folder: str | Path, path: str | Path) -> Figure:
    """Top-1 of every prefix over the epochs of a run, training loss and learning rate below, as
    PNG.

    OSError where params.json or log is not there, RunError where params.json is not that of a
    training.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    run = read_run(folder)
    (run.path / "log").stat()  # a run without a log would be an empty picture
    figure = Figure(figsize=(8, 6.5), layout="constrained", dpi=150)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.set_title(
        " ".join(filter(None, (run.arch, run.head, short_dims(run.dims)))),
        loc="left",
        parse_math=False,
    )
    above.set_title(
        run.path.resolve().name[:60], loc="right", fontsize="small", color="0.4", parse_math=False
    )
    _plot_top1(above, run)
    rate = below.twinx()
    for axes, key, label, colour in (
        (below, "train_loss", "training loss", "#1f5fa8"),
        (rate, "current_lr", "learning rate", "#d1495b"),
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
    figure.savefig(path, format="png")
    return figure


def _plot_top1(axes: Axes, run: Run) -> None:
    from matplotlib import colormaps

    epoch, best = run.best()
    top1, averaged = run.top1(), run.top1("ema_")
    shades = colormaps["viridis_r"]
    for i, (name, values) in reversed(
        list(enumerate(top1.items()))
    ):  # the legend in the order of the curves
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
        if points := averaged.get(name):
            axes.plot(list(points), list(points.values()), "--", linewidth=1, color=colour)
    if averaged:
        axes.plot([], [], "--", linewidth=1, color="0.4", label="average\nof weights")
    if epoch is not None:
        axes.axvline(epoch, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        title = f"prefix: top-1 %\nat epoch {epoch}"
        axes.legend(
            title=title,
            title_fontsize="small",
            alignment="left",
            prop={"family": "monospace", "size": "small"},
            loc="upper left",
            bbox_to_anchor=(1.01, 1),
            frameon=False,
        )
    axes.set_ylabel("top-1 accuracy (%)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _marker(values: Mapping[int, float]) -> str:
    return "o" if len(values) <= 30 else ""  # a single value would be invisible without
