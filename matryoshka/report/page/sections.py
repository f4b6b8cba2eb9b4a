"""Contents of the page's sections: JSON results in, charts, sentences and table rows out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from matryoshka.report import statements
from matryoshka.report.page import dim_sections, paper, ssl_sections
from matryoshka.report.page.charts import (
    Series,
    bar_chart,
    heat_map,
    line_chart,
    number,
    reliability,
)
from matryoshka.report.statements import top1_by_dim
from matryoshka.report.tables import wilson_interval

if TYPE_CHECKING:
    from matryoshka.report.page import Evidence

# Colour variables of style.css: for models, and to tell the curves of many methods apart.
MODEL_COLOURS = ("first", "fourth", "fifth", "sixth", "third")
METHOD_COLOURS = ("first", "second", "fourth", "fifth", "sixth", "third")
PAPER_COLOURS = ("third", "fifth", "sixth")

IMAGENET = 1000  # classes; only then are the paper's curves comparable and share the chart
SETS = ("V1", "V2", "A", "R", "Sketch", "O")  # order of the columns

Json = Mapping[str, Any]
Legend = list[tuple[str, str, str]]  # (label, colour, style)


def build(evidence: Evidence) -> dict[str, Any]:
    """The variables of page.html; a section without evidence is None."""
    analysis = evidence.analysis or {}
    run = ssl_sections.self_supervised(evidence.run)
    return {
        **(_of_evaluation(evidence.results, analysis) or _of_run(run)),
        "ssl": run,
        "baselines": methods(evidence.baselines),
        "training": training(evidence),
        "cascade": cascade(analysis),
        "oracle": oracle(analysis),
        "superclasses": superclasses(analysis),
        "calibration": calibration(analysis),
        "agreement": agreement(analysis),
        "classes": classes(analysis),
        "cost": dim_sections.cost(evidence.dims),
        "confusion": dim_sections.class_confusion(evidence.dims),
        "maps": dim_sections.maps(evidence.dims),
        "provenance": provenance(evidence),
    }


def _of_evaluation(results: Sequence[Json], analysis: Json) -> dict[str, Any] | None:
    """What comes from the results of an evaluation."""
    if not results:
        return None
    return {
        "headline": statements.headline(results[0], analysis),
        "facts": facts(results[0], analysis),
        "accuracy": accuracy(results),
        "sets": other_sets(results),
    }


def _of_run(run: Json | None) -> dict[str, Any]:
    """The same for a self-supervised run alone, whose classifiers nobody has trained."""
    return {
        "headline": ssl_sections.headline(run) if run else "",
        "facts": ssl_sections.facts(run) if run else [],
        "accuracy": None,
        "sets": None,
    }


# ---------------------------------------------------------------- headline


def facts(subject: Json, analysis: Json) -> list[tuple[str, str]]:
    """The cards at the top: (number, what it measures)."""
    values = top1_by_dim(subject)
    shown = []
    for d in sorted({min(values), max(values)}):
        low, high = wilson_interval(values[d], subject["images"])
        unit = "dimension" if d == 1 else "dimensions"
        shown.append((f"{values[d]:.1f} %", f"top-1, {d} {unit} ({low:.1f} to {high:.1f})"))
    certificate = statements.certified_cascade(analysis)
    if certificate:
        shown.append(
            (
                number(certificate["expected_dim"]),
                "dimensions on average in a cascade, certified to lose at most one point",
            )
        )
    oracle = analysis.get("oracle")
    if oracle and len(values) > 1:
        shown.append((f"{oracle['top1']:.1f} %", "some prefix is right: a bound, not a method"))
    calibration = analysis.get("calibration")
    if calibration:
        longest = list(calibration.values())[-1]
        shown.append((f"{longest['ece']:.1f}", "points of calibration error"))
    shown.append((f"{subject['images']:,}", "images evaluated"))
    return shown


# ---------------------------------------------------------------- accuracy


def accuracy(results: Sequence[Json]) -> dict[str, Any]:
    """The subject, other models on the same images, and the paper's curves."""
    subject = results[0]
    images = subject["images"]
    # Accuracies are comparable only on the same images with the same classes.
    image_set = itemgetter("images", "dataset", "data", "classes")
    same = [r for r in results if image_set(r) == image_set(subject)]
    nested = [r for r in same if not r["head"].startswith("ff")]
    fixed = [r for r in same if r["head"].startswith("ff")]

    series = []
    columns = []
    for i, (result, label) in enumerate(zip(nested, _labels(nested), strict=True)):
        colour = MODEL_COLOURS[i % len(MODEL_COLOURS)]
        values = list(top1_by_dim(result).items())
        series.append(_with_intervals(label, values, result["images"], colour=colour))
        columns.append((label, dict(values)))
    if fixed:  # models of one width each are one series of points
        values = []
        for r in fixed:
            values += top1_by_dim(r).items()
        values.sort()
        label = "fixed features, a model each"
        series.append(_with_intervals(label, values, images, colour="second", style="points"))
        columns.append(("fixed features", dict(values)))

    reference = []
    for (name, values), colour in zip(paper.LINEAR.items(), PAPER_COLOURS, strict=True):
        line = Series(f"paper: {name}", paper.DIMS, values, colour=colour, style="dashed")
        reference.append(line)
    # On other data the paper's accuracies are no reference: its curves get a separate chart.
    comparable = subject["classes"] == IMAGENET and subject["dataset"] == "V1"
    dims = sorted(set().union(*(values for _, values in columns)))
    ticks = sorted({*dims, *paper.DIMS}) if comparable else dims
    if comparable:
        series += reference
    rows = []
    for d in dims:
        rows.append((d, [values.get(d) for _, values in columns]))
    chart = None  # for a single number
    if len(rows) > 1 or len(columns) > 1 or comparable:
        chart = line_chart(
            series,
            "top-1 accuracy by dimension",
            "dimensions used",
            "top-1 accuracy (%)",
            x_ticks=ticks,
        )
    return {
        "chart": chart,
        "legend": _legend(series),
        "columns": [label for label, _ in columns],
        "rows": rows,
        "images": images,
        "widths": statements.has_widths(subject),
        "paper": None if comparable else _reference_chart(reference),
    }


