"""What each section of the page shows: numbers in, charts, sentences and rows out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from matryoshka.report.page import paper
from matryoshka.report.page.charts import (
    Series,
    bar_chart,
    heat_map,
    line_chart,
    number,
    reliability,
)
from matryoshka.report.tables import short_dims, wilson_interval

if TYPE_CHECKING:
    from matryoshka.report.page import Evidence

NESTED = ("first", "fourth", "fifth", "sixth", "third")  # of style.css
IMAGENET = 1000  # classes: only then the paper's curves belong into the same chart
INKS = (
    "first",
    "second",
    "fourth",
    "fifth",
    "sixth",
    "third",
)  # of style.css, to tell many curves apart
SETS = ("V1", "V2", "A", "R", "Sketch", "O")


def build(evidence: Evidence) -> dict[str, Any]:
    """The variables of page.html; a section without evidence is None."""
    subject = evidence.results[0]
    analysis = evidence.analysis or {}
    return {
        "headline": headline(subject, analysis),
        "facts": facts(subject, analysis),
        "accuracy": accuracy(evidence.results),
        "sets": other_sets(evidence.results),
        "baselines": methods(evidence.baselines, subject),
        "training": training(evidence),
        "cascade": cascade(analysis, subject),
        "oracle": oracle(analysis),
        "superclasses": superclasses(analysis),
        "calibration": calibration(analysis),
        "agreement": agreement(analysis),
        "classes": classes(analysis),
        "provenance": provenance(evidence),
    }


def top1(results: Mapping[str, Any]) -> dict[int, float]:
    return {int(d): row["top1"] for d, row in results["prefixes"].items()}


def headline(subject: Mapping[str, Any], analysis: Mapping[str, Any]) -> str:
    values = top1(subject)
    first, last = min(values), max(values)
    if first == last:
        return f"{values[last]:.1f} % top-1 with {last} dimensions."
    text = f"{values[first]:.1f} % top-1 with the first {first} dimensions, {values[last]:.1f} % with all {last}."
    if values[last] > 0:
        enough = next(d for d in sorted(values) if values[d] >= values[last] - 1)
        if enough != last:
            text += f" {enough} are enough to come within one point."
    return text


def facts(subject: Mapping[str, Any], analysis: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(number, what it is), the cards at the top."""
    values = top1(subject)
    shown = [(f"{values[d]:.1f} %", f"top-1, {d} dimensions") for d in (min(values), max(values))][
        : len(values)
    ]
    if caps := analysis.get("cascade", {}).get("caps"):
        full = caps[-1]
        shown.append(
            (
                number(full["expected_dim"]["mean"]),
                f"dimensions on average in a cascade, {full['top1']['mean']:.1f} % top-1",
            )
        )
    if oracle := analysis.get("oracle"):
        shown.append((f"{oracle['top1']:.1f} %", "right at some prefix (oracle)"))
    if calibration := analysis.get("calibration"):
        shown.append(
            (f"{list(calibration.values())[-1]['ece']:.1f}", "points of calibration error")
        )
    shown.append((f"{subject['images']:,}", "images evaluated"))
    return shown


def _curve(label: str, values: Mapping[int, float], images: int, colour: str) -> Series:
    sides = [wilson_interval(v, images) for v in values.values()]
    low, high = [a for a, _ in sides], [b for _, b in sides]
    return Series(label, list(values), list(values.values()), low, high, colour)


