"""Sections of the page that show dims.json: cost, confusion of classes, maps of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from matryoshka.report.dims import (
    batch_sizes,
    costs_differ,
    dims_rows,
    in_short,
    latency_note,
    milliseconds,
)
from matryoshka.report.page.charts import Series, line_chart

MAX_DRAWN = 30  # classes of a matrix whose names fit beside it
MAX_LEGEND = 20  # classes that a reader can tell apart by colour
SIDE = 300  # of a map, in pixels
GOLDEN_ANGLE = 137.508  # degrees between the hues of neighbouring classes

Json = Mapping[str, Any]


def cost(found: Json | None) -> dict[str, Any] | None:
    """The table of costs, and accuracy against multiply-adds where the dims differ in them."""
    if not found:
        return None
    batches = batch_sizes(found)
    rows = []
    for row in dims_rows(found):
        rows.append(
            {
                "dim": row["dim"],
                "top1": f"{row['top1']:.2f}",
                "interval": f"{row['top1_low']:.1f} to {row['top1_high']:.1f}",
                "parameters": in_short(row["parameters"]),
                "macs": in_short(row["multiply_adds"]),
                "size": f"{in_short(row['bytes'])}B",
                "latency": [milliseconds(row[f"ms_at_{batch}"]) for batch in batches],
            }
        )
    return {
        "rows": rows,
        "batches": batches,
        "note": latency_note(found) if batches else "",
        "chart": _cost_chart(found) if len(rows) > 1 and costs_differ(found) else None,
        "alike": len(rows) > 1 and not costs_differ(found),
        "alone": _stored_together(found),
    }


def _stored_together(found: Json) -> bool:
    """Whether one file holds all dims, so that sizes are those of the dims' own exports."""
    return len({row["file"] for row in found["costs"].values()}) < len(found["costs"])


def _cost_chart(found: Json) -> Markup:
    rows = dims_rows(found)
    series = Series(
        "top-1",
        [row["multiply_adds"] / 1e6 for row in rows],
        [row["top1"] for row in rows],
        low=[row["top1_low"] for row in rows],
        high=[row["top1_high"] for row in rows],
    )
    return line_chart(
        [series],
        "top-1 accuracy by multiply-adds",
        "million multiply-adds per image",
        "top-1 accuracy (%)",
        x_ticks=series.x,
    )


def class_confusion(found: Json | None) -> dict[str, Any] | None:
    """The matrices for behaviour.js, and the most frequent errors of the widest dim."""
    if not found or found["classes"] < 2:
        return None
    names = found["class_names"]
    widest = list(found["prefixes"])[-1]
    total = [sum(row) for row in found["confusion"].get(widest, [])]
    errors = []
    for true, guess, images in found["confused"][widest]:
        share = 100 * images / total[true] if total else None
        errors.append((names[true], names[guess], images, share))
    data = None
    if found["confusion"] and len(names) <= MAX_DRAWN:
        data = {"names": names, "confusion": found["confusion"]}
    if data is None and not errors:
        return None
    return {"dims": list(found["prefixes"]), "data": data, "errors": errors, "widest": widest}


def maps(found: Json | None) -> dict[str, Any] | None:
    """A map of each dim, and the colours of the classes where these can be told apart."""
    drawn = (found or {}).get("map")
    if not found or not drawn:
        return None
    names = found["class_names"]
    charts = []
    for dim, points in drawn["points"].items():
        top1 = found["prefixes"][dim]["top1"]
        charts.append((dim, f"{top1:.1f}", _map(points, drawn["labels"], names, dim)))
    legend = []
    if len(names) <= MAX_LEGEND:
        legend = [(name, class_colour(k, len(names)), "points") for k, name in enumerate(names)]
    return {
        "charts": charts,
        "legend": legend,
        "method": {"tsne": "t-SNE", "pca": "PCA"}[drawn["method"]],
        "is_tsne": drawn["method"] == "tsne",
        "images": len(drawn["labels"]),
    }


def class_colour(label: int, classes: int) -> str:
    """The colour of a class: hues by the golden angle, three lightnesses in turn."""
    hue = 25 + label * (GOLDEN_ANGLE if classes > 12 else 360 / classes)
    return f"oklch(calc(var(--dot) + {(label % 3 - 1) * 0.1:.2f}) .16 {hue % 360:.0f})"


def _map(
    points: Sequence[Sequence[float]], labels: Sequence[int], names: Sequence[str], dim: str
) -> Markup:
    """A point for each embedding: one path of dots for each class."""
    low = [min(p[axis] for p in points) for axis in (0, 1)]
    high = [max(p[axis] for p in points) for axis in (0, 1)]
    span = max(high[0] - low[0], high[1] - low[1]) or 1.0
    margin = 10
    scale = (SIDE - 2 * margin) / span
    dots: dict[int, list[str]] = {}
    for (x, y), label in zip(points, labels, strict=True):
        across = SIDE / 2 + scale * (x - (low[0] + high[0]) / 2)
        down = SIDE / 2 - scale * (y - (low[1] + high[1]) / 2)
        dots.setdefault(label, []).append(f"M{across:.1f} {down:.1f}h0")
    parts = [
        f'<svg class="chart dots" viewBox="0 0 {SIDE} {SIDE}" role="img" '
        f'aria-label="map of the embeddings with {dim} dimensions">'
        f'<rect class="frame" x=".5" y=".5" width="{SIDE - 1}" height="{SIDE - 1}" rx="6"/>'
    ]
    for label in sorted(dots):
        parts.append(
            f'<path style="stroke:{class_colour(label, len(names))}" d="{"".join(dots[label])}">'
            f"<title>{escape(names[label])}</title></path>"
        )
    return Markup("".join([*parts, "</svg>"]))
