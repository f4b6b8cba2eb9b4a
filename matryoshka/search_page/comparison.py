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

from matryoshka.retrieval import SearchParams, Stage
from matryoshka.retrieval.hits import empty_bits, set_bits
from matryoshka.retrieval.store import Index, trained_dims

NEIGHBOURS = 10  # unless a request asks for another number
MAX_NEIGHBOURS = 100
MAX_SHORTLIST = 2000
# An index that exact search goes through in less time needs no fast search.
FAST_ENOUGH = 0.002  # seconds
# Not timed beyond: 20 million float16 numbers are read in 4 ms at 10 GB/s.
MAX_TIMED_NUMBERS = 20_000_000
# A time is the median of MAX_TURNS runs, or of those that fit into MAX_SECONDS.
MAX_TURNS = 5
MAX_SECONDS = 0.1


class Column(NamedTuple):
    """Neighbours of one query.

    dim: the prefix that orders them. ids: int64 [n], n <= k, best first. cosines: float32 [n].
    seconds: duration of one search.
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

    Searches return `k` neighbours. `only` is a filter, int64: the rows that may be found.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self.dims = trained_dims(index)
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
        last = own.stages[-1].dim if own.stages else index.columns
        fitting = min(self.rerank_dims, key=lambda d: abs(d - last))
        self.default = self.clipped(Choice(own.with_k(NEIGHBOURS).k, nprobe, fitting))

    def clipped(self, choice: Choice, k: int = NEIGHBOURS) -> Choice:
        """The nearest possible choice for k neighbours."""
        shortlist = min(max(choice.shortlist, NEIGHBOURS, k), max(self.longest, k))
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

    def needs_fast_search(self) -> bool:
        """Whether exact search is slower than FAST_ENOUGH, or the index has lists."""
        if self.lists or self.index.total * self.index.columns > MAX_TIMED_NUMBERS:
            return True
        if not len(self.index):
            return False
        query = self.index.vector(self.live_row(0))
        # The best of several runs: the first one reads the rows from the disk.
        seconds = min(
            _timed(lambda: self._scan(query, self.index.columns, self._live), repeat=False)[2]
            for _ in range(MAX_TURNS)
        )
        return seconds > FAST_ENOUGH

    def exact(
        self,
        query: np.ndarray,
        leave_out: int = -1,
        *,
        k: int = NEIGHBOURS,
        only: np.ndarray | None = None,
    ) -> list[Column]:
        """A Column for each of `dims`; only the last one's time is a median.

        query: float32 [D]. leave_out: a row that must not be found, such as the query itself.
        """
        candidates = self._candidates(only)
        columns = []
        for dim in self.dims:
            found = _timed(
                lambda dim=dim: self._scan(query, dim, candidates, leave_out=leave_out, k=k),
                repeat=dim == self.dims[-1],
            )
            columns.append(Column(dim, *found))
        return columns

    def _candidates(self, only: np.ndarray | None) -> list[np.ndarray]:
        """Rows of each part, counted from its first, that are not deleted and pass the filter."""
        if only is None:
            return self._live
        return [
            np.intersect1d(live, only - part.first)
            for part, live in zip(self.index.parts, self._live, strict=True)
        ]

    def _scan(
        self,
        query: np.ndarray,
        dim: int,
        candidates: list[np.ndarray],
        *,
        leave_out: int = -1,
        k: int = NEIGHBOURS,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and exact cosines of the best rows of all parts."""
        # One more, because the row to leave out may be among them.
        keep = k + (leave_out >= 0)
        ids = []
        scores = []
        for part, rows in zip(self.index.parts, candidates, strict=True):
            hits = part.rerank(query[None], rows[None], [Stage(dim, keep)], whole_rows=True)
            ids.append(np.where(hits.ids[0] < 0, -1, hits.ids[0] + part.first))
            scores.append(hits.scores[0])
        return _best(np.concatenate(ids), np.concatenate(scores), leave_out, k)

    def params(self, choice: Choice, k: int = NEIGHBOURS) -> SearchParams:
        """The index's default search with the choice in place of its own values.

        Its earlier stages stay if they are shorter than the chosen re-ranking prefix.
        """
        own = self.index.params.with_k(k)
        early = [stage for stage in own.stages[:-1] if stage.dim < choice.rerank]
        return SearchParams(
            "ivf" if self.lists else "scan",
            self.index.dim,
            choice.shortlist,
            (*early, Stage(choice.rerank, k)),
            nprobe=choice.nprobe,
        )

    def adaptive(
        self,
        query: np.ndarray,
        choice: Choice,
        leave_out: int = -1,
        *,
        k: int = NEIGHBOURS,
        only: np.ndarray | None = None,
    ) -> Column:
        """As `exact`, by the index's fast search."""
        params = self.params(choice, k)
        deleted = None
        if leave_out >= 0:
            deleted = empty_bits(self.index.total)
            set_bits(deleted, np.array([leave_out]))

        def search() -> tuple[np.ndarray, np.ndarray]:
            found = self.index.search(query[None], params, k=k, deleted=deleted, only=only)
            return _best(found.ids[0], found.scores[0], -1, k)

        return Column(choice.rerank, *_timed(search, repeat=True))


def recall(found: Column, truth: Column) -> float:
    """Share of the true neighbours that were found; 1 without true neighbours."""
    return float(np.isin(truth.ids, found.ids).mean()) if len(truth.ids) else 1.0


def _best(
    ids: np.ndarray, scores: np.ndarray, leave_out: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best, ties by rising id, without missing rows and `leave_out`."""
    # lexsort's last key comes first: by falling score, then by rising id.
    order = np.lexsort((ids, -scores))
    order = order[(ids[order] >= 0) & (ids[order] != leave_out)][:k]
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