def _reference_chart(reference: Sequence[Series]) -> dict[str, Any]:
    chart = line_chart(
        reference,
        "the paper's accuracy",
        "dimensions used",
        "top-1 accuracy (%)",
        x_ticks=paper.DIMS,
        height=260,
    )
    return {"chart": chart, "legend": _legend(reference)}


def _with_intervals(
    label: str,
    values: Sequence[tuple[int, float]],
    images: int,
    *,
    colour: str,
    style: str = "line",
) -> Series:
    """A series of (dim, percent) with 95 % intervals."""
    intervals = [wilson_interval(percent, images) for _, percent in values]
    return Series(
        label,
        [dim for dim, _ in values],
        [percent for _, percent in values],
        low=[low for low, _ in intervals],
        high=[high for _, high in intervals],
        colour=colour,
        style=style,
    )


def _labels(results: Sequence[Json]) -> list[str]:
    """Backbone and head; if these are ambiguous, also test-time augmentation and run."""
    labels = [f"{r['arch']}, {r['head'].upper()}" for r in results]
    if len(set(labels)) == len(labels):
        return labels
    longer = []
    for label, r in zip(labels, results, strict=True):
        tta = ", mirrored images added" if r.get("tta") else ""
        run = PurePath(r["checkpoint"]).parent.name or r["checkpoint"]
        longer.append(f"{label}{tta}, {run}")
    return longer


def _legend(series: Sequence[Series]) -> Legend:
    return [(s.label, s.css_colour, s.style) for s in series if s.points()]


def other_sets(results: Sequence[Json]) -> dict[str, Any] | None:
    """The subject's checkpoint on several test sets, and its detection of unknown classes."""
    keys = ("checkpoint", "arch", "head", "dims")
    own = []
    for r in results:
        if all(r.get(key) == results[0].get(key) for key in keys):
            own.append(r)
    unknown = None
    for r in own:
        if unknown is None and any("auroc" in row for row in r["prefixes"].values()):
            unknown = r
    if len({(r["dataset"], r["data"]) for r in own}) < 2 and unknown is None:
        return None

    order = {name: position for position, name in enumerate(SETS)}
    own.sort(key=lambda r: order.get(r["dataset"], len(SETS)))  # unknown sets last
    names = [r["dataset"] + (", mirrored" if r.get("tta") else "") for r in own]
    titles = []
    for name, r in zip(names, own, strict=True):
        unique = name if names.count(name) == 1 else f"{name}, {PurePath(r['data']).name}"
        titles.append((unique, r["images"]))
    dims = sorted({int(d) for r in own for d in r["prefixes"]})
    rows = []
    for d in dims:
        rows.append((d, [r["prefixes"].get(str(d)) for r in own]))
    return {"titles": titles, "rows": rows, "unknown": unknown}


