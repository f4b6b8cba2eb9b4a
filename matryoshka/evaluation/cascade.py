"""Cascades of prefixes: the shortest prefix answers where it is confident, the next one looks at
the rest.

All prefixes come from one forward pass, so a cascade saves the cost of classifiers, or of comparing
embeddings, not that of the backbone. Source: Kusupati et al., arXiv 2205.13147, section 4.2.1 and
appendix D. confidence float [G, N] and correct bool [G, N], shortest prefix first; thresholds float
[G-1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

GRID = np.linspace(0.1, 1, 100)  # of thresholds, as the paper's code has it
PATH = np.concatenate(
    [[0.0], np.geomspace(1e-3, 1, 40)]
)  # see certify: shares of the leavers that may be lost


def learn_thresholds(
    confidence: np.ndarray, correct: np.ndarray, grid: np.ndarray = GRID
) -> np.ndarray:
    """float [G-1]: for each prefix and the next the smallest threshold of `grid` at which "the
    shorter where its confidence is above, else the longer" is most accurate.
    """
    found = []
    for g in range(len(confidence) - 1):
        # an image counts for the shorter prefix at all thresholds below its confidence
        below = np.searchsorted(grid, confidence[g], side="left")
        gain = correct[g].astype(np.int64) - correct[g + 1]
        by_bin = np.bincount(below, gain, len(grid) + 1)
        gained = by_bin[::-1].cumsum()[::-1][
            1:
        ]  # at threshold j: those with more than j thresholds below
        found.append(grid[gained.argmax()])
    return np.array(found, float)


def exits(confidence: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """int64 [N]: the first prefix whose confidence is above its threshold, else the last one."""
    sure = np.ones(confidence.shape, bool)
    sure[:-1] = confidence[:-1] > np.asarray(thresholds)[:, None]
    return sure.argmax(0)


class Evaluated(NamedTuple):
    """Of a cascade that ends at the latest with prefix m, for each m: float [G] each.

    expected_dim: mean length of the prefix that answers. cumulative_dim: mean of the lengths of all
    that were asked.
    """

    accuracy: np.ndarray
    expected_dim: np.ndarray
    cumulative_dim: np.ndarray


def evaluate(left: np.ndarray, correct: np.ndarray, dims: Sequence[int]) -> Evaluated:
    """left: int64 [N] of `exits`."""
    lengths = np.asarray(dims, float)
    caps = np.minimum(left, np.arange(len(dims))[:, None])  # [G, N]
    hits = np.stack([np.take_along_axis(correct, row[None], 0)[0] for row in caps])
    return Evaluated(hits.mean(1), lengths[caps].mean(1), lengths.cumsum()[caps].mean(1))


def split_indices(
    n: int, splits: int, learn: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`splits` times (learn, rest): `learn` of the indices 0..n-1 at random, and the others."""
    orders = (np.random.default_rng((seed, i)).permutation(n) for i in range(splits))
    return [(order[:learn], order[learn:]) for order in orders]


class CascadeResult(NamedTuple):
    """Measured on the images that the thresholds were not learned on: float [splits, G], thresholds
    [splits, G-1].
    """

    accuracy: np.ndarray
    expected_dim: np.ndarray
    cumulative_dim: np.ndarray
    thresholds: np.ndarray


def cascade(
    confidence: np.ndarray,
    correct: np.ndarray,
    dims: Sequence[int],
    splits: int = 30,
    learn: float = 0.2,
    seed: int = 0,
    grid: np.ndarray = GRID,
) -> CascadeResult:
    """The paper's experiment: thresholds from a share `learn` of the images, accuracy of every cap
    on the rest.
    """
    n = confidence.shape[1]
    rows = []
    for part, rest in split_indices(n, splits, round(learn * n), seed):
        thresholds = learn_thresholds(confidence[:, part], correct[:, part], grid)
        rows.append(
            (*evaluate(exits(confidence[:, rest], thresholds), correct[:, rest], dims), thresholds)
        )
    return CascadeResult(*(np.stack(column) for column in zip(*rows, strict=True)))


# ---------------------------------------------------------------- with a guarantee


