"""HNSW graph of faiss over a prefix, the index of the paper, for comparison."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from matryoshka.retrieval.hits import (
    Hits,
    RetrievalError,
    as_rows,
    check_bits,
    check_k,
    chunks,
    pool,
    unit,
)

LINKS = 32  # M of the paper's HNSW32


class Graph:
    """Graph.build(rows, 64).search(queries, k=200, ef_search=200).

    Approximate; the order of equal scores is not defined.
    """

    def __init__(self, graph: Any, dim: int, count: int, num_threads: int = 0) -> None:
        self._graph = graph
        self.dim = dim
        self.count = count
        self.num_threads = num_threads

    @classmethod
    def build(cls, rows: np.ndarray, dim: int, *, links: int = LINKS, num_threads: int = 0) -> Self:
        """Insert the L2-normalised prefixes of `rows`, float [N, D].

        The inner product orders them as the paper's Euclidean distance does, and is the cosine of
        zero vectors, too. RetrievalError without faiss, and for rows with NaN or infinity, which a
        graph cannot leave out.
        """
        rows = as_rows(rows, dim, "database")
        try:
            import faiss
        except ImportError:
            raise RetrievalError("an HNSW graph needs faiss: pip install faiss-cpu") from None
        faiss.omp_set_num_threads(pool(num_threads).num_threads)
        graph = faiss.IndexHNSWFlat(dim, links, faiss.METRIC_INNER_PRODUCT)
        for first, prefixes in chunks(rows, dim):
            if not np.isfinite(prefixes).all():
                row = first + int(np.flatnonzero(~np.isfinite(prefixes).all(1))[0])
                raise RetrievalError(
                    f"database: row {row} has NaN or infinity; index hnsw cannot leave rows out"
                )
            graph.add(prefixes)
        return cls(graph, dim, len(rows), num_threads)

    @property
    def nbytes(self) -> int:
        """Vectors and links of the lowest layer, nearly all of the memory."""
        return self.count * (4 * self.dim + 4 * 2 * LINKS)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        ef_search: int = 200,
        *,
        deleted: np.ndarray | None = None,
    ) -> Hits:
        """As PrefixScan.search. ef_search: size of the candidate queue, raised to k."""
        import faiss

        queries = as_rows(queries, self.dim)
        check_k(k)
        if deleted is not None:
            check_bits(deleted, self.count)
        if deleted is not None and deleted.any():
            raise RetrievalError("index hnsw cannot leave rows out; use scan, ivf, binary or exact")
        # The setting belongs to the process, and another index may have changed it.
        faiss.omp_set_num_threads(pool(self.num_threads).num_threads)
        prefixes = unit(queries, self.dim)
        valid = np.isfinite(prefixes).all(1)
        parameters = faiss.SearchParametersHNSW(efSearch=max(ef_search, k))  # pyright: ignore[reportAttributeAccessIssue]
        cosines, ids = self._graph.search(np.nan_to_num(prefixes), k, params=parameters)
        ids[~valid] = -1
        return Hits(ids, np.where(ids < 0, -np.inf, cosines).astype(np.float32))
