"""What the saved predictions of all prefixes tell: cascades, oracle, superclasses, trends,
calibration, agreement.

    matryoshka eval    --path model.safetensors --data-root val.beton --save_logits --save_gt --output out/results.json
    matryoshka analyze --results out/results.json                                         # -> out/analysis.json
    matryoshka analyze --softmax mrl=True_..._softmax.pth --gt gt_dataset=V1.pth --dims 8,16,32,64,128,256,512,1024,2048

Needs the labels (gt) and logits or softmax; predictions alone do for oracle, trends, agreement and
superclasses.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka import config
from matryoshka.evaluation import analysis, superclasses
from matryoshka.evaluation.cascade import GRID, cascade, certify, evaluate, exits, split_indices
from matryoshka.evaluation.options import ANALYSES, SCORES
from matryoshka.evaluation.options import analyze_parser as parser
from matryoshka.evaluation.prediction_arrays import (
    ArrayError,
    Arrays,
    from_files,
    from_results,
)
from matryoshka.files import write_atomically

NEED_SCORES = ("cascade", "calibration")
# images that a temperature is fitted on: one parameter needs no more, and each costs 1000
# exponentials
FIT = 5000


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    wanted, epsilons = check(args)
    started = time.perf_counter()
    arrays = from_results(args.results) if args.results else from_files(vars(args))
    chosen = args.only != ANALYSES
    for name, reason in cannot(arrays, args.learn).items():
        if name in wanted and chosen:
            raise ArrayError(f"--only {name}: {reason}")
        if name in wanted:
            wanted.remove(name)
            print(f"note: no {name}: {reason}")
    output = Path(args.output) if args.output else Path(args.results or "").parent / "analysis.json"
    if not output.resolve().parent.is_dir():
        raise config.ConfigError(f"--output {output}: its folder does not exist; make it first")

    found: dict[str, Any] = {
        **arrays.about,
        "dims": list(arrays.dims),
        "images": len(arrays.labels),
        "classes": arrays.num_classes,
        "seed": args.seed,
    }
    predictions, confidence = arrays.answers()
    correct = predictions == arrays.labels
    found["top1"] = dict(zip(map(str, arrays.dims), percent(correct.mean(1)), strict=True))
    print(
        f"{found['images']:,} images, {arrays.num_classes} classes, prefixes "
        f"{' '.join(map(str, arrays.dims))}"
    )
    for name in wanted:
        if name == "cascade":
            found[name] = cascades(arrays, confidence, correct, args, epsilons)
        elif name == "oracle":
            found[name] = bounds(arrays, predictions)
        elif name == "superclasses":
            if (part := by_superclass(arrays, predictions, args)) is not None:
                found[name] = part
        elif name == "trends":
            found |= by_class(arrays, predictions)
        elif name == "calibration":
            found[name] = calibrations(arrays, confidence, correct, args)
        elif name == "agreement":
            found[name] = agreements(arrays, predictions)
    found["seconds"] = round(time.perf_counter() - started, 2)
    write_atomically(output, (json.dumps(found, indent=1) + "\n").encode())
    print(f"\nanalysis  {output}  ({found['seconds']:.1f} s)")
    return 0


def check(args: argparse.Namespace) -> tuple[list[str], list[float]]:
    """(analyses, epsilons in points). ConfigError for arrays given twice."""
    if args.results and (both := [k for k in (*SCORES, "gt", "dims") if getattr(args, k)]):
        raise config.ConfigError(
            f"--results {args.results}: names its own arrays; drop --{both[0]}, or --results"
        )
    return list(args.only), list(args.epsilon)


def cannot(arrays: Arrays, learn: float) -> dict[str, str]:
    """Analyses that these arrays do not allow, and why."""
    n = len(arrays.labels)
    if arrays.scores is None:
        return dict.fromkeys(
            NEED_SCORES, "needs --logits or --softmax; save them with eval --save_logits"
        )
    if len(arrays.dims) < 2:
        return {"cascade": "needs two prefixes or more"}
    if not 0 < round(learn * n) < n:
        return {"cascade": f"needs more than {n} images, to learn from some and measure on others"}
    return {}


def percent(values: np.ndarray) -> list[float | None]:
    """Fractions as percent, to 0.001; None for NaN, which JSON lacks."""
    return [None if np.isnan(v) else round(100 * float(v), 3) for v in values]


def spread(values: np.ndarray, factor: float = 1.0) -> dict[str, float]:
    """Mean and standard deviation (ddof 1) over splits."""
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return {
        "mean": round(factor * float(values.mean()), 4),
        "std": round(factor * float(deviation), 4),
    }


# ---------------------------------------------------------------- the analyses: numbers for the file, lines to read


def cascades(
    arrays: Arrays, confidence: np.ndarray, correct: np.ndarray, args, epsilons: list[float]
) -> dict:
    n, dims = len(arrays.labels), arrays.dims
    learn = round(args.learn * n)
    result = cascade(confidence, correct, dims, args.splits, args.learn, args.seed)
    print(
        f"\n== cascade: thresholds from {learn:,} images, measured on {n - learn:,}; "
        f"{args.splits} splits"
    )
    print("  ends at    top-1 %           mean dim           dims asked    threshold before")
    caps = []
    for g, dim in enumerate(dims):
        row: dict[str, Any] = {
            "dim": dim,
            "top1": spread(result.accuracy[:, g], 100),
            "expected_dim": spread(result.expected_dim[:, g]),
            "cumulative_dim": spread(result.cumulative_dim[:, g]),
            "threshold": spread(result.thresholds[:, g - 1]) if g else None,
        }
        caps.append(row)
        shown = [
            f"{row[key]['mean']:8.2f} ± {row[key]['std']:<6.2f}" for key in ("top1", "expected_dim")
        ]
        threshold = f"{row['threshold']['mean']:10.3f}" if g else f"{'-':>10}"
        print(f"  {dim:7d}  {'  '.join(shown)}  {row['cumulative_dim']['mean']:10.2f}  {threshold}")
    certified = [certificate(confidence, correct, dims, points, args) for points in epsilons]
    return {
        "splits": args.splits,
        "learn_images": learn,
        "test_images": n - learn,
        "grid": [float(GRID[0]), float(GRID[-1]), len(GRID)],
        "caps": caps,
        "delta": args.delta,
        "certified": certified,
    }


def certificate(
    confidence: np.ndarray, correct: np.ndarray, dims: Sequence[int], points: float, args
) -> dict:
    """For all images; and how certificates from one half of them hold on the other, over the
    splits.
    """
    whole = certify(confidence, correct, dims, points / 100, args.delta, args.seed)
    losses, lengths = [], []
    for mine, rest in split_indices(
        correct.shape[1], args.splits, correct.shape[1] // 2, args.seed
    ):
        half = certify(
            confidence[:, mine], correct[:, mine], dims, points / 100, args.delta, args.seed
        )
        there = evaluate(exits(confidence[:, rest], half.thresholds), correct[:, rest], dims)
        losses.append(100 * float(correct[-1, rest].mean() - there.accuracy[-1]))
        lengths.append(there.expected_dim[-1])
    above = sum(loss > points for loss in losses)
    said = (
        f"{whole.expected_dim:.1f} of {dims[-1]} dims"
        if whole.certified
        else "nothing shorter than the longest"
    )
    print(
        f"  certified at {100 * (1 - args.delta):g} %: at most {points:g} points lost with "
        f"{said}; from half of the "
        f"images, on the other half: {np.mean(losses):.2f} lost, above {points:g} in {above} of "
        f"{len(losses)} splits"
    )
    return {
        "epsilon": points,
        "certified": whole.certified,
        "expected_dim": whole.expected_dim,
        "thresholds": [None if np.isinf(t) else float(t) for t in whole.thresholds],
        "loss_bound": round(100 * whole.loss_bound, 4),
        "top1": round(100 * whole.accuracy, 3),
        "held_out": {
            "loss": spread(np.array(losses)),
            "expected_dim": spread(np.array(lengths)),
            "above": above,
        },
    }


def bounds(arrays: Arrays, predictions: np.ndarray) -> dict:
    result = analysis.oracle(predictions, arrays.labels, arrays.dims)
    shares = dict(zip([*map(str, arrays.dims), "never"], percent(result.shares), strict=True))
    print("\n== oracle: the first prefix that is right, % of the images")
    print("  " + "  ".join(f"{name:>6}" for name in shares))
    print("  " + "  ".join(f"{value:6.2f}" for value in shares.values()))
    print(
        f"  some prefix is right {100 * result.accuracy:.2f} %, the majority "
        f"{100 * result.majority_accuracy:.2f} %, "
        f"the longest {shown_last(predictions, arrays)} %; mean dim of the oracle "
        f"{result.expected_dim:.1f}"
    )
    return {
        "first_right": shares,
        "top1": round(100 * result.accuracy, 3),
        "expected_dim": result.expected_dim,
        "majority_top1": round(100 * result.majority_accuracy, 3),
    }


def shown_last(predictions: np.ndarray, arrays: Arrays) -> str:
    return f"{100 * (predictions[-1] == arrays.labels).mean():.2f}"


def by_superclass(arrays: Arrays, predictions: np.ndarray, args) -> dict | None:
    """None, and a note, where the classes are not ImageNet's; an error if a level was asked for."""
    try:
        if arrays.class_names is None:
            raise superclasses.SuperclassError(
                "--superclasses: the classes have no names; analyze --results FILE"
            )
        grouping = superclasses.superclasses(arrays.class_names, args.superclasses)
    except superclasses.SuperclassError as error:
        if args.superclasses is not None:
            raise
        print(f"\nnote: no superclasses: {error}")
        return None
    groups, names = grouping.groups, grouping.names
    count = len(names)
    images = np.bincount(groups[arrays.labels], minlength=count)
    result: dict[str, Any] = {
        "names": list(names),
        "images": images.tolist(),
        "classes": np.bincount(groups, minlength=count).tolist(),
        "confusion": {},
        "top1": {},
        "within": {},
    }
    print(f"\n== superclasses: {count}-way (with '{names[0]}': {images[0]:,} images)")
    print("  prefix   top-1 %  within the group %")
    for g, dim in enumerate(arrays.dims):
        confusion = analysis.superclass_confusion(predictions[g], arrays.labels, groups, count)
        with np.errstate(invalid="ignore"):
            each = np.diag(confusion) / confusion.sum(1)
        result["confusion"][str(dim)] = confusion.tolist()
        result["top1"][str(dim)] = percent(np.array([np.trace(confusion) / confusion.sum()]))[0]
        line = f"  {dim:6d}  {result['top1'][str(dim)]:8.2f}"
        if arrays.scores is not None:
            within = analysis.within_superclass(arrays.scores[g], arrays.labels, groups, count)
            result["within"][str(dim)] = percent(within)
            some = within[1:][~np.isnan(within[1:])]
            line += f"  {100 * some.mean():18.2f}" if len(some) else f"  {'-':>18}"
        worst = int(np.nanargmin(np.where(images > 0, each, np.nan)))
        print(f"{line}   worst: {names[worst]} {100 * each[worst]:.0f} %")
    return result


