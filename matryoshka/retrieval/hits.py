"""Search inputs and results, row bitmaps, and memory for codes."""

from __future__ import annotations

import contextlib
import mmap
import operator
import os
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from matryoshka.arrays import as_array, as_float32, as_int64
from matryoshka.retrieval import _native

CHUNK = 65_536  # rows per conversion: 67 MB of float32 at 256 dimensions


class RetrievalError(ValueError):
    """Invalid input of a search or an index; the message names the value and the remedy."""

    user_error = True


class Hits(NamedTuple):
    """Results of a search, best first.

    ids: int64 [Q, k], row ids, -1 where results are missing. scores: float32 [Q, k], cosines or
    estimates of them, -inf where results are missing.
    """

    ids: np.ndarray
    scores: np.ndarray


def pool(num_threads: int) -> Any:
    """The shared thread pool of this size; 0: one thread per core."""
    if not num_threads:
        # The cores that this process may use, which a container or taskset limits.
        if hasattr(os, "sched_getaffinity"):
            num_threads = len(os.sched_getaffinity(0))
        else:
            num_threads = os.cpu_count() or 1
    # Threads do not survive a fork: a child makes a pool of its own.
    return _pool_of(num_threads, os.getpid())


@cache
def _pool_of(num_threads: int, process: int) -> Any:
    return _native.Pool(num_threads)


def huge_page_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros on huge pages where the system has them: random row access is 1.3 times as fast."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if hasattr(mmap, "MAP_ANONYMOUS"):
        # Private, because shared memory, Python's default, does not get huge pages.
        area = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        area = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, dtype, int(np.prod(shape))).reshape(shape)


def check_rows(rows: np.ndarray, dim: int, what: str) -> None:
    """RetrievalError unless `rows` is floating point [N, D] with D >= dim."""
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.floating):
        raise RetrievalError(
            f"{what}: is {rows.dtype} {list(rows.shape)}, "
            "expected floating point [rows, dimensions]"
        )
    if not 1 <= dim <= rows.shape[1]:
        raise RetrievalError(
            f"{what}: has {rows.shape[1]} dimensions, the search needs a prefix of {dim}"
        )


def as_rows(rows: Any, dim: int = 1, what: str = "queries") -> np.ndarray:
    """Arrays, lists and CPU tensors as an array of `check_rows`. RetrievalError for all else."""
    array = as_array(rows, what, RetrievalError)
    check_rows(array, dim, what)
    return array


def as_candidates(ids: Any, rows: int) -> np.ndarray:
    """Row ids [Q, m] as int64. RetrievalError for other types and shapes, and beyond `rows`."""
    array = as_int64(as_array(ids, "candidates", RetrievalError), "candidates", RetrievalError)
    if array.ndim != 2:
        raise RetrievalError(f"candidates {list(array.shape)}: expected one list for each query")
    if array.size and array.max() >= rows:
        raise RetrievalError(
            f"candidates: row id {array.max()} out of range, the database has {rows} rows"
        )
    return array


def row_numbers(rows: Any, total: int, what: str, where: str = "the database") -> np.ndarray:
    """Row numbers, int64 [n], from integers or from a mask, bool [total].

    RetrievalError for anything else, for a mask of another length and beyond `total`; where: of
    the rows, for messages. Negative numbers stay.
    """
    array = as_array(rows, what, RetrievalError)
    if array.ndim != 1:
        raise RetrievalError(
            f"{what}: is {array.dtype} {list(array.shape)}, expected row numbers [n] or a mask "
            f"of {total} booleans"
        )
    if array.dtype.kind == "b":
        if len(array) != total:
            raise RetrievalError(f"{what}: is a mask of {len(array)} rows, {where} has {total}")
        return np.flatnonzero(array)
    array = as_int64(array, what, RetrievalError)
    if len(array) and array.max() >= total:
        raise RetrievalError(f"{what}: row {array.max()} out of range, {where} has {total} rows")
    return array


