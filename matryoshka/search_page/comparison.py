"""Compare two searches for one query: exact at every prefix, and the index's fast search.

    comparison = Comparison(index)
    exact = comparison.exact(vector)                       # a Column for each of comparison.dims
    fast = comparison.adaptive(vector, Choice(200, 32, 512))
    recall(fast, exact[-1])

The ground truth is the cosine of every row that is not deleted; the last column uses all
dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import numpy as np

from matryoshka.retrieval import SearchParams, Stage, rerank
from matryoshka.retrieval.hits import empty_bits, set_bits
from matryoshka.retrieval.store import Index

NEIGHBOURS = 10
MAX_SHORTLIST = 2000
# A time is the median of MAX_TURNS runs, or of those that fit into MAX_SECONDS.
MAX_TURNS = 5
MAX_SECONDS = 0.1


class Column(NamedTuple):
    """Neighbours of one query.

    dim: the prefix that orders them. ids: int64 [n], n <= NEIGHBOURS, best first. cosines: float32
    [n]. seconds: duration of one search.
    """

    dim: int
    ids: np.ndarray
    cosines: np.ndarray
    seconds: float


class Choice(NamedTuple):
    """The sliders of the fast search: shortlist length, visited lists, prefix of the re-ranking."""

    shortlist: int
    nprobe: int
    rerank: int


class Comparison:
    """Both searches of an index.

    dims: prefixes that the model was trained for, up to the index's columns, and all columns.
    lists: number in the largest inverted file, 0 without one. longest: limit of the shortlist.
    rerank_dims: prefixes for re-ranking. default: the Choice nearest to the index's own params.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        columns = index.columns
        dims = index.model.get("dims")
        # Models that were not trained for prefixes: powers of two.
        known = dims if isinstance(dims, list) and dims else [8 << i for i in range(16)]
        self.dims = sorted({d for d in known if isinstance(d, int) and 0 < d < columns} | {columns})
        self.lists = max((part.metadata["lists"] for part in index.parts), default=0)
        self.rerank_dims = [d for d in self.dims if d >= index.dim]
        # Rows that exact search compares, by part: it has no list of deleted rows.
        self._live = []
        for part in index.parts:
            rows = np.arange(part.first, part.first + part.count)
            self._live.append(rows[~index.is_deleted(rows)] - part.first)
        self.longest = min(MAX_SHORTLIST, max(NEIGHBOURS, index.total))
        own = index.params
        nprobe = own.nprobe if own.index == "ivf" else max(1, self.lists)
        last = own.stages[-1].dim if own.stages else columns
        fitting = min(self.rerank_dims, key=lambda d: abs(d - last))
        self.default = self.clipped(Choice(own.with_k(NEIGHBOURS).k, nprobe, fitting))

    def clipped(self, choice: Choice) -> Choice:
        """The nearest possible choice."""
        shortlist = min(max(choice.shortlist, NEIGHBOURS), self.longest)
        nprobe = min(max(choice.nprobe, 1), max(1, self.lists))
        rerank = min(self.rerank_dims, key=lambda d: abs(d - choice.rerank))
        return Choice(shortlist, nprobe, rerank)

    def live_row(self, at: int) -> int:
        """The number of the at-th row that is not deleted, 0 <= at < len(index). IndexError."""
        for part, live in zip(self.index.parts, self._live, strict=True):
            if at < len(live):
                return part.first + int(live[at])
            at -= len(live)
        raise IndexError(f"the index has only {len(self.index)} rows")

    def exact(self, query: np.ndarray, leave_out: int = -1) -> list[Column]:
        """A Column for each of `dims`; only the last one's time is a median.

        query: float32 [D]. leave_out: a row that must not be found, such as the query itself.
        """
        columns = []
        for dim in self.dims:
            found = _timed(
                lambda dim=dim: self._scan(query, dim, leave_out), repeat=dim == self.dims[-1]
            )
            columns.append(Column(dim, *found))
        return columns

    def _scan(self, query: np.ndarray, dim: int, leave_out: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and exact cosines of the best rows of all parts."""
        # One more, because the row to leave out may be among them.
        keep = NEIGHBOURS + (leave_out >= 0)
        ids = []
        scores = []
        for part, live in zip(self.index.parts, self._live, strict=True):
            hits = rerank(
                part.rows,
                query[None],
                live[None],
                [Stage(dim, keep)],
                num_threads=self.index.num_threads,
            )
            ids.append(np.where(hits.ids[0] < 0, -1, hits.ids[0] + part.first))
            scores.append(hits.scores[0])
        return _best(np.concatenate(ids), np.concatenate(scores), leave_out)

    def params(self, choice: Choice) -> SearchParams:
        """The index's default search with the choice in place of its own values.

        Its earlier stages stay if they are shorter than the chosen re-ranking prefix.
        """
        own = self.index.params.with_k(NEIGHBOURS)
        early = [stage for stage in own.stages[:-1] if stage.dim < choice.rerank]
        return SearchParams(
            "ivf" if self.lists else "scan",
            self.index.dim,
            choice.shortlist,
            (*early, Stage(choice.rerank, NEIGHBOURS)),
            nprobe=choice.nprobe,
        )

    def adaptive(self, query: np.ndarray, choice: Choice, leave_out: int = -1) -> Column:
        """As `exact`, by the index's fast search."""
        params = self.params(choice)
        deleted = None
        if leave_out >= 0:
            deleted = empty_bits(self.index.total)
            set_bits(deleted, np.array([leave_out]))

        def search() -> tuple[np.ndarray, np.ndarray]:
            found = self.index.search(query[None], params, k=NEIGHBOURS, deleted=deleted)
            return _best(found.ids[0], found.scores[0], -1)

        return Column(choice.rerank, *_timed(search, repeat=True))


def recall(found: Column, truth: Column) -> float:
    """Share of the true neighbours that were found; 1 without true neighbours."""
    return float(np.isin(truth.ids, found.ids).mean()) if len(truth.ids) else 1.0


def _best(ids: np.ndarray, scores: np.ndarray, leave_out: int) -> tuple[np.ndarray, np.ndarray]:
    """The NEIGHBOURS best, ties by rising id, without missing rows and `leave_out`."""
    # lexsort's last key comes first: by falling score, then by rising id.
    order = np.lexsort((ids, -scores))
    order = order[(ids[order] >= 0) & (ids[order] != leave_out)][:NEIGHBOURS]
    return ids[order], scores[order]


def _timed(
    search: Callable[[], tuple[np.ndarray, np.ndarray]], repeat: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """The result of a search and its duration in seconds, a median if `repeat`."""
    times = list[float]()
    for _ in range(MAX_TURNS if repeat else 1):
        started = time.perf_counter()
        ids, cosines = search()
        times.append(time.perf_counter() - started)
        if sum(times) > MAX_SECONDS:
            break
    return ids, cosines, median(times)
