"""A part of an index: rows that were added together, as immutable files of a folder."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.files import open_regular, read_regular
from matryoshka.retrieval import _native
from matryoshka.retrieval.checked_file import BLOCK, REBUILD, CheckedFile, count_blocks
from matryoshka.retrieval.hits import Hits, RetrievalError, empty_bits
from matryoshka.retrieval.ivf import InvertedFile
from matryoshka.retrieval.rerank import Stage, rerank
from matryoshka.retrieval.scan import Codec, PrefixScan

PART = "part.json"
SUMS = "blocks.u64"
# Files that may be large: beyond MMAP_MIN_BYTES, their blocks are compared when they are read.
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
# Smaller files are read: a map holds one of the 1024 open files of a process.
MMAP_MIN_BYTES = 1 << 20


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
        self.num_threads = num_threads
        self.prefix_cache: np.ndarray | None = None
        self._mapped: dict[str, CheckedFile] = {}
        self._sums = self._stored_sums()

        # ---- rows, labels, names ----
        self._rows = self._map("rows.f16", np.float16, (n, columns))
        self._labels = self._map("labels.i64", np.int64, (n,))
        self._origins = self._map("origins.u32", np.uint32, (n, 2))
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
            if SUMS not in self._files and len(slots) and int(slots.max()) >= n:
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
        if size >= MMAP_MIN_BYTES and name in MAYBE_LARGE:
            # A checksum reads the whole file: opening a large index must not.
            file = CheckedFile(path, size, self._sums.get(name), self.num_threads)
            self._mapped[name] = file
            return file.bytes.view(dtype).reshape(shape)
        content = read_regular(path)
        if len(content) != size or zlib.crc32(content) != crc:
            raise self.damaged(name)
        return np.frombuffer(content, dtype).reshape(shape)

    def _stored_sums(self) -> dict[str, np.ndarray]:
        """The checksums of the blocks of each large file; {} for a part of an older version."""
        if SUMS not in self._files:
            return {}
        every = self._map(SUMS, np.uint64, (-1,))
        try:
            block = self.metadata["blocks"]["bytes"]
            names = [str(name) for name in self.metadata["blocks"]["files"]]
            counts = [count_blocks(self._files[name][0]) for name in names]
        except (LookupError, TypeError):
            raise self.damaged(PART) from None
        if block != BLOCK or sum(counts) != len(every):
            raise self.damaged(PART)
        ends = np.cumsum(counts)
        return dict(zip(names, np.split(every, ends[:-1]), strict=True))

    @property
    def has_sums(self) -> bool:
        """Whether its large files have checksums of blocks, as all since version 0.3 have."""
        return bool(self._sums)

    @property
    def mapped_files(self) -> list[CheckedFile]:
        return list(self._mapped.values())

    # ---- large files, checked ----

    @property
    def rows(self) -> np.ndarray:
        """float16 [n, D], all of them compared with their checksums."""
        return self._whole("rows.f16", self._rows)

    @property
    def labels(self) -> np.ndarray:
        """int64 [n]"""
        return self._whole("labels.i64", self._labels)

    @property
    def origins(self) -> np.ndarray:
        """uint32 [n, 2]: data set and number of the image there"""
        return self._whole("origins.u32", self._origins)

    def _whole(self, name: str, array: np.ndarray) -> np.ndarray:
        """An array of a file after a check of all of it, at the first time. RetrievalError."""
        if name in self._mapped:
            self._mapped[name].check()
        return array

    def _some(self, name: str, array: np.ndarray, first: int, end: int) -> np.ndarray:
        """A copy of array[first:end] after a check of these blocks alone. RetrievalError."""
        file = self._mapped.get(name)
        if file is None:
            return array[first:end]
        # `strides`, because a row of an array [n, D] is longer than a number.
        file.check(first * array.strides[0], end * array.strides[0])
        copy = array[first:end].copy()
        file.check_whole()
        return copy

    def vector(self, row: int) -> np.ndarray:
        """A row, float16 [D]."""
        return self._some("rows.f16", self._rows, row, row + 1)[0]

    def label(self, row: int) -> int:
        return int(self._some("labels.i64", self._labels, row, row + 1)[0])

    def origin(self, row: int) -> tuple[int, int]:
        """The data set of a row, and the number of its image there."""
        source, item = self._some("origins.u32", self._origins, row, row + 1)[0].tolist()
        return source, item

    def check_files(self) -> None:
        """RetrievalError if a file was cut off since the part was opened: reads gave zeros."""
        for file in self._mapped.values():
            file.check_whole()

    # ---- searches ----

    def search_codes(
        self, queries: np.ndarray, k: int, nprobe: int | None, deleted: np.ndarray | None
    ) -> Hits:
        """The shortlist by the codes. nprobe: lists to visit, None for all rows."""
        shortlist = self.shortlist
        codes = self._mapped.get("codes.u8")
        if not isinstance(shortlist, InvertedFile):
            if codes is not None:
                codes.check()
            return shortlist.search(queries, k, deleted=deleted)
        slots = self._mapped.get("slots.u32")
        return self._explained(
            (codes, slots),
            lambda: shortlist.search(
                queries,
                k,
                len(shortlist.starts) if nprobe is None else nprobe,
                deleted=deleted,
                code_blocks=codes and codes.blocks,
                id_blocks=slots and slots.blocks,
            ),
        )

    def rerank(
        self,
        queries: np.ndarray,
        candidates: np.ndarray,
        stages: Sequence[Stage],
        *,
        whole_rows: bool = False,
    ) -> Hits:
        """rerank.rerank of rows of this part; only the blocks that it reads are checked.

        whole_rows: read them from the file, also where the prefix cache has them.
        """
        file = self._mapped.get("rows.f16")
        return self._explained(
            (file,),
            lambda: rerank(
                self._rows,
                queries,
                candidates,
                stages,
                prefix_cache=None if whole_rows else self.prefix_cache,
                num_threads=self.num_threads,
                blocks=file and file.blocks,
            ),
        )

    def _explained(self, files: Sequence[CheckedFile | None], search: Callable[[], Hits]) -> Hits:
        """A search, and the error of the file that it found damaged or cut off."""
        mapped = [file for file in files if file is not None]
        for file in mapped:
            file.check_whole()
        try:
            found = search()
        except (_native.DamagedBlock, IndexError):  # IndexError: of an id, from a part without sums
            for file in mapped:
                if file.is_damaged:
                    raise file.damaged() from None
            raise self.damaged(mapped[-1].path.name if mapped else PART) from None
        for file in mapped:
            file.check_whole()
        return found

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
        ends = self._some("name_ends.i64", self._ends, max(row - 1, 0), row + 1).tolist()
        start = ends[0] if row else 0
        end = ends[-1]
        if not 0 <= start <= end <= len(self._names):
            raise self.damaged("name_ends.i64")
        try:
            encoded = self._some("names.utf8", self._names, start, end).tobytes()
            return encoded.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.damaged("names.utf8") from None

    def rows_named(self, names: Sequence[str], hashes: np.ndarray) -> np.ndarray:
        """The row of each name, int64; -1 where it is unknown, the last of several.

        hashes: name_hash of each name.
        """
        found = np.full(len(names), -1, np.int64)
        stored = self._whole("name_hashes.u64", self._hashes)
        first = np.searchsorted(stored, hashes)
        candidates = stored[np.minimum(first, self.count - 1)] == hashes
        self.check_files()
        for i in np.flatnonzero(candidates).tolist():
            # Different names with equal hashes follow each other.
            for at in range(int(first[i]), self.count):
                if stored[at] != hashes[i]:
                    break
                row = int(self._some("name_rows.u32", self._hashed, at, at + 1)[0])
                if row >= self.count:
                    raise self.damaged("name_rows.u32")
                if self.name(row) == names[i]:
                    found[i] = max(found[i], row)
        return found
