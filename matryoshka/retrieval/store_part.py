"""A part of an index: rows that were added together, as immutable files of a folder."""

from __future__ import annotations

import json
import mmap
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.files import open_regular, read_regular
from matryoshka.retrieval import _native
from matryoshka.retrieval.hits import RetrievalError, empty_bits
from matryoshka.retrieval.ivf import InvertedFile
from matryoshka.retrieval.scan import Codec, PrefixScan

PART = "part.json"
# Files that may be large: beyond MMAP_MIN_BYTES, only `verify` compares their checksums.
MAYBE_LARGE = frozenset(
    (
        "rows.f16",
        "codes.u8",
        "names.utf8",
        "name_ends.i64",
        "name_hashes.u64",
        "name_rows.u32",
        "labels.i64",
        "origins.u32",
        "slots.u32",
    )
)
# Smaller files are read: before Python 3.13 a map holds one of the 1024 open files of a process.
MMAP_MIN_BYTES = 1 << 20
MMAP_OPTIONS: dict[str, bool] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
REBUILD = "build the index again: matryoshka index build --overwrite"


def with_checksum(metadata: Mapping[str, Any]) -> bytes:
    """JSON whose first line has the checksum of the rest, for `read_checked`."""
    # The result is still JSON, which other programs can read.
    rest = json.dumps(metadata, sort_keys=True, indent=1).removeprefix("{\n").encode() + b"\n"
    return b'{"crc32": %d,\n' % zlib.crc32(rest) + rest


def read_checked(path: Path) -> dict[str, Any]:
    """Read a file of `with_checksum`. RetrievalError if a byte differs, OSError if unreadable."""
    content = read_regular(path)
    first, _, rest = content.partition(b"\n")
    try:
        if first == b'{"crc32": %d,' % zlib.crc32(rest):
            metadata = json.loads(content)
            del metadata["crc32"]
            return metadata
    except (ValueError, RecursionError):
        pass
    raise RetrievalError(f"{path}: is damaged; {REBUILD}")


def name_hash(name: str) -> int:
    """64 bits of a name, by which rows are found; the names distinguish equal hashes."""
    # Not Python's hash(), which differs between processes.
    encoded = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(encoded, digest_size=8).digest(), "little")


