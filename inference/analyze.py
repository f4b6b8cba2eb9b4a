"""Analyses of the saved predictions of all prefixes: cascades, oracle, superclasses, calibration.

    matryoshka eval --path model.safetensors --data-root val.beton \\
        --save_logits --save_gt --output out/results.json
    matryoshka analyze --results out/results.json        # writes out/analysis.json
    matryoshka analyze --softmax mrl=True_..._softmax.pth --gt gt_dataset=V1.pth \\
        --dims 8,16,32,64,128,256,512,1024,2048

Needs the labels (gt) and logits or softmax. With predictions alone: oracle, superclasses, trends
and agreement.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matryoshka import config
from matryoshka.evaluation.options import analyze_parser as parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

import numpy as np

from matryoshka.evaluation import analysis, superclasses
from matryoshka.evaluation.cascade import (
    GRID,
    cascade,
    certify,
    certify_held_out,
    compare_with_longest,
    split_indices,
)
from matryoshka.evaluation.options import ANALYSES, SCORES
from matryoshka.evaluation.prediction_arrays import (
    ArrayError,
    PredictionArrays,
    from_files,
    from_results,
)
from matryoshka.evaluation.width_table import WidthImages, width_analysis, width_lines
from matryoshka.files import write_atomically
from matryoshka.report import statements
from matryoshka.report.claims import against_constant, paired

NEED_SCORES = ("cascade", "widths", "calibration")
# Images that a temperature is fitted on: one parameter needs no more, and Newton's method computes
# the softmax of all of them in each iteration.
MAX_FIT_IMAGES = 5000


@dataclass(frozen=True)
class Answers:
    """The predictions of G prefixes for N images: [G, N] each."""

    arrays: PredictionArrays
    predictions: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    requested, epsilons = check(args)
    started = time.perf_counter()
    arrays = from_results(args.results) if args.results else from_files(vars(args))
    # By default, an analysis that these arrays do not allow is left out; a requested one is an
    # error.
    explicit = args.only != ANALYSES
    analyses = possible_analyses(requested, arrays, args, explicit)
    validation = open_validation(args, arrays)
    output = Path(args.output) if args.output else Path(args.results or "").parent / "analysis.json"
    if not output.resolve().parent.is_dir():
        raise config.ConfigError(f"--output {output}: its folder does not exist; make it first")

    predictions, confidence = arrays.answers()
    answers = Answers(arrays, predictions, confidence, predictions == arrays.labels)
    found: dict[str, Any] = {
        **arrays.metadata,
        "dims": list(arrays.dims),
        "images": len(arrays.labels),
        "classes": arrays.num_classes,
        "seed": args.seed,
        "top1": by_dim(arrays, percentages(answers.correct.mean(1))),
        **pairs_of_prefixes(answers),
    }
    print(
        f"{found['images']:,} images, {arrays.num_classes} classes, prefixes "
        f"{' '.join(map(str, arrays.dims))}"
    )
    subject = {
        "prefixes": {dim: {"top1": value} for dim, value in found["top1"].items()},
        "images": found["images"],
    }
    print(statements.headline(subject, found))
    for name in analyses:
        if name == "cascade":
            found[name] = analyze_cascade(answers, args, epsilons)
        elif name == "widths":
            found[name] = analyze_widths(answers, validation, args, epsilons)
        elif name == "oracle":
            found[name] = analyze_oracle(answers)
        elif name == "superclasses":
            grouping = find_superclasses(arrays, args.superclasses)
            if grouping is not None:
                found[name] = analyze_superclasses(answers, grouping)
        elif name == "trends":
            found |= analyze_classes(answers)
        elif name == "calibration":
            found[name] = analyze_calibration(answers, args)
        elif name == "agreement":
            found[name] = analyze_agreement(answers)
        sentence = statements.about(name, found)
        if sentence:
            print(f"  {sentence}")

    found["seconds"] = round(time.perf_counter() - started, 2)
    write_atomically(output, (json.dumps(found, indent=1) + "\n").encode())
    print(f"\nanalysis  {output}  ({found['seconds']:.1f} s)")
    return 0


# ---------------------------------------------------------------- options


def check(args: SimpleNamespace) -> tuple[list[str], list[float]]:
    """(analyses, epsilons in points). ConfigError for arrays given twice."""
    arrays = [name for name in (*SCORES, "gt", "dims") if getattr(args, name)]
    if args.results and arrays:
        raise config.ConfigError(
            f"--results {args.results}: names its own arrays; drop --{arrays[0]}, or --results"
        )
    if args.results and args.macs:
        raise config.ConfigError(
            f"--results {args.results}: has the multiply-adds of its widths; drop --macs"
        )
    return list(args.only), list(args.epsilon)


def open_validation(args: SimpleNamespace, arrays: PredictionArrays) -> PredictionArrays | None:
    """The predictions of --validation. ArrayError unless they are of the same widths."""
    if args.validation is None:
        return None
    if "widths" not in args.only or arrays.macs is None:
        raise ArrayError(
            f"--validation {args.validation}: is for the analysis `widths` of a family of widths, "
            "such as vit_nested; leave it out"
        )
    validation = from_results(args.validation)
    file = f"--validation {args.validation}"
    if validation.scores is None:
        raise ArrayError(f"{file}: has predictions only; evaluate with --save_logits")
    if (validation.dims, validation.num_classes) != (arrays.dims, arrays.num_classes):
        raise ArrayError(
            f"{file}: has widths {list(validation.dims)} and {validation.num_classes} classes, not "
            f"{list(arrays.dims)} and {arrays.num_classes}; evaluate the same model on other images"
        )
    for key, what in (("checkpoint", "another model"), ("data", "the same images")):
        ours, theirs = arrays.metadata.get(key), validation.metadata.get(key)
        known = ours is not None and theirs is not None
        if known and (ours == theirs) == (key == "data"):
            raise ArrayError(
                f"{file}: is of {what}, {theirs}; thresholds need the same model on other images"
            )
    return validation


def possible_analyses(
    requested: Sequence[str], arrays: PredictionArrays, args: SimpleNamespace, explicit: bool
) -> list[str]:
    """The requested analyses that the arrays allow; for the others a note, or an error.

    explicit: whether --only names them, which makes it an error.
    """
    possible = []
    reasons = impossible_analyses(arrays, args)
    for name in requested:
        if name not in reasons:
            possible.append(name)
        elif explicit:
            raise ArrayError(f"--only {name}: {reasons[name]}")
        elif name != "widths" or arrays.macs is not None:  # most models are no family
            print(f"note: no {name}: {reasons[name]}")
    return possible


def impossible_analyses(arrays: PredictionArrays, args: SimpleNamespace) -> dict[str, str]:
    """The analyses that the arrays do not allow, with the reason."""
    n = len(arrays.labels)
    if arrays.scores is None:
        return dict.fromkeys(
            NEED_SCORES, "needs --logits or --softmax; save them with eval --save_logits"
        )
    if len(arrays.dims) < 2:
        return dict.fromkeys(("cascade", "widths"), "needs two prefixes or more")
    reasons = {}
    if not 0 < round(args.learn * n) < n:
        too_few = f"needs more than {n} images, to learn from some and measure on others"
        reasons["cascade"] = too_few
        if args.validation is None:
            reasons["widths"] = too_few
    if arrays.macs is None:
        reasons["widths"] = (
            "is for a family of widths (vit_nested, ...): the prefixes of one trunk come from one "
            "pass; results.json of such a model has its multiply-adds, for arrays give --macs"
        )
    return reasons


# ---------------------------------------------------------------- numbers for JSON


def percentages(values: np.ndarray) -> list[float | None]:
    """Fractions as percent, rounded to 0.001; None for NaN, which JSON lacks."""
    return [None if np.isnan(v) else round(100 * float(v), 3) for v in values]


def spread(values: np.ndarray, factor: float = 1.0) -> dict[str, float]:
    """Mean and sample standard deviation over splits."""
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return {
        "mean": round(factor * float(values.mean()), 4),
        "std": round(factor * float(deviation), 4),
    }


def by_dim(arrays: PredictionArrays, values: Sequence) -> dict[str, Any]:
    return {str(dim): value for dim, value in zip(arrays.dims, values, strict=True)}


def pairs_of_prefixes(answers: Answers) -> dict[str, Any]:
    """Images that only one of two has right: what tests of a difference need.

    `paired`: each shorter prefix against the longest. `against_constant`: each prefix against
    always answering the most frequent class.
    """
    arrays = answers.arrays
    correct = answers.correct
    images = np.bincount(arrays.labels, minlength=arrays.num_classes)
    against_longest = {}
    constant = {}
    for dim, right in zip(arrays.dims, correct, strict=True):
        if dim != arrays.dims[-1]:
            against_longest[str(dim)] = paired(right, correct[-1])._asdict()
        hits = np.bincount(arrays.labels[right], minlength=arrays.num_classes)
        constant[str(dim)] = against_constant(hits, images)._asdict()
    return {"paired": against_longest, "against_constant": constant}


# ------------------------------------- the analyses: each prints a table and returns its JSON value


def analyze_cascade(
    answers: Answers, args: SimpleNamespace, epsilons: Sequence[float]
) -> dict[str, Any]:
    arrays = answers.arrays
    n = len(arrays.labels)
    learned = round(args.learn * n)
    result = cascade(
        answers.confidence,
        answers.correct,
        arrays.dims,
        splits=args.splits,
        learn=args.learn,
        seed=args.seed,
    )
    print(
        f"\n== cascade: thresholds from {learned:,} images, measured on {n - learned:,}; "
        f"{args.splits} splits"
    )
    print("  ends at    top-1 %           mean dim           dims asked    threshold before")
    caps = []
    for g, dim in enumerate(arrays.dims):
        top1 = spread(result.accuracy[:, g], 100)
        expected = spread(result.expected_dim[:, g])
        cumulative = spread(result.cumulative_dim[:, g])
        threshold = spread(result.thresholds[:, g - 1]) if g else None
        caps.append(
            {
                "dim": dim,
                "top1": top1,
                "expected_dim": expected,
                "cumulative_dim": cumulative,
                "threshold": threshold,
            }
        )
        shown = f"{threshold['mean']:10.3f}" if threshold else f"{'-':>10}"
        print(
            f"  {dim:7d}"
            f"  {top1['mean']:8.2f} ± {top1['std']:<6.2f}"
            f"  {expected['mean']:8.2f} ± {expected['std']:<6.2f}"
            f"  {cumulative['mean']:10.2f}  {shown}"
        )
    against_longest = compare_with_longest(
        answers.confidence, answers.correct, learn=args.learn, seed=args.seed
    )
    return {
        "against_longest": against_longest._asdict(),
        "splits": args.splits,
        "learn_images": learned,
        "test_images": n - learned,
        "grid": [float(GRID[0]), float(GRID[-1]), len(GRID)],
        "caps": caps,
        "delta": args.delta,
        "certified": [analyze_certificate(answers, args, points) for points in epsilons],
    }


def analyze_certificate(answers: Answers, args: SimpleNamespace, points: float) -> dict[str, Any]:
    """A certificate from all images, and a check of certificates from random halves.

    points: epsilon in percentage points.
    """
    dims = answers.arrays.dims
    inputs = (answers.confidence, answers.correct, dims)
    options = {"epsilon": points / 100, "delta": args.delta, "seed": args.seed}
    whole = certify(*inputs, **options)
    held_out = certify_held_out(*inputs, splits=args.splits, **options)
    losses = 100 * held_out.loss
    above = int((losses > points).sum())
    if whole.certified:
        result = (
            f"certified at {100 * (1 - args.delta):g} %: at most {points:g} points lost with "
            f"{whole.expected_dim:.1f} of {dims[-1]} dims"
        )
    else:
        result = (
            f"not certified at {100 * (1 - args.delta):g} %: these images do not show that a "
            f"cascade loses at most {points:g} points"
        )
    print(
        f"  {result}; certified on one half of the images and measured on the other: "
        f"{losses.mean():.2f} lost, above {points:g} in {above} of {len(losses)} splits"
    )
    return {
        "epsilon": points,
        "certified": whole.certified,
        "expected_dim": whole.expected_dim,
        "thresholds": [None if np.isinf(t) else float(t) for t in whole.thresholds],
        "loss_bound": round(100 * whole.loss_bound, 4),
        "top1": round(100 * whole.accuracy, 3),
        "held_out": {
            "loss": spread(losses),
            "expected_dim": spread(held_out.expected_dim),
            "above": above,
        },
    }


def analyze_widths(
    answers: Answers,
    validation: PredictionArrays | None,
    args: SimpleNamespace,
    epsilons: Sequence[float],
) -> dict[str, Any]:
    """Cascades over widths that each run on their own; thresholds come from other images."""
    arrays = answers.arrays
    assert arrays.macs is not None
    whole = WidthImages(arrays_confidence(arrays, args.confidence), answers.correct)
    if validation is not None:
        right = validation.answers()[0] == validation.labels
        learn, test = WidthImages(arrays_confidence(validation, args.confidence), right), whole
    else:
        n = len(arrays.labels)
        ((part, rest),) = split_indices(n, 1, round(args.learn * n), args.seed)
        learn, test = whole.some(part), whole.some(rest)
    found = {
        "confidence": args.confidence,
        "validation": args.validation,
        **width_analysis(
            (arrays.dims, arrays.macs),
            learn,
            test,
            epsilons=epsilons,
            delta=args.delta,
            seed=args.seed,
        ),
    }
    source = args.validation or "a share of the images"
    print(
        f"\n== widths: thresholds from {found['learn_images']:,} images ({source}), measured on "
        f"{found['test_images']:,}; confidence: {args.confidence}"
    )
    print("\n".join(f"  {line}" for line in width_lines(found)))
    return found


def arrays_confidence(arrays: PredictionArrays, kind: str) -> np.ndarray:
    """Confidence of all images, float32 [G, N]; kind: one of CONFIDENCES."""
    return arrays.entropy_confidence() if kind == "entropy" else arrays.answers()[1]


def analyze_oracle(answers: Answers) -> dict[str, Any]:
    arrays = answers.arrays
    result = analysis.oracle(answers.predictions, arrays.labels, arrays.dims)
    names = [*map(str, arrays.dims), "never"]
    shares = dict(zip(names, percentages(result.shares), strict=True))
    print("\n== oracle: the first prefix that is right, % of the images")
    print("  " + "  ".join(f"{name:>6}" for name in shares))
    print("  " + "  ".join(f"{value:6.2f}" for value in shares.values()))
    print(
        f"  some prefix is right {100 * result.accuracy:.2f} %, the majority "
        f"{100 * result.majority_accuracy:.2f} %, the longest "
        f"{100 * answers.correct[-1].mean():.2f} %; mean dim of the oracle "
        f"{result.expected_dim:.1f}"
    )
    vote = analysis.majority_vote(answers.predictions) == arrays.labels
    return {
        "vote_against_longest": paired(vote, answers.correct[-1])._asdict(),
        "first_right": shares,
        "top1": round(100 * result.accuracy, 3),
        "expected_dim": result.expected_dim,
        "majority_top1": round(100 * result.majority_accuracy, 3),
    }


def find_superclasses(arrays: PredictionArrays, level: str | None) -> superclasses.Grouping | None:
    """The groups of the classes; None, with a note, if the classes are not of ImageNet.

    level: --superclasses; if given, classes without groups are an error.
    """
    try:
        if arrays.class_names is None:
            raise superclasses.SuperclassError(
                "--superclasses: the classes have no names; analyze --results FILE"
            )
        return superclasses.superclasses(arrays.class_names, level)
    except superclasses.SuperclassError as error:
        if level is not None:
            raise
        print(f"\nnote: left out: {error}")
        return None


def analyze_superclasses(answers: Answers, grouping: superclasses.Grouping) -> dict[str, Any]:
    arrays = answers.arrays
    groups, names = grouping.groups, grouping.names
    count = len(names)
    images = np.bincount(groups[arrays.labels], minlength=count)
    confusions = {}
    top1 = {}
    within = {}
    print(f"\n== superclasses: {count}-way (with '{names[0]}': {images[0]:,} images)")
    print("  prefix   top-1 %  within the group %")
    for g, dim in enumerate(arrays.dims):
        confusion = analysis.superclass_confusion(
            answers.predictions[g], arrays.labels, groups, count
        )
        accuracy, each = analysis.superclass_accuracy(confusion)
        confusions[str(dim)] = confusion.tolist()
        top1[str(dim)] = round(100 * accuracy, 3)
        line = f"  {dim:6d}  {top1[str(dim)]:8.2f}"
        if arrays.scores is not None:
            inside = analysis.within_superclass(arrays.scores[g], arrays.labels, groups, count)
            within[str(dim)] = percentages(inside)
            known = inside[1:][~np.isnan(inside[1:])]  # without "other"
            line += f"  {100 * known.mean():18.2f}" if len(known) else f"  {'-':>18}"
        # Groups without images have no accuracy.
        worst = int(np.nanargmin(np.where(images > 0, each, np.nan)))
        print(f"{line}   worst: {names[worst]} {100 * each[worst]:.0f} %")
    return {
        "names": list(names),
        "images": images.tolist(),
        "classes": np.bincount(groups, minlength=count).tolist(),
        "confusion": confusions,
        "top1": top1,
        "within": within,
    }


def analyze_classes(answers: Answers) -> dict[str, Any]:
    arrays = answers.arrays
    accuracy = analysis.class_accuracy(answers.predictions, arrays.labels, arrays.num_classes)
    trends = analysis.trends(accuracy)
    counts = {trend: trends.count(trend) for trend in analysis.TRENDS if trend in trends}
    print("\n== trends of the classes from the shortest prefix to the longest")
    print("  " + ", ".join(f"{trend} {count}" for trend, count in counts.items()))
    found: dict[str, Any] = {"trends": counts}
    if len(arrays.dims) > 1:
        better, worse = analysis.class_changes(answers.correct, arrays.labels, arrays.num_classes)
        found["class_changes"] = {"better": better, "worse": worse}

    images = np.bincount(arrays.labels, minlength=arrays.num_classes)
    names = arrays.class_names or [str(c) for c in range(arrays.num_classes)]
    rows = []
    for c, name in enumerate(names):
        rows.append(
            {
                "name": name,
                "shown": superclasses.name_of(name),
                "images": int(images[c]),
                "top1": percentages(accuracy[:, c]),
                "trend": trends[c],
            }
        )
    return found | {"per_class": rows}


def analyze_calibration(answers: Answers, args: SimpleNamespace) -> dict[str, Any]:
    """Calibration on all images; temperatures are fitted on some and evaluated on the others."""
    arrays = answers.arrays
    confidence = answers.confidence
    correct = answers.correct
    n = len(arrays.labels)
    # A temperature always improves the images it was fitted on: measure on the others.
    ((fit, rest),) = split_indices(n, 1, min(MAX_FIT_IMAGES, n // 2), args.seed)
    fit, rest = np.sort(fit), np.sort(rest)  # in the order of the file: memory maps are read faster
    print(
        f"\n== calibration: expected error in points; temperature from {len(fit):,} images, "
        f"evaluated on {len(rest):,}"
    )
    print("  prefix      ECE    temperature    ECE before    ECE after")
    found = {}
    for g, dim in enumerate(arrays.dims):
        whole = analysis.calibration(confidence[g], correct[g], args.bins)
        row: dict[str, Any] = {
            "ece": round(100 * whole.ece, 3),
            "bins": {
                "images": whole.counts.tolist(),
                "confidence": percentages(whole.confidence),
                "top1": percentages(whole.accuracy),
            },
        }
        line = f"  {dim:6d}  {100 * whole.ece:7.2f}"
        if len(fit):
            logits_of = partial(arrays.logits, g)
            scaled = analysis.temperature_scaling(logits_of, arrays.labels, fit, rest)
            before = analysis.calibration(confidence[g, rest], correct[g, rest], args.bins)
            after = analysis.calibration(scaled.confidence, correct[g, rest], args.bins)
            row["temperature"] = round(scaled.temperature, 4)
            row["held_out_ece"] = round(100 * before.ece, 3)
            row["held_out_ece_after"] = round(100 * after.ece, 3)
            line += (
                f"  {scaled.temperature:13.3f}  {100 * before.ece:12.2f}  {100 * after.ece:11.2f}"
            )
        found[str(dim)] = row
        print(line)
    return found


def analyze_agreement(answers: Answers) -> list[list[float | None]]:
    dims = answers.arrays.dims
    same = analysis.agreement(answers.predictions)
    print("\n== agreement: images for which two prefixes predict the same class, %")
    print("  " + " " * 6 + "".join(f"{dim:8d}" for dim in dims))
    for dim, row in zip(dims, same, strict=True):
        print(f"  {dim:6d}" + "".join(f"{100 * value:8.2f}" for value in row))
    return [percentages(row) for row in same]


if __name__ == "__main__":
    raise SystemExit(main())
