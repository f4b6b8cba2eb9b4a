"""Cascades over the widths of a family of models, at their real cost in multiply-adds.

A small width answers the images that it is confident about, the next one looks at the rest. Unlike
the prefixes of one trunk (cascade.py), every width is a forward pass of its own: an image costs the
sum over all widths that looked at it, and a width that never answers is not asked at all.

Arguments, for G widths (smallest first) and N images: confidence float [G, N], correct bool [G, N],
macs float [G], the multiply-adds of each width alone. A cascade is its thresholds, float [G-1]: a
width answers the images above its threshold, inf leaves it out. The last width answers the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from matryoshka.arrays import booleans, floats, takes
from matryoshka.evaluation.cascade import certify, exits, split_indices

MAX_STAGES = 4  # widths of one cascade: more of them add cost, and hardly save any
GRID = 200  # thresholds that are tried: quantiles of the confidences


class Measured(NamedTuple):
    """A cascade on some images.

    accuracy: fraction. shares: float [G], fractions of the images that each width answers. macs:
    mean multiply-adds of an image. right: bool [N].
    """

    accuracy: float
    shares: np.ndarray
    macs: float
    right: np.ndarray


@takes(thresholds=floats("T"))
def costs(thresholds: np.ndarray, macs: Sequence[float]) -> np.ndarray:
    """Multiply-adds spent on an image that each width answers, float [G]: all that were asked."""
    asked = np.append(np.isfinite(thresholds), True)
    return np.where(asked, np.asarray(macs, float), 0.0).cumsum()


@takes(confidence=floats("G+ N+", finite=True), correct=booleans("G N"), thresholds=floats("T"))
def measure(
    confidence: np.ndarray, correct: np.ndarray, thresholds: np.ndarray, macs: Sequence[float]
) -> Measured:
    """Accuracy, shares and cost of one cascade on these images."""
    answering = exits(confidence, thresholds)
    right = np.take_along_axis(correct, answering[None], 0)[0]
    return Measured(
        accuracy=float(right.mean()),
        shares=np.bincount(answering, minlength=len(confidence)) / len(answering),
        macs=float(costs(thresholds, macs)[answering].mean()),
        right=right,
    )


class Candidate(NamedTuple):
    """A cascade with one threshold for all its widths, on the images that it is chosen on."""

    thresholds: np.ndarray
    accuracy: float
    macs: float


@takes(confidence=floats("G+ N+", finite=True), correct=booleans("G N"))
def frontier(confidence: np.ndarray, correct: np.ndarray, macs: Sequence[float]) -> list[Candidate]:
    """The cascades that none other beats in both accuracy and cost, by rising cost.

    All sets of up to MAX_STAGES widths with the last one, and for each set one threshold on a grid
    of quantiles. The last entry is the most accurate.
    """
    grid = _grid(confidence)
    found = []
    for widths in _sets_of_widths(len(confidence)):
        accuracy, cost = _all_thresholds(confidence, correct, macs, widths=widths, grid=grid)
        for j, threshold in enumerate(grid):
            thresholds = np.full(len(confidence) - 1, np.inf)
            thresholds[list(widths[:-1])] = threshold
            found.append(Candidate(thresholds, float(accuracy[j]), float(cost[j])))

    found.sort(key=lambda candidate: (candidate.macs, -candidate.accuracy))
    best: list[Candidate] = []
    for candidate in found:
        if not best or candidate.accuracy > best[-1].accuracy:
            best.append(candidate)
    return best


def _grid(confidence: np.ndarray) -> np.ndarray:
    """Thresholds, ascending: quantiles of the confidences of all widths but the last."""
    if len(confidence) < 2:
        return np.array([np.inf])
    # Quantiles, not even steps: a trained model is nearly certain of most images.
    shorter = confidence[:-1].astype(np.float64).ravel()
    return np.unique(np.quantile(shorter, np.linspace(0, 1, GRID), method="lower"))


def _sets_of_widths(count: int) -> Iterator[tuple[int, ...]]:
    """Indices of the widths of each cascade; all end with the last width."""
    last = count - 1
    for before in range(min(last, MAX_STAGES - 1) + 1):
        for widths in itertools.combinations(range(last), before):
            yield (*widths, last)


def _all_thresholds(
    confidence: np.ndarray,
    correct: np.ndarray,
    macs: Sequence[float],
    *,
    widths: Sequence[int],
    grid: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(accuracy, mean multiply-adds) of the cascade of `widths` at each threshold, float [T] each.

    In one pass over the images: at rising thresholds, an image moves through the widths in order.
    A width answers it from the first threshold at which all earlier ones are too unsure, to the
    last one below its own confidence: an interval of the grid.
    """
    images = confidence.shape[1]
    steps = len(grid)
    hits = np.zeros(steps + 1)
    cost = np.zeros(steps + 1)
    spent = 0.0
    start = np.zeros(images, np.int64)  # first threshold at which an image reaches this width
    for width in widths:
        spent += macs[width]
        if width == widths[-1]:
            end = np.full(images, steps)
        else:
            # number of thresholds below the confidence
            end = np.searchsorted(grid, confidence[width].astype(np.float64), side="left")
            end = np.maximum(start, end)
        # The start of an interval adds the image, its end takes it away: cumsum then fills it.
        gain = correct[width].astype(float)
        hits += np.bincount(start, gain, steps + 1) - np.bincount(end, gain, steps + 1)
        count = np.bincount(start, minlength=steps + 1) - np.bincount(end, minlength=steps + 1)
        cost += spent * count
        start = end
    return hits.cumsum()[:steps] / images, cost.cumsum()[:steps] / images