def clopper_pearson(k: int, n: int, alpha: float, upper: bool) -> float:
    """One-sided exact bound for a probability, seen k times in n: wrong at most in a share `alpha`
    of experiments.
    """
    from scipy.special import betaincinv  # scipy.stats would take a second to import

    if upper:
        return 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - alpha))
    return 0.0 if k == 0 else float(betaincinv(k, n - k + 1, alpha))


class Certificate(NamedTuple):
    """thresholds float [G-1], inf where a prefix never answers. certified: whether any image may
    leave early.

    loss_bound: what the accuracy can have lost against the longest prefix, with the stated
    confidence; 0 without early leavers. expected_dim, accuracy, full_accuracy: of the images that
    tested it.
    """

    thresholds: np.ndarray
    certified: bool
    loss_bound: float
    expected_dim: float
    accuracy: float
    full_accuracy: float


def certify(
    confidence: np.ndarray,
    correct: np.ndarray,
    dims: Sequence[int],
    epsilon: float = 0.01,
    delta: float = 0.05,
    seed: int = 0,
) -> Certificate:
    """Thresholds of which it holds, with probability 1 - delta over the choice of the images: on
    new images of the same kind the cascade is less accurate than the longest prefix by at most
    epsilon (both fractions).

    Learn then Test (Angelopoulos et al., arXiv 2110.01052) with fixed-sequence testing. Half of the
    images give a path of cascades, from one that loses nothing to one that loses much; the other
    half tests them in that order and stops at the first that fails. A test bounds the loss,
    P(longest right, cascade wrong) - P(longest wrong, cascade right), by Clopper and Pearson's
    bounds at delta/2 each: exact for any number of images.
    """
    ((path, test),) = split_indices(confidence.shape[1], 1, confidence.shape[1] // 2, seed)
    learned, known = confidence[:, path], correct[:, path]
    orders = [
        np.argsort(-row, kind="stable") for row in learned[:-1]
    ]  # once, for all steps of the path
    full = correct[-1, test]
    best = Certificate(
        np.full(len(dims) - 1, np.inf),
        False,
        0.0,
        float(dims[-1]),
        float(full.mean()),
        float(full.mean()),
    )
    for allowed in PATH:
        thresholds = _thresholds_that_lose(allowed, learned, known, orders)
        left = exits(confidence[:, test], thresholds)
        answers = np.take_along_axis(correct[:, test], left[None], 0)[0]
        harm = clopper_pearson(int((full & ~answers).sum()), len(test), delta / 2, upper=True)
        gain = clopper_pearson(int((answers & ~full).sum()), len(test), delta / 2, upper=False)
        if harm - gain > epsilon:
            break
        expected = float(np.asarray(dims, float)[left].mean())
        if expected < best.expected_dim:
            early = bool((left < len(dims) - 1).any())
            best = Certificate(
                thresholds, early, harm - gain, expected, float(answers.mean()), float(full.mean())
            )
    return best


def _thresholds_that_lose(
    allowed: float, confidence: np.ndarray, correct: np.ndarray, orders: list[np.ndarray]
) -> np.ndarray:
    """float [G-1]: at each prefix in turn the smallest threshold at which those that leave, of
    those still there, lose at most the share `allowed` of their accuracy against the longest
    prefix; inf where there is none.
    """
    found = np.full(len(confidence) - 1, np.inf)
    stays = np.ones(confidence.shape[1], bool)
    for g, descending in enumerate(orders):
        order = descending[stays[descending]]
        if not len(order):
            break  # nobody is left to learn from, so nobody may leave here
        sure = confidence[g, order]
        lost = (correct[-1, order].astype(np.int64) - correct[g, order]).cumsum()
        fits = lost <= allowed * np.arange(1, len(order) + 1)
        fits &= np.append(sure[1:] < sure[:-1], True)  # equal confidences leave together
        if fits.any():
            last = np.flatnonzero(fits)[-1]
            below = sure[last + 1] if last + 1 < len(sure) else np.nextafter(sure[last], -np.inf)
            found[g] = below
            stays[order[: last + 1]] = False
    return found
