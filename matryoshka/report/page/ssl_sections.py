"""Section of the page that shows a self-supervised run: what its log says about every prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from matryoshka.report.page.charts import Series, line_chart, number
from matryoshka.report.run import Run

NAMES = {
    "relic": "ReLIC",
    "moco": "MoCo",
    "simclr": "SimCLR",
    "byol": "BYOL",
    "vicreg": "VICReg",
    "sigreg": "SIGReg",
}
SMALL = 240  # height of the charts that stand below each other

Legend = list[tuple[str, str, str]]  # (label, colour, style)


class Curves(NamedTuple):
    """A quantity of the log: its key (before the prefix), its chart, a sentence about it."""

    key: str
    title: str
    label: str
    sentence: str = ""
    percent: bool = False


ACCURACIES = (
    Curves("knn20", "Weighted kNN, 20 neighbours", "top-1 (%)", percent=True),
    Curves("knn200", "Weighted kNN, 200 neighbours", "top-1 (%)", percent=True),
    Curves("map10", "mAP@10 of the nearest neighbours", "mAP@10 (%)", percent=True),
    Curves("probe", "Linear classifier beside the run", "top-1 (%)", percent=True),
)
LOSSES = (Curves("loss", "Loss", "loss"),)
MONITORS = (
    Curves(
        "std",
        "Standard deviation",
        "std x sqrt(d)",
        "Of the numbers of normalised embeddings: 1 if they point in all directions alike, 0 if "
        "all images have one embedding.",
    ),
    Curves(
        "rank",
        "Effective rank",
        "% of the length",
        "RankMe, as a share of the prefix's length: how many directions the embeddings use.",
        percent=True,
    ),
    Curves(
        "uniformity",
        "Uniformity",
        "uniformity",
        "Lower is better: embeddings fill the sphere. It rises to 0 in a collapse.",
    ),
    Curves(
        "alignment",
        "Alignment",
        "alignment",
        "Mean squared distance of the two views of an image; lower is better, unless all images "
        "are close.",
    ),
)
SCHEDULES = (
    ("lr", "Learning rate"),
    ("momentum", "Momentum of the target network"),
    ("temperature", "Temperature"),
)
COLUMNS = {
    "knn20": "kNN 20, %",
    "knn200": "kNN 200, %",
    "map10": "mAP@10, %",
    "probe": "Linear, %",
    "std": "Std",
    "rank": "Rank",
    "uniformity": "Uniformity",
    "alignment": "Alignment",
}


def method_of(run: Run | None) -> str | None:
    """The method of a self-supervised run in its usual spelling; None for other runs."""
    method = None if run is None else run.params.get("ssl.method")
    if not isinstance(method, str):
        return None
    return NAMES.get(method, method)


def self_supervised(run: Run | None) -> dict[str, Any] | None:
    """Charts, table and warnings of a self-supervised run; None for other runs."""
    method = method_of(run)
    if run is None or method is None or not run.epochs:
        return None
    epochs = sorted(run.epochs)
    warnings = []
    for event in run.events:
        if event.get("event") == "collapse":
            warnings.append((event.get("epoch"), str(event.get("text", ""))))
    schedules = []
    for key, title in SCHEDULES:
        values = run.column(key)
        if len(set(values.values())) > 1:
            schedules.append((title, _chart([_series(title, values, "first")], title, title)))
    return {
        "method": method,
        "epochs": len(epochs),
        "dims": run.dims,
        "pflop": _last(run.column("pflop")),
        "accuracies": _charts(run, ACCURACIES),
        "losses": _charts(run, LOSSES),
        "monitors": _charts(run, MONITORS),
        "schedules": schedules,
        "legend": _legend(run),
        "warnings": warnings,
        **_table(run),
    }


def headline(found: Mapping[str, Any]) -> str:
    """One sentence: the last numbers of the shortest and the longest prefix."""
    rows = [(dim, row["knn20"]) for dim, row in found["rows"] if row.get("knn20") is not None]
    epochs = f"{found['epochs']} epoch" + ("" if found["epochs"] == 1 else "s")
    text = f"{found['method']} without labels, {epochs}."
    if not rows:
        return f"{text} The log has no evaluation of the embeddings."
    (short, worst), (full, best) = rows[0], rows[-1]
    if short == full:
        return f"{text} Weighted kNN: {best:.1f} % with {full} dimensions."
    return (
        f"{text} Weighted kNN: {worst:.1f} % with the first {short} dimensions, {best:.1f} % with "
        f"all {full}."
    )


def facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The cards at the top: (number, what it measures)."""
    shown = []
    rows = found["rows"]
    if not rows:
        return [(f"{found['epochs']:,}", "epochs")]
    for dim, row in rows if len(rows) == 1 else (rows[0], rows[-1]):
        if row.get("knn20") is not None:
            shown.append((f"{row['knn20']:.1f} %", f"kNN, 20 neighbours, {dim} dimensions"))
    last = rows[-1]
    if last[1].get("probe") is not None:
        shown.append((f"{last[1]['probe']:.1f} %", f"linear classifier, {last[0]} dimensions"))
    if last[1].get("rank") is not None:
        shown.append((number(last[1]["rank"]), f"effective rank, {last[0]} dimensions"))
    shown.append((f"{found['epochs']:,}", "epochs"))
    if found["pflop"] is not None:
        shown.append((f"{found['pflop']:.2g}", "PFLOP of training"))
    return shown


def _charts(run: Run, groups: Sequence[Curves]) -> list[dict[str, Any]]:
    """A chart of each quantity that the log has."""
    charts = []
    for curves in groups:
        series = []
        for position, dim in _positions(run):
            factor = 100 / dim if curves.key == "rank" else 1
            values = run.column(f"{curves.key}/{dim}", factor)
            if values:
                series.append(_series(str(dim), values, position))
        if series:
            chart = _chart(series, curves.title, curves.label, percent=curves.percent)
            charts.append({"title": curves.title, "chart": chart, "sentence": curves.sentence})
    return charts


def _series(label: str, values: Mapping[int, float], colour: str | float) -> Series:
    return Series(label, list(values), list(values.values()), colour=colour)


def _chart(series: Sequence[Series], title: str, label: str, *, percent: bool = False) -> Markup:
    epochs = sorted({epoch for each in series for epoch in each.x})
    # Numbers of more epochs would overlap on the axis.
    ticks = epochs if len(epochs) <= 12 else epochs[:: max(1, len(epochs) // 10)]
    return line_chart(
        series,
        f"{title} by epoch",
        "epoch",
        label,
        x_ticks=ticks,
        log2=False,
        percent=percent,
        height=SMALL,
    )


def _positions(run: Run) -> list[tuple[float, int]]:
    """(position on the colour ramp, prefix), shortest first."""
    last = max(len(run.dims) - 1, 1)
    return [(i / last, dim) for i, dim in enumerate(run.dims)]


def _legend(run: Run) -> Legend:
    return [
        (f"{dim} dims", Series("", [], [], colour=position).css_colour, "line")
        for position, dim in _positions(run)
    ]


def _table(run: Run) -> dict[str, Any]:
    """The last value of every quantity of every prefix: columns that have values, and rows."""
    rows = []
    for dim in run.dims:
        row = {}
        for key in COLUMNS:
            row[key] = _last(run.column(f"{key}/{dim}"))
        rows.append((dim, row))
    columns = []
    for key, title in COLUMNS.items():
        if any(row[key] is not None for _, row in rows):
            columns.append((key, title))
    return {"columns": columns, "rows": rows}


def _last(values: Mapping[int, float]) -> float | None:
    return values[max(values)] if values else None
