"""A large file of an index, mapped: what is read of it is compared with checksums first.

    file = CheckedFile(path, size, sums, num_threads)
    file.check(first, end)              # the blocks of these bytes, unless they were checked before
    file.bytes[first:end]
    file.check_whole()                  # afterwards: whether it was cut off meanwhile

A block is checked when it is first read after opening, at 10 GB/s and core; later reads ask for one
byte of a table. A file that is cut off under a map would end the process:
matryoshka/data/native/file_map.hpp.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.data._native import FileMap
from matryoshka.files import open_regular
from matryoshka.retrieval import _native
from matryoshka.retrieval.hits import RetrievalError, pool

BLOCK = 32_768  # bytes with a checksum of 8: 0.02 % of a file
REBUILD = (
    "`matryoshka index verify` checks all files; build the index again: "
    "matryoshka index build --overwrite"
)


class CheckedFile:
    """A mapped file, read-only; bytes: uint8 [size].

    sums: uint64, XXH64 of each block; None for files of older versions, which have none.
    """

    def __init__(
        self, path: Path, size: int, sums: np.ndarray | None, num_threads: int = 0
    ) -> None:
        """size: at least 1. RetrievalError for a file of another size, OSError for one that cannot
        be opened.
        """
        self.path = path
        self._num_threads = num_threads
        self._map = self._open(size)
        self.bytes: np.ndarray = self._map.data
        self._blocks: Any = None
        if sums is not None:
            self._blocks = self.bytes, sums, np.zeros(len(sums), np.uint8), BLOCK

    def _open(self, size: int) -> FileMap:
        with open_regular(self.path) as file:
            if os.fstat(file.fileno()).st_size != size:
                raise RetrievalError(f"{self.path}: is not a file of {size} bytes; {REBUILD}")
            try:
                return FileMap(file.fileno())
            except OSError as error:
                reason = error.strerror or str(error)
                raise RetrievalError(f"{self.path}: cannot be mapped: {reason}") from None

    @property
    def blocks(self) -> Any:
        """What the native functions check blocks with; None if there is nothing left to check."""
        return self._blocks

    def check(self, first: int = 0, end: int | None = None) -> None:
        """Compare the blocks of the bytes first .. end, default: all. RetrievalError."""
        self.check_whole()
        if self._blocks is None:
            return
        whole = first == 0 and end is None
        end = len(self.bytes) if end is None else end
        try:
            _native.check_blocks(pool(self._num_threads), self._blocks, first, end)
        except _native.DamagedBlock:
            raise self.damaged() from None
        self.check_whole()
        if whole:
            self._blocks = None

    def check_whole(self) -> None:
        """RetrievalError if the file was cut off, or its disk failed, since it was opened.

        Call it before a group of reads as well: it guards them from other code of this process
        that has taken the signal.
        """
        if self._is_cut:
            raise RetrievalError(f"{self.path}: was cut off while it was open; {REBUILD}")

    @property
    def _is_cut(self) -> bool:
        left = self._map.begin_reading()
        return self._map.torn or left < len(self.bytes)

    @property
    def is_damaged(self) -> bool:
        """Whether a block that was read differs from its checksum, or some of the file is gone."""
        if self._is_cut:
            return True
        return self._blocks is not None and bool((self._blocks[2] == 2).any())

    def damaged(self) -> RetrievalError:
        """The error for a block that differs, which may be one of zeros behind a cut."""
        self.check_whole()
        number = 0
        if self._blocks is not None:
            number = int(np.flatnonzero(self._blocks[2] == 2)[:1].sum())
        return RetrievalError(
            f"{self.path}: is damaged at byte {number * BLOCK} or after; {REBUILD}"
        )


class BlockSums:
    """Checksums of the blocks of a file that is written piece by piece."""

    def __init__(self) -> None:
        self._sums: list[np.ndarray] = []
        self._rest = bytearray()

    def add(self, data: memoryview) -> None:
        """The next bytes of the file."""
        if self._rest:
            taken = min(BLOCK - len(self._rest), len(data))
            self._rest += data[:taken]
            data = data[taken:]
            if len(self._rest) == BLOCK:
                self._sums.append(sums_of(self._rest))
                self._rest = bytearray()
        whole = len(data) // BLOCK * BLOCK
        if whole:
            self._sums.append(sums_of(data[:whole]))
        self._rest += data[whole:]

    def end(self) -> np.ndarray:
        """The checksums of all blocks, uint64."""
        if self._rest:
            self._sums.append(sums_of(self._rest))
            self._rest = bytearray()
        return np.concatenate([np.zeros(0, np.uint64), *self._sums])


def sums_of(data: bytes | bytearray | memoryview) -> np.ndarray:
    """XXH64 of each block of some bytes, uint64."""
    return _native.sum_blocks(pool(0), np.frombuffer(data, np.uint8), BLOCK)


def count_blocks(size: int) -> int:
    """Blocks of a file of `size` bytes."""
    return -(-size // BLOCK)
