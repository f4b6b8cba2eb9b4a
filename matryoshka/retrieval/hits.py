"""Search inputs and results, row bitmaps, and memory for codes."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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


@cache
def pool(num_threads: int) -> Any:
    """The shared thread pool of this size; 0: one thread per core."""
    if num_threads:
        return _native.Pool(num_threads)
    # The cores that this process may use, which a container or taskset limits.
    if hasattr(os, "sched_getaffinity"):
        return pool(len(os.sched_getaffinity(0)))
    return pool(os.cpu_count() or 1)


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


def as_rows(queries: Any, what: str = "queries") -> np.ndarray:
    """Convert arrays, lists and CPU tensors; RetrievalError for anything that NumPy cannot read."""
    try:
        return np.asarray(queries)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RetrievalError(
            f"{what}: {reason}; give an array [rows, dimensions], or a tensor on the CPU"
        ) from None


def check_k(k: int) -> None:
    """RetrievalError unless the native code can count to k."""
    if not 1 <= k < 1 << 31:
        raise RetrievalError(f"k={k}: expected 1 to {(1 << 31) - 1} neighbours")


def unit(rows: np.ndarray, dim: int) -> np.ndarray:
    """L2-normalised prefixes, float32 [n, dim].

    Zero vectors stay zero. Rows with NaN or infinity become NaN in all dimensions, so that one
    column shows whether a row is valid.
    """
    cut = np.asarray(rows[:, :dim], np.float32)
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
    """Set the bits of `rows` in place."""
    rows = np.asarray(rows, np.uint64)
    # `at`, because several rows share a word; an assignment would keep the last bit only.
    np.bitwise_or.at(bits, rows // 64, np.uint64(1) << (rows % 64))


def get_bits(bits: np.ndarray, first: int, count: int) -> np.ndarray:
    """The bits of rows first .. first + count, bool [count]."""
    rows = np.arange(first, first + count, dtype=np.uint64)
    return (bits[rows // 64] >> (rows % 64) & np.uint64(1)).astype(bool)


def excluded_bits(bad: np.ndarray, deleted: np.ndarray | None) -> NDArray[np.uint64] | None:
    """Bits of rows that a search skips; None without any, which spares it the test per row."""
    both = bad if deleted is None else np.bitwise_or(bad, deleted)
    return both if both.any() else None
