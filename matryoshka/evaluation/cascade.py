"""Cascades of prefixes: a prefix answers if it is confident, else the next longer one is asked.

All prefixes come from one forward pass. A cascade therefore saves the cost of classifiers or of
embedding comparisons, not the cost of the backbone. Source: Kusupati et al., arXiv 2205.13147,
section 4.2.1 and appendix D.

Arguments, for G prefixes (shortest first) and N images: confidence float [G, N], correct bool
[G, N], thresholds float [G-1], dims the G lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from matryoshka.arrays import booleans, floats, integers, takes
from matryoshka.report.claims import Paired, paired

GRID = np.linspace(0.1, 1, 100)  # of thresholds, as in the paper's code

# The cascades that `certify` tests, in this order: the accuracy that the exiting images may lose
# against the longest prefix, from none to all of it.
ALLOWED_LOSSES = np.concatenate([[0.0], np.geomspace(1e-3, 1, 40)])


@takes(confidence=floats("G+ N+", finite=True), correct=booleans("G N"), grid=floats("T+"))
def learn_thresholds(
    confidence: np.ndarray, correct: np.ndarray, grid: np.ndarray = GRID
) -> np.ndarray:
    """Learn the threshold of each prefix against the next one: float [G-1].

    The threshold is the smallest of `grid` that maximises the accuracy of "the shorter prefix
    above the threshold, the longer one otherwise".
    """
    # All thresholds of the grid in one pass over the images, instead of one pass for each.
    thresholds = []
    for g in range(len(confidence) - 1):
        # An image is answered by the shorter prefix at every threshold below its confidence, the
        # first `below` ones of the grid, and then changes the number of hits by `gain`.
        below = np.searchsorted(grid, confidence[g], side="left")
        gain = correct[g].astype(np.int64) - correct[g + 1]
        gain_by_count = np.bincount(below, gain, len(grid) + 1)
        # threshold j is below the confidence of the images with `below` > j
        gain_above = gain_by_count[::-1].cumsum()[::-1]
        gain_at_threshold = gain_above[1:]
        thresholds.append(grid[gain_at_threshold.argmax()])
    return np.array(thresholds, float)


@takes(confidence=floats("G+ N", finite=True), thresholds=floats("T"))
def exits(confidence: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The prefix that answers each image, int64 [N]: the first above its threshold, else the last.

    thresholds: inf for a prefix that never answers.
    """
    confident = np.ones(confidence.shape, bool)
    confident[:-1] = confidence[:-1] > np.asarray(thresholds)[:, None]
    return confident.argmax(0)


class CascadeMetrics(NamedTuple):
    """Metrics of the cascade that ends with prefix m, for each m: float [G] each.

    expected_dim: mean length of the prefix that answers. cumulative_dim: mean total length of all
    prefixes that were asked.
    """

    accuracy: np.ndarray
    expected_dim: np.ndarray
    cumulative_dim: np.ndarray


@takes(exit_prefix=integers("N+", low=0), correct=booleans("G N"))
def evaluate(exit_prefix: np.ndarray, correct: np.ndarray, dims: Sequence[int]) -> CascadeMetrics:
    """Metrics of the cascade and of its shortened versions. exit_prefix: int64 [N] from `exits`."""
    lengths = np.asarray(dims, float)
    last = np.arange(len(dims))[:, None]
    answering = np.minimum(exit_prefix, last)  # [G, N], by the last prefix of the cascade
    hits = np.stack([np.take_along_axis(correct, row[None], 0)[0] for row in answering])
    return CascadeMetrics(
        accuracy=hits.mean(1),
        expected_dim=lengths[answering].mean(1),
        cumulative_dim=lengths.cumsum()[answering].mean(1),
    )


