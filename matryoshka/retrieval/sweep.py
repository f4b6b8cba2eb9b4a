"""Find the fastest search parameters that meet a recall bound with confidence."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from matryoshka.retrieval.hits import RetrievalError
from matryoshka.retrieval.params import PREFIX_CACHE_DIMS, SearchParams
from matryoshka.retrieval.ranking_metrics import (
    RecallSummary,
    recall_against_exact,
    summarise_recall,
)
from matryoshka.retrieval.rerank import Stage

# Grid of a sweep. Int8 prefixes of 16 to 128 dimensions have 0.89, 0.976, 0.997 and 1.0 of the
# exact ten among their first 200.
PREFIX_DIMS = (16, 32, 64, 128)
BINARY_DIMS = (64, 128, 256, 512)
SHORTLIST_LENGTHS = (50, 100, 200, 400, 800)
NPROBES = (4, 8, 16, 32, 64, 128)
# From here on an inverted file is built for one prefix only: k-means takes a minute.
LARGE_DATABASE = 200_000

TURNS = 5  # repeated speed measurements of parameters on the frontier

# (queries, params) -> ids
Search = Callable[[np.ndarray, SearchParams], np.ndarray]


@dataclass(frozen=True)
class Measured:
    """Recall and speed of one set of parameters.

    recall: of the exact neighbours, with bounds that hold for the whole sweep together.
    rates: queries per second of each turn, in batches of `batch`.
    """

    params: SearchParams
    recall: RecallSummary
    rates: tuple[float, ...]
    batch: int

    @property
    def speed(self) -> float:
        """Queries per second, median of the turns."""
        return float(np.median(self.rates))


# ---------------------------------------------------------------- what to try


def grid(
    indexes: Sequence[str],
    *,
    columns: int,
    rows: int,
    neighbours: int = 10,
    dims: Sequence[int] = (),
) -> list[SearchParams]:
    """Parameters worth measuring for a database [rows, columns].

    dims: prefixes of the shortlists; default: PREFIX_DIMS or BINARY_DIMS.
    """
    found: list[SearchParams] = []
    for index in indexes:
        if index == "exact":
            continue  # the ground truth itself
        lengths = (200, 400, 800, 1600) if index == "binary" else SHORTLIST_LENGTHS
        ks = sorted({max(neighbours, min(k, rows)) for k in lengths})
        for dim in _shortlist_dims(index, dims, columns=columns, rows=rows):
            for k in ks:
                for stages in _stages(index, dim, k, columns=columns, neighbours=neighbours):
                    for width in _widths(index, rows):
                        found.append(SearchParams(index, dim, k, stages, **width))
    return list(dict.fromkeys(found))


def _shortlist_dims(index: str, dims: Sequence[int], *, columns: int, rows: int) -> Sequence[int]:
    """The usable ones of `dims`, or of the index's defaults; all dimensions if none is usable."""
    if index == "binary":
        return [dim for dim in dims or BINARY_DIMS if dim <= columns and dim % 64 == 0]
    if index == "ivf":
        dims = dims or ((64,) if rows > LARGE_DATABASE else (32, 64))
    return [dim for dim in dims or PREFIX_DIMS if dim <= columns] or [columns]


def _widths(index: str, rows: int) -> list[dict[str, int]]:
    """How thoroughly an approximate index searches: nprobe or ef_search."""
    if index == "ivf":
        lists = 2 ** round(math.log2(4 * math.sqrt(rows)))  # as InvertedFile.build has them
        usable = [nprobe for nprobe in NPROBES if nprobe <= lists]
        return [{"nprobe": nprobe} for nprobe in usable or [lists]]
    if index == "hnsw":
        return [{"ef_search": 4 * nprobe} for nprobe in NPROBES]
    return [{}]


