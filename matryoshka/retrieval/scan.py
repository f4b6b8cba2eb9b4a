"""Exhaustive shortlists from compact codes of a prefix.

PrefixScan keeps 7 bits per dimension, BinaryScan one: above the database's median or not (features
behind a ReLU are all positive, so their signs carry no information). Both scan the codes with the
native kernels, which keep only rows above the k-th best score so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

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

LEVELS = 127  # largest code: 7 bits, the range of the VNNI kernels' uint8 x int8 products
CLIP_QUANTILE = 0.0005  # share of the values at either end that saturate
SAMPLE_ROWS = 100_000  # rows from which ranges and medians are estimated


@dataclass(frozen=True)
class Codec:
    """Scalar quantisation: code c of dimension j stands for low[j] + c * step[j].

    low, step: float32 [d].
    """

    low: np.ndarray
    step: np.ndarray

    @property
    def dim(self) -> int:
        return len(self.low)

    @property
    def width(self) -> int:
        """Bytes per code: the dimensions, rounded up to the kernels' multiple of 4."""
        return -(-self.dim // _native.CHUNK) * _native.CHUNK

    @classmethod
    def learn(cls, rows: np.ndarray, dim: int) -> Self:
        """Ranges of the dimensions, from a sample of the rows."""
        values = unit(sample(rows, SAMPLE_ROWS), dim)
        values = values[np.isfinite(values[:, 0])]
        if not len(values):
            return cls(np.zeros(dim, np.float32), np.ones(dim, np.float32))
        # A few outliers would otherwise take most of the 128 levels.
        low, high = np.quantile(values, [CLIP_QUANTILE, 1 - CLIP_QUANTILE], axis=0).astype(
            np.float32
        )
        # A constant dimension has a range of 0, by which `encode` divides.
        return cls(low, np.maximum(high - low, 1e-12) / LEVELS)

    def encode(self, prefixes: np.ndarray) -> np.ndarray:
        """Codes of unit prefixes [n, d], uint8 [n, width]; NaN becomes 0."""
        codes = np.zeros((len(prefixes), self.width), np.uint8)
        with np.errstate(invalid="ignore"):
            levels = np.nan_to_num(np.rint((prefixes - self.low) / self.step))
        codes[:, : self.dim] = levels.clip(0, LEVELS)
        return codes

    def queries(self, prefixes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Quantised queries: int8 [n, width], scale float32 [n], offset float32 [n].

        score * scale + offset estimates the cosine.
        """
        if not np.isfinite(prefixes).all():
            prefixes = np.nan_to_num(prefixes)
        # cosine = sum q (low + c step) = sum (q step) c + sum q low: an integer product of codes
        # with quantised weights, and one number per query.
        weights = prefixes * self.step
        scale = np.maximum(np.abs(weights).max(1), 1e-30) / 127
        signed = np.zeros((len(prefixes), self.width), np.int8)
        signed[:, : self.dim] = np.rint(weights / scale[:, None])
        return signed, scale.astype(np.float32), (prefixes @ self.low).astype(np.float32)


class PrefixScan:
    """Scan of 7-bit codes: PrefixScan.build(rows, 64).search(queries, k=200)."""

    def __init__(
        self, codec: Codec, packed: np.ndarray, count: int, bad: np.ndarray, num_threads: int = 0
    ) -> None:
        self.codec = codec
        self.packed = packed
        self.count = count
        self.bad = bad
        self.num_threads = num_threads

    @property
    def dim(self) -> int:
        return self.codec.dim

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    @classmethod
    def build(cls, rows: np.ndarray, dim: int, num_threads: int = 0) -> Self:
        """Encode `rows`, float [N, D]. RetrievalError if D < dim."""
        rows = as_rows(rows, dim, "database")
        codec = Codec.learn(rows, dim)
        block = _native.BLOCK
        packed = huge_page_zeros((-(-len(rows) // block) * block * codec.width,), np.uint8)
        bad = empty_bits(len(rows))
        for first, prefixes in chunks(rows, dim):
            _native.pack(pool(num_threads), codec.encode(prefixes), packed[first * codec.width :])
            set_bits(bad, first + np.flatnonzero(~np.isfinite(prefixes[:, 0])))
        return cls(codec, packed, len(rows), bad, num_threads)

    def search(
        self, queries: np.ndarray, k: int, *, deleted: np.ndarray | None = None, kernels: str = ""
    ) -> Hits:
        """The k rows of highest estimated cosine.

        deleted: bits of rows to leave out, see hits.set_bits. kernels: a name of
        _native.kernels(); default: the fastest that the CPU has.
        """
        queries = as_rows(queries, self.dim)
        check_k(k)
        return self.search_unit(unit(queries, self.dim), k, deleted=deleted, kernels=kernels)

    def search_unit(
        self, prefixes: np.ndarray, k: int, *, deleted: np.ndarray | None = None, kernels: str = ""
    ) -> Hits:
        """As `search`, for prefixes of length 1."""
        signed, scale, offset = self.codec.queries(prefixes)
        ids, scores = _native.search_codes(
            pool(self.num_threads),
            packed=self.packed,
            count=self.count,
            queries=signed,
            k=k,
            deleted=excluded_bits(self.bad, deleted, self.count),
            kernels=kernels,
        )
        return mask_missing(ids, scores * scale[:, None] + offset[:, None], prefixes)


class BinaryScan:
    """Scan of one bit per dimension; the score is 1 - 2 * (share of bits that differ)."""

    def __init__(
        self,
        medians: np.ndarray,
        packed: np.ndarray,
        count: int,
        bad: np.ndarray,
        num_threads: int = 0,
    ) -> None:
        self.medians = medians
        self.packed = packed
        self.count = count
        self.bad = bad
        self.num_threads = num_threads

    @property
    def dim(self) -> int:
        return len(self.medians)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    @classmethod
    def build(cls, rows: np.ndarray, dim: int, num_threads: int = 0) -> Self:
        """Encode `rows`, float [N, D]; dim is a multiple of 64.

        RetrievalError for any other dim, and for D < dim.
        """
        rows = as_rows(rows, dim, "database")
        if dim % 64:
            raise RetrievalError(f"dim={dim}: binary codes need a multiple of 64")
        values = unit(sample(rows, SAMPLE_ROWS), dim)
        values = values[np.isfinite(values[:, 0])]
        medians = np.zeros(dim, np.float32)
        if len(values):
            medians = np.median(values, axis=0).astype(np.float32)
        block = _native.BLOCK
        words = dim // 64
        packed = huge_page_zeros((-(-len(rows) // block) * block * words,), np.uint64)
        bad = empty_bits(len(rows))
        for first, prefixes in chunks(rows, dim):
            _native.pack_bits(_above(prefixes, medians), packed[first * words :])
            set_bits(bad, first + np.flatnonzero(~np.isfinite(prefixes[:, 0])))
        return cls(medians, packed, len(rows), bad, num_threads)

    def search(
        self, queries: np.ndarray, k: int, *, deleted: np.ndarray | None = None, kernels: str = ""
    ) -> Hits:
        """As PrefixScan.search."""
        queries = as_rows(queries, self.dim)
        check_k(k)
        prefixes = unit(queries, self.dim)
        ids, scores = _native.search_bits(
            pool(self.num_threads),
            packed=self.packed,
            count=self.count,
            queries=_above(prefixes, self.medians),
            k=k,
            deleted=excluded_bits(self.bad, deleted, self.count),
            kernels=kernels,
        )
        return mask_missing(ids, 1 + scores * np.float32(2 / self.dim), prefixes)


def _above(prefixes: np.ndarray, medians: np.ndarray) -> np.ndarray:
    """One bit per dimension, above its median or not: uint64 [n, d / 64]."""
    with np.errstate(invalid="ignore"):
        return np.packbits(prefixes > medians, axis=1, bitorder="little").view(np.uint64)


def mask_missing(ids: np.ndarray, scores: np.ndarray, prefixes: np.ndarray) -> Hits:
    """Set id -1 for queries with NaN or infinity, and score -inf where results are missing."""
    ids[~np.isfinite(prefixes[:, 0])] = -1
    scores = np.asarray(scores, np.float32)
    scores[ids < 0] = -np.inf
    return Hits(ids, scores)
