"""How good a ranking is, how much of exact search it keeps, and what it costs by the paper's count.

Q queries, k results of each, N database rows. ids int64 [Q, k]: rows of the database, best first,
negative where there is none. labels int64 [N], query_labels int64 [Q]: classes, negative where a
class is unknown. All shares are fractions of 1. Source, where none is named: Kusupati et al., arXiv
2205.13147, section 4.3 and appendices, and its notebooks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

ROWS = 512  # queries at a time: k = 2048 then takes 8 MB


class Average(NamedTuple):
    """value: mean over the queries that count, NaN where there are none. queries: how many do.
    excluded: how many do not, because the database has no row of their class.
    """

    value: float
    queries: int
    excluded: int


# ---------------------------------------------------------------- against the classes


def hits(ids: np.ndarray, labels: np.ndarray, query_labels: np.ndarray) -> np.ndarray:
    """bool [Q, k]: whether a result has its query's class. No result, and no known class, is never
    a hit.

    ValueError for ids that the database lacks, and for labels that are not integers: upstream's
    float16 cannot tell 2049 from 2048.
    """
    for name, array in (("ids", ids), ("labels", labels), ("query_labels", query_labels)):
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name}: {array.dtype}, needs integers")
    if len(ids) != len(query_labels):
        raise ValueError(f"ids of {len(ids)} queries, but query_labels of {len(query_labels)}")
    if ids.size and ids.max() >= len(labels):
        raise ValueError(f"ids: row {ids.max()} is not among the database's {len(labels)}")
    found = np.zeros(ids.shape, bool)
    if len(labels):
        for start in range(0, len(ids), ROWS):
            part = slice(start, start + ROWS)
            rows, own = ids[part], query_labels[part, None]
            found[part] = (rows >= 0) & (own >= 0) & (labels[np.maximum(rows, 0)] == own)
    return found


def relevant_rows(labels: np.ndarray, query_labels: np.ndarray) -> np.ndarray:
    """int64 [Q]: how many rows of the database have the query's class, 0 where that is unknown."""
    classes, counts = np.unique(labels, return_counts=True)
    if not len(classes):
        return np.zeros(len(query_labels), np.int64)
    place = np.minimum(np.searchsorted(classes, query_labels), len(classes) - 1)
    return np.where((classes[place] == query_labels) & (query_labels >= 0), counts[place], 0)


def top1(hits: np.ndarray) -> float:
    """Share of the queries whose first result is a hit: accuracy of the 1-nearest-neighbour
    classifier.
    """
    return precision_at(hits, 1)


def precision_at(hits: np.ndarray, k: int) -> float:
    """P@k: mean over all queries of (hits among the first k) / k. Results that are missing count as
    wrong.
    """
    return _mean(_first(hits, k).sum(1) / k)


def recall_at(hits: np.ndarray, k: int, relevant: np.ndarray) -> Average:
    """Recall@k: mean of (hits among the first k) / R, with R the query's own `relevant` (int64 [Q],
    `relevant_rows`).

    The paper's notebook divides by 1300 for every class. Queries with R = 0 are excluded, and
    counted.
    """
    return _average(_first(hits, k).sum(1), relevant, relevant)


def mean_average_precision(
    hits: np.ndarray,
    k: int,
    relevant: np.ndarray | None = None,
    normaliser: Literal["k", "min"] = "k",
) -> Average:
    """mAP@k: mean of (sum over the hits among the first k of the precision at their rank) /
    normaliser.

    "k": divided by k, the paper's corrected mAP@k, all of its tables. Queries without relevant rows
    count, as 0; `relevant` does not matter and may be left out. "min": divided by min(k, R), with R
    the query's own `relevant` (int64 [Q], `relevant_rows`): the usual form, where a perfect ranking
    has 1 for small classes, too. Queries with R = 0 are excluded, and counted.
    """
    shown = _first(hits, k)
    summed = np.empty(len(shown))
    for start in range(0, len(shown), ROWS):
        part = shown[start : start + ROWS]
        summed[start : start + ROWS] = np.where(part, part.cumsum(1) / np.arange(1, k + 1), 0).sum(
            1
        )
    if normaliser == "k":
        return Average(_mean(summed / k), len(summed), 0)
    if normaliser != "min":
        raise ValueError(f"normaliser {normaliser!r}: unknown; known: k, min")
    if relevant is None:
        raise ValueError("normaliser 'min' needs `relevant`")
    _average(shown.sum(1), relevant, relevant)  # refuses more hits than there are relevant rows
    return _average(summed, relevant, np.minimum(relevant, k))