def _stages(
    index: str, dim: int, k: int, *, columns: int, neighbours: int
) -> Iterator[tuple[Stage, ...]]:
    """Re-ranking in one step, by a middle prefix, and for bits, which order coarsely, by two."""
    last = Stage(columns, neighbours)
    yield (last,)
    middle = 2 ** int(math.log2(min(PREFIX_CACHE_DIMS, max(columns // 2, 1))))
    if middle >= columns or (index != "binary" and middle <= dim):
        return
    for keep in (25, 40):
        if not neighbours <= keep < k:
            continue
        yield Stage(middle, keep), last
        if index == "binary" and middle > 64 and k >= 400:
            yield Stage(64, 120), Stage(middle, keep), last


# ---------------------------------------------------------------- measuring


def measure(
    search: Search,
    candidates: Iterable[SearchParams],
    queries: np.ndarray,
    truth: np.ndarray,
    *,
    batch: int,
    tried: int,
) -> Iterator[Measured]:
    """Measure each candidate on all queries.

    truth: exact neighbours, int64 [Q, n]. tried: number of candidates of the whole sweep; recall
    bounds hold for all of them together (Bonferroni).
    """
    for params in candidates:
        search(queries[:batch], params)  # builds the index, warms up
        found = []
        rates = []
        for first in range(0, len(queries), batch):
            started = time.perf_counter()
            found.append(search(queries[first : first + batch], params))
            rates.append(len(found[-1]) / (time.perf_counter() - started))
        recall = recall_against_exact(np.concatenate(found), truth)
        summary = summarise_recall(recall, truth.shape[1], bonferroni=tried)
        yield Measured(params, summary, tuple(rates), batch)


def remeasure_frontier(
    search: Search,
    measured: list[Measured],
    queries: np.ndarray,
    *,
    batch: int,
    target: float,
) -> list[Measured]:
    """Measure the speed of the best candidates again, in turns.

    Single measurements are noisy, and the luckiest would win. Candidates that fall behind make room
    for others, which are measured as well, until all of the current best have been.
    """
    rates: dict[SearchParams, tuple[float, ...]] = {}
    while True:
        measured = [replace(m, rates=rates.get(m.params, m.rates)) for m in measured]
        # The fastest three that meet the target, so that noise does not decide between them.
        certain = [m for m in measured if m.recall.lower >= target]
        certain.sort(key=lambda m: -m.speed)
        best = [m.params for m in (*frontier(measured), *certain[:3])]
        due = [params for params in dict.fromkeys(best) if params not in rates]
        if not due:
            return measured
        # In turns, so that a slow moment of the machine affects all of them.
        turns = {params: list[float]() for params in due}
        for _ in range(TURNS):
            for params in due:
                turns[params].append(queries_per_second(search, params, queries, batch))
        rates |= {params: tuple(values) for params, values in turns.items()}


def queries_per_second(
    search: Search, params: SearchParams, queries: np.ndarray, batch: int
) -> float:
    """Speed over all queries, in batches."""
    started = time.perf_counter()
    for first in range(0, len(queries), batch):
        search(queries[first : first + batch], params)
    return len(queries) / (time.perf_counter() - started)


# ---------------------------------------------------------------- choosing


def frontier(measured: Iterable[Measured]) -> list[Measured]:
    """The measurements that none beats in both recall and speed, fastest first."""
    best: list[Measured] = []
    for candidate in sorted(measured, key=lambda m: (-m.speed, -m.recall.mean)):
        if not best or candidate.recall.mean > best[-1].recall.mean:
            best.append(candidate)
    return best


def certified(measured: Iterable[Measured], target: float) -> Measured | None:
    """The fastest with a lower bound of recall of `target` or more, or None."""
    if not 0 < target <= 1:
        raise RetrievalError(f"target recall {target}: expected more than 0, at most 1")
    certain = [m for m in measured if m.recall.lower >= target]
    return max(certain, key=lambda m: m.speed, default=None)


def highest_bound(queries: int, tried: int, confidence: float = 0.95) -> float:
    """The lower bound of recall of a search without any loss on this number of queries."""
    return summarise_recall(np.ones(queries), 1, confidence, tried).lower


def queries_needed(target: float, tried: int, confidence: float = 0.95) -> int:
    """Queries that a search without any loss needs for a lower bound of `target`, below 1."""

    def is_enough(queries: int) -> bool:
        return highest_bound(queries, tried, confidence) >= target

    # Doubling, then bisection: the bound grows with the number of queries.
    enough = 1
    while not is_enough(enough):
        enough *= 2
    too_few = enough // 2
    while too_few + 1 < enough:
        middle = (too_few + enough) // 2
        if is_enough(middle):
            enough = middle
        else:
            too_few = middle
    return enough