def choose(
    candidates: Sequence[Candidate], full_accuracy: float, epsilon: float
) -> Candidate | None:
    """The cheapest cascade that loses at most `epsilon` (a fraction) against the last width.

    None if the cheapest is the last width alone.
    """
    for candidate in candidates:  # by rising cost
        # 1e-12: fractions of the same images may differ in their last bit
        if candidate.accuracy >= full_accuracy - epsilon - 1e-12:
            return candidate if np.isfinite(candidate.thresholds).any() else None
    return None


class CertifiedCascade(NamedTuple):
    """A cascade over widths with a guaranteed accuracy.

    certified: whether any width but the last may answer. loss_bound: upper confidence bound of the
    accuracy lost against the last width.
    """

    thresholds: np.ndarray
    certified: bool
    loss_bound: float


@takes(confidence=floats("G+ N+", finite=True), correct=booleans("G N"))
def certify_widths(
    confidence: np.ndarray,
    correct: np.ndarray,
    macs: Sequence[float],
    *,
    epsilon: float = 0.01,
    delta: float = 0.05,
    seed: int = 0,
) -> CertifiedCascade:
    """`cascade.certify` over the widths, with multiply-adds as the cost.

    With probability 1 - delta, the cascade loses at most `epsilon` (a fraction) on new images. The
    widths are chosen on the half of the images that also proposes the thresholds; the other half
    tests them.
    """
    alone = CertifiedCascade(np.full(len(confidence) - 1, np.inf), certified=False, loss_bound=0.0)
    images = confidence.shape[1]
    # The same split as in `certify`: the choice of widths must not see the images of the test.
    ((path, _),) = split_indices(images, 1, images // 2, seed)
    candidates = frontier(confidence[:, path], correct[:, path], macs)
    chosen = choose(candidates, float(correct[-1, path].mean()), epsilon)
    if chosen is None:
        return alone
    widths = [*np.flatnonzero(np.isfinite(chosen.thresholds)).tolist(), len(confidence) - 1]
    certificate = certify(
        confidence[widths],
        correct[widths],
        np.asarray(macs, float)[widths].cumsum().tolist(),
        epsilon=epsilon,
        delta=delta,
        seed=seed,
    )
    thresholds = alone.thresholds.copy()
    thresholds[widths[:-1]] = certificate.thresholds
    spent = measure(confidence[:, path], correct[:, path], thresholds, macs).macs
    if not certificate.certified or spent >= macs[-1]:
        return alone
    return CertifiedCascade(thresholds, certified=True, loss_bound=certificate.loss_bound)