def _first(hits: np.ndarray, k: int) -> np.ndarray:
    if not 1 <= k <= hits.shape[1]:
        raise ValueError(f"k = {k}: needs 1 to {hits.shape[1]}, the results of each query")
    return hits[:, :k]


def _average(scores: np.ndarray, relevant: np.ndarray, divisor: np.ndarray) -> Average:
    """Mean of scores / divisor over the queries with relevant rows."""
    if len(relevant) != len(scores):
        raise ValueError(f"relevant of {len(relevant)} queries, but results of {len(scores)}")
    if (scores > relevant).any():
        raise ValueError(
            "a query has more hits than relevant rows: of another database, or ids are repeated"
        )
    counted = relevant > 0
    value = _mean(scores[counted] / divisor[counted])
    return Average(value, int(counted.sum()), int((~counted).sum()))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


# ---------------------------------------------------------------- against exact search


def recall_against_exact(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """float64 [Q]: share of the rows in `exact` (int64 [Q, k]) that `found` (int64 [Q, any width])
    has, too.

    The order does not matter; an id counts once, a negative one never. With fewer than k rows in
    `exact` (a database smaller than k) these are all; NaN where it has none.
    """
    if len(found) != len(exact):
        raise ValueError(f"found has {len(found)} queries, exact {len(exact)}")
    recall = np.full(len(exact), np.nan)
    for start in range(0, len(exact), ROWS):
        part = slice(start, start + ROWS)
        wanted, had = _distinct(exact[part]), _distinct(found[part])
        both = np.sort(np.concatenate([wanted, had], 1), 1)
        common = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(1)
        number = (wanted >= 0).sum(1)
        np.divide(common, number, out=recall[part], where=number > 0)
    return recall


def _distinct(ids: np.ndarray) -> np.ndarray:
    """Each row sorted, with -1 for every repetition."""
    ordered = np.sort(ids.astype(np.int64, copy=False), 1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    return ordered


class RecallSummary(NamedTuple):
    """What `summarise_recall` says of per-query recall; the mean alone hides queries that lose
    everything.

    queries: how many count; excluded: those without exact neighbours (NaN). standard_error: of the
    mean, NaN for fewer than 2 queries. interval: two-sided, lower: one-sided, of the mean; both by
    `mean_lower_bound`. found: int64 [k+1], queries by how many of the k they found, rounded down,
    so that only perfect queries are in the last.
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
        """Share of the queries that found all."""
        return float(self.found[-1] / self.queries) if self.queries else math.nan

    def at_most(self, number: int) -> float:
        """Share of the queries that found `number` or fewer."""
        return float(self.found[: number + 1].sum() / self.queries) if self.queries else math.nan

    def quantile(self, share: float) -> int:
        """The smallest number such that at least `share` (0 to 1) of the queries found that many or
        fewer.
        """
        return int(np.searchsorted(self.found.cumsum(), share * self.queries * (1 - 1e-12)))


def summarise_recall(
    recall: np.ndarray, k: int, confidence: float = 0.95, bonferroni: int = 1
) -> RecallSummary:
    """Mean, bounds and distribution of per-query recall (float [Q], as `recall_against_exact`
    returns it).

    bonferroni: the number of settings that were tried, where the best of them is chosen by these
    bounds: with it, the bounds of all of them hold together with probability `confidence`, so that
    the chosen one's does. Without it, the luckiest of 100 settings is believed.
    """
    counted = recall[~np.isnan(recall)]
    number = len(counted)
    error = float(counted.std(ddof=1) / math.sqrt(number)) if number > 1 else math.nan
    half = (1 + confidence) / 2
    interval = (
        mean_lower_bound(counted, half, bonferroni),
        1 - mean_lower_bound(1 - counted, half, bonferroni),
    )
    found = np.bincount(np.floor(counted * k + 1e-9).astype(np.int64), minlength=k + 1)
    lower = mean_lower_bound(counted, confidence, bonferroni)
    return RecallSummary(
        number, len(recall) - number, _mean(counted), error, interval, lower, found
    )


def mean_lower_bound(values: np.ndarray, confidence: float = 0.95, bonferroni: int = 1) -> float:
    """A number that the true mean exceeds with probability >= confidence, whatever the distribution
    and however few the values. values: float [n] in [0, 1]; 0.0 for none. With delta = (1 -
    confidence) / bonferroni:

        wealth(m) = mean over stakes s of prod_i (1 + s (x_i - m)),   bound = the m where wealth(m) = 1 / delta

    A gambler who bets against a mean of m, and m is at least the true one, expects no more than his
    1 (AM-GM), so that by Markov's inequality he ends above 1 / delta with probability <= delta.
    Wealth falls with m. That holds for independent values, of different distributions, too (so many
    queries of each class), and for a sample without replacement (negative association). Betting:
    Waudby-Smith and Ramdas, JRSS B 2024, arXiv 2010.09686; fixed stakes, mixed, make it independent
    of the order. The stakes halve from 1 to what suits the largest possible variance.

    Why not mean - 1.645 standard errors: recall is mostly 1 with a rare cliff, and a sample that
    happens to miss the cliff has too high a mean and too small an error. Where 1 query in 1000
    loses all, that "95 %" bound is wrong for 61 % of the samples of 500 queries and 14 % of those
    of 2000. Why not Wilson's over all Q k items: the misses of a query come together. Empirical
    Bernstein's bound (Maurer and Pontil 2009) is sound, but lower where recall is high.
    """
    if not 0 < confidence < 1 or bonferroni < 1:
        raise ValueError(
            f"confidence {confidence} and bonferroni {bonferroni}: need 0 to 1, and 1 or more"
        )
    if not len(values):
        return 0.0
    values = np.asarray(values, np.float64)
    if not (values.min() >= 0 and values.max() <= 1):  # NaN fails
        raise ValueError("values: need numbers from 0 to 1")
    log_needed = math.log(bonferroni / (1 - confidence))
    x, counts = np.unique(values, return_counts=True)
    halvings = max(0, math.ceil(0.5 * math.log2(len(values) / (8 * log_needed))))
    stakes = 0.5 ** np.arange(halvings + 1)[:, None]
    low, high = 0.0, float(values.mean())  # wealth(mean of the values) <= 1
    for _ in range(50):
        m = (low + high) / 2
        log_wealth = np.logaddexp.reduce(np.log1p(stakes * (x - m)) @ counts) - math.log(
            len(stakes)
        )
        low, high = (m, high) if log_wealth >= log_needed else (low, m)
    return low


# ---------------------------------------------------------------- cost


def mflops(shortlist_dim: int, database_size: int, stages: Sequence[tuple[int, int]] = ()) -> float:
    """Million floating point operations of a query, as the paper counts them (one multiply-add = 1
    FLOP):

        (shortlist_dim * database_size + sum of dim * k over the re-ranking `stages` [(dim, k),
        ...]) / 1e6

    That is exhaustive search of the shortlist. No stages: single shot. The paper's tables of
    adaptive retrieval count a re-ranking of 200 even at the shortlist's own dim: mflops(2048,
    1281167, [(2048, 200)]) = 2624.24.
    """
    return (shortlist_dim * database_size + sum(dim * k for dim, k in stages)) / 1e6
