"""Ranking metrics: mAP@k, precision, recall against exact search with bounds, MFLOPs.

Q queries, k results each, N database rows. ids: int64 [Q, k], rows of the database, best first,
negative where missing. labels: int64 [N], query_labels: int64 [Q], classes, negative where unknown.
All metrics are fractions of 1. Source, unless another is named: Kusupati et al., arXiv 2205.13147,
section 4.3 and appendices, and its notebooks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from matryoshka.arrays import booleans, floats, integers, numbers, takes

BLOCK = 512  # queries per step: 8 MB at k = 2048


class Average(NamedTuple):
    """A mean over queries, NaN without any.

    queries: how many it includes. excluded: queries whose class has no row in the database.
    """

    value: float
    queries: int
    excluded: int


# ---------------------------------------------------------------- against the classes


@takes(ids=integers("Q k"), labels=integers("N"), query_labels=integers("L"))
def class_hits(ids: np.ndarray, labels: np.ndarray, query_labels: np.ndarray) -> np.ndarray:
    """Whether each result has its query's class, bool [Q, k].

    Missing results and unknown classes never count. ValueError for ids out of range, and for labels
    that are not integers: upstream's float16 cannot distinguish 2049 from 2048.
    """
    if len(ids) != len(query_labels):
        raise ValueError(f"ids of {len(ids)} queries, query_labels of {len(query_labels)}")
    if ids.size and ids.max() >= len(labels):
        raise ValueError(f"ids: row {ids.max()} out of range, the database has {len(labels)}")
    hits = np.zeros(ids.shape, bool)
    if len(labels):
        for start in range(0, len(ids), BLOCK):
            part = slice(start, start + BLOCK)
            rows = ids[part]
            own = query_labels[part, None]
            hits[part] = (rows >= 0) & (own >= 0) & (labels[np.maximum(rows, 0)] == own)
    return hits


@takes(labels=integers("N"), query_labels=integers("Q"))
def relevant_rows(labels: np.ndarray, query_labels: np.ndarray) -> np.ndarray:
    """Database rows of each query's class, int64 [Q]; 0 where the class is unknown."""
    classes, counts = np.unique(labels, return_counts=True)
    if not len(classes):
        return np.zeros(len(query_labels), np.int64)
    at = np.minimum(np.searchsorted(classes, query_labels), len(classes) - 1)
    return np.where((classes[at] == query_labels) & (query_labels >= 0), counts[at], 0)


@takes(hits=booleans("Q k"))
def top1(hits: np.ndarray) -> float:
    """Share of queries whose first result is a hit: 1-nearest-neighbour accuracy."""
    return precision_at(hits, 1)


@takes(hits=booleans("Q k"))
def precision_at(hits: np.ndarray, k: int) -> float:
    """P@k: mean of (hits among the first k) / k; missing results count as wrong."""
    return _mean(_first(hits, k).sum(1) / k)


@takes(hits=booleans("Q k"), relevant=integers("R", low=0))
def recall_at(hits: np.ndarray, k: int, relevant: np.ndarray) -> Average:
    """Recall@k: mean of (hits among the first k) / R, with R = `relevant_rows` of the query.

    Queries with R = 0 are excluded and counted. The paper's notebook divides by 1300 for all.
    """
    return _average(_first(hits, k).sum(1), relevant, relevant)


@takes(hits=booleans("Q k"), relevant=integers("R", low=0))
def mean_average_precision(
    hits: np.ndarray,
    k: int,
    relevant: np.ndarray | None = None,
    normaliser: Literal["k", "min"] = "k",
) -> Average:
    """mAP@k: mean of (sum of the precisions at the ranks of hits among the first k) / normaliser.

    normaliser "k" is the form of all tables in the paper ("corrected mAP@k"). Queries without
    relevant rows count as 0, and `relevant` is not needed. "min" divides by min(k, R), with
    R = `relevant_rows` of the query: the usual form, in which a perfect ranking of a small class
    has 1. Queries with R = 0 are excluded and counted.
    """
    first_hits = _first(hits, k)
    ranks = np.arange(1, k + 1)
    summed = np.empty(len(first_hits))
    for start in range(0, len(first_hits), BLOCK):
        part = first_hits[start : start + BLOCK]
        precisions = np.where(part, part.cumsum(1) / ranks, 0)
        summed[start : start + BLOCK] = precisions.sum(1)
    if normaliser == "k":
        return Average(_mean(summed / k), len(summed), 0)
    if normaliser != "min":
        raise ValueError(f"normaliser {normaliser!r}: expected k or min")
    if relevant is None:
        raise ValueError("normaliser 'min' needs `relevant`")
    _average(first_hits.sum(1), relevant, relevant)  # raises for more hits than relevant rows
    return _average(summed, relevant, np.minimum(relevant, k))


