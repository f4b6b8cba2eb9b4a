"""What accuracies measured on the same images support: paired tests, and statements from them.

A report says "as good as" or "better than" only where a test at 95 % confidence supports it.
"Differs": McNemar's exact test on the images that only one of the two classifies right.
"Loses at most x points": Tango's score interval of the paired difference of two proportions (Tango,
Statistics in Medicine 17, 1998) lies above -x. As usual for non-inferiority, the interval has two
sides, so that the claim is wrong with a probability of 2.5 %.
Without the predictions the pairs are unknown; `unpaired_loss` then bounds the loss by Newcombe's
hybrid score interval (Statistics in Medicine 17, 1998, method 10), which is wider.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import NamedTuple

import numpy as np

from matryoshka.arrays import booleans, floats, integers, takes
from matryoshka.report.tables import Z_95, wilson_interval

MARGIN = 1.0  # percentage points: a smaller loss counts as none in sentences of the report
ALPHA = 0.05  # level of every test


class Paired(NamedTuple):
    """Two classifiers on the same images: images that only one of them classifies right."""

    first_only: int
    second_only: int
    images: int


@takes(first_right=booleans("N"), second_right=booleans("N"))
def paired(first_right: np.ndarray, second_right: np.ndarray) -> Paired:
    """Count the images that only one of two classifiers has right; bool [N] each."""
    return Paired(
        first_only=int((first_right & ~second_right).sum()),
        second_only=int((second_right & ~first_right).sum()),
        images=len(first_right),
    )


def mcnemar(pair: Paired) -> float:
    """Two-sided p-value of "both are right on equally many images" (exact, conditional)."""
    from scipy.special import bdtr  # scipy.stats would take a second to import

    fewer, more = sorted((pair.first_only, pair.second_only))
    return min(1.0, 2 * float(bdtr(fewer, fewer + more, 0.5)))


def loses_at_most(pair: Paired, margin: float = MARGIN) -> bool:
    """Whether the first loses less than `margin` points, by Tango's 95 % interval."""
    n = pair.images
    if not n:
        return False
    return _tango_z(pair, -margin / 100) > Z_95


def _tango_z(pair: Paired, difference: float) -> float:
    """Score statistic of a negative difference of the accuracies, first minus second.

    Its variance is that of the likeliest proportions with that difference (Tango 1998).
    """
    n = pair.images
    observed = pair.first_only - pair.second_only
    a = 2 * n
    b = -pair.first_only - pair.second_only + (2 * n + observed) * -difference
    c = -pair.first_only * -difference * (1 + difference)
    # The likeliest share of images that only the first has right: a root of a quadratic equation.
    first_only = (sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * first_only - difference * (1 + difference))
    return (observed - n * difference) / sqrt(variance) if variance > 0 else 0.0


def unpaired_loss(first: float, second: float, images: int) -> float:
    """Upper 97.5 % bound of the points that the first loses; both in percent, on `images` each."""
    first_low, _ = wilson_interval(first, images)
    _, second_high = wilson_interval(second, images)
    return second - first + sqrt((first - first_low) ** 2 + (second_high - second) ** 2)


def verdict(pair: Paired, margin: float = MARGIN) -> str:
    """The first against the second: `better`, `within` the margin, `worse`, or `unknown`."""
    differs = mcnemar(pair) < ALPHA
    if differs and pair.first_only > pair.second_only:
        return "better"
    if loses_at_most(pair, margin):
        return "within"
    return "worse" if differs else "unknown"


def shortest_within(against_longest: Mapping[int, Paired], margin: float = MARGIN) -> int | None:
    """The shortest prefix that loses at most `margin` points against the longest one.

    against_longest: each shorter prefix, paired with the longest. The tests go from long to short
    and stop at the first that fails, so that all of them together have the
    level of one.
    """
    enough = None
    for dim in sorted(against_longest, reverse=True):
        if not loses_at_most(against_longest[dim], margin):
            break
        enough = dim
    return enough


def beats(pair: Paired) -> bool:
    """Whether the first is more accurate than the second, by McNemar's exact test."""
    return pair.first_only > pair.second_only and mcnemar(pair) < ALPHA


@takes(right=integers("C+", low=0), images=integers("C", low=0))
def against_constant(right: np.ndarray, images: np.ndarray) -> Paired:
    """A classifier, paired with always answering the most frequent class.

    right, images: of each class, int [C]: images that the classifier has right, and all of them.
    """
    most = int(images.argmax())
    return Paired(
        first_only=int(right.sum() - right[most]),
        second_only=int(images[most] - right[most]),
        images=int(images.sum()),
    )


@takes(p_values=floats("m", finite=True))
def holm(p_values: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """Which hypotheses Holm's step-down procedure rejects: bool [m], together at level alpha."""
    order = np.argsort(p_values, kind="stable")
    levels = alpha / np.arange(len(p_values), 0, -1)
    fails = p_values[order] > levels
    first_failure = int(fails.argmax()) if fails.any() else len(p_values)
    rejected = np.zeros(len(p_values), bool)
    rejected[order[:first_failure]] = True
    return rejected
