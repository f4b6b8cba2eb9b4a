"""Cascades over widths as a table: thresholds chosen on some images, measured on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from matryoshka.evaluation.width_cascade import certify_widths, choose, frontier, measure
from matryoshka.report.claims import Paired, loses_at_most, paired

TABLE_ROWS = 12  # cascades of the table, thinned out from the best ones of all costs


@dataclass(frozen=True)
class WidthImages:
    """Confidence float and correct bool of G widths, [G, N] each, for N images."""

    confidence: np.ndarray
    correct: np.ndarray

    def some(self, images: np.ndarray) -> WidthImages:
        return WidthImages(self.confidence[:, images], self.correct[:, images])


def width_analysis(
    widths: tuple[Sequence[int], Sequence[int]],
    learn: WidthImages,
    test: WidthImages,
    *,
    epsilons: Sequence[float],
    delta: float,
    seed: int,
) -> dict[str, Any]:
    """Cascades over `widths`, (dims, multiply-adds of each), as a JSON object.

    Everything is chosen on `learn` and measured on `test`. rows: the best cascades of all costs.
    chosen: for each of `epsilons` (points) the cheapest that loses no more on `learn`. certified:
    the same with a guarantee of probability 1 - delta, see `certify_widths`. Percentages are 0 to
    100; `thresholds` are None for widths that are not asked.
    """
    dims, macs = widths
    candidates = frontier(learn.confidence, learn.correct, macs)
    full_accuracy = float(learn.correct[-1].mean())
    chosen = []
    certified = []
    for points in epsilons:
        candidate = choose(candidates, full_accuracy, points / 100)
        alone = np.full(len(dims) - 1, np.inf)
        thresholds = alone if candidate is None else candidate.thresholds
        chosen.append({"epsilon": points, **_measured(widths, thresholds, test)})
        certificate = certify_widths(
            learn.confidence,
            learn.correct,
            macs,
            epsilon=points / 100,
            delta=delta,
            seed=seed,
        )
        certified.append(
            {
                "epsilon": points,
                "certified": certificate.certified,
                "loss_bound": round(100 * certificate.loss_bound, 4),
                **_measured(widths, certificate.thresholds, test),
            }
        )
    return {
        "learn_images": learn.correct.shape[1],
        "test_images": test.correct.shape[1],
        "dims": list(dims),
        "macs": dict(zip(map(str, dims), macs, strict=True)),
        "top1": _by_dim(dims, 100 * test.correct.mean(1)),
        "rows": [_measured(widths, c.thresholds, test) for c in _thinned(candidates)],
        "chosen": chosen,
        "delta": delta,
        "certified": certified,
    }


def _measured(
    widths: tuple[Sequence[int], Sequence[int]], thresholds: np.ndarray, test: WidthImages
) -> dict[str, Any]:
    """One cascade on the images of the test."""
    dims, macs = widths
    found = measure(test.confidence, test.correct, thresholds, macs)
    full = test.correct[-1]
    asked = [dim for dim, limit in zip(dims[:-1], thresholds, strict=True) if np.isfinite(limit)]
    limits = [float(limit) if np.isfinite(limit) else None for limit in thresholds]
    return {
        "asked": [*asked, dims[-1]],
        "thresholds": dict(zip(map(str, dims[:-1]), limits, strict=True)),
        "top1": round(100 * found.accuracy, 3),
        "loss": round(100 * float(full.mean() - found.accuracy), 3),
        "shares": _by_dim(dims, 100 * found.shares),
        "macs": round(found.macs),
        "macs_share": round(100 * found.macs / macs[-1], 3),
        "against_widest": paired(found.right, full)._asdict(),
    }


def _by_dim(dims: Sequence[int], values: np.ndarray) -> dict[str, float]:
    return {str(dim): round(float(value), 3) for dim, value in zip(dims, values, strict=True)}


def _thinned(candidates: Sequence) -> list:
    """At most TABLE_ROWS of them, evenly, with the first and the last."""
    last = len(candidates) - 1
    kept = np.unique(np.linspace(0, last, min(TABLE_ROWS, last + 1)).round().astype(int))
    return [candidates[i] for i in kept]


# ---------------------------------------------------------------- text


def width_lines(found: Mapping[str, Any]) -> list[str]:
    """The lines of a `width_analysis`: the table, then the cascade of each allowed loss."""
    dims = found["dims"]
    answered = "  ".join(f"{f'{dim} %':>7}" for dim in dims)
    lines = [f"threshold   top-1 %  {answered}  multiply-adds  of the widest"]
    lines += [_row_line(dims, row) for row in found["rows"]]
    for row in found["chosen"]:
        points = row["epsilon"]
        pair = paired_of(row)
        shown = "which these images confirm" if loses_at_most(pair, points) else "not confirmed"
        lines.append(
            f"at most {points:g} points lost on the images of the thresholds: {_asked(row)}; on "
            f"the others {row['loss']:.2f} lost with {row['macs_share']:.1f} % of the "
            f"multiply-adds ({shown} at 95 %)"
        )
    level = 100 * (1 - found["delta"])
    for row in found["certified"]:
        points = row["epsilon"]
        if row["certified"]:
            lines.append(
                f"certified at {level:g} %: at most {points:g} points lost with {_asked(row)}; "
                f"{row['loss']:.2f} lost with {row['macs_share']:.1f} % of the multiply-adds"
            )
        else:
            lines.append(
                f"not certified at {level:g} %: no cascade is shown to lose at most {points:g} "
                "points"
            )
    return lines


def _row_line(dims: Sequence[int], row: Mapping[str, Any]) -> str:
    """A row of the table; `-` for a width that is not asked."""
    limits = [limit for limit in row["thresholds"].values() if limit is not None]
    shown = f"{limits[0]:9.4f}" if limits else f"{'-':>9}"
    cells = []
    for dim in dims:
        asked = dim in row["asked"]
        cells.append(f"{row['shares'][str(dim)]:7.2f}" if asked else f"{'-':>7}")
    return (
        f"{shown}  {row['top1']:8.2f}  {'  '.join(cells)}  {row['macs'] / 1e6:11.2f} M"
        f"  {row['macs_share']:11.1f} %"
    )


def _asked(row: Mapping[str, Any]) -> str:
    """`16 > 64 > 128`, or `128 alone`."""
    if len(row["asked"]) == 1:
        return f"{row['asked'][0]} alone"
    return " > ".join(str(dim) for dim in row["asked"])


def paired_of(row: Mapping[str, Any]) -> Paired:
    """The cascade of a row against the widest member."""
    return Paired(**row["against_widest"])
