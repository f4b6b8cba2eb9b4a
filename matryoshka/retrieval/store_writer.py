"""Writing an index: one writer at a time, killed at any moment, and readers see the old index or
the new one.

    with Writer(folder) as writer:
        writer.build(Batch(rows, names, ...), dim=64)       # or .add(batch), .delete(names), .compact()

A change writes new files under names that nobody knows, brings them to the disk, and then replaces
index.json. Files that it does not name are swept by the next writer.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.files import sync_folder
from matryoshka.retrieval.hits import CHUNK, RetrievalError, check_rows, empty_bits, set_bits
from matryoshka.retrieval.ivf import InvertedFile
from matryoshka.retrieval.pipeline import Setting, default_setting
from matryoshka.retrieval.scan import PrefixScan
from matryoshka.retrieval.store import (
    FORMAT,
    MANIFEST,
    OURS,
    Index,
    SomeNames,
    SomeRows,
    joined_classes,
    rows_of,
)
from matryoshka.retrieval.store_part import PART, checked, name_hash, read_checked

MOST_PARTS = 128  # a search goes through all of them, and a large one keeps ten files open
# rows of a part from which on it has an inverted file: of 50,000 x 512 real ones a scan finds 0.996
# of the exact ten at 20,000 queries/s, 32 lists 0.957 at 37,000
LISTED = 200_000
LOCK = "writer.lock"


@dataclass(frozen=True)
class Batch:
    """Rows to add. rows: float [n, D], any array or memory map; names: n different ones; labels:
    int64 [n].

    model, preprocessing: what embed wrote; model["weights_sha256"] must be the index's. classes:
    names by label. data: about the data sets, as it is to be stored; origins: uint32 [n, 2], which
    of them a row comes from and the number of its image there, default: the first, in its order.
    """

    rows: np.ndarray
    names: Sequence[str]
    labels: np.ndarray
    model: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    classes: list[str] | None = None
    data: Sequence[Mapping[str, Any]] = ()
    origins: np.ndarray | None = None


class Writer:
    """The one that may change an index. RetrievalError where another one does."""

    def __init__(self, path: str | os.PathLike, num_threads: int = 0) -> None:
        self.path, self.num_threads = Path(path), num_threads

    def __enter__(self) -> Writer:
        try:
            if self.path.is_dir() and not (self.path / MANIFEST).exists():
                foreign = [
                    name
                    for name in os.listdir(self.path)
                    if name != LOCK and not OURS.fullmatch(name)
                ]
                if foreign:
                    raise RetrievalError(
                        f"{self.path}: has {foreign[0]}; an index needs a folder of its own"
                    )
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RetrievalError(f"{self.path}: {error.strerror}; choose another folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise RetrievalError(
                f"{self.path}: another process is changing it; wait for it"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)  # the lock goes with it

    # ---------------------------------------------------------------- changes

    def build(
        self, batch: Batch, dim: int = 0, lists: int = 0, seed: int = 0, overwrite: bool = False
    ) -> Index:
        """A new index. dim: of the shortlist's codes, 0 for 64 or all; lists: of the inverted file,
        0 for about 4 x sqrt(n) where there are LISTED rows or more. RetrievalError for an index,
        damaged or not, without `overwrite`.
        """
        self._check(batch)
        present = (self.path / MANIFEST).exists()
        if present and not overwrite:
            raise RetrievalError(
                f"{self.path}: is an index already; `index add` adds to it, --overwrite replaces it"
            )
        columns = batch.rows.shape[1]
        dim = dim or min(64, columns)
        check_rows(batch.rows, dim, "embeddings")
        self._unique(batch.names)
        with contextlib.suppress(
            RetrievalError
        ):  # of a damaged index nothing is swept before there is another
            self._sweep(read_checked(self.path / MANIFEST) if present else {})
        part = self._write_part(batch, dim, lists, seed)
        setting = default_setting(columns, dim)
        about = {
            "format": FORMAT,
            "columns": columns,
            "dim": dim,
            "lists": lists,
            "seed": seed,
            "model": dict(batch.model),
            "preprocessing": dict(batch.preprocessing),
            "setting": asdict(setting),
            "certificate": None,
        }
        return self._publish(about, [part], None)

    def add(self, batch: Batch, replace: bool = False) -> Index:
        """replace: rows that have a name already are deleted in the same step. RetrievalError for
        such a name without it, for another model, another width, and beyond MOST_PARTS; nothing is
        changed then.
        """
        index = self._opened()
        if len(index.parts) >= MOST_PARTS:
            many = f"has {len(index.parts)} parts"
            raise RetrievalError(
                f"{self.path}: {many}; `matryoshka index compact` makes one of them, then add again"
            )
        self._check(batch)
        index.check_model(batch.model["weights_sha256"], "the embeddings")
        prepared = json.loads(json.dumps(batch.preprocessing))
        if prepared != index.preprocessing:
            keys = [
                k
                for k in {**index.preprocessing, **prepared}
                if index.preprocessing.get(k) != prepared.get(k)
            ]
            what = ", ".join(
                f"{k} {index.preprocessing.get(k)} there, {prepared.get(k)} here" for k in keys
            )
            raise RetrievalError(
                f"{self.path}: its images were prepared otherwise ({what}); embed these in the "
                "same way"
            )
        if batch.rows.shape[1] != index.columns:
            raise RetrievalError(
                f"{self.path}: has {index.columns} dimensions, the embeddings {batch.rows.shape[1]}"
            )
        self._unique(batch.names)
        there = index.find(batch.names)
        if (there >= 0).any() and not replace:
            first = batch.names[int((there >= 0).argmax())]
            more = (there >= 0).sum() - 1
            others = f", and {more} more of these names" if more else ""
            raise RetrievalError(
                f"{self.path}: has {first!r} already{others}; --replace replaces them, --prefix "
                "gives others"
            )
        about, bits = index.about, _longer(index.deleted, index.total + len(batch.rows))
        del index  # its files are closed before those of the next one are opened
        part = self._write_part(batch, about["dim"], 0, about["seed"])
        set_bits(bits, there[there >= 0])
        return self._publish(about, [*about["parts"], part], bits)

    def delete(self, names: Sequence[str], missing_ok: bool = False) -> Index:
        """RetrievalError for a name that the index does not have, without `missing_ok`; nothing is
        changed then.
        """
        index = self._opened()
        rows = index.find(names)
        if (rows < 0).any() and not missing_ok:
            first = names[int((rows < 0).argmax())]
            more = (rows < 0).sum() - 1
            others = f", nor {more} more of these names" if more else ""
            raise RetrievalError(
                f"{self.path}: has no row {first!r}{others}; --missing-ok passes over them"
            )
        about, bits = index.about, index.deleted.copy()
        del index
        set_bits(bits, rows[rows >= 0])
        return self._publish(about, about["parts"], bits)

    def compact(self) -> Index:
        """One part of all rows that are not deleted. Row numbers change; room for a second copy is
        needed. RetrievalError for damage, which a new part would hide.
        """
        index = self._opened()
        if not len(index):
            raise RetrievalError(
                f"{self.path}: all rows are deleted; add some, or remove the folder"
            )
        index.verify()
        live = np.flatnonzero(~index.is_deleted(np.arange(index.total)))
        classes, labels = joined_classes(index, live)
        rows: Any = SomeRows(index, live)
        sources = [source for part in index.parts for source in part.data]
        before = np.cumsum([0, *(len(part.data) for part in index.parts)])
        origins = [
            part.origins + np.array([n, 0], np.uint32)
            for part, n in zip(index.parts, before, strict=False)
        ]
        batch = Batch(
            rows,
            SomeNames(index, live),
            labels,
            index.model,
            index.preprocessing,
            classes,
            sources,
            np.concatenate(origins)[live],
        )
        about = index.about
        part = self._write_part(batch, about["dim"], about["lists"], about["seed"])
        del index, batch, rows
        return self._publish(about, [part], None)

    def choose(
        self,
        setting: Setting,
        certificate: Mapping[str, Any] | None,
        measured: Mapping[str, Any] | None = None,
    ) -> Index:
        """Makes `setting` the default of searches, with what is known of its recall. measured:
        `Index.about` of the index that this was measured on. RetrievalError where that had other
        rows or codes, and for a setting that the index cannot search.
        """
        index = self._opened()
        about, bits = index.about, index.deleted
        if measured is not None and _searched(measured) != _searched(about):
            raise RetrievalError(
                f"{self.path}: has changed since it was measured; start the sweep again"
            )
        index.check_setting(setting)
        if certificate is not None:
            certificate = {**certificate, "rows": len(index), "rows_of": rows_of(about)}
        del index
        return self._publish(
            about | {"setting": asdict(setting), "certificate": certificate}, about["parts"], bits
        )

    # ---------------------------------------------------------------- files

    def _opened(self) -> Index:
        """The index, without what it does not name: of writers that were killed, or from before a
        change.
        """
        index = Index(self.path, self.num_threads)
        self._sweep(index.about)
        return index

    def _check(self, batch: Batch) -> None:
        check_rows(batch.rows, 1, "embeddings")
        n = len(batch.rows)
        if not n:
            raise RetrievalError("embeddings: have no rows; nothing can be found among them")
        labels = batch.labels
        if len(batch.names) != n or labels.shape != (n,) or labels.dtype.kind not in "iu":
            what = f"{len(batch.names)} names, labels {labels.dtype} {list(labels.shape)}"
            raise RetrievalError(
                f"embeddings: {n} rows, {what}; give each a name and a whole number"
            )
        where = batch.origins
        if where is not None and (
            where.shape != (n, 2)
            or not 0 <= where[:, 0].min() <= where[:, 0].max() < len(batch.data)
        ):
            raise RetrievalError(
                f"embeddings: origins {list(where.shape)} are not [{n}, 2] of {len(batch.data)} "
                "data sets"
            )

    def _unique(self, names: Sequence[str]) -> None:
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise RetrievalError(
                    f"embeddings: the name {name!r} occurs twice; rows are told apart by their "
                    "names"
                )
            seen.add(name)

    def _write_part(self, batch: Batch, dim: int, lists: int, seed: int) -> str:
        """All files of a part, on the disk; its name."""
        n, columns = len(batch.rows), batch.rows.shape[1]
        needed, free = n * (2 * columns + dim + 64), shutil.disk_usage(self.path).free
        if needed > free:
            raise RetrievalError(
                f"{self.path}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there"
            )
        name = f"part-{secrets.token_hex(4)}"
        folder = self.path / name
        try:
            folder.mkdir()
            files = _Files(folder)
            files.write("rows.f16", (half(batch.rows[i : i + CHUNK]) for i in range(0, n, CHUNK)))
            rows = np.memmap(folder / "rows.f16", np.float16, "r", shape=(n, columns)).view(
                np.ndarray
            )
            if n >= LISTED or lists:
                made = InvertedFile.build(rows, dim, lists, seed, self.num_threads)
                files.array("centroids.f32", made.centres.astype(np.float32))
                for key, array in (
                    ("starts.i64", made.starts),
                    ("sizes.i32", made.sizes),
                    ("slots.u32", made.ids),
                ):
                    files.array(key, array)
                count = len(made.starts)
            else:
                made, count = PrefixScan.build(rows, dim, self.num_threads), 0
            files.array("codes.u8", made.packed)
            files.array("codec.f32", np.stack([made.codec.low, made.codec.step]).astype(np.float32))
            files.array("bad.u64", made.bad)
            files.array("labels.i64", np.ascontiguousarray(batch.labels, np.int64))
            origins = batch.origins
            if origins is None:
                origins = np.stack([np.zeros(n, np.uint32), np.arange(n, dtype=np.uint32)], 1)
            files.array("origins.u32", np.ascontiguousarray(origins, np.uint32))
            _write_names(files, batch.names)
            about = {
                "rows": n,
                "lists": count,
                "files": files.written,
                "classes": batch.classes,
                "data": [dict(source) for source in batch.data] or [{}],
            }
            _durable(folder / PART, checked(about))
            sync_folder(folder)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise RetrievalError(
                    f"{folder}: {error.strerror}; the index is as it was"
                ) from None
            raise
        return name

    def _publish(
        self, about: Mapping[str, Any], parts: Sequence[str], deleted: np.ndarray | None
    ) -> Index:
        entry, state = None, "the index is as it was"
        try:
            if not (self.path / MANIFEST).exists():
                _sync_parents(self.path)
            if deleted is not None and deleted.any():
                file = f"deleted-{secrets.token_hex(4)}.bits"
                _durable(self.path / file, deleted.tobytes())
                entry = {"file": file, "crc32": zlib.crc32(deleted.tobytes())}
            manifest = checked({**about, "parts": list(parts), "deleted": entry})
            temporary = self.path / f".{MANIFEST}.tmp"
            _durable(temporary, manifest)
            sync_folder(self.path)  # the new files' names before the one that names them
            os.replace(temporary, self.path / MANIFEST)
            state = "the index has changed, but a power cut may undo it"
            sync_folder(self.path)
        except OSError as error:
            raise RetrievalError(f"{self.path}: {error.strerror}; {state}") from None
        try:
            return self._opened()
        except (OSError, RetrievalError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            raise RetrievalError(
                f"{self.path}: the index has changed, but cannot be opened now: {reason}"
            ) from None

    def _sweep(self, about: Mapping[str, Any]) -> None:
        """Removes what an index that says this does not name; nothing of other names than a writer
        gives.
        """
        entry = about.get("deleted")
        named = {*about.get("parts", ()), *([entry["file"]] if entry else [])}
        for file in self.path.iterdir():
            if OURS.fullmatch(file.name) and file.name not in named:
                if file.is_dir():
                    shutil.rmtree(file, ignore_errors=True)
                else:
                    file.unlink(missing_ok=True)


class _Files:
    """Files of a part as they are written; `written`: size and checksum by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[str, dict[str, int]] = {}

    def write(self, name: str, blocks: Iterator[np.ndarray]) -> None:
        size = crc = 0
        with (self.folder / name).open("wb") as file:
            for block in blocks:
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                file.write(data)
                size, crc = size + len(data), zlib.crc32(data, crc)
            file.flush()
            os.fsync(file.fileno())
        self.written[name] = {"bytes": size, "crc32": crc}

    def array(self, name: str, array: np.ndarray) -> None:
        self.write(name, iter([array]))