class Part:
    """The files of one part.

    first: number of the part's first row in the index. metadata: the content of part.json.
    """

    def __init__(
        self, folder: Path, *, first: int, columns: int, dim: int, num_threads: int
    ) -> None:
        self.folder = folder
        self.first = first
        self.columns = columns
        self.metadata = read_checked(folder / PART)
        try:
            n = int(self.metadata["rows"])
            lists = int(self.metadata["lists"])
            self._files = {
                str(name): (int(entry["bytes"]), int(entry["crc32"]))
                for name, entry in self.metadata["files"].items()
            }
            self.classes: list[str] | None = self.metadata["classes"]
            self.data: list[dict[str, Any]] = self.metadata["data"]
            if n < 1 or lists < 0:
                raise ValueError
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
            raise self.damaged(PART) from None
        self.count = n
        self.prefix_cache: np.ndarray | None = None

        # ---- rows, labels, names ----
        self.rows = self._map("rows.f16", np.float16, (n, columns))
        self.labels = self._map("labels.i64", np.int64, (n,))
        self.origins = self._map("origins.u32", np.uint32, (n, 2))
        self._ends = self._map("name_ends.i64", np.int64, (n,))
        self._names = self._map("names.utf8", np.uint8, (-1,))
        self._hashes = self._map("name_hashes.u64", np.uint64, (n,))
        self._hashed = self._map("name_rows.u32", np.uint32, (n,))
        # ---- codes for the shortlist ----
        codec = Codec(*self._map("codec.f32", np.float32, (2, dim)))
        bad = self._map("bad.u64", np.uint64, (len(empty_bits(n)),))

        self.shortlist: PrefixScan | InvertedFile
        if not lists:
            padded = -(-n // _native.BLOCK) * _native.BLOCK
            codes = self._map("codes.u8", np.uint8, (padded * codec.width,))
            self.shortlist = PrefixScan(codec, codes, n, bad, num_threads)
        else:
            slots = self._map("slots.u32", np.uint32, (-1,))
            if len(slots) and int(slots.max()) >= n:  # the native search does not check them
                raise self.damaged("slots.u32")
            self.shortlist = InvertedFile(
                codec,
                centres=self._map("centroids.f32", np.float32, (lists, dim)),
                packed=self._map("codes.u8", np.uint8, (len(slots) * codec.width,)),
                starts=self._map("starts.i64", np.int64, (lists,)),
                sizes=self._map("sizes.i32", np.int32, (lists,)),
                ids=slots,
                count=n,
                bad=bad,
                num_threads=num_threads,
            )

    @property
    def nbytes(self) -> int:
        """Size of all files, from part.json."""
        return sum(size for size, _ in self._files.values())

    def damaged(self, name: str) -> RetrievalError:
        """The error for a file whose content cannot be right."""
        return RetrievalError(
            f"{self.folder / name}: is damaged or does not belong to {PART}; {REBUILD}"
        )

    def _map(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """A file as an array of this shape, (-1,): as long as part.json says.

        Checks the size, and the checksum of files that are small or cannot be checked by their use.
        """
        path = self.folder / name
        item = np.dtype(dtype).itemsize
        size, crc = self._files.get(name, (-1, 0))
        if shape == (-1,):
            shape = (size // item,)
        # dtype=object: Python integers, which do not overflow.
        if size != int(np.prod(shape, dtype=object)) * item:
            raise self.damaged(name)
        if os.stat(path).st_size != size:
            raise RetrievalError(
                f"{path}: has {os.stat(path).st_size} bytes instead of {size}; {REBUILD}"
            )
        if not size:  # an empty file cannot be mapped
            return np.zeros(shape, dtype)
        if size >= MMAP_MIN_BYTES:
            with open_regular(path) as file:
                area = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, **MMAP_OPTIONS)
            array = np.frombuffer(area, dtype).reshape(shape)
        else:
            array = np.frombuffer(read_regular(path), dtype).reshape(shape)
        # A checksum reads the whole file: opening a large index must not.
        is_checked = name not in MAYBE_LARGE or size < MMAP_MIN_BYTES
        if is_checked and zlib.crc32(array.reshape(-1).view(np.uint8).data) != crc:
            raise self.damaged(name)
        return array

    def verify(self) -> None:
        """Read every byte. RetrievalError names the first file whose checksum differs."""
        if read_checked(self.folder / PART) != self.metadata:
            raise self.damaged(PART)
        for name, (_, crc) in self._files.items():
            actual = 0
            with open_regular(self.folder / name) as file:
                while block := file.read(1 << 22):
                    actual = zlib.crc32(block, actual)
            if actual != crc:
                raise self.damaged(name)

    def name(self, row: int) -> str:
        """The name of a row of this part."""
        start = int(self._ends[row - 1]) if row else 0
        end = int(self._ends[row])
        if not 0 <= start <= end <= len(self._names):
            raise self.damaged("name_ends.i64")
        try:
            return self._names[start:end].tobytes().decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.damaged("names.utf8") from None

    def rows_named(self, names: Sequence[str], hashes: np.ndarray) -> np.ndarray:
        """The row of each name, int64; -1 where it is unknown, the last of several.

        hashes: name_hash of each name.
        """
        found = np.full(len(names), -1, np.int64)
        first = np.searchsorted(self._hashes, hashes)
        candidates = self._hashes[np.minimum(first, self.count - 1)] == hashes
        for i in np.flatnonzero(candidates).tolist():
            # Different names with equal hashes follow each other.
            for at in range(int(first[i]), self.count):
                if self._hashes[at] != hashes[i]:
                    break
                row = int(self._hashed[at])
                if row >= self.count:
                    raise self.damaged("name_rows.u32")
                if self.name(row) == names[i]:
                    found[i] = max(found[i], row)
        return found