def _first(hits: np.ndarray, k: int) -> np.ndarray:
    if not 1 <= k <= hits.shape[1]:
        raise ValueError(f"k={k}: expected 1 to {hits.shape[1]}, the results of each query")
    return hits[:, :k]


def _average(scores: np.ndarray, relevant: np.ndarray, divisor: np.ndarray) -> Average:
    """Mean of scores / divisor over the queries with relevant rows."""
    if len(relevant) != len(scores):
        raise ValueError(f"relevant of {len(relevant)} queries, results of {len(scores)}")
    if (scores > relevant).any():
        raise ValueError(
            "a query has more hits than relevant rows: ids are of another database, or repeated"
        )
    counted = relevant > 0
    value = _mean(scores[counted] / divisor[counted])
    return Average(value, int(counted.sum()), int((~counted).sum()))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


# ---------------------------------------------------------------- against exact search


@takes(found=integers("Q m"), exact=integers("L k"))
def recall_against_exact(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Share of the rows in `exact` (int64 [Q, k]) that `found` (int64 [Q, m]) contains, [Q].

    The order does not matter. An id counts once, a negative one never. NaN where `exact` has no
    rows.
    """
    if len(found) != len(exact):
        raise ValueError(f"found has {len(found)} queries, exact {len(exact)}")
    recall = np.full(len(exact), np.nan)
    for start in range(0, len(exact), BLOCK):
        part = slice(start, start + BLOCK)
        # Ids of either side occur once, so that an id that occurs twice in both is common.
        expected = _distinct(exact[part])
        both = np.sort(np.concatenate([expected, _distinct(found[part])], 1), 1)
        common = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(1)
        number = (expected >= 0).sum(1)
        np.divide(common, number, out=recall[part], where=number > 0)
    return recall


def _distinct(ids: np.ndarray) -> np.ndarray:
    """Each row of ids sorted, with repetitions replaced by -1."""
    ordered = np.sort(ids.astype(np.int64, copy=False), 1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    return ordered


class RecallSummary(NamedTuple):
    """Mean, bounds and distribution of per-query recall; a mean hides queries that lose everything.

    queries: how many count. excluded: those without exact neighbours (NaN).
    standard_error: of the mean, NaN for fewer than 2 queries.
    interval: two-sided, lower: one-sided bound of the mean, both by `mean_lower_bound`.
    found: int64 [k + 1], a histogram of how many of the k a query found, rounded down, so that only
        perfect queries are in the last bin.
    """

    queries: int
    excluded: int
    mean: float
    standard_error: float
    interval: tuple[float, float]
    lower: float
    found: np.ndarray

    @property
    def perfect(self) -> float:
        """Share of queries that found all."""
        return float(self.found[-1] / self.queries) if self.queries else math.nan

    def at_most(self, number: int) -> float:
        """Share of queries that found `number` or fewer."""
        return float(self.found[: number + 1].sum() / self.queries) if self.queries else math.nan

    def quantile(self, share: float) -> int:
        """The smallest n such that at least `share` (0 to 1) of the queries found n or fewer."""
        return int(np.searchsorted(self.found.cumsum(), share * self.queries * (1 - 1e-12)))


@takes(recall=floats("Q"))
def summarise_recall(
    recall: np.ndarray, k: int, confidence: float = 0.95, bonferroni: int = 1
) -> RecallSummary:
    """Summary of per-query recall, float [Q] from `recall_against_exact`.

    bonferroni: how many searches were tried, if the best is chosen by these bounds. The bounds of
    all of them then hold together with probability `confidence`, and so does the chosen one's.
    Without the correction, the luckiest of 100 searches would win.
    """
    counted = recall[~np.isnan(recall)]
    number = len(counted)
    error = float(counted.std(ddof=1) / math.sqrt(number)) if number > 1 else math.nan
    half = (1 + confidence) / 2
    interval = (
        mean_lower_bound(counted, half, bonferroni),
        1 - mean_lower_bound(1 - counted, half, bonferroni),
    )
    # 1e-9: in floating point, 0.29 * 100 is 28.999999999999996.
    found = np.bincount(np.floor(counted * k + 1e-9).astype(np.int64), minlength=k + 1)
    lower = mean_lower_bound(counted, confidence, bonferroni)
    return RecallSummary(
        queries=number,
        excluded=len(recall) - number,
        mean=_mean(counted),
        standard_error=error,
        interval=interval,
        lower=lower,
        found=found,
    )


@takes(values=numbers("n"))
def mean_lower_bound(values: np.ndarray, confidence: float = 0.95, bonferroni: int = 1) -> float:
    """Lower confidence bound of a mean, valid for every distribution and sample size.

    The true mean exceeds it with probability >= confidence. values: float [n] in [0, 1]; without
    any the bound is 0. With delta = (1 - confidence) / bonferroni:

        wealth(m) = mean over stakes s of prod_i (1 + s (x_i - m))
        bound     = the m with wealth(m) = 1 / delta

    Wealth falls with m. A gambler who bets against a mean of m, where m is at least the true mean,
    has an expected wealth of at most 1 (AM-GM). By Markov's inequality, he ends above 1 / delta
    with probability <= delta. This holds for independent values, also of different distributions
    (a fixed number of queries per class), and for samples without replacement (negative
    association). Source: Waudby-Smith and Ramdas, JRSS B 2024, arXiv 2010.09686. A mixture of fixed
    stakes makes the bound independent of the order. The stakes halve from 1 to what suits the
    largest possible variance.

    Why not mean - 1.645 standard errors: recall is mostly 1 with a rare cliff, and a sample that
    happens to miss the cliff has too high a mean and too small an error. Where 1 query in 1000
    loses all, that "95 %" bound is wrong for 61 % of the samples of 500 queries and 14 % of those
    of 2000. Why not Wilson's bound over all Q k items: the misses of a query are correlated. The
    empirical Bernstein bound (Maurer and Pontil 2009) is valid, but lower where recall is high.
    """
    if not 0 < confidence < 1 or bonferroni < 1:
        raise ValueError(
            f"confidence={confidence}, bonferroni={bonferroni}: expected 0 to 1, and 1 or more"
        )
    if not len(values):
        return 0.0
    values = np.asarray(values, np.float64)
    if not (values.min() >= 0 and values.max() <= 1):  # NaN fails both
        raise ValueError("values: expected numbers from 0 to 1")
    log_needed = math.log(bonferroni / (1 - confidence))
    # Recall of k neighbours has few different values: the products take k + 1 terms, not Q.
    x, counts = np.unique(values, return_counts=True)
    halvings = max(0, math.ceil(0.5 * math.log2(len(values) / (8 * log_needed))))
    stakes = 0.5 ** np.arange(halvings + 1)[:, None]

    # Bisection; wealth(mean of the values) <= 1, so that the bound is below the mean.
    low = 0.0
    high = float(values.mean())
    for _ in range(50):
        m = (low + high) / 2
        # In logarithms: products over thousands of queries underflow.
        log_products = np.log1p(stakes * (x - m)) @ counts
        log_wealth = np.logaddexp.reduce(log_products) - math.log(len(stakes))
        if log_wealth >= log_needed:
            low = m
        else:
            high = m
    return low


# ---------------------------------------------------------------- cost


def mflops(shortlist_dim: int, database_size: int, stages: Sequence[tuple[int, int]] = ()) -> float:
    """Million floating point operations per query, as the paper counts (one multiply-add = 1 FLOP):

        (shortlist_dim * database_size + sum of dim * k over `stages`) / 1e6

    stages: re-ranking steps (dim, k). The count assumes an exhaustive shortlist. The paper's tables
    of adaptive retrieval count a re-ranking of 200 rows even at the shortlist's own dim:
    mflops(2048, 1281167, [(2048, 200)]) = 2624.24.
    """
    return (shortlist_dim * database_size + sum(dim * k for dim, k in stages)) / 1e6
