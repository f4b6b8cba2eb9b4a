"""Whole searches in arrays, shortlist and re-ranking; indexes are built once and kept."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from matryoshka.retrieval.exact import exact_search
from matryoshka.retrieval.graph import Graph
from matryoshka.retrieval.hits import Hits, RetrievalError, as_rows, check_bits, check_rows
from matryoshka.retrieval.ivf import InvertedFile
from matryoshka.retrieval.params import PREFIX_CACHE_DIMS, SearchParams
from matryoshka.retrieval.rerank import build_prefix_cache, rerank
from matryoshka.retrieval.scan import BinaryScan, PrefixScan

BUILDERS: dict[str, Any] = {
    "scan": PrefixScan,
    "ivf": InvertedFile,
    "binary": BinaryScan,
    "hnsw": Graph,
}


class Engine(Protocol):
    """What every search engine offers: `Searcher`, `store.Index`, `device.DeviceSearcher`."""

    def search(
        self,
        queries: Any,
        params: SearchParams,
        *,
        k: int | None = None,
        deleted: np.ndarray | None = None,
    ) -> Hits:
        """The nearest rows of each query.

        queries: float [Q, D]. k: number of results, as `params.with_k(k)`; default: what params
        give. deleted: bits of rows to leave out, see hits.set_bits.
        """
        ...

    @property
    def memory_bytes(self) -> int:
        """Memory of codes, graphs and prefix caches, without the rows."""
        ...


class Searcher:
    """Search of rows in memory, by any index.

        Searcher(rows).search(queries, SearchParams("scan", 64, 200, (Stage(2048, 10),)))

    rows: float16 or float32 [N, D], any array or memory map. Indexes and the prefix cache are built
    when a search first needs them (`prepare` does it ahead of time) and kept in `indexes` by
    (index, dim).
    """

    def __init__(self, rows: np.ndarray, num_threads: int = 0, seed: int = 0) -> None:
        rows = as_rows(rows, 1, "database")
        if not len(rows):
            raise RetrievalError("database: is empty; a search needs rows")
        self.rows = rows
        self.num_threads = num_threads
        self.seed = seed
        self.indexes: dict[tuple[str, int], Any] = {}
        self.prefix_cache: np.ndarray | None = None

    def prepare(self, params: SearchParams) -> None:
        """Build what a search with these parameters needs.

        RetrievalError for prefixes that are longer than the rows.
        """
        check_rows(self.rows, params.widest, "database")
        key = params.index, params.dim
        if params.index != "exact" and key not in self.indexes:
            # Only k-means draws random numbers.
            options = {"seed": self.seed} if params.index == "ivf" else {}
            self.indexes[key] = BUILDERS[params.index].build(
                self.rows, params.dim, num_threads=self.num_threads, **options
            )

        # Early stages read random rows, which the cache makes 1.3 times as fast.
        cached = [stage.dim for stage in params.stages if stage.dim <= PREFIX_CACHE_DIMS]
        if cached and (self.prefix_cache is None or self.prefix_cache.shape[1] < max(cached)):
            width = min(PREFIX_CACHE_DIMS, self.rows.shape[1])
            self.prefix_cache = build_prefix_cache(self.rows, width)

    def shortlist(
        self, queries: Any, params: SearchParams, *, deleted: np.ndarray | None = None
    ) -> Hits:
        """The shortlist without re-ranking; its scores are estimates, except for "exact"."""
        queries = as_rows(queries)
        if deleted is not None:
            check_bits(deleted, len(self.rows))
        self.prepare(params)
        if params.index == "exact":
            return exact_search(self.rows, queries, params.dim, params.k, deleted=deleted)
        index = self.indexes[params.index, params.dim]
        options = {}
        if params.index == "ivf":
            options["nprobe"] = params.nprobe
        if params.index == "hnsw":
            options["ef_search"] = params.ef_search
        return index.search(queries, params.k, deleted=deleted, **options)

    def search(
        self,
        queries: Any,
        params: SearchParams,
        *,
        k: int | None = None,
        deleted: np.ndarray | None = None,
    ) -> Hits:
        """See `Engine.search`; the width of the result is what the last stage keeps."""
        if k is not None:
            params = params.with_k(k)
        queries = as_rows(queries)
        found = self.shortlist(queries, params, deleted=deleted)
        if not params.stages:
            return found
        return rerank(
            self.rows,
            queries,
            found.ids,
            params.stages,
            prefix_cache=self.prefix_cache,
            num_threads=self.num_threads,
        )

    @property
    def memory_bytes(self) -> int:
        """Memory of the indexes and the prefix cache, without the rows."""
        cache = 0 if self.prefix_cache is None else self.prefix_cache.nbytes
        return cache + sum(index.nbytes for index in self.indexes.values())