def methods(baselines: Json | None) -> dict[str, Any] | None:
    """The table and chart of baselines.json."""
    if not baselines or not baselines.get("methods"):
        return None
    by_name = baselines["methods"]
    dims = sorted({int(d) for method in by_name.values() for d in method["values"]})
    series = []
    for i, (name, method) in enumerate(by_name.items()):
        values = {int(d): v for d, v in method["values"].items() if v is not None}
        std = {int(d): v for d, v in (method.get("std") or {}).items() if v is not None}
        low = high = None
        if std:
            low = [v - std.get(d, 0) for d, v in values.items()]
            high = [v + std.get(d, 0) for d, v in values.items()]
        colour = METHOD_COLOURS[i % len(METHOD_COLOURS)]
        # With more methods than colours, the second round is dashed.
        style = ("line", "dashed")[i // len(METHOD_COLOURS) % 2]
        series.append(
            Series(
                name,
                list(values),
                list(values.values()),
                low=low,
                high=high,
                colour=colour,
                style=style,
            )
        )
    rows = []
    for name, method in by_name.items():
        rows.append((name, method["metric"], [method["values"].get(str(d)) for d in dims]))
    chart = line_chart(
        series, "accuracy of baselines", "dimensions used", "top-1 accuracy (%)", x_ticks=dims
    )
    return {"chart": chart, "legend": _legend(series), "dims": dims, "rows": rows}


# ---------------------------------------------------------------- training


def training(evidence: Evidence) -> dict[str, Any] | None:
    run = evidence.run
    if run is None or not run.epochs:
        return None
    if ssl_sections.method_of(run) is not None:
        return None  # has a section of its own
    curves = run.top1()
    series = []
    for i, (name, values) in enumerate(curves.items()):
        position = i / max(len(curves) - 1, 1)  # on the colour ramp
        series.append(Series(name, list(values), list(values.values()), colour=position))

    epochs = sorted(run.epochs)
    # Numbers of more epochs would overlap on the axis.
    ticks = epochs if len(epochs) <= 12 else epochs[:: max(1, len(epochs) // 10)]
    chart = None
    if any(s.points() for s in series):
        chart = line_chart(
            series,
            "top-1 accuracy by epoch",
            "epoch",
            "top-1 accuracy (%)",
            x_ticks=ticks,
            log2=False,
        )
    loss = run.column("train_loss")
    loss_chart = None
    if len(loss) > 1:
        loss_chart = line_chart(
            [Series("training loss", list(loss), list(loss.values()))],
            "training loss by epoch",
            "epoch",
            "training loss",
            x_ticks=ticks,
            log2=False,
            percent=False,
            height=220,
        )
    return {"chart": chart, "loss": loss_chart, "legend": _legend(series), "epochs": len(epochs)}


# ---------------------------------------------------------------- analysis.json


def cascade(analysis: Json) -> dict[str, Any] | None:
    found = analysis.get("cascade")
    if not found:
        return None
    caps = found["caps"]
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
            [c["top1"]["mean"] for c in caps],
            low=[c["top1"]["mean"] - c["top1"]["std"] for c in caps],
            high=[c["top1"]["mean"] + c["top1"]["std"] for c in caps],
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
        series,
        "accuracy of cascades",
        "mean dimensions used",
        "top-1 accuracy (%)",
        x_ticks=list(single),
    )
    return {
        "chart": chart,
        "legend": _legend(series),
        "found": found,
        "sentence": statements.cascade_sentence(analysis),
    }


def oracle(analysis: Json) -> dict[str, Any] | None:
    found = analysis.get("oracle")
    if not found or len(analysis["dims"]) < 2:  # of one prefix it is the accuracy
        return None
    shares = found["first_right"]
    chart = bar_chart(
        list(shares), list(shares.values()), "the first prefix that is right", "images (%)"
    )
    return {"chart": chart, "found": found, "sentence": statements.vote_sentence(analysis)}


def superclasses(analysis: Json) -> dict[str, Any] | None:
    found = analysis.get("superclasses")
    if not found:
        return None
    dims = list(found["confusion"])
    rows = []
    for k, name in enumerate(found["names"]):
        images = found["images"][k]
        if not images:
            continue
        right = [100 * found["confusion"][d][k][k] / images for d in dims]
        within = [found["within"][d][k] if found["within"] else None for d in dims]
        rows.append((name, found["classes"][k], images, right, within))
    return {
        "dims": dims,
        "rows": rows,
        "found": found,
        "has_within": bool(found["within"]),
        "sentence": statements.superclass_sentence(analysis),
        "data": {"names": found["names"], "confusion": found["confusion"]},
    }


def calibration(analysis: Json) -> dict[str, Any] | None:
    found = analysis.get("calibration")
    if not found:
        return None
    charts: list[tuple[str, Markup, dict]] = []
    for dim, row in found.items():
        bins = row["bins"]
        chart = reliability(f"{dim} dimensions", bins["confidence"], bins["top1"], bins["images"])
        charts.append((dim, chart, row))
    return {"charts": charts}


def agreement(analysis: Json) -> dict[str, Any] | None:
    if not analysis.get("agreement") or len(analysis["dims"]) < 2:
        return None
    values = analysis["agreement"]
    if min(min(row) for row in values) == 100:  # a chart of one shade
        return {"chart": None}
    names = [str(d) for d in analysis["dims"]]
    return {"chart": heat_map(names, values, "agreement between prefixes")}


def classes(analysis: Json) -> dict[str, Any] | None:
    """The table of classes as data for behaviour.js, which sorts, searches and paginates it."""
    found = analysis.get("per_class")
    if not found:
        return None
    rows = [[r["shown"], r["name"], r["images"], r["trend"], *r["top1"]] for r in found]
    return {
        "dims": analysis["dims"],
        "rows": rows,
        "trends": analysis["trends"],
        "sentence": statements.classes_sentence(analysis),
    }


# ---------------------------------------------------------------- provenance

EVALUATION_FIELDS = {
    "checkpoint": "checkpoint",
    "arch": "backbone",
    "head": "head",
    "data": "images of",
    "dataset": "data set",
    "split": "part",
    "classes": "classes",
    "preprocessing": "preprocessing",
    "resolution": "pixels",
    "tta": "mirrored images added",
    "precision": "precision",
    "images_per_s": "images/s",
}


def provenance(evidence: Evidence) -> list[tuple[str, list[tuple[str, str]]]]:
    """Provenance of the numbers: (title, [(name, value)]) of each table."""
    subject = evidence.results[0] if evidence.results else {}
    evaluation = []
    is_own = subject.get("dataset") == "V1" and subject.get("classes") != IMAGENET
    for key, name in EVALUATION_FIELDS.items():
        if key == "dataset" and is_own:
            continue  # not ImageNet's: "images of" names the folder
        if subject.get(key) is not None:
            evaluation.append((name, _text(subject[key])))
    evaluation += _machine(subject.get("environment"))

    groups = [("Evaluation", evaluation)]
    if evidence.run is not None:
        options = [(key, _text(value)) for key, value in sorted(evidence.run.params.items())]
        groups.append(("Training machine", _machine(evidence.environment)))
        groups.append(("Training options", options))
    return [(title, rows) for title, rows in groups if rows]


def _machine(environment: Json | None) -> list[tuple[str, str]]:
    if not environment:
        return []
    git = environment.get("git")
    code = "not a checkout"
    if git:
        code = git["commit"][:12] + (" with changes" if git["dirty"] else "")

    hardware = environment.get("hardware") or {}
    gpus = hardware.get("gpus") or []
    rows = [("code", code), ("CPU", f"{hardware.get('cpu')}, {hardware.get('cores')} cores")]
    if gpus:
        rows.append(("GPU", f"{len(gpus)} x {gpus[0]}"))
    rows.append(("processes", _text(environment.get("world_size"))))

    versions = [f"python {environment.get('python')}"]
    for name, version in (environment.get("versions") or {}).items():
        if version:
            versions.append(f"{name} {version}")
    rows.append(("versions", ", ".join(versions)))
    return rows


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value) if abs(value) >= 1 else f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