def by_class(arrays: Arrays, predictions: np.ndarray) -> dict:
    accuracy = analysis.class_accuracy(predictions, arrays.labels, arrays.num_classes)
    kinds = analysis.trends(accuracy)
    counts = {kind: kinds.count(kind) for kind in analysis.TRENDS if kind in kinds}
    print("\n== trends of the classes from the shortest prefix to the longest")
    print("  " + ", ".join(f"{kind} {count}" for kind, count in counts.items()))
    images = np.bincount(arrays.labels, minlength=arrays.num_classes)
    names = arrays.class_names or [str(c) for c in range(arrays.num_classes)]
    rows = [
        {
            "name": name,
            "shown": superclasses.name_of(name),
            "images": int(n),
            "top1": percent(values),
            "trend": kind,
        }
        for name, n, values, kind in zip(names, images, accuracy.T, kinds, strict=True)
    ]
    return {"trends": counts, "per_class": rows}


def calibrations(arrays: Arrays, confidence: np.ndarray, correct: np.ndarray, args) -> dict:
    """Temperatures are fitted on some images and judged on the others."""
    assert arrays.scores is not None
    n = len(arrays.labels)
    ((fit, rest),) = split_indices(n, 1, min(FIT, n // 2), args.seed)
    fit, rest = np.sort(fit), np.sort(rest)
    print(
        f"\n== calibration: expected error in points; temperature from {len(fit):,} images, then "
        f"on {len(rest):,}"
    )
    print("  prefix      ECE    temperature    ECE before    ECE after")
    result = {}
    for g, dim in enumerate(arrays.dims):
        whole = analysis.calibration(confidence[g], correct[g], args.bins)
        result[str(dim)] = {
            "ece": round(100 * whole.ece, 3),
            "bins": {
                "images": whole.counts.tolist(),
                "confidence": percent(whole.confidence),
                "top1": percent(whole.accuracy),
            },
        }
        line = f"  {dim:6d}  {100 * whole.ece:7.2f}"
        if len(fit):
            temperature = analysis.fit_temperature(arrays.logits(g, fit), arrays.labels[fit])
            before = analysis.calibration(confidence[g, rest], correct[g, rest], args.bins)
            cooled = np.concatenate(
                [
                    analysis.top_confidence(arrays.logits(g, part)[None] / np.float32(temperature))[
                        1
                    ][0]
                    for part in np.array_split(rest, max(1, len(rest) // 4096))
                ]
            )
            after = analysis.calibration(cooled, correct[g, rest], args.bins)
            result[str(dim)] |= {
                "temperature": round(temperature, 4),
                "held_out_ece": round(100 * before.ece, 3),
                "held_out_ece_after": round(100 * after.ece, 3),
            }
            line += f"  {temperature:13.3f}  {100 * before.ece:12.2f}  {100 * after.ece:11.2f}"
        print(line)
    return result


def agreements(arrays: Arrays, predictions: np.ndarray) -> list[list[float | None]]:
    same = analysis.agreement(predictions)
    print("\n== agreement: images for which two prefixes say the same, %")
    print("  " + " " * 6 + "".join(f"{dim:8d}" for dim in arrays.dims))
    for dim, row in zip(arrays.dims, same, strict=True):
        print(f"  {dim:6d}" + "".join(f"{100 * value:8.2f}" for value in row))
    return [percent(row) for row in same]


if __name__ == "__main__":
    raise SystemExit(main())
