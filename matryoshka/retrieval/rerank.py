"""Re-ranking by longer prefixes: adaptive retrieval (one stage), funnel retrieval (several).

    shortlist = PrefixScan.build(rows, 64).search(queries, 200)
    hits = rerank(rows, queries, shortlist.ids, [Stage(256, 40), Stage(2048, 10)])

Each stage reads only the dimensions that the one before has not read, of the rows that it kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from matryoshka.arrays import as_float32
from matryoshka.retrieval import _native
from matryoshka.retrieval.hits import (
    Hits,
    RetrievalError,
    as_candidates,
    as_rows,
    huge_page_zeros,
    pool,
)


class Stage(NamedTuple):
    """Order rows by the cosine of the first `dim` dimensions and keep the `keep` best."""

    dim: int
    keep: int


def build_prefix_cache(rows: np.ndarray, dim: int) -> np.ndarray:
    """A copy of the first dimensions on huge pages for the first stages, [N, dim], type of rows.

    A memory map has small pages: 200 random rows of 256 dimensions are 1.3 times as fast from the
    copy.
    """
    rows = as_rows(rows, dim, "database")
    copy = huge_page_zeros((len(rows), dim), rows.dtype)
    for first in range(0, len(rows), 65_536):
        copy[first : first + 65_536] = rows[first : first + 65_536, :dim]
    return copy


def rerank(
    rows: np.ndarray,
    queries: np.ndarray,
    candidates: np.ndarray,
    stages: Sequence[Stage],
    *,
    prefix_cache: np.ndarray | None = None,
    num_threads: int = 0,
    kernels: str = "",
    blocks: Any = None,
) -> Hits:
    """Order candidates (ids [Q, m], -1 where missing) by the last stage; cosines are exact.

    rows: float16 or float32 [N, D], also a memory map. queries: float [Q, D]. prefix_cache: from
    `build_prefix_cache`, read instead of `rows` by the stages that fit into it. blocks:
    CheckedFile.blocks of the file of `rows`. RetrievalError for stages that do not get longer, and
    for ids out of range.
    """
    stages = [Stage(*stage) for stage in stages]
    if not stages or any(a.dim >= b.dim for a, b in pairwise(stages)):
        raise RetrievalError(
            f"stages {[s.dim for s in stages]}: expected one or more, each longer than the one "
            "before"
        )
    if any(not 1 <= stage.keep < 1 << 31 for stage in stages):
        raise RetrievalError(
            f"stages keep {[s.keep for s in stages]}: expected 1 to {(1 << 31) - 1} each"
        )
    rows = as_rows(rows, stages[-1].dim, "database")
    queries = as_rows(queries, stages[-1].dim)
    candidates = as_candidates(candidates, len(rows))
    if len(candidates) != len(queries):
        raise RetrievalError(
            f"candidates {list(candidates.shape)}: expected one list for each of "
            f"{len(queries)} queries"
        )
    if rows.dtype not in (np.float16, np.float32):
        raise RetrievalError(f"database: is {rows.dtype}, expected float16 or float32")

    cached = 0
    if prefix_cache is not None:
        prefix_cache = as_rows(prefix_cache, 1, "prefix_cache")
        if len(prefix_cache) != len(rows) or prefix_cache.dtype != rows.dtype:
            raise RetrievalError(
                f"prefix_cache: is {prefix_cache.dtype} {list(prefix_cache.shape)} of a database "
                f"of {rows.dtype} {list(rows.shape)}; build_prefix_cache makes one"
            )
        cached = prefix_cache.shape[1]
    # (table, first dimension that is new, end, rows to keep) of each stage
    native = []
    begin = 0
    for stage in stages:
        table = prefix_cache if stage.dim <= cached else rows
        native.append((table, begin, stage.dim, stage.keep))
        begin = stage.dim
    # The native code reads consecutive float32 and int64.
    prefixes = np.ascontiguousarray(as_float32(queries[:, : stages[-1].dim]))
    candidates = np.ascontiguousarray(candidates, np.int64)
    ids, scores = _native.rerank(pool(num_threads), native, prefixes, candidates, kernels, blocks)
    return Hits(ids, scores)
