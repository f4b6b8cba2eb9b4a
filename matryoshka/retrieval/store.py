"""An index on disk: a folder of immutable parts and a manifest that names the current ones.

    index.json          parts, deleted rows, model, default search; replaced atomically
    deleted-*.bits      uint64: one bit per row of all parts, in their order; new for every deletion
    part-*/part.json    sizes and checksums of the part's files, its classes and data sets
    part-*/rows.f16     float16 [n, D]: each row times a power of two, which cancels in a cosine
    part-*/...          7-bit codes of the first `dim` dimensions, in lists if there are many rows;
                        names, labels
    part-*/blocks.u64   a checksum of every 32 kB of the large files

Files are little-endian, raw and memory-mapped. Opening reads the small files and checks the sizes
of all; blocks of the large ones are compared with their checksums when they are first read. Readers
need no lock: files never change, and a process that has an older index open keeps its files.
store_writer.py writes. The parts exist because 5 GB of rows cannot be rewritten for one image that
is added or deleted.
"""

from __future__ import annotations

import math
import operator
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.arrays import as_array, as_int64
from matryoshka.files import read_regular
from matryoshka.retrieval.checked_file import REBUILD
from matryoshka.retrieval.exact import exact_search
from matryoshka.retrieval.hits import (
    Hits,
    RetrievalError,
    as_rows,
    check_bits,
    empty_bits,
    get_bits,
    row_numbers,
    set_bits,
)
from matryoshka.retrieval.params import PREFIX_CACHE_DIMS, SearchParams
from matryoshka.retrieval.rerank import Stage, build_prefix_cache
from matryoshka.retrieval.store_part import Part, name_hash, read_checked

FORMAT = "matryoshka-index-1"
MANIFEST = "index.json"
DEFAULT_K = 10  # results of `Index.search`
MAX_EXACT_FILTER_ROWS = 4096  # filters that need no shortlist: 2 ms for 2048 dimensions
# Names that a writer gives to files, besides index.json.
OWN_FILES = re.compile(r"part-[0-9a-f]{8}|deleted-[0-9a-f]{8}\.bits|\.index\.json\.tmp")


def rows_key(manifest: Mapping[str, Any]) -> list[Any]:
    """Identifies a set of rows: parts never change, and deleted rows have a checksum."""
    return [manifest["parts"], (manifest["deleted"] or {}).get("crc32")]


