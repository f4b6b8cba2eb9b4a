"""What a search takes and gives, and the memory of its codes."""

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

CHUNK = 65_536  # rows that are converted together


class RetrievalError(ValueError):
    """Arrays or numbers that do not make a search; the message says which and the remedy."""

    user_error = True


class Hits(NamedTuple):
    """ids: int64 [Q, k], best first, -1 where there is none. scores: float32 [Q, k], cosines or
    estimates of them.
    """

    ids: np.ndarray
    scores: np.ndarray


@cache
def pool(num_threads: int) -> Any:
    """Threads, shared by all that ask for as many; 0: one for each core."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return _native.Pool(num_threads) if num_threads else pool(cores)


def memory(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros on pages of their own, huge ones where the system has them: random rows are 1.3 times
    as fast there.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if hasattr(
        mmap, "MAP_ANONYMOUS"
    ):  # private: shared memory, Python's default, gets no huge pages
        area = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        area = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the system was built without them
            area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, dtype, int(np.prod(shape))).reshape(shape)


def check_rows(rows: np.ndarray, dim: int, what: str) -> None:
    """RetrievalError unless `rows` is a table of at least `dim` numbers a row."""
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.floating):
        raise RetrievalError(
            f"{what}: is {rows.dtype} {list(rows.shape)}, expected floating point [rows, "
            "dimensions]"
        )
    if not 1 <= dim <= rows.shape[1]:
        raise RetrievalError(
            f"{what}: has {rows.shape[1]} dimensions, a prefix of {dim} was asked for"
        )


def as_rows(queries: Any, what: str = "queries") -> np.ndarray:
    """What NumPy can read as a table: arrays, lists, tensors on the CPU. RetrievalError for others."""
    try:
        return np.asarray(queries)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RetrievalError(
            f"{what}: {reason}; give an array [rows, dimensions], or a tensor on the CPU"
        ) from None


def check_k(k: int) -> None:
    if not 1 <= k < 1 << 31:
        raise RetrievalError(
            f"k = {k}: ask for 1 or more neighbours" + (", below 2^31" if k > 1 else "")
        )


def unit(rows: np.ndarray, dim: int) -> np.ndarray:
    """float32 [n, dim]: the prefixes, L2-normalised; zeros stay zeros, and rows with NaN or
    infinity are all NaN.
    """
    cut = np.asarray(rows[:, :dim], np.float32)
    with np.errstate(all="ignore"):
        length = np.sqrt(np.einsum("nd,nd->n", cut, cut, dtype=np.float64))
        scale = np.where(length > 0, 1 / length, np.where(length == 0, 0, np.nan))
        scale[np.isinf(length)] = np.nan
        return cut * scale[:, None].astype(np.float32)


def chunks(rows: np.ndarray, dim: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, unit prefixes) of CHUNK rows at a time."""
    for first in range(0, len(rows), CHUNK):
        yield first, unit(rows[first : first + CHUNK], dim)


def sample(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many rows, evenly over all of them."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def empty_bits(count: int) -> np.ndarray:
    """uint64: a bit for each row, all clear."""
    return np.zeros(-(-count // 64), np.uint64)


def set_bits(bits: np.ndarray, rows: np.ndarray) -> None:
    """Set the bits of some rows, in place."""
    rows = np.asarray(rows, np.uint64)
    np.bitwise_or.at(bits, rows // 64, np.uint64(1) << (rows % 64))


def get_bits(bits: np.ndarray, first: int, count: int) -> np.ndarray:
    """bool [count]: the bits of rows first, first + 1, ..."""
    rows = np.arange(first, first + count, dtype=np.uint64)
    return (bits[rows // 64] >> (rows % 64) & np.uint64(1)).astype(bool)


def left_out(bad: np.ndarray, deleted: np.ndarray | None) -> NDArray[np.uint64] | None:
    """The bits of both; None where there are none, which spares a search the look."""
    both = bad if deleted is None else np.bitwise_or(bad, deleted)
    return both if both.any() else None
