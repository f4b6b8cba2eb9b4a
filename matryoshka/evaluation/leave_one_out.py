"""How good the prefixes of some embeddings are, by searching each among all others.

    panel = Panel(rows, labels, dims=(8, 64), queries=10_000)
    adapted, raw = panel.scores(adapter), panel.scores(None)
    difference_of_means(adapted.right_1nn[0], raw.right_1nn[0])      # of the prefix 8

The rows are database and queries at once: nothing that a map was fitted to takes part, and classes
need no images elsewhere. Legend: N rows, Q queries, G prefixes, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch

from matryoshka.arrays import floats, integers, takes
from matryoshka.evaluation.neighbours import NeighbourError, nearest, vote
from matryoshka.models.adapter import Adapter
from matryoshka.report.tables import Z_95, wilson_interval
from matryoshka.retrieval.ranking_metrics import recall_against_exact, relevant_rows

KNN = 20  # neighbours that vote
AT = 10  # of mAP and of the recall of neighbours


@takes(rows=floats("N D"), queries=integers("Q", low=0))
def other_neighbours(
    rows: np.ndarray, dims: Sequence[int], k: int, queries: np.ndarray | None = None
) -> np.ndarray:
    """The k rows of highest cosine to each query, itself left out, by each prefix: int64 [G, Q, k].

    rows: float [N, D]. queries: row numbers int64 [Q], None for all. Ties by row number.
    NeighbourError for fewer than k + 1 rows.
    """
    if k + 1 > len(rows):
        raise NeighbourError(f"{k} neighbours among {len(rows)} rows: one of them is the query")
    database = torch.from_numpy(np.asarray(rows, np.float32))
    own = np.arange(len(rows)) if queries is None else queries
    found = nearest(database, database[torch.from_numpy(own)], dims, k + 1, dtype=torch.float32)
    # The query itself goes to the end; if k + 1 equal rows come before it, the last of them goes.
    is_own = found.numpy() == own[:, None]
    order = is_own.argsort(axis=2, kind="stable")
    return np.take_along_axis(found.numpy(), order, 2)[:, :, :k]


# ---------------------------------------------------------------- scores of each query


@dataclass(frozen=True)
class Scores:
    """Scores of each query by each prefix, [G, Q]: their means over queries are the metrics.

    right_1nn, right_knn: whether the class of the nearest, and the vote of KNN, are right.
    precision: average precision at AT, divided by min(AT, rows of the class). Without labels these
    are None. recall: the share of the AT nearest by the full width of the original embeddings that
    the prefix finds.
    """

    recall: np.ndarray
    right_1nn: np.ndarray | None = None
    right_knn: np.ndarray | None = None
    precision: np.ndarray | None = None

    @property
    def main(self) -> np.ndarray:
        """What maps are chosen by: 1-NN, or the recall without labels. float64 [G, Q]."""
        return np.asarray(self.recall if self.right_1nn is None else self.right_1nn, np.float64)


@takes(
    found=integers("G+ Q K+", low=0),
    exact=integers("Q A"),
    labels=integers("N"),
    own=integers("Q", low=0),
)
def scores_of(
    found: np.ndarray, exact: np.ndarray, labels: np.ndarray | None, own: np.ndarray
) -> Scores:
    """Scores of `other_neighbours`.

    found: int64 [G, Q, K], K of at least AT. exact: int64 [Q, AT], by the full width of the
    original embeddings. labels: int64 [N] or None. own: the row numbers of the queries.
    """
    recall = np.stack([recall_against_exact(ids[:, :AT], exact[:, :AT]) for ids in found])
    if labels is None:
        return Scores(recall)
    classes = labels[found]  # [G, Q, K]
    truth = labels[own]
    winners = vote(torch.from_numpy(classes[:, :, :KNN])).numpy()
    rows_of_class = relevant_rows(labels, truth) - 1  # without the query itself
    hits = classes[:, :, :AT] == truth[:, None]
    at_hits = np.where(hits, hits.cumsum(2) / np.arange(1, hits.shape[2] + 1), 0)
    precision = at_hits.sum(2) / np.clip(rows_of_class, 1, hits.shape[2])
    return Scores(recall, classes[:, :, 0] == truth, winners == truth, precision)


class Panel:
    """Rows that adapters are compared on: each of some of them, the queries, searches all others.

    rows: float32 [N, D], as the encoder made them. labels: int64 [N] or None. queries: at most so
    many, evenly spaced.
    """

    def __init__(
        self, rows: np.ndarray, labels: np.ndarray | None, dims: Sequence[int], queries: int
    ) -> None:
        self.rows = rows
        self.labels = labels
        self.dims = tuple(dims)
        count = len(rows)
        self.own = np.unique(np.linspace(0, count - 1, min(queries, count)).astype(np.int64))
        # Few rows have fewer neighbours.
        self.exact = other_neighbours(rows, [rows.shape[1]], min(AT, count - 1), self.own)[0]

    @property
    def metric(self) -> str:
        """What `score` is."""
        return "neighbour recall" if self.labels is None else "1-NN"

    def scores(self, adapter: Adapter | None) -> Scores:
        """Scores of the rows behind an adapter; None: of the rows as they are."""
        adapted = self.rows if adapter is None else adapter.apply_to(self.rows)
        found = other_neighbours(adapted, self.dims, min(KNN, len(self.rows) - 1), self.own)
        return scores_of(found, self.exact, self.labels, self.own)

    def score(self, adapter: Adapter) -> float:
        """`Scores.main` in percent, the mean over queries and prefixes, by the nearest rows alone.

        The same as of `scores`, at less cost.
        """
        k = AT if self.labels is None else 1
        adapted = adapter.apply_to(self.rows)
        found = other_neighbours(adapted, self.dims, min(k, len(self.rows) - 1), self.own)
        if self.labels is not None:
            return float(100 * (self.labels[found[:, :, 0]] == self.labels[self.own]).mean())
        recall = [recall_against_exact(ids, self.exact) for ids in found]
        return float(100 * np.mean(recall))


# ---------------------------------------------------------------- means with intervals


class Interval(NamedTuple):
    """A mean over queries in percent or points, and its 95 % interval."""

    mean: float
    low: float
    high: float


def interval_of_mean(values: np.ndarray) -> Interval:
    """The mean of values of 0 to 1, [Q], in percent: Wilson's interval of shares, else the mean
    +- 1.96 standard errors.
    """
    mean = 100 * float(values.mean())
    if values.dtype == np.bool_:
        return Interval(mean, *wilson_interval(mean, len(values)))
    return _normal_interval(100 * values.astype(np.float64))


def difference_of_means(first: np.ndarray, second: np.ndarray) -> Interval:
    """First minus second in points, both [Q] and of the same queries: a paired comparison, mean +-
    1.96 standard errors of the differences.
    """
    return _normal_interval(100 * (first.astype(np.float64) - second.astype(np.float64)))


def _normal_interval(points: np.ndarray) -> Interval:
    mean = float(points.mean())
    error = float(points.std(ddof=1)) / sqrt(len(points)) if len(points) > 1 else 0.0
    return Interval(mean, mean - Z_95 * error, mean + Z_95 * error)
