"""Inverted file over the 7-bit codes of a prefix: visits the lists of the nearest centroids."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from matryoshka.retrieval import _native
from matryoshka.retrieval.hits import (
    Hits,
    RetrievalError,
    as_rows,
    check_k,
    chunks,
    empty_bits,
    excluded_bits,
    huge_page_zeros,
    pool,
    sample,
    set_bits,
    unit,
)
from matryoshka.retrieval.scan import Codec, PrefixScan, mask_missing

SAMPLES_PER_CENTROID = 64  # training rows of k-means; faiss warns below 39 and stops at 256


class InvertedFile:
    """InvertedFile.build(rows, 64).search(queries, k=200, nprobe=32).

    centres: float32 [lists, d]. starts (int64), sizes (int32): position and length of each list in
    `packed`, in slots. ids: uint32, the row of each slot, rising within a list.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        centres: np.ndarray,
        packed: np.ndarray,
        starts: np.ndarray,
        sizes: np.ndarray,
        ids: np.ndarray,
        count: int,
        bad: np.ndarray,
        num_threads: int = 0,
    ) -> None:
        self.codec = codec
        self.centres = centres
        self.centroids = PrefixScan.build(centres, codec.dim, num_threads)
        self.packed = packed
        self.starts = starts
        self.sizes = sizes
        self.ids = ids
        self.count = count
        self.bad = bad
        self.num_threads = num_threads

    @property
    def dim(self) -> int:
        return self.codec.dim

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.ids.nbytes + self.centroids.nbytes

    @classmethod
    def build(
        cls, rows: np.ndarray, dim: int, *, lists: int = 0, seed: int = 0, num_threads: int = 0
    ) -> Self:
        """Encode `rows`, float [N, D], in lists around centroids of faiss' spherical k-means.

        lists: 0 for about 4 * sqrt(N), a power of two.
        """
        rows = as_rows(rows, dim, "database")
        if not len(rows):
            raise RetrievalError("database: is empty; an inverted file needs rows")
        lists = min(lists or 2 ** round(np.log2(4 * np.sqrt(len(rows)))), len(rows))
        centres = _k_means(rows, dim, lists, seed, num_threads)
        codec = Codec.learn(rows, dim)

        nearest = np.empty(len(rows), np.int32)
        bad = empty_bits(len(rows))
        for first, prefixes in chunks(rows, dim):
            nearest[first : first + len(prefixes)] = _nearest(prefixes, centres)
            set_bits(bad, first + np.flatnonzero(~np.isfinite(prefixes[:, 0])))

        # Every list starts at a multiple of the kernels' block, which they read whole. `slots`: the
        # position of each row, in the order of the lists.
        block = _native.BLOCK
        order = np.argsort(nearest, kind="stable")
        sizes = np.bincount(nearest, minlength=len(centres)).astype(np.int32)
        room = -(-sizes.astype(np.int64) // block) * block
        starts = room.cumsum() - room
        ids = np.zeros(int(room.sum()), np.uint32)
        slots = np.repeat(starts - (sizes.cumsum() - sizes), sizes) + np.arange(len(rows))
        ids[slots] = order
        packed = huge_page_zeros((len(ids) * codec.width,), np.uint8)
        step = 1024 * block
        # The padding repeats row 0; searches never reach it, because it is beyond the lists' sizes.
        for first in range(0, len(ids), step):
            _native.pack(
                pool(num_threads),
                codec.encode(unit(rows[ids[first : first + step]], dim)),
                packed[first * codec.width :],
            )
        return cls(
            codec,
            centres=centres,
            packed=packed,
            starts=starts,
            sizes=sizes,
            ids=ids,
            count=len(rows),
            bad=bad,
            num_threads=num_threads,
        )

    def search(
        self,
        queries: np.ndarray,
        k: int,
        nprobe: int = 32,
        *,
        deleted: np.ndarray | None = None,
        kernels: str = "",
        code_blocks: Any = None,
        id_blocks: Any = None,
    ) -> Hits:
        """The k rows of highest estimated cosine in the lists of the `nprobe` nearest centroids.

        code_blocks, id_blocks: CheckedFile.blocks of `packed` and `ids`, if they are of files.
        """
        queries = as_rows(queries, self.dim)
        check_k(k)
        check_k(nprobe, "nprobe")
        prefixes = unit(queries, self.dim)
        # By 7-bit codes as well: 16 us for the 32 nearest of 4,096 centroids (bench/NOTES.md).
        nearest = self.centroids.search_unit(
            prefixes, min(nprobe, len(self.starts)), kernels=kernels
        )
        probes = nearest.ids.astype(np.int32)
        signed, scale, offset = self.codec.queries(prefixes)
        ids, scores = _native.search_lists(
            pool(self.num_threads),
            packed=self.packed,
            starts=self.starts,
            sizes=self.sizes,
            ids=self.ids,
            num_ids=self.count,
            queries=signed,
            probes=probes,
            k=k,
            deleted=excluded_bits(self.bad, deleted, self.count),
            kernels=kernels,
            code_blocks=code_blocks,
            id_blocks=id_blocks,
        )
        return mask_missing(ids, scores * scale[:, None] + offset[:, None], prefixes)


def _k_means(rows: np.ndarray, dim: int, lists: int, seed: int, num_threads: int) -> np.ndarray:
    """Centroids, unit vectors, float32 [lists, dim]."""
    try:
        import faiss
    except ImportError:
        raise RetrievalError(
            "an inverted file needs faiss for k-means: pip install faiss-cpu"
        ) from None
    points = unit(sample(rows, SAMPLES_PER_CENTROID * lists), dim)
    points = np.ascontiguousarray(points[np.isfinite(points[:, 0])])
    lists = min(lists, len(points))
    if not lists:
        raise RetrievalError("database: every row has NaN or infinity")
    faiss.omp_set_num_threads(pool(num_threads).num_threads)
    k_means = faiss.Kmeans(
        dim,
        lists,
        niter=10,
        spherical=True,
        seed=seed,
        # Small databases may have fewer points per centroid than faiss recommends: no warning.
        min_points_per_centroid=1,
        max_points_per_centroid=SAMPLES_PER_CENTROID,
    )
    k_means.train(points)
    return np.nan_to_num(np.asarray(k_means.centroids))


def _nearest(prefixes: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The centroid of highest cosine, int32 [n]; rows with NaN go to any."""
    best = np.empty(len(prefixes), np.int32)
    # In parts: the product of 65,536 rows and 4,096 centroids would take 1 GB.
    for first in range(0, len(prefixes), 4096):
        part = slice(first, first + 4096)
        best[part] = (np.nan_to_num(prefixes[part]) @ centres.T).argmax(1)
    return best
