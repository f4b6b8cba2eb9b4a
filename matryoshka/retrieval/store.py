"""An index on disk: a folder of immutable parts and one small file that says which of them count.

    index.json          parts, deleted rows, model, default setting; replaced in one step: the index changes with it
    deleted-*.bits      uint64: a bit for each row of all parts, in their order; new with every deletion
    part-*/part.json    sizes and checksums of the part's files, its classes and data sets
    part-*/rows.f16     float16 [n, D]: each row times a power of two, which no cosine of a prefix notices
    part-*/...          7-bit codes of the first `dim` dimensions, in lists where there are many; names, labels

Files are little-endian, raw, memory-mapped. Opening reads the small ones and checks the sizes of all. Readers need no
lock: files never change, and those of an index that was replaced stay readable for who has them open. Writing is
store_writer.py's. Source of the design: 5 GB of rows cannot be rewritten for one image that is added or deleted.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.retrieval import _native
from matryoshka.retrieval.exact import exact_search
from matryoshka.retrieval.hits import Hits, RetrievalError, check_rows, empty_bits, get_bits, set_bits
from matryoshka.retrieval.ivf import InvertedFile
from matryoshka.retrieval.pipeline import HEAD, Setting
from matryoshka.retrieval.rerank import Stage, head_of, rerank
from matryoshka.retrieval.scan import Codec, PrefixScan

FORMAT = "matryoshka-index-1"
MANIFEST, PART = "index.json", "part.json"
BIG = frozenset(("rows.f16", "codes.u8", "names.utf8", "name_ends.i64", "name_hashes.u64", "name_rows.u32",
                 "labels.i64", "origins.u32", "slots.u32"))  # fmt: skip
MAPPED = 1 << 20  # bytes from which on a file is mapped: a map takes one of the 1024 open files that systems allow
FEW = 4096  # rows that are compared in full without a shortlist: 2 ms for 2048 dimensions
OURS = re.compile(r"part-[0-9a-f]{8}|deleted-[0-9a-f]{8}\.bits|\.index\.json\.tmp")  # besides index.json
REBUILD = "build the index again: matryoshka index build --overwrite"


def checked(about: Mapping[str, Any]) -> bytes:
    """JSON whose first line has the checksum of the others, for `read_checked`."""
    rest = json.dumps(about, sort_keys=True, indent=1).removeprefix("{\n").encode() + b"\n"
    return b'{"crc32": %d,\n' % zlib.crc32(rest) + rest


def read_checked(path: Path) -> dict[str, Any]:
    """RetrievalError for a file that is not, byte by byte, what `checked` wrote; OSError where it cannot be read."""
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
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Part:
    """Rows that were added together. `first`: the number of its first row in the index."""

    def __init__(self, folder: Path, first: int, columns: int, dim: int, num_threads: int) -> None:
        self.folder, self.first, self.columns = folder, first, columns
        self.about = read_checked(folder / PART)
        try:
            n, lists = int(self.about["rows"]), int(self.about["lists"])
            self._files = {str(name): (int(f["bytes"]), int(f["crc32"])) for name, f in self.about["files"].items()}
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
            self.shortlist = PrefixScan(codec, self._map("codes.u8", np.uint8, (padded * width,)), n, bad, num_threads)
        else:
            starts, sizes = self._map("starts.i64", np.int64, (lists,)), self._map("sizes.i32", np.int32, (lists,))
            slots = self._map("slots.u32", np.uint32, (-1,))
            codes = self._map("codes.u8", np.uint8, (len(slots) * width,))
            if len(slots) and int(slots.max()) >= n:  # the native search trusts it
                raise self.damaged("slots.u32")
            centres = self._map("centroids.f32", np.float32, (lists, dim))
            self.shortlist = InvertedFile(codec, centres, codes, starts, sizes, slots, n, bad, num_threads)
        self.head: np.ndarray | None = None

    def damaged(self, name: str) -> RetrievalError:
        return RetrievalError(f"{self.folder / name}: is damaged or does not belong to {PART}; {REBUILD}")

    def _map(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """A file of exactly this size (-1: as part.json says) as an array; small ones are checksummed."""
        path, item = self.folder / name, np.dtype(dtype).itemsize
        size, crc = self._files.get(name, (-1, 0))
        shape = (size // item,) if shape == (-1,) else shape
        if size != int(np.prod(shape, dtype=object)) * item:
            raise self.damaged(name)
        if os.stat(path).st_size != size:
            raise RetrievalError(f"{path}: has {os.stat(path).st_size} bytes instead of {size}; {REBUILD}")
        if not size:
            return np.zeros(shape, dtype)
        if size >= MAPPED:
            array = np.memmap(path, dtype, "r", shape=shape).view(np.ndarray)
        else:
            array = np.frombuffer(path.read_bytes(), dtype).reshape(shape)
        if name not in BIG and zlib.crc32(array.reshape(-1).view(np.uint8).data) != crc:
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
        """int64: the row of each name, -1 where there is none; of several the last. hashes: name_hash of each."""
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


class Index:
    """An index as it was when it was opened; `is_current` tells whether it still is.

    columns: D; dim: of the shortlist; model, preprocessing: what embed wrote about them; setting: the default of
    `search`. Rows are numbered through all parts; the numbers stay until the index is compacted.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int = 0) -> None:
        """RetrievalError, one line, for a folder that is no index, not whole, or damaged where opening looks."""
        self.path, self.num_threads = Path(path), num_threads
        for attempt in range(5):
            try:
                self._open()
                return
            except FileNotFoundError as error:
                if not (self.path / MANIFEST).is_file():
                    raise RetrievalError(f"{self.path}: {_absent(self.path)}") from None
                if attempt == 4:  # before: compacted between reading the manifest and opening its files
                    raise RetrievalError(f"{error.filename}: is missing; {REBUILD}") from None
            except OSError as error:
                raise RetrievalError(f"{error.filename or self.path}: {error.strerror}") from None

    def _open(self) -> None:
        file = self.path / MANIFEST
        about = self.about = read_checked(file)
        if about.get("format") != FORMAT:
            raise RetrievalError(f"{file}: is of the format {str(about.get('format'))[:40]!r}, not {FORMAT}")
        try:
            self._use(about)
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
            if str(self.path) in str(error):  # of a part
                raise
            raise RetrievalError(f"{file}: does not say all that an index needs; {REBUILD}") from None

    def _use(self, about: Mapping[str, Any]) -> None:
        self.columns, self.dim = int(about["columns"]), int(about["dim"])
        self.model, self.preprocessing = about["model"], about["preprocessing"]
        if not (0 < self.dim <= self.columns and isinstance(self.model["weights_sha256"], str) and about["parts"]):
            raise ValueError
        self.parts, self.total = list[Part](), 0
        for name in about["parts"]:
            self.parts.append(Part(self.path / name, self.total, self.columns, self.dim, self.num_threads))
            self.total += self.parts[-1].count
        self.deleted = self._stored_bits()
        self._live = self.total - int(np.bitwise_count(self.deleted).sum())
        self._firsts = [part.first for part in self.parts]
        chosen = about["setting"]
        self.setting = Setting(chosen["index"], chosen["dim"], chosen["k"], tuple(chosen["stages"]), chosen["effort"])

    def _stored_bits(self) -> np.ndarray:
        bits, entry = empty_bits(self.total), self.about["deleted"]
        if not entry:
            return bits
        stored = (self.path / entry["file"]).read_bytes()
        if len(stored) != bits.nbytes or zlib.crc32(stored) != entry["crc32"]:
            raise RetrievalError(f"{self.path / entry['file']}: is damaged; {REBUILD}")
        return np.frombuffer(stored, np.uint64)

    def __len__(self) -> int:
        """Rows that are not deleted."""
        return self._live

    def is_current(self) -> bool:
        """Whether nobody has changed the index since; opening again takes milliseconds."""
        try:
            return read_checked(self.path / MANIFEST) == self.about
        except (OSError, RetrievalError):
            return False

    def check_model(self, weights_sha256: str, what: str) -> None:
        """RetrievalError unless `what` comes from the model of this index (embeddings.trunk_sha256)."""
        own = self.model["weights_sha256"]
        if weights_sha256 != own:
            raise RetrievalError(
                f"{what}: is of another model (weights {weights_sha256[:12]}) than {self.path} ({own[:12]}, "
                f"{self.model.get('file')}); embed with that model, or build another index"
            )

    def warm(self) -> None:
        """Copies the rows' first dimensions to memory where random ones are fast: 0.3 s and 0.66 GB for 1.28 M."""
        for part in self.parts:
            if part.head is None and part.count:
                part.head = head_of(part.rows, min(HEAD, self.columns))

    def search(
        self,
        queries: np.ndarray,
        k: int = 10,
        setting: Setting | None = None,
        deleted: np.ndarray | None = None,
        only: np.ndarray | None = None,
    ) -> Hits:
        """queries: float [Q, D] -> the k nearest rows, by number. setting: index "ivf" or "scan" of the index's own
        `dim`, or "exact"; default: the index's, see Setting.giving. deleted: bits of more rows to leave out.

        only: a filter, the rows that may be found (-1, which `find` gives for none, is passed over). Up to FEW of them
        are all compared in full; with more, so many more lists are looked at as the filter is narrow. Parts without
        lists are scanned. RetrievalError for another setting, other widths, or rows that the index does not have.
        """
        setting = (setting or self.setting).giving(k)
        check_rows(queries, self.columns, "queries")
        if queries.shape[1] != self.columns:
            raise RetrievalError(f"queries: have {queries.shape[1]} dimensions, {self.path} has {self.columns}")
        if setting.index != "exact" and (setting.index not in ("ivf", "scan") or setting.dim != self.dim):
            raise RetrievalError(
                f"{self.path}: has 7-bit codes of {self.dim} dimensions; {setting} needs others: give index ivf, scan "
                f"or exact, and shortlist dimension {self.dim}"
            )
        if deleted is not None and deleted.shape != self.deleted.shape:
            raise RetrievalError(f"deleted: has bits for {64 * deleted.size} rows, {self.path} has {self.total}")
        out = self.deleted if deleted is None else self.deleted | deleted
        few = False
        if only is not None:
            only = np.asarray(only, np.int64)
            only = only[only >= 0]
            if len(only) and only.max() >= self.total:
                raise RetrievalError(f"only: row {only.max()} of {self.total}; {self.path} does not have it")
            allowed = empty_bits(self.total)
            set_bits(allowed, only)
            out = out | ~allowed
            few = len(only) <= FEW and setting.index != "exact"
            share = max(len(only), 1) / max(self.total, 1)
            setting = replace(setting, effort=min(1 << 30, math.ceil(setting.effort / share)))
        ids = np.full((len(queries), k * max(1, len(self.parts))), -1, np.int64)
        scores = np.full(ids.shape, -np.inf, np.float32)
        for i, part in enumerate(self.parts):
            left_out = _slice(out, part.first, part.count)
            if few:
                some = np.flatnonzero(~get_bits(left_out, 0, part.count))
                all_of_them = np.broadcast_to(some, (len(queries), len(some)))
                found = rerank(part.rows, queries, all_of_them, [Stage(self.columns, k)], None, self.num_threads)
            else:
                found = self._search_part(part, queries, setting, left_out)
            ids[:, i * k : (i + 1) * k] = np.where(found.ids < 0, -1, found.ids + part.first)
            scores[:, i * k : (i + 1) * k] = found.scores
        if len(self.parts) > 1:
            order = np.lexsort((np.where(ids < 0, self.total, ids), -scores))[:, :k]
            ids, scores = np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)
        return Hits(ids, scores)

    def _search_part(self, part: Part, queries: np.ndarray, setting: Setting, deleted: np.ndarray) -> Hits:
        left_out, shortlist = deleted if deleted.any() else None, part.shortlist
        if setting.index == "exact":
            found = exact_search(part.rows, queries, setting.dim, setting.k, deleted=left_out)
        elif isinstance(shortlist, InvertedFile):
            effort = setting.effort if setting.index == "ivf" else len(shortlist.starts)
            found = shortlist.search(queries, setting.k, effort, left_out)
        else:
            found = shortlist.search(queries, setting.k, left_out)
        if not setting.stages:
            return found
        return rerank(part.rows, queries, found.ids, setting.stages, part.head, self.num_threads)

    def _place(self, row: int) -> tuple[Part, int]:
        if not 0 <= row < self.total:
            raise IndexError(f"row {row} of {self.total}")
        part = self.parts[int(np.searchsorted(self._firsts, row, side="right")) - 1]
        return part, row - part.first

    def name(self, row: int) -> str:
        part, local = self._place(row)
        return part.name(local)

    def class_name(self, row: int) -> str | None:
        """The class of a row where its data set has names for them."""
        part, local = self._place(row)
        label = int(part.labels[local])
        return part.classes[label] if part.classes and 0 <= label < len(part.classes) else None

    def origin(self, row: int) -> tuple[dict[str, Any], int]:
        """What embed wrote about the data set that a row comes from, and the number of its image there."""
        part, local = self._place(row)
        source, item = part.origins[local].tolist()
        if source >= len(part.data):
            raise part.damaged("origins.u32")
        return part.data[source], item

    def vector(self, row: int) -> np.ndarray:
        """float32 [D]: the embedding times some power of two."""
        part, local = self._place(row)
        return part.rows[local].astype(np.float32)

    def find(self, names: Sequence[str]) -> np.ndarray:
        """int64: the row of each name, -1 for those that the index does not have, or no more."""
        hashes = np.array([name_hash(name) for name in names], np.uint64)
        found = np.full(len(names), -1, np.int64)
        for part in self.parts:
            rows = part.rows_named(names, hashes)
            rows = np.where(rows >= 0, rows + part.first, -1)
            gone = (rows >= 0) & self.is_deleted(rows)
            found = np.where((rows >= 0) & ~gone, rows, found)
        return found

    def is_deleted(self, rows: np.ndarray) -> np.ndarray:
        """bool, for each row number."""
        at = np.maximum(rows, 0).astype(np.uint64)
        return (self.deleted[at // np.uint64(64)] >> (at % np.uint64(64)) & np.uint64(1)).astype(bool)

    def verify(self) -> None:
        """Reads every byte. RetrievalError naming the first file that is damaged, or gone since."""
        try:
            read_checked(self.path / MANIFEST)
            for part in self.parts:
                part.verify()
            self._stored_bits()
        except OSError as error:
            raise RetrievalError(f"{error.filename}: {error.strerror}; {REBUILD}") from None

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(size for part in self.parts for size, _ in part._files.values())


def _slice(bits: np.ndarray, first: int, count: int) -> np.ndarray:
    """The bits of rows first .. first + count as an array of their own."""
    word, shift, words = first // 64, first % 64, -(-count // 64)
    out = bits[word : word + words] >> np.uint64(shift)
    if shift:
        above = bits[word + 1 : word + 1 + words] << np.uint64(64 - shift)
        out[: len(above)] |= above
    if count % 64:
        out[-1] &= np.uint64((1 << (count % 64)) - 1)
    return out


def _absent(path: Path) -> str:
    if not path.is_dir():
        return "no such index; `matryoshka index build` makes one"
    if any(map(OURS.fullmatch, os.listdir(path))):
        return "the index is not finished: start `matryoshka index build` again"
    return f"is no index (no {MANIFEST}); `matryoshka index build` makes one"