def _write_names(files: _Files, names: Sequence[str]) -> None:
    lengths, hashes = np.zeros(len(names), np.int64), np.zeros(len(names), np.uint64)

    def encoded() -> Iterator[np.ndarray]:
        text = bytearray()
        for i, name in enumerate(names):
            one = name.encode("utf-8", "surrogatepass")
            lengths[i], hashes[i] = len(one), name_hash(name)
            text += one
            if len(text) > 1 << 20:
                yield np.frombuffer(bytes(text), np.uint8)
                text.clear()
        yield np.frombuffer(bytes(text), np.uint8)

    files.write("names.utf8", encoded())
    files.array("name_ends.i64", lengths.cumsum())
    order = np.argsort(hashes, kind="stable")
    files.array("name_hashes.u64", hashes[order])
    files.array("name_rows.u32", order.astype(np.uint32))


def half(rows: np.ndarray) -> np.ndarray:
    """float16, each row times the power of two that brings its largest number to 256 .. 512:
    nothing overflows, and what the row has is not rounded but to float16's 11 bits. Rows with NaN
    or infinity become NaN.
    """
    rows = np.asarray(rows, np.float32)
    with np.errstate(all="ignore"):
        largest = np.abs(rows).max(1)
        _, exponent = np.frexp(np.where(np.isfinite(largest) & (largest > 0), largest, 1))
        scaled = np.ldexp(rows, 9 - exponent[:, None])
        scaled[~np.isfinite(largest)] = np.nan
        return scaled.astype(np.float16)


def _searched(about: Mapping[str, Any]) -> list[Any]:
    """What decides which neighbours a setting finds."""
    return [*rows_of(about), about["dim"], about["columns"]]


def _longer(bits: np.ndarray, rows: int) -> np.ndarray:
    out = empty_bits(rows)
    out[: len(bits)] = bits
    return out


def _durable(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_parents(path: Path) -> None:
    """The names of a folder and of those above: a writer may have made them, also one that was
    killed since.
    """
    path = path.resolve()
    for folder in path.parents:
        if os.stat(folder).st_dev != os.stat(path).st_dev:  # a mount: what is above was there
            break
        with contextlib.suppress(
            PermissionError
        ):  # nobody makes folders in one that he may not read
            sync_folder(folder)
