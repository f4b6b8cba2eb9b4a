"""A shortlist in the order of longer prefixes: adaptive retrieval (one stage), funnel retrieval
(several).

    shortlist = PrefixScan.build(rows, 64).search(queries, 200)
    hits = rerank(rows, queries, shortlist.ids, [Stage(256, 40), Stage(2048, 10)])

Each stage computes only the dimensions that the one before has not, on what the one before kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from matryoshka.retrieval import _native
from matryoshka.retrieval.hits import Hits, RetrievalError, check_rows, memory, pool


class Stage(NamedTuple):
    """Order by the cosine of the first `dim` dimensions, keep the best `keep`."""

    dim: int
    keep: int


def head_of(rows: np.ndarray, dim: int) -> np.ndarray:
    """A copy of the first dimensions in memory of huge pages, for the first stages: float16 [N,
    dim] or as rows are.

    Rows of a memory map lie on small pages; 200 random ones of 256 dimensions are 1.3 times as fast
    from here.
    """
    check_rows(rows, dim, "database")
    copy = memory((len(rows), dim), rows.dtype)
    for first in range(0, len(rows), 65_536):
        copy[first : first + 65_536] = rows[first : first + 65_536, :dim]
    return copy


def rerank(
    rows: np.ndarray,
    queries: np.ndarray,
    candidates: np.ndarray,
    stages: Sequence[Stage],
    head: np.ndarray | None = None,
    num_threads: int = 0,
    kernels: str = "",
) -> Hits:
    """The candidates (ids [Q, m], -1 for none) in the order of the last stage, `keep` of it:
    cosines are exact.

    rows: float16 or float32 [N, D], also a memory map; queries: float [Q, D]. head: of `head_of`,
    for the stages that it is wide enough for. RetrievalError for stages that do not get longer, or
    ids that are no rows.
    """
    stages = [Stage(*stage) for stage in stages]
    if not stages or any(a.dim >= b.dim for a, b in pairwise(stages)):
        raise RetrievalError(
            f"stages {[s.dim for s in stages]}: give one or more, each longer than the one before"
        )
    if any(not 1 <= stage.keep < 1 << 31 for stage in stages):
        raise RetrievalError(
            f"stages keep {[s.keep for s in stages]}: each keeps 1 or more, below 2^31"
        )
    check_rows(rows, stages[-1].dim, "database")
    check_rows(queries, stages[-1].dim, "queries")
    if candidates.ndim != 2 or len(candidates) != len(queries):
        raise RetrievalError(
            f"candidates {list(candidates.shape)}: expected one list for each of {len(queries)} "
            "queries"
        )
    if candidates.size and candidates.max() >= len(rows):
        raise RetrievalError(
            f"candidates: id {candidates.max()} is no row of the {len(rows)} in the database"
        )
    if rows.dtype not in (np.float16, np.float32):
        raise RetrievalError(f"database: is {rows.dtype}, re-ranking takes float16 and float32")
    begins = [0, *(stage.dim for stage in stages[:-1])]
    tables = [head if head is not None and stage.dim <= head.shape[1] else rows for stage in stages]
    native = [
        (table, begin, stage.dim, stage.keep)
        for table, begin, stage in zip(tables, begins, stages, strict=True)
    ]
    asked = np.ascontiguousarray(queries[:, : stages[-1].dim], np.float32)
    ids, scores = _native.rerank(
        pool(num_threads), native, asked, np.ascontiguousarray(candidates, np.int64), kernels
    )
    return Hits(ids, scores)