class Index:
    """An index as of the moment of opening; `is_current` compares it with the disk.

        Index("photos.index").search(model.encode_files(["cat.jpg"]), k=10)

    columns: D. dim: dimensions of the codes. model, preprocessing: as `matryoshka embed` wrote
    them. params: the default of `search`. Row numbers run through all parts; compacting changes
    them.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int = 0) -> None:
        """RetrievalError, one line, if the folder is not an index, or an incomplete or damaged one.

        Opening checks small files only; `verify` reads everything.
        """
        self.path = Path(path)
        self.num_threads = num_threads
        for attempt in range(5):
            try:
                self._open()
                return
            except FileNotFoundError as error:
                if not (self.path / MANIFEST).is_file():
                    raise RetrievalError(f"{self.path}: {_why_not_an_index(self.path)}") from None
                # A writer may compact between the reading of the manifest and the opening of its
                # files, which no longer exist then; the next attempt reads the new manifest.
                if attempt == 4:
                    raise RetrievalError(f"{error.filename}: is missing; {REBUILD}") from None
            except OSError as error:
                raise RetrievalError(f"{error.filename or self.path}: {error.strerror}") from None

    def _open(self) -> None:
        file = self.path / MANIFEST
        manifest = self.manifest = read_checked(file)
        if manifest.get("format") != FORMAT:
            raise RetrievalError(
                f"{file}: has format {str(manifest.get('format'))[:40]!r}, expected {FORMAT}"
            )
        try:
            self._use(manifest)
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
            if str(self.path) in str(error):  # a RetrievalError of a part, which names its file
                raise
            raise RetrievalError(f"{file}: lacks entries that an index needs; {REBUILD}") from None

    def _use(self, manifest: Mapping[str, Any]) -> None:
        """Open the parts that the manifest names."""
        self.columns = int(manifest["columns"])
        self.dim = int(manifest["dim"])
        self.model = manifest["model"]
        self.preprocessing = manifest["preprocessing"]
        if not 0 < self.dim <= self.columns or not manifest["parts"]:
            raise ValueError
        if not isinstance(self.model["weights_sha256"], str):
            raise ValueError

        self.parts: list[Part] = []
        self.total = 0
        for name in manifest["parts"]:
            part = Part(
                self.path / name,
                first=self.total,
                columns=self.columns,
                dim=self.dim,
                num_threads=self.num_threads,
            )
            self.parts.append(part)
            self.total += part.count
        self.deleted = self._stored_bits()
        self._live = self.total - int(np.bitwise_count(self.deleted).sum())
        self._firsts = [part.first for part in self.parts]
        self.params = SearchParams.from_stored(manifest["setting"])
        if self.params.index == "ivf" and not any(part.metadata["lists"] for part in self.parts):
            self.params = replace(self.params, index="scan")  # until a part has lists

    def _stored_bits(self) -> np.ndarray:
        """The bitmap of deleted rows, from its file."""
        bits = empty_bits(self.total)
        entry = self.manifest["deleted"]
        if not entry:
            return bits
        stored = read_regular(self.path / entry["file"])
        if len(stored) != bits.nbytes or zlib.crc32(stored) != entry["crc32"]:
            raise RetrievalError(f"{self.path / entry['file']}: is damaged; {REBUILD}")
        return np.frombuffer(stored, np.uint64)

    def __len__(self) -> int:
        """Rows that are not deleted."""
        return self._live

    def __repr__(self) -> str:
        return f"Index({str(self.path)!r}: {len(self):,} rows of {self.columns} dimensions)"

    @property
    def certificate(self) -> tuple[dict[str, Any], bool] | None:
        """The measured recall of the default search, and whether its rows are still the same.

        None if it was never measured.
        """
        certificate = self.manifest["certificate"]
        if not certificate:
            return None
        return certificate, certificate.get("rows_of") == rows_key(self.manifest)

    def is_current(self) -> bool:
        """Whether the index on disk is still the same; opening it again takes milliseconds."""
        try:
            return read_checked(self.path / MANIFEST) == self.manifest
        except (OSError, RetrievalError):
            return False

    def check_model(self, weights_sha256: str, what: str) -> None:
        """RetrievalError unless `what` comes from the index's model and adapter
        (embeddings.embedding_sha256).
        """
        own = self.model["weights_sha256"]
        if weights_sha256 == own:
            return
        adapter = self.model.get("adapter")
        if adapter and weights_sha256 == self.model.get("encoder_sha256"):
            raise RetrievalError(
                f"{what}: is not behind the adapter of {self.path} ({adapter['file']}); give it "
                "with --adapter"
            )
        raise RetrievalError(
            f"{what}: is of another model (weights {weights_sha256[:12]}) than {self.path} "
            f"({own[:12]}, {self.model.get('file')}); embed with that model, or build another "
            "index"
        )

    def check_params(self, params: SearchParams) -> None:
        """RetrievalError for params that need codes or dimensions that the index does not have."""
        # `search(queries, 10)` is a likely mistake: the error names k=.
        if not isinstance(params, SearchParams):
            raise RetrievalError(
                f"params: is a {type(params).__name__}, expected "
                "matryoshka.retrieval.SearchParams (the number of results is k=)"
            )
        if params.index != "exact" and (
            params.index not in ("ivf", "scan") or params.dim != self.dim
        ):
            raise RetrievalError(
                f"{self.path}: has 7-bit codes of {self.dim} dimensions; {params} needs others: "
                f"use index ivf, scan or exact, and shortlist dimension {self.dim}"
            )
        if params.widest > self.columns:
            raise RetrievalError(
                f"{self.path}: has {self.columns} dimensions, {params} needs a prefix of "
                f"{params.widest}"
            )

    def warm(self) -> None:
        """Build the prefix caches, which speed up re-ranking: 0.3 s and 0.66 GB for 1.28 M rows."""
        for part in self.parts:
            if part.prefix_cache is None and part.count:
                part.prefix_cache = build_prefix_cache(
                    part.rows, min(PREFIX_CACHE_DIMS, self.columns)
                )
                part.check_files()

    def search(
        self,
        queries: Any,
        params: SearchParams | None = None,
        *,
        k: int | None = None,
        deleted: np.ndarray | None = None,
        only: np.ndarray | None = None,
    ) -> Hits:
        """The k nearest rows of each query, by row number.

        queries: float [Q, D], anything that NumPy reads.
        params: index "ivf" or "scan" of the index's own `dim`, or "exact"; default: the index's.
        k: number of results, see SearchParams.with_k; default: what `params` give, else DEFAULT_K.
        deleted: bits of further rows to leave out.
        only: a filter: the rows that may be found, as integers or as a mask, bool [total]. -1,
            which `find` gives for unknown names, is ignored. Up to MAX_EXACT_FILTER_ROWS rows are
            compared in full. For longer filters nprobe grows as the filter narrows. Parts without
            lists are scanned.

        RetrievalError for other params, other widths, and rows that the index does not have.
        """
        if k is None:
            k = DEFAULT_K if params is None else params.results
        params = self.params if params is None else params
        self.check_params(params)
        params = params.with_k(k)
        queries = self._check_queries(queries)
        excluded, allowed = self._mask(deleted, only)
        compare_all = False
        if allowed is not None:
            compare_all = allowed <= MAX_EXACT_FILTER_ROWS and params.index != "exact"
            params = self._params_for_filter(params, allowed)

        # Parts are independent indexes: row ids of each count from its first row.
        found = []
        for part in self.parts:
            bits = slice_bits(excluded, part.first, part.count)
            if compare_all:
                hits = self._compare_all(part, queries, k, bits)
            else:
                hits = self._search_part(part, queries, params, bits)
            found.append(Hits(np.where(hits.ids < 0, -1, hits.ids + part.first), hits.scores))
        return merge_top_k(found, k, len(queries), self.total)

    def _check_queries(self, queries: Any) -> np.ndarray:
        """Queries as an array [Q, columns]. RetrievalError."""
        queries = as_rows(queries)
        if queries.shape[1] != self.columns:
            raise RetrievalError(
                f"queries: have {queries.shape[1]} dimensions, {self.path} has {self.columns}"
            )
        return queries

    def _mask(
        self, deleted: np.ndarray | None, only: np.ndarray | None
    ) -> tuple[np.ndarray, int | None]:
        """Bits of all rows that a search leaves out; the length of the filter, None without one."""
        if deleted is not None:
            check_bits(deleted, self.total)
        excluded = self.deleted if deleted is None else self.deleted | deleted
        if only is None:
            return excluded, None

        only = row_numbers(only, self.total, "only", str(self.path))
        only = only[only >= 0]
        allowed = empty_bits(self.total)
        set_bits(allowed, only)
        return excluded | ~allowed, len(only)

    def _params_for_filter(self, params: SearchParams, allowed: int) -> SearchParams:
        """With a filter of 1 row in 10, visit 10 times the lists: as many rows are then scored."""
        share = max(allowed, 1) / max(self.total, 1)
        return replace(params, nprobe=min(1 << 30, math.ceil(params.nprobe / share)))

    def _compare_all(self, part: Part, queries: np.ndarray, k: int, excluded: np.ndarray) -> Hits:
        """Exact cosines of all rows of a part that are not excluded."""
        rows = np.flatnonzero(~get_bits(excluded, 0, part.count))
        # All queries have the same candidates; broadcast_to makes no copies.
        candidates = np.broadcast_to(rows, (len(queries), len(rows)))
        return part.rerank(queries, candidates, [Stage(self.columns, k)])

    def _search_part(
        self, part: Part, queries: np.ndarray, params: SearchParams, excluded: np.ndarray
    ) -> Hits:
        """Shortlist and re-ranking in one part; ids count from the part's first row."""
        deleted = excluded if excluded.any() else None
        if params.index == "exact":
            found = exact_search(part.rows, queries, params.dim, params.k, deleted=deleted)
            part.check_files()
        else:
            # A scan of a part with lists visits all of them.
            nprobe = params.nprobe if params.index == "ivf" else None
            found = part.search_codes(queries, params.k, nprobe, deleted)
        if not params.stages:
            return found
        return part.rerank(queries, found.ids, params.stages)

    @property
    def memory_bytes(self) -> int:
        """Memory of the codes and the prefix caches, without the rows."""
        caches = [part.prefix_cache for part in self.parts if part.prefix_cache is not None]
        return sum(part.shortlist.nbytes for part in self.parts) + sum(c.nbytes for c in caches)

    def _locate(self, row: int) -> tuple[Part, int]:
        """The part of a row, and its number there. IndexError."""
        if isinstance(row, bool):
            raise TypeError("row: is bool, expected an integer")
        if not 0 <= operator.index(row) < self.total:
            raise IndexError(f"row {row} of {self.total}")
        part = self.parts[int(np.searchsorted(self._firsts, row, side="right")) - 1]
        return part, row - part.first

    def name(self, row: int) -> str:
        part, local = self._locate(row)
        return part.name(local)

    def class_name(self, row: int) -> str | None:
        """The class of a row, None if its data set does not name the classes."""
        part, local = self._locate(row)
        label = part.label(local)
        if part.classes and 0 <= label < len(part.classes):
            return part.classes[label]
        return None

    def origin(self, row: int) -> tuple[dict[str, Any], int]:
        """The data set of a row, as embed described it, and the number of its image there."""
        part, local = self._locate(row)
        source, item = part.origin(local)
        # origins.u32 may be too large for a checksum when the part is opened.
        if source >= len(part.data):
            raise part.damaged("origins.u32")
        return part.data[source], item

    def vector(self, row: int) -> np.ndarray:
        """The embedding times a power of two, float32 [D]."""
        part, local = self._locate(row)
        return part.vector(local).astype(np.float32)

    def find(self, names: Sequence[str]) -> np.ndarray:
        """The row of each name, int64; -1 for unknown and deleted ones."""
        # A string is a sequence of names as well, of one character each.
        if isinstance(names, str):
            raise TypeError(f"find takes several names: find([{names!r}])")
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"find takes names: {type(name).__name__} is not text")
        hashes = np.array([name_hash(name) for name in names], np.uint64)
        found = np.full(len(names), -1, np.int64)
        for part in self.parts:
            rows = part.rows_named(names, hashes)
            rows = np.where(rows >= 0, rows + part.first, -1)
            # A replaced row is deleted in its old part; the name is then in a later one.
            is_live = (rows >= 0) & ~self.is_deleted(rows)
            found = np.where(is_live, rows, found)
        return found

    def is_deleted(self, rows: np.ndarray) -> np.ndarray:
        """Whether each row is deleted, bool; row -1 counts as row 0. RetrievalError."""
        numbers = as_int64(as_array(rows, "rows", RetrievalError), "rows", RetrievalError)
        if numbers.size and numbers.max() >= self.total:
            raise RetrievalError(
                f"rows: row {numbers.max()} out of range, {self.path} has {self.total} rows"
            )
        at = np.maximum(numbers, 0).astype(np.uint64)
        word = self.deleted[at // np.uint64(64)]
        return (word >> (at % np.uint64(64)) & np.uint64(1)).astype(bool)

    def verify(self) -> None:
        """Read every byte. RetrievalError names the first file that is damaged or missing."""
        try:
            read_checked(self.path / MANIFEST)
            for part in self.parts:
                part.verify()
            self._stored_bits()
        except OSError as error:
            raise RetrievalError(f"{error.filename}: {error.strerror}; {REBUILD}") from None

    def check_files(self) -> None:
        """RetrievalError if a file was cut off since the index was opened.

        Who reads arrays of `parts` calls it afterwards: they have zeros then.
        """
        for part in self.parts:
            part.check_files()

    @property
    def has_sums(self) -> bool:
        """Whether all large files have checksums of their blocks; older versions wrote none."""
        return all(part.has_sums for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Size of all parts on disk."""
        return sum(part.nbytes for part in self.parts)


def trained_dims(index: Index) -> list[int]:
    """Prefixes that the model was trained for, up to the index's columns, and all columns.

    Powers of two for a model that was not trained for prefixes.
    """
    dims = index.model.get("dims")
    known = dims if isinstance(dims, list) and dims else [8 << i for i in range(16)]
    columns = index.columns
    return sorted({d for d in known if isinstance(d, int) and 0 < d < columns} | {columns})


class RowSubset:
    """Some rows of an index behind an array's interface, for arrays larger than memory."""

    ndim = 2
    dtype = np.dtype(np.float16)

    def __init__(self, index: Index, rows: np.ndarray) -> None:
        self._index = index
        self._rows = rows
        self.shape = (len(rows), index.columns)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> np.ndarray:
        numbers = self._rows[part]
        out = np.empty((len(numbers), self.shape[1]), np.float16)
        for stored in self._index.parts:
            inside = (numbers >= stored.first) & (numbers < stored.first + stored.count)
            out[inside] = stored.rows[numbers[inside] - stored.first]
            stored.check_files()
        return out


class NameSubset(Sequence[str]):
    """The names of some rows of an index."""

    def __init__(self, index: Index, rows: np.ndarray) -> None:
        self._index = index
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: Any) -> Any:
        return self._index.name(int(self._rows[at]))


def merge_classes(index: Index, live: np.ndarray) -> tuple[list[str] | None, np.ndarray]:
    """Class names of all parts, and the labels of rows `live` as their numbers, int64.

    Labels without a name follow the named ones.
    """
    number: dict[str, int] = {}
    for part in index.parts:
        for name in part.classes or ():
            number.setdefault(name, len(number))
    labels = []
    for part in index.parts:
        own = np.array([number[name] for name in part.classes or ()], np.int64)
        moved = np.where(part.labels < 0, part.labels, part.labels + (len(number) - len(own)))
        named = (part.labels >= 0) & (part.labels < len(own))
        moved[named] = own[part.labels[named]]
        labels.append(moved)
    return list(number) or None, np.concatenate(labels)[live]


def merge_top_k(found: Sequence[Hits], k: int, queries: int, total: int) -> Hits:
    """The k best of several parts' hits, [queries, k]; ties by rising id.

    total: larger than any id.
    """
    if len(found) == 1:
        return found[0]
    ids = np.full((queries, k * max(1, len(found))), -1, np.int64)
    scores = np.full(ids.shape, -np.inf, np.float32)
    for i, hits in enumerate(found):
        columns = slice(i * k, (i + 1) * k)
        ids[:, columns] = hits.ids
        scores[:, columns] = hits.scores
    # lexsort's last key comes first: by falling score, then by rising id.
    missing_last = np.where(ids < 0, total, ids)
    order = np.lexsort((missing_last, -scores))[:, :k]
    return Hits(np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1))


def slice_bits(bits: np.ndarray, first: int, count: int) -> np.ndarray:
    """The bits of rows first .. first + count as a separate bitmap."""
    word = first // 64
    shift = first % 64
    words = -(-count // 64)
    # A part may start inside a word: each word is joined from two neighbours.
    out = bits[word : word + words] >> np.uint64(shift)
    if shift:
        above = bits[word + 1 : word + 1 + words] << np.uint64(64 - shift)
        out[: len(above)] |= above
    if count % 64:
        out[-1] &= np.uint64((1 << (count % 64)) - 1)
    return out


def _why_not_an_index(path: Path) -> str:
    """Why a path is not an index, with the remedy."""
    if not path.is_dir():
        return "no such index; `matryoshka index build` makes one"
    if any(map(OWN_FILES.fullmatch, os.listdir(path))):
        return "the index is incomplete: start `matryoshka index build` again"
    return f"is not an index (no {MANIFEST}); `matryoshka index build` makes one"