def check_bits(bits: Any, rows: int, what: str = "deleted") -> None:
    """RetrievalError unless `bits` is a bitmap of `rows` rows, see `set_bits`."""
    words = len(empty_bits(rows))
    is_array = isinstance(bits, np.ndarray)
    if not is_array or bits.dtype != np.uint64 or bits.ndim != 1:
        found = f"{bits.dtype} {list(bits.shape)}" if is_array else type(bits).__name__
        raise RetrievalError(
            f"{what}: is {found}, expected a bitmap, uint64 [{words}]: "
            f"matryoshka.retrieval.hits.empty_bits({rows}), then set_bits"
        )
    if len(bits) != words:
        raise RetrievalError(f"{what}: has bits for {64 * len(bits)} rows, expected {rows}")


def check_k(k: int, what: str = "k") -> None:
    """RetrievalError unless k is an integer to which the native code can count."""
    try:
        count = operator.index(k)
    except TypeError:
        raise RetrievalError(f"{what}={k}: expected an integer") from None
    if isinstance(k, bool) or not 1 <= count < 1 << 31:
        of_what = "lists" if what == "nprobe" else "neighbours"
        raise RetrievalError(f"{what}={k}: expected 1 to {(1 << 31) - 1} {of_what}")


def unit(rows: np.ndarray, dim: int) -> np.ndarray:
    """L2-normalised prefixes, float32 [n, dim].

    Zero vectors stay zero. Rows with NaN or infinity become NaN in all dimensions, so that one
    column shows whether a row is valid.
    """
    cut = as_float32(rows[:, :dim])
    with np.errstate(all="ignore"):
        # Squares of large float32 numbers overflow float32, but not float64.
        length = np.sqrt(np.einsum("nd,nd->n", cut, cut, dtype=np.float64))
        scale = np.where(length > 0, 1 / length, np.where(length == 0, 0, np.nan))
        scale[np.isinf(length)] = np.nan
        return cut * scale[:, None].astype(np.float32)


def chunks(rows: np.ndarray, dim: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, unit prefixes) for CHUNK rows at a time."""
    for first in range(0, len(rows), CHUNK):
        yield first, unit(rows[first : first + CHUNK], dim)


def sample(rows: np.ndarray, most: int) -> np.ndarray:
    """Up to `most` rows, evenly spaced over all of them."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def empty_bits(count: int) -> np.ndarray:
    """A bitmap of `count` rows, uint64, all bits clear."""
    return np.zeros(-(-count // 64), np.uint64)


def set_bits(bits: np.ndarray, rows: np.ndarray) -> None:
    """Set the bits of `rows`, integers [n], in place. RetrievalError for other row numbers."""
    rows = row_numbers(rows, 64 * len(bits), "rows")
    if len(rows) and rows.min() < 0:
        raise RetrievalError(f"rows: row {rows.min()}, expected 0 or more")
    rows = rows.astype(np.uint64)
    # `at`, because several rows share a word; an assignment would keep the last bit only.
    np.bitwise_or.at(bits, rows // 64, np.uint64(1) << (rows % 64))


def get_bits(bits: np.ndarray, first: int, count: int) -> np.ndarray:
    """The bits of rows first .. first + count, bool [count]."""
    rows = np.arange(first, first + count, dtype=np.uint64)
    return (bits[rows // 64] >> (rows % 64) & np.uint64(1)).astype(bool)


def excluded_bits(
    bad: np.ndarray, deleted: np.ndarray | None, count: int
) -> NDArray[np.uint64] | None:
    """Bits of `count` rows that a search skips; None without any, which spares it the test per row.

    RetrievalError unless `deleted` is such a bitmap.
    """
    if deleted is not None:
        check_bits(deleted, count)
    both = bad if deleted is None else np.bitwise_or(bad, deleted)
    return both if both.any() else None