def accuracy(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The subject, models of other kinds on the same images, and the paper's curves."""
    subject = results[0]
    same = [
        r
        for r in results
        if all(r[key] == subject[key] for key in ("images", "dataset", "data", "classes"))
    ]
    nested = [r for r in same if not r["head"].startswith("ff")]
    fixed = [(d, v) for r in same if r["head"].startswith("ff") for d, v in top1(r).items()]
    series, columns = [], []
    for i, (result, label) in enumerate(zip(nested, _labels(nested), strict=True)):
        series.append(_curve(label, top1(result), result["images"], NESTED[i % len(NESTED)]))
        columns.append((label, top1(result)))
    if fixed:
        fixed.sort()
        sides = [wilson_interval(v, subject["images"]) for _, v in fixed]
        low, high = [a for a, _ in sides], [b for _, b in sides]
        label = "fixed features, a model each"
        series.append(
            Series(
                label, [d for d, _ in fixed], [v for _, v in fixed], low, high, "second", "points"
            )
        )
        columns.append(("fixed features", dict(fixed)))
    own = subject["classes"] == IMAGENET and subject["dataset"] == "V1"
    reference = [
        Series(f"paper: {name}", paper.DIMS, values, colour=colour, style="dashed")
        for (name, values), colour in zip(
            paper.LINEAR.items(), ("third", "fifth", "sixth"), strict=True
        )
    ]
    dims = sorted(
        {d for _, values in columns for d in values} | (set(paper.DIMS) if own else set())
    )
    return {
        "chart": line_chart(
            series + (reference if own else []),
            "top-1 accuracy by dimension",
            "dimensions used",
            "top-1 accuracy (%)",
            dims,
        ),
        "legend": _legend(series + (reference if own else [])),
        "columns": [label for label, _ in columns],
        "rows": [
            (d, [values.get(d) for _, values in columns])
            for d in sorted({d for _, v in columns for d in v})
        ],
        "images": subject["images"],
        "paper": None
        if own
        else {
            "chart": line_chart(
                reference,
                "the paper's accuracy",
                "dimensions used",
                "top-1 accuracy (%)",
                paper.DIMS,
                height=260,
            ),
            "legend": _legend(reference),
        },
    }


def _labels(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Backbone and head; where that is not enough to tell them apart, mirrored images and the run,
    too.
    """
    labels = [f"{r['arch']}, {r['head'].upper()}" for r in results]
    if len(set(labels)) < len(labels):
        tta = [", mirrored images added" if r.get("tta") else "" for r in results]
        run = [PurePath(r["checkpoint"]).parent.name or r["checkpoint"] for r in results]
        labels = [f"{a}{b}, {c}" for a, b, c in zip(labels, tta, run, strict=True)]
    return labels


def _legend(series: Sequence[Series]) -> list[tuple[str, str, str]]:
    return [(s.label, s.ink, s.style) for s in series if s.points()]


def other_sets(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The same checkpoint on several data sets, and what it says of unknown classes."""
    keys = ("checkpoint", "arch", "head", "dims")
    own = [r for r in results if all(r.get(key) == results[0].get(key) for key in keys)]
    unknown = next((r for r in own if any("auroc" in row for row in r["prefixes"].values())), None)
    if len({(r["dataset"], r["data"]) for r in own}) < 2 and unknown is None:
        return None
    own.sort(key=lambda r: SETS.index(r["dataset"]) if r["dataset"] in SETS else len(SETS))
    dims = sorted({int(d) for r in own for d in r["prefixes"]})
    table = [(d, [r["prefixes"].get(str(d)) for r in own]) for d in dims]
    names = [r["dataset"] + (", mirrored" if r.get("tta") else "") for r in own]
    names = [
        n if names.count(n) == 1 else f"{n}, {PurePath(r['data']).name}"
        for n, r in zip(names, own, strict=True)
    ]
    titles = [(name, r["images"]) for name, r in zip(names, own, strict=True)]
    return {"titles": titles, "rows": table, "unknown": unknown}


def methods(
    baselines: Mapping[str, Any] | None, subject: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Other uses of the embedding, and what else could have made it shorter."""
    if not baselines or not baselines.get("methods"):
        return None
    names = list(baselines["methods"])
    dims = sorted({int(d) for m in baselines["methods"].values() for d in m["values"]})
    series = []
    for i, name in enumerate(names):
        method = baselines["methods"][name]
        values = {int(d): v for d, v in method["values"].items() if v is not None}
        std = {int(d): v for d, v in (method.get("std") or {}).items() if v is not None}
        low = [v - std.get(d, 0) for d, v in values.items()] if std else None
        high = [v + std.get(d, 0) for d, v in values.items()] if std else None
        ink, style = INKS[i % len(INKS)], ("line", "dashed")[i // len(INKS) % 2]
        series.append(Series(name, list(values), list(values.values()), low, high, ink, style))
    return {
        "chart": line_chart(
            series, "accuracy of baselines", "dimensions used", "top-1 accuracy (%)", dims
        ),
        "legend": _legend(series),
        "dims": dims,
        "rows": [
            (n, m["metric"], [m["values"].get(str(d)) for d in dims])
            for n, m in baselines["methods"].items()
        ],
        "about": baselines,
    }


def training(evidence: Evidence) -> dict[str, Any] | None:
    run = evidence.run
    if run is None or not run.epochs:
        return None
    curves = run.top1()
    spread = max(len(curves) - 1, 1)
    series = [
        Series(name, list(v), list(v.values()), colour=i / spread)
        for i, (name, v) in enumerate(curves.items())
    ]
    loss = run.column("train_loss")
    epochs = sorted(run.epochs)
    ticks = epochs if len(epochs) <= 12 else epochs[:: max(1, len(epochs) // 10)]
    chart = None
    if any(s.points() for s in series):
        chart = line_chart(
            series, "top-1 accuracy by epoch", "epoch", "top-1 accuracy (%)", ticks, log2=False
        )
    lost = Series("training loss", list(loss), list(loss.values()))
    below = None
    if loss:
        below = line_chart(
            [lost], "training loss by epoch", "epoch", "training loss", ticks, False, False, 220
        )
    return {
        "chart": chart,
        "loss": below,
        "legend": _legend(series),
        "epochs": len(epochs),
        "dims": short_dims(run.dims),
    }


def cascade(analysis: Mapping[str, Any], subject: Mapping[str, Any]) -> dict[str, Any] | None:
    found = analysis.get("cascade")
    if not found:
        return None
    caps = found["caps"]
    means, deviations = [c["top1"]["mean"] for c in caps], [c["top1"]["std"] for c in caps]
    single = {int(d): v for d, v in analysis["top1"].items()}
    certified = [c for c in found["certified"] if c["certified"]]
    series = [
        Series(
            "one prefix for all images",
            list(single),
            list(single.values()),
            colour="third",
            style="dashed",
        ),
        Series(
            "cascade, mean of the splits",
            [c["expected_dim"]["mean"] for c in caps],
            means,
            [m - s for m, s in zip(means, deviations, strict=True)],
            [m + s for m, s in zip(means, deviations, strict=True)],
            "first",
            "line",
        ),
        Series(
            f"certified ({100 * (1 - found['delta']):g} %)",
            [c["expected_dim"] for c in certified],
            [c["top1"] for c in certified],
            colour="second",
            style="diamonds",
        ),
    ]
    chart = line_chart(
        series, "accuracy of cascades", "mean dimensions used", "top-1 accuracy (%)", list(single)
    )
    return {"chart": chart, "legend": _legend(series), "found": found, "last": max(single)}


def oracle(analysis: Mapping[str, Any]) -> dict[str, Any] | None:
    found = analysis.get("oracle")
    if not found:
        return None
    shares = found["first_right"]
    chart = bar_chart(
        list(shares), list(shares.values()), "the first prefix that is right", "images (%)"
    )
    return {"chart": chart, "found": found}


def superclasses(analysis: Mapping[str, Any]) -> dict[str, Any] | None:
    found = analysis.get("superclasses")
    if not found:
        return None
    dims = list(found["confusion"])
    rows = []
    for k, name in enumerate(found["names"]):
        if found["images"][k]:
            right = [100 * found["confusion"][d][k][k] / found["images"][k] for d in dims]
            within = [found["within"][d][k] if found["within"] else None for d in dims]
            rows.append((name, found["classes"][k], found["images"][k], right, within))
    return {
        "dims": dims,
        "rows": rows,
        "found": found,
        "has_within": bool(found["within"]),
        "data": {"names": found["names"], "confusion": found["confusion"]},
    }


def calibration(analysis: Mapping[str, Any]) -> dict[str, Any] | None:
    found = analysis.get("calibration")
    if not found:
        return None
    charts: list[tuple[str, Markup, dict]] = []
    for dim, row in found.items():
        bins = row["bins"]
        charts.append(
            (
                dim,
                reliability(f"{dim} dimensions", bins["confidence"], bins["top1"], bins["images"]),
                row,
            )
        )
    return {"charts": charts}


def agreement(analysis: Mapping[str, Any]) -> Markup | None:
    if not analysis.get("agreement") or len(analysis["dims"]) < 2:
        return None
    return heat_map(
        [str(d) for d in analysis["dims"]], analysis["agreement"], "agreement between prefixes"
    )


def classes(analysis: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table of classes, as behaviour.js wants it: it sorts, searches and turns pages."""
    found = analysis.get("per_class")
    if not found:
        return None
    rows = [[r["shown"], r["name"], r["images"], r["trend"], *r["top1"]] for r in found]
    return {"dims": analysis["dims"], "rows": rows, "trends": analysis["trends"]}


def provenance(evidence: Evidence) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, [(name, value)]): what produced the numbers."""
    subject = evidence.results[0]
    names = {
        "checkpoint": "checkpoint",
        "arch": "backbone",
        "head": "head",
        "data": "images of",
        "dataset": "data set",
        "classes": "classes",
        "preprocessing": "preprocessing",
        "resolution": "pixels",
        "tta": "mirrored images added",
        "precision": "precision",
        "images_per_s": "images/s",
    }
    groups = [
        (
            "Evaluation",
            [
                (text, _said(subject[key]))
                for key, text in names.items()
                if subject.get(key) is not None
            ],
        )
    ]
    groups[0][1].extend(_machine(subject.get("environment")))
    if evidence.run is not None:
        groups.append(("Training machine", _machine(evidence.environment)))
        groups.append(
            ("Training options", [(k, _said(v)) for k, v in sorted(evidence.run.params.items())])
        )
    return [(title, rows) for title, rows in groups if rows]


def _machine(environment: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not environment:
        return []
    hardware, git = environment.get("hardware") or {}, environment.get("git")
    code = (
        "not a checkout"
        if not git
        else git["commit"][:12] + (" with changes" if git["dirty"] else "")
    )
    gpus = hardware.get("gpus") or []
    rows = [("code", code), ("CPU", f"{hardware.get('cpu')}, {hardware.get('cores')} cores")]
    rows += [("GPU", f"{len(gpus)} x {gpus[0]}")] if gpus else []
    rows += [("processes", _said(environment.get("world_size")))]
    versions = {name: v for name, v in (environment.get("versions") or {}).items() if v}
    rows.append(
        (
            "versions",
            ", ".join(
                f"{n} {v}" for n, v in {"python": environment.get("python"), **versions}.items()
            ),
        )
    )
    return rows


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value) if abs(value) >= 1 else f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