def split_indices(
    n: int, splits: int, learn: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random splits of 0..n-1: `splits` pairs of `learn` indices and the remaining ones."""
    pairs = []
    for i in range(splits):
        # Its own generator: split i is the same for every number of splits.
        order = np.random.default_rng((seed, i)).permutation(n)
        pairs.append((order[:learn], order[learn:]))
    return pairs


class CascadeResult(NamedTuple):
    """Metrics on images that the thresholds were not learned on.

    float [splits, G]; thresholds [splits, G-1].
    """

    accuracy: np.ndarray
    expected_dim: np.ndarray
    cumulative_dim: np.ndarray
    thresholds: np.ndarray


@takes(confidence=floats("G+ N+", finite=True), correct=booleans("G N"), grid=floats("T+"))
def cascade(
    confidence: np.ndarray,
    correct: np.ndarray,
    dims: Sequence[int],
    *,
    splits: int = 30,
    learn: float = 0.2,
    seed: int = 0,
    grid: np.ndarray = GRID,
) -> CascadeResult:
    """The paper's experiment: learn thresholds on a share of the images, evaluate on the rest.

    learn: that share, 0 to 1. splits: number of random splits.
    """
    n = confidence.shape[1]
    metrics = []
    thresholds = []
    for part, rest in split_indices(n, splits, round(learn * n), seed):
        learned = learn_thresholds(confidence[:, part], correct[:, part], grid)
        metrics.append(evaluate(exits(confidence[:, rest], learned), correct[:, rest], dims))
        thresholds.append(learned)
    return CascadeResult(
        accuracy=np.stack([m.accuracy for m in metrics]),
        expected_dim=np.stack([m.expected_dim for m in metrics]),
        cumulative_dim=np.stack([m.cumulative_dim for m in metrics]),
        thresholds=np.stack(thresholds),
    )


@takes(confidence=floats("G+ N+", finite=True), correct=booleans("G N"), grid=floats("T+"))
def compare_with_longest(
    confidence: np.ndarray,
    correct: np.ndarray,
    *,
    learn: float = 0.2,
    seed: int = 0,
    grid: np.ndarray = GRID,
) -> Paired:
    """The cascade of all prefixes and the longest prefix, on the test images of the first split.

    One split: the test images of several splits overlap, and no paired test allows that.
    """
    n = confidence.shape[1]
    ((part, rest),) = split_indices(n, 1, round(learn * n), seed)
    thresholds = learn_thresholds(confidence[:, part], correct[:, part], grid)
    exit_prefix = exits(confidence[:, rest], thresholds)
    answers = np.take_along_axis(correct[:, rest], exit_prefix[None], 0)[0]
    return paired(answers, correct[-1, rest])


# ---------------------------------------------------------------- with a guarantee


def clopper_pearson(k: int, n: int, alpha: float, upper: bool) -> float:
    """One-sided exact confidence bound of a probability observed k times in n trials.

    The bound is violated with a probability of at most `alpha`.
    """
    from scipy.special import betaincinv  # scipy.stats would take a second to import

    if upper:
        return 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - alpha))
    return 0.0 if k == 0 else float(betaincinv(k, n - k + 1, alpha))


class Certificate(NamedTuple):
    """A cascade with a guaranteed accuracy.

    thresholds: float [G-1], inf where a prefix never answers. certified: whether any image may
    exit before the longest prefix. loss_bound: upper confidence bound of the accuracy lost against
    the longest prefix; 0 without early exits. expected_dim, accuracy, full_accuracy: on the images
    that tested the cascade; full_accuracy is that of the longest prefix.
    """

    thresholds: np.ndarray
    certified: bool
    loss_bound: float
    expected_dim: float
    accuracy: float
    full_accuracy: float


@takes(confidence=floats("G+ N+", finite=True), correct=booleans("G N"))
def certify(
    confidence: np.ndarray,
    correct: np.ndarray,
    dims: Sequence[int],
    *,
    epsilon: float = 0.01,
    delta: float = 0.05,
    seed: int = 0,
) -> Certificate:
    """Find the shortest cascade that is provably within `epsilon` of the longest prefix.

    With probability 1 - delta over the choice of the images, the cascade's accuracy on new images
    of the same distribution is at most epsilon (a fraction) below that of the longest prefix.

    Learn then Test (Angelopoulos et al., arXiv 2110.01052) with fixed-sequence testing. Half of the
    images define a sequence of cascades, from one that loses nothing to one that loses much. The
    other half tests them in that order; the first failure ends the tests. A test bounds the loss
    P(longest right, cascade wrong) - P(longest wrong, cascade right) by Clopper-Pearson bounds at
    delta / 2 each, which are exact for any number of images.
    """
    n = confidence.shape[1]
    # The images that propose the cascades must not test them: the bounds would not hold.
    ((path, test),) = split_indices(n, 1, n // 2, seed)
    path_confidence, path_correct = confidence[:, path], correct[:, path]
    # sorted once for all cascades of the sequence
    orders = [np.argsort(-row, kind="stable") for row in path_confidence[:-1]]

    full = correct[-1, test]
    # Without a shorter certified cascade, the longest prefix answers every image.
    best = Certificate(
        thresholds=np.full(len(dims) - 1, np.inf),
        certified=False,
        loss_bound=0.0,
        expected_dim=float(dims[-1]),
        accuracy=float(full.mean()),
        full_accuracy=float(full.mean()),
    )
    for allowed in ALLOWED_LOSSES:
        thresholds = _thresholds_for_loss(allowed, path_confidence, path_correct, orders)
        exit_prefix = exits(confidence[:, test], thresholds)
        answers = np.take_along_axis(correct[:, test], exit_prefix[None], 0)[0]
        harmed = int((full & ~answers).sum())
        gained = int((answers & ~full).sum())
        # delta / 2 for each bound: together they fail with a probability of at most delta.
        harm = clopper_pearson(harmed, len(test), delta / 2, upper=True)
        gain = clopper_pearson(gained, len(test), delta / 2, upper=False)
        if harm - gain > epsilon:
            break  # later cascades must not be tested: they would need a correction of delta
        expected = float(np.asarray(dims, float)[exit_prefix].mean())
        if expected < best.expected_dim:
            best = Certificate(
                thresholds=thresholds,
                certified=bool((exit_prefix < len(dims) - 1).any()),
                loss_bound=harm - gain,
                expected_dim=expected,
                accuracy=float(answers.mean()),
                full_accuracy=float(full.mean()),
            )
    return best


def _thresholds_for_loss(
    allowed: float, confidence: np.ndarray, correct: np.ndarray, orders: list[np.ndarray]
) -> np.ndarray:
    """Thresholds, float [G-1], at which each prefix loses at most the share `allowed`.

    Prefix by prefix, among the images that have not exited: the smallest threshold at which the
    accuracy of the exiting images is at most `allowed` below that of the longest prefix; inf if
    there is no such threshold. orders: for each prefix, the images by falling confidence.
    """
    thresholds = np.full(len(confidence) - 1, np.inf)
    stays = np.ones(confidence.shape[1], bool)
    for g, descending in enumerate(orders):
        order = descending[stays[descending]]
        if not len(order):
            break  # no image is left to learn from: this prefix must not answer
        sure = confidence[g, order]
        lost = (correct[-1, order].astype(np.int64) - correct[g, order]).cumsum()
        fits = lost <= allowed * np.arange(1, len(order) + 1)
        fits &= np.append(sure[1:] < sure[:-1], True)  # equal confidences exit together
        if fits.any():
            last = np.flatnonzero(fits)[-1]
            # An image exits above its threshold: the next lower confidence keeps the others out.
            if last + 1 < len(sure):
                thresholds[g] = sure[last + 1]
            else:
                thresholds[g] = np.nextafter(sure[last], -np.inf)
            stays[order[: last + 1]] = False
    return thresholds


class HeldOut(NamedTuple):
    """Certificates from one half of the images, measured on the other half: float [splits] each.

    loss: accuracy lost against the longest prefix, a fraction. expected_dim: mean length of the
    prefix that answers.
    """

    loss: np.ndarray
    expected_dim: np.ndarray


@takes(confidence=floats("G+ N+", finite=True), correct=booleans("G N"))
def certify_held_out(
    confidence: np.ndarray,
    correct: np.ndarray,
    dims: Sequence[int],
    *,
    epsilon: float = 0.01,
    delta: float = 0.05,
    splits: int = 30,
    seed: int = 0,
) -> HeldOut:
    """Check certificates empirically: certify on random halves, measure on the other halves."""
    losses = []
    lengths = []
    n = correct.shape[1]
    for half, rest in split_indices(n, splits, n // 2, seed):
        certificate = certify(
            confidence[:, half], correct[:, half], dims, epsilon=epsilon, delta=delta, seed=seed
        )
        exit_prefix = exits(confidence[:, rest], certificate.thresholds)
        metrics = evaluate(exit_prefix, correct[:, rest], dims)
        losses.append(correct[-1, rest].mean() - metrics.accuracy[-1])
        lengths.append(metrics.expected_dim[-1])
    return HeldOut(loss=np.array(losses), expected_dim=np.array(lengths))
