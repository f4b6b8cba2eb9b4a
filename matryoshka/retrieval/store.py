"""An index on disk: a folder of immutable parts and one small file that says which of them count.

    index.json          parts, deleted rows, model, default setting; replaced in one step: the index changes with it
    deleted-*.bits      uint64: a bit for each row of all parts, in their order; new with every deletion
    part-*/part.json    sizes and checksums of the part's files, its classes and data sets
    part-*/rows.f16     float16 [n, D]: each row times a power of two, which no cosine of a prefix notices
    part-*/...          7-bit codes of the first `dim` dimensions, in lists where there are many; names, labels

Files are little-endian, raw, memory-mapped. Opening reads the small ones and checks the sizes of
all. Readers need no lock: files never change, and those of an index that was replaced stay readable
for who has them open. Writing is store_writer.py's. Source of the design: 5 GB of rows cannot be
rewritten for one image that is added or deleted.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.retrieval.exact import exact_search
from matryoshka.retrieval.hits import (
    Hits,
    RetrievalError,
    as_rows,
    check_rows,
    empty_bits,
    get_bits,
    set_bits,
)
from matryoshka.retrieval.ivf import InvertedFile
from matryoshka.retrieval.pipeline import HEAD, Setting
from matryoshka.retrieval.rerank import Stage, head_of, rerank
from matryoshka.retrieval.store_part import REBUILD, Part, name_hash, read_checked

FORMAT = "matryoshka-index-1"
MANIFEST = "index.json"
FEW = 4096  # rows that are compared in full without a shortlist: 2 ms for 2048 dimensions
OURS = re.compile(
    r"part-[0-9a-f]{8}|deleted-[0-9a-f]{8}\.bits|\.index\.json\.tmp"
)  # besides index.json


def rows_of(about: Mapping[str, Any]) -> list[Any]:
    """What tells one set of rows from another: parts never change, and deleted rows have a
    checksum.
    """
    return [about["parts"], (about["deleted"] or {}).get("crc32")]


class Index:
    """An index as it was when it was opened; `is_current` tells whether it still is.

    columns: D; dim: of the shortlist; model, preprocessing: what embed wrote about them; setting:
    the default of `search`. Rows are numbered through all parts; the numbers stay until the index
    is compacted.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int = 0) -> None:
        """RetrievalError, one line, for a folder that is no index, not whole, or damaged where
        opening looks.
        """
        self.path, self.num_threads = Path(path), num_threads
        for attempt in range(5):
            try:
                self._open()
                return
            except FileNotFoundError as error:
                if not (self.path / MANIFEST).is_file():
                    raise RetrievalError(f"{self.path}: {_absent(self.path)}") from None
                if (
                    attempt == 4
                ):  # before: compacted between reading the manifest and opening its files
                    raise RetrievalError(f"{error.filename}: is missing; {REBUILD}") from None
            except OSError as error:
                raise RetrievalError(f"{error.filename or self.path}: {error.strerror}") from None

    def _open(self) -> None:
        file = self.path / MANIFEST
        about = self.about = read_checked(file)
        if about.get("format") != FORMAT:
            raise RetrievalError(
                f"{file}: is of the format {str(about.get('format'))[:40]!r}, not {FORMAT}"
            )
        try:
            self._use(about)
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
            if str(self.path) in str(error):  # of a part
                raise
            raise RetrievalError(
                f"{file}: does not say all that an index needs; {REBUILD}"
            ) from None

    def _use(self, about: Mapping[str, Any]) -> None:
        self.columns, self.dim = int(about["columns"]), int(about["dim"])
        self.model, self.preprocessing = about["model"], about["preprocessing"]
        if not (
            0 < self.dim <= self.columns
            and isinstance(self.model["weights_sha256"], str)
            and about["parts"]
        ):
            raise ValueError
        self.parts, self.total = list[Part](), 0
        for name in about["parts"]:
            self.parts.append(
                Part(self.path / name, self.total, self.columns, self.dim, self.num_threads)
            )
            self.total += self.parts[-1].count
        self.deleted = self._stored_bits()
        self._live = self.total - int(np.bitwise_count(self.deleted).sum())
        self._firsts = [part.first for part in self.parts]
        chosen = about["setting"]
        self.setting = Setting(
            chosen["index"], chosen["dim"], chosen["k"], tuple(chosen["stages"]), chosen["effort"]
        )
        if self.setting.index == "ivf" and not any(part.about["lists"] for part in self.parts):
            self.setting = replace(self.setting, index="scan")  # until there are lists

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

    def __repr__(self) -> str:
        return f"Index({str(self.path)!r}: {len(self):,} rows of {self.columns} dimensions)"

    @property
    def certificate(self) -> tuple[dict[str, Any], bool] | None:
        """What is known of the default search's recall, None where it was not measured; and whether
        these are still the rows that it was measured on.
        """
        found = self.about["certificate"]
        return (found, found.get("rows_of") == rows_of(self.about)) if found else None

    def is_current(self) -> bool:
        """Whether nobody has changed the index since; opening again takes milliseconds."""
        try:
            return read_checked(self.path / MANIFEST) == self.about
        except (OSError, RetrievalError):
            return False

    def check_model(self, weights_sha256: str, what: str) -> None:
        """RetrievalError unless `what` comes from the model of this index
        (embeddings.trunk_sha256).
        """
        own = self.model["weights_sha256"]
        if weights_sha256 != own:
            raise RetrievalError(
                f"{what}: is of another model (weights {weights_sha256[:12]}) than {self.path} "
                f"({own[:12]}, "
                f"{self.model.get('file')}); embed with that model, or build another index"
            )

    def check_setting(self, setting: Setting) -> None:
        """RetrievalError for one that needs codes or dimensions that the index does not have."""
        if not isinstance(setting, Setting):
            raise RetrievalError(
                f"setting: is a {type(setting).__name__}, expected a matryoshka.retrieval.Setting"
            )
        if setting.index != "exact" and (
            setting.index not in ("ivf", "scan") or setting.dim != self.dim
        ):
            raise RetrievalError(
                f"{self.path}: has 7-bit codes of {self.dim} dimensions; {setting} needs others: "
                "give index ivf, scan "
                f"or exact, and shortlist dimension {self.dim}"
            )
        widest = max([setting.dim, *(stage.dim for stage in setting.stages)])
        if widest > self.columns:
            raise RetrievalError(
                f"{self.path}: has {self.columns} dimensions, {setting} asks for a prefix of "
                f"{widest}"
            )

    def warm(self) -> None:
        """Copies the rows' first dimensions to memory where random ones are fast: 0.3 s and 0.66 GB
        for 1.28 M.
        """
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
        """queries: float [Q, D], anything that NumPy reads -> the k nearest rows, by number.
        setting: index "ivf" or "scan" of the index's own `dim`, or "exact"; default: the index's,
        see Setting.giving. deleted: bits of more rows to leave out.

        only: a filter, the rows that may be found (-1, which `find` gives for none, is passed
        over). Up to FEW of them are all compared in full; with more, so many more lists are looked
        at as the filter is narrow. Parts without lists are scanned. RetrievalError for another
        setting, other widths, or rows that the index does not have.
        """
        setting = self.setting if setting is None else setting
        self.check_setting(setting)
        setting, queries = setting.giving(k), as_rows(queries)
        check_rows(queries, 1, "queries")
        if queries.shape[1] != self.columns:
            raise RetrievalError(
                f"queries: have {queries.shape[1]} dimensions, {self.path} has {self.columns}"
            )
        if deleted is not None and deleted.shape != self.deleted.shape:
            raise RetrievalError(
                f"deleted: has bits for {64 * deleted.size} rows, {self.path} has {self.total}"
            )
        out = self.deleted if deleted is None else self.deleted | deleted
        few = False
        if only is not None:
            only = np.asarray(only, np.int64)
            only = only[only >= 0]
            if len(only) and only.max() >= self.total:
                raise RetrievalError(
                    f"only: row {only.max()} of {self.total}; {self.path} does not have it"
                )
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
                found = rerank(
                    part.rows,
                    queries,
                    all_of_them,
                    [Stage(self.columns, k)],
                    None,
                    self.num_threads,
                )
            else:
                found = self._search_part(part, queries, setting, left_out)
            ids[:, i * k : (i + 1) * k] = np.where(found.ids < 0, -1, found.ids + part.first)
            scores[:, i * k : (i + 1) * k] = found.scores
        if len(self.parts) > 1:
            order = np.lexsort((np.where(ids < 0, self.total, ids), -scores))[:, :k]
            ids, scores = np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)
        return Hits(ids, scores)

    def _search_part(
        self, part: Part, queries: np.ndarray, setting: Setting, deleted: np.ndarray
    ) -> Hits:
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
        """What embed wrote about the data set that a row comes from, and the number of its image
        there.
        """
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
        if isinstance(names, str):
            raise TypeError(f"find takes several names: find([{names!r}])")
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
        return (self.deleted[at // np.uint64(64)] >> (at % np.uint64(64)) & np.uint64(1)).astype(
            bool
        )

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


class SomeRows:
    """Some rows of an index, as an array is asked for them."""

    def __init__(self, index: Index, rows: np.ndarray) -> None:
        self._index, self._rows = index, rows
        self.shape, self.dtype, self.ndim = (len(rows), index.columns), np.dtype(np.float16), 2

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> np.ndarray:
        wanted = self._rows[part]
        out = np.empty((len(wanted), self.shape[1]), np.float16)
        for one in self._index.parts:
            mine = (wanted >= one.first) & (wanted < one.first + one.count)
            out[mine] = one.rows[wanted[mine] - one.first]
        return out


class SomeNames(Sequence[str]):
    """Their names."""

    def __init__(self, index: Index, rows: np.ndarray) -> None:
        self._index, self._rows = index, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: Any) -> Any:
        return self._index.name(int(self._rows[at]))


def joined_classes(index: Index, live: np.ndarray) -> tuple[list[str] | None, np.ndarray]:
    """Classes of all parts by name, and the labels of the rows as numbers of these; those without a
    name follow.
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
