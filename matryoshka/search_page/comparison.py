"""One query against an index, in two ways: exactly, at every prefix, and by the index's own fast
search.

    comparison = Comparison(index)
    exact = comparison.exact(vector)                       # a Column for each of comparison.dims
    fast = comparison.adaptive(vector, Choice(200, 32, 512))
    recall(fast, exact[-1])

The truth is the cosine of every row that is not deleted; the last column's is that of all
dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import numpy as np

from matryoshka.retrieval import Setting, Stage, rerank
from matryoshka.retrieval.hits import empty_bits, set_bits
from matryoshka.retrieval.store import Index

NEIGHBOURS = 10
LONGEST = 2000  # of shortlists
TURNS, PATIENCE = (
    5,
    0.1,
)  # a time is the median of so many turns, or of those that fit into these seconds


class Column(NamedTuple):
    """Neighbours of one query. dim: the prefix that put them in order; ids: int64 [n], n <=
    NEIGHBOURS, best first; cosines: float32 [n]; seconds: that one such search takes.
    """

    dim: int
    ids: np.ndarray
    cosines: np.ndarray
    seconds: float


class Choice(NamedTuple):
    """What may be chosen of the fast search: rows of the shortlist, lists that are looked at, and
    the prefix that puts the shortlist in order.
    """

    shortlist: int
    nprobe: int
    rerank: int


class Comparison:
    """dims: the prefixes that the index's model was trained for, as far as the index has them, and
    all dimensions. lists: of the largest inverted file, 0 where there is none. longest: rows of a
    shortlist. rerank_dims: prefixes that it can be put in order by. default: the Choice that is the
    index's own setting.
    """

    def __init__(self, index: Index) -> None:
        self.index, columns = index, index.columns
        dims = index.model.get("dims")
        known = dims if isinstance(dims, list) and dims else [8 << i for i in range(16)]
        self.dims = sorted({d for d in known if isinstance(d, int) and 0 < d < columns} | {columns})
        self.lists = max((part.about["lists"] for part in index.parts), default=0)
        self.rerank_dims = [d for d in self.dims if d >= index.dim]
        self._live = []
        for part in index.parts:
            rows = np.arange(part.first, part.first + part.count)
            self._live.append(rows[~index.is_deleted(rows)] - part.first)
        self.longest = min(LONGEST, max(NEIGHBOURS, index.total))
        own = index.setting
        nprobe = own.effort if own.index == "ivf" else max(1, self.lists)
        last = own.stages[-1].dim if own.stages else columns
        fitting = min(self.rerank_dims, key=lambda d: abs(d - last))
        self.default = self.clipped(Choice(own.giving(NEIGHBOURS).k, nprobe, fitting))

    def clipped(self, choice: Choice) -> Choice:
        """The nearest one that there is."""
        shortlist = min(max(choice.shortlist, NEIGHBOURS), self.longest)
        nprobe = min(max(choice.nprobe, 1), max(1, self.lists))
        return Choice(
            shortlist, nprobe, min(self.rerank_dims, key=lambda d: abs(d - choice.rerank))
        )

    def live_row(self, at: int) -> int:
        """The number of a row, by its place 0 to len(index) - 1 among those that are not deleted.
        IndexError.
        """
        for part, live in zip(self.index.parts, self._live, strict=True):
            if at < len(live):
                return part.first + int(live[at])
            at -= len(live)
        raise IndexError(f"the index has only {len(self.index)} rows")

    def exact(self, query: np.ndarray, leave_out: int = -1) -> list[Column]:
        """query: float32 [D]; leave_out: a row that shall not be found, such as the query itself. A
        Column for each of `dims`; only the last one's time is a median.
        """
        return [
            Column(
                dim,
                *_timed(lambda dim=dim: self._scan(query, dim, leave_out), dim == self.dims[-1]),
            )
            for dim in self.dims
        ]

    def _scan(self, query: np.ndarray, dim: int, leave_out: int) -> tuple[np.ndarray, np.ndarray]:
        keep = NEIGHBOURS + (leave_out >= 0)
        ids, scores = [], []
        for part, live in zip(self.index.parts, self._live, strict=True):
            found = rerank(
                part.rows, query[None], live[None], [Stage(dim, keep)], None, self.index.num_threads
            )
            ids.append(np.where(found.ids[0] < 0, -1, found.ids[0] + part.first))
            scores.append(found.scores[0])
        return _best(np.concatenate(ids), np.concatenate(scores), leave_out)

    def setting(self, choice: Choice) -> Setting:
        """The index's default with what was chosen in its place; its stages before the last stay,
        if they are shorter than the chosen one.
        """
        own = self.index.setting
        early = [stage for stage in own.giving(NEIGHBOURS).stages[:-1] if stage.dim < choice.rerank]
        kind = "ivf" if self.lists else "scan"
        stages = (*early, Stage(choice.rerank, NEIGHBOURS))
        return Setting(kind, self.index.dim, choice.shortlist, stages, choice.nprobe)

    def adaptive(self, query: np.ndarray, choice: Choice, leave_out: int = -1) -> Column:
        """As `exact`, by the index's fast search."""
        setting, deleted = self.setting(choice), None
        if leave_out >= 0:
            deleted = empty_bits(self.index.total)
            set_bits(deleted, np.array([leave_out]))

        def search() -> tuple[np.ndarray, np.ndarray]:
            found = self.index.search(query[None], NEIGHBOURS, setting, deleted)
            return _best(found.ids[0], found.scores[0], -1)

        return Column(choice.rerank, *_timed(search, True))


def recall(found: Column, truth: Column) -> float:
    """The share of the true neighbours that were found; 1 where there are none."""
    return float(np.isin(truth.ids, found.ids).mean()) if len(truth.ids) else 1.0


def _best(ids: np.ndarray, scores: np.ndarray, leave_out: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((ids, -scores))
    order = order[(ids[order] >= 0) & (ids[order] != leave_out)][:NEIGHBOURS]
    return ids[order], scores[order]


def _timed(
    search: Callable[[], tuple[np.ndarray, np.ndarray]], often: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    times = list[float]()
    for _ in range(TURNS if often else 1):
        started = time.perf_counter()
        ids, cosines = search()
        times.append(time.perf_counter() - started)
        if sum(times) > PATIENCE:
            break
    return ids, cosines, median(times)
