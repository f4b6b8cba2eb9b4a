"""Rows that were added to an index together, as files of a folder that never change."""

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

from matryoshka.retrieval import _native
from matryoshka.retrieval.hits import RetrievalError, empty_bits
from matryoshka.retrieval.ivf import InvertedFile
from matryoshka.retrieval.scan import Codec, PrefixScan

PART = "part.json"
BIG = frozenset(
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
MAPPED = (
    1 << 20
)  # bytes from which on a file is mapped: a map takes one of the 1024 open files that systems allow
UNTRACKED: dict[str, bool] = (
    {"trackfd": False} if sys.version_info >= (3, 13) else {}
)  # there it takes none
REBUILD = "build the index again: matryoshka index build --overwrite"


def checked(about: Mapping[str, Any]) -> bytes:
    """JSON whose first line has the checksum of the others, for `read_checked`."""
    rest = json.dumps(about, sort_keys=True, indent=1).removeprefix("{\n").encode() + b"\n"
    return b'{"crc32": %d,\n' % zlib.crc32(rest) + rest


def read_checked(path: Path) -> dict[str, Any]:
    """RetrievalError for a file that is not, byte by byte, what `checked` wrote; OSError where it
    cannot be read.
    """
    content = path.read_bytes()
    first, _, rest = content.partition(b"\n")
    try:
        if first == b'{"crc32": %d,' % zlib.crc32(rest):
            about = json.loads(content)
            del about["crc32"]
            return about
    except (ValueError, RecursionError):
        pass
    raise RetrievalError(f"{path}: is damaged; {REBUILD}")


def name_hash(name: str) -> int:
    return int.from_bytes(
        blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


class Part:
    """Rows that were added together. `first`: the number of its first row in the index."""

    def __init__(self, folder: Path, first: int, columns: int, dim: int, num_threads: int) -> None:
        self.folder, self.first, self.columns = folder, first, columns
        self.about = read_checked(folder / PART)
        try:
            n, lists = int(self.about["rows"]), int(self.about["lists"])
            self._files = {
                str(name): (int(f["bytes"]), int(f["crc32"]))
                for name, f in self.about["files"].items()
            }
            self.classes: list[str] | None = self.about["classes"]
            self.data: list[dict[str, Any]] = self.about["data"]
            if n < 1 or lists < 0:
                raise ValueError
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
            raise self.damaged(PART) from None
        self.count, width = n, -(-dim // _native.CHUNK) * _native.CHUNK
        self.rows = self._map("rows.f16", np.float16, (n, columns))
        self.labels = self._map("labels.i64", np.int64, (n,))
        self.origins = self._map("origins.u32", np.uint32, (n, 2))
        self._ends = self._map("name_ends.i64", np.int64, (n,))
        self._names = self._map("names.utf8", np.uint8, (-1,))
        self._hashes = self._map("name_hashes.u64", np.uint64, (n,))
        self._hashed = self._map("name_rows.u32", np.uint32, (n,))
        codec = Codec(*self._map("codec.f32", np.float32, (2, dim)))
        bad = self._map("bad.u64", np.uint64, (len(empty_bits(n)),))
        self.shortlist: PrefixScan | InvertedFile
        if not lists:
            padded = -(-n // _native.BLOCK) * _native.BLOCK
            self.shortlist = PrefixScan(
                codec, self._map("codes.u8", np.uint8, (padded * width,)), n, bad, num_threads
            )
        else:
            starts, sizes = (
                self._map("starts.i64", np.int64, (lists,)),
                self._map("sizes.i32", np.int32, (lists,)),
            )
            slots = self._map("slots.u32", np.uint32, (-1,))
            codes = self._map("codes.u8", np.uint8, (len(slots) * width,))
            if len(slots) and int(slots.max()) >= n:  # the native search trusts it
                raise self.damaged("slots.u32")
            centres = self._map("centroids.f32", np.float32, (lists, dim))
            self.shortlist = InvertedFile(
                codec, centres, codes, starts, sizes, slots, n, bad, num_threads
            )
        self.head: np.ndarray | None = None

    def damaged(self, name: str) -> RetrievalError:
        return RetrievalError(
            f"{self.folder / name}: is damaged or does not belong to {PART}; {REBUILD}"
        )

    def _map(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """A file of exactly this size (-1: as part.json says) as an array; small ones are
        checksummed.
        """
        path, item = self.folder / name, np.dtype(dtype).itemsize
        size, crc = self._files.get(name, (-1, 0))
        shape = (size // item,) if shape == (-1,) else shape
        if size != int(np.prod(shape, dtype=object)) * item:
            raise self.damaged(name)
        if os.stat(path).st_size != size:
            raise RetrievalError(
                f"{path}: has {os.stat(path).st_size} bytes instead of {size}; {REBUILD}"
            )
        if not size:
            return np.zeros(shape, dtype)
        if size >= MAPPED:
            with path.open("rb") as file:
                area = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, **UNTRACKED)
            array = np.frombuffer(area, dtype).reshape(shape)
        else:
            array = np.frombuffer(path.read_bytes(), dtype).reshape(shape)
        if (name not in BIG or size < MAPPED) and zlib.crc32(
            array.reshape(-1).view(np.uint8).data
        ) != crc:
            raise self.damaged(name)
        return array

    def verify(self) -> None:
        """Reads everything. RetrievalError naming the first file whose checksum is another."""
        if read_checked(self.folder / PART) != self.about:
            raise self.damaged(PART)
        for name, (_, crc) in self._files.items():
            found = 0
            with (self.folder / name).open("rb") as file:
                while block := file.read(1 << 22):
                    found = zlib.crc32(block, found)
            if found != crc:
                raise self.damaged(name)

    def name(self, row: int) -> str:
        start, end = int(self._ends[row - 1]) if row else 0, int(self._ends[row])
        if not 0 <= start <= end <= len(self._names):
            raise self.damaged("name_ends.i64")
        try:
            return self._names[start:end].tobytes().decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.damaged("names.utf8") from None

    def rows_named(self, names: Sequence[str], hashes: np.ndarray) -> np.ndarray:
        """int64: the row of each name, -1 where there is none; of several the last. hashes:
        name_hash of each.
        """
        found = np.full(len(names), -1, np.int64)
        place = np.searchsorted(self._hashes, hashes)
        for i in np.flatnonzero(self._hashes[np.minimum(place, self.count - 1)] == hashes).tolist():
            for at in range(int(place[i]), self.count):
                if self._hashes[at] != hashes[i]:
                    break
                row = int(self._hashed[at])
                if row >= self.count:
                    raise self.damaged("name_rows.u32")
                if self.name(row) == names[i]:
                    found[i] = max(found[i], row)
        return found
