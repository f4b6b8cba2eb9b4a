"""Transactional writer of an index: whenever it is killed, readers see the old or the new index.

    with Writer(folder) as writer:
        writer.build(IndexRows(rows, names, ...), dim=64)
        writer.add(more)
        writer.delete(names)
        writer.compact()

A change writes new files under random names, syncs them to disk, and then replaces index.json. The
next writer removes files that index.json does not name. One writer at a time has the lock.
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
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.arrays import as_array, as_float32, as_int64
from matryoshka.files import sync_folder
from matryoshka.retrieval.checked_file import BLOCK, BlockSums
from matryoshka.retrieval.hits import CHUNK, RetrievalError, check_rows, empty_bits, set_bits
from matryoshka.retrieval.ivf import InvertedFile
from matryoshka.retrieval.params import SearchParams, default_params
from matryoshka.retrieval.scan import PrefixScan
from matryoshka.retrieval.store import (
    FORMAT,
    MANIFEST,
    OWN_FILES,
    Index,
    NameSubset,
    RowSubset,
    merge_classes,
    rows_key,
)
from matryoshka.retrieval.store_part import (
    MAYBE_LARGE,
    PART,
    SUMS,
    name_hash,
    read_checked,
    with_checksum,
)

MAX_PARTS = 128  # a search visits all parts, and a large part keeps ten files open
# Smaller parts are scanned: among 50,000 x 512 real rows a scan has recall@10 0.996 at 20,000
# queries/s, 32 lists have 0.957 at 37,000.
MIN_ROWS_FOR_IVF = 200_000
LOCK = "writer.lock"


@dataclass(frozen=True)
class IndexRows:
    """Rows to add to an index.

    rows: float [n, D], any array or memory map. names: n distinct ones. labels: int64 [n].
    model, preprocessing: as embed wrote them; model["weights_sha256"] must be the index's.
    classes: names by label. data: descriptions of the data sets, stored as they are.
    origins: uint32 [n, 2], each row's data set and the number of its image there; default: all
        rows are from the first data set, in its order.
    """

    rows: np.ndarray
    names: Sequence[str]
    labels: np.ndarray
    model: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    _: KW_ONLY
    classes: list[str] | None = None
    data: Sequence[Mapping[str, Any]] = ()
    origins: np.ndarray | None = None


class Writer:
    """Exclusive writer of an index. RetrievalError while another process has the lock."""

    def __init__(self, path: str | os.PathLike, num_threads: int = 0) -> None:
        self.path = Path(path)
        self.num_threads = num_threads

    def __enter__(self) -> Writer:
        try:
            if self.path.is_dir() and not (self.path / MANIFEST).exists():
                for name in os.listdir(self.path):
                    if name != LOCK and not OWN_FILES.fullmatch(name):
                        raise RetrievalError(
                            f"{self.path}: contains {name}; an index needs an empty folder"
                        )
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RetrievalError(f"{self.path}: {error.strerror}; choose another folder") from None
        try:
            # The system releases the lock when the process ends, even by a kill.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise RetrievalError(
                f"{self.path}: another process is changing it; wait until it ends"
            ) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None:  # a part that the index does not name: of use to nobody
                with contextlib.suppress(OSError, RetrievalError):
                    present = (self.path / MANIFEST).exists()
                    self._sweep(read_checked(self.path / MANIFEST) if present else {})
        finally:
            os.close(self._lock)  # this releases the lock

    # ---------------------------------------------------------------- changes

    def build(
        self,
        batch: IndexRows,
        dim: int = 0,
        *,
        lists: int = 0,
        seed: int = 0,
        overwrite: bool = False,
    ) -> Index:
        """Build a new index.

        dim: dimensions of the codes, 0: 64, or all if there are fewer. lists: of the inverted
        file, 0: about 4 * sqrt(n) from MIN_ROWS_FOR_IVF rows on, else none. seed: of k-means.
        RetrievalError if there is an index, damaged or not, and `overwrite` is false.
        """
        batch = self._checked(batch)
        present = (self.path / MANIFEST).exists()
        if present and not overwrite:
            raise RetrievalError(
                f"{self.path}: is an index already; `index add` adds to it, --overwrite replaces it"
            )
        columns = batch.rows.shape[1]
        dim = dim or min(64, columns)
        check_rows(batch.rows, dim, "embeddings")
        self._check_unique(batch.names)
        # Files of a damaged index stay until the new one is complete.
        with contextlib.suppress(RetrievalError):
            self._sweep(read_checked(self.path / MANIFEST) if present else {})
        part = self._write_part(batch, dim, lists, seed)
        manifest = {
            "format": FORMAT,
            "columns": columns,
            "dim": dim,
            "lists": lists,
            "seed": seed,
            "model": dict(batch.model),
            "preprocessing": dict(batch.preprocessing),
            "setting": default_params(columns, dim).stored(),
            "certificate": None,
        }
        return self._publish(manifest, [part], None)

    def add(self, batch: IndexRows, replace: bool = False) -> Index:
        """Add rows as a new part.

        replace: delete rows of the same names in the same step. RetrievalError, before anything
        changes, for a name that exists without `replace`, for another model or width, and beyond
        MAX_PARTS.
        """
        index = self._opened()
        if len(index.parts) >= MAX_PARTS:
            raise RetrievalError(
                f"{self.path}: has {len(index.parts)} parts, the maximum; run `matryoshka index "
                "compact`, then add again"
            )
        batch = self._checked(batch)
        index.check_model(batch.model["weights_sha256"], "the embeddings")
        # As JSON has it: tuples are lists there.
        prepared = json.loads(json.dumps(batch.preprocessing))
        if prepared != index.preprocessing:
            differences = []
            for key in {**index.preprocessing, **prepared}:
                stored = index.preprocessing.get(key)
                new = prepared.get(key)
                if stored != new:
                    differences.append(f"{key} {stored} in the index, {new} in the embeddings")
            raise RetrievalError(
                f"{self.path}: its images have another preprocessing ({', '.join(differences)}); "
                "embed these in the same way"
            )
        if batch.rows.shape[1] != index.columns:
            raise RetrievalError(
                f"{self.path}: has {index.columns} dimensions, the embeddings {batch.rows.shape[1]}"
            )
        self._check_unique(batch.names)
        replaced = index.find(batch.names)
        if (replaced >= 0).any() and not replace:
            first = batch.names[int((replaced >= 0).argmax())]
            more = (replaced >= 0).sum() - 1
            others = f", and {more} more of these names" if more else ""
            raise RetrievalError(
                f"{self.path}: already has {first!r}{others}; --replace replaces them, --prefix "
                "renames them"
            )
        manifest = index.manifest
        bits = _extended(index.deleted, index.total + len(batch.rows))
        del index  # closes its files before those of the next one are opened
        part = self._write_part(batch, manifest["dim"], 0, manifest["seed"])
        # The same step publishes the new part and deletes the replaced rows.
        set_bits(bits, replaced[replaced >= 0])
        return self._publish(manifest, [*manifest["parts"], part], bits)

    def delete(self, names: Sequence[str], missing_ok: bool = False) -> Index:
        """Delete rows by name; their numbers are not reused.

        RetrievalError, before anything changes, for a name that the index does not have, unless
        `missing_ok`.
        """
        index = self._opened()
        rows = index.find(names)
        if (rows < 0).any() and not missing_ok:
            first = names[int((rows < 0).argmax())]
            more = (rows < 0).sum() - 1
            others = f", nor {more} more of these names" if more else ""
            raise RetrievalError(
                f"{self.path}: has no row {first!r}{others}; --missing-ok ignores them"
            )
        manifest = index.manifest
        bits = index.deleted.copy()
        del index
        set_bits(bits, rows[rows >= 0])
        return self._publish(manifest, manifest["parts"], bits)

    def compact(self) -> Index:
        """Write all rows that are not deleted into one part.

        Row numbers change, and the disk must have room for a second copy. RetrievalError for
        damage, which a new part would hide.
        """
        index = self._opened()
        if not len(index):
            raise RetrievalError(
                f"{self.path}: all rows are deleted; add rows, or remove the folder"
            )
        # Before copying: a damaged row would get a valid checksum in the new part.
        index.verify()
        live = np.flatnonzero(~index.is_deleted(np.arange(index.total)))
        classes, labels = merge_classes(index, live)
        rows: Any = RowSubset(index, live)

        # The data sets of all parts follow each other; origins count through them.
        sources: list[Mapping[str, Any]] = []
        origins = []
        for part in index.parts:
            origins.append(part.origins + np.array([len(sources), 0], np.uint32))
            sources += part.data
        batch = IndexRows(
            rows,
            NameSubset(index, live),
            labels,
            index.model,
            index.preprocessing,
            classes=classes,
            data=sources,
            origins=np.concatenate(origins)[live],
        )
        manifest = index.manifest
        name = self._write_part(batch, manifest["dim"], manifest["lists"], manifest["seed"])
        # All that hold the old parts' memory maps, before the new index opens its own.
        del index, part, batch, rows
        return self._publish(manifest, [name], None)

    def choose(
        self,
        params: SearchParams,
        certificate: Mapping[str, Any] | None,
        measured: Mapping[str, Any] | None = None,
    ) -> Index:
        """Make `params` the default of searches and store the certificate of their recall.

        measured: `Index.manifest` of the index that the certificate is of. RetrievalError if that
        had other rows or codes, and for params that the index cannot search with.
        """
        index = self._opened()
        manifest = index.manifest
        bits = index.deleted
        if measured is not None and _search_key(measured) != _search_key(manifest):
            raise RetrievalError(
                f"{self.path}: has changed since it was measured; start the sweep again"
            )
        index.check_params(params)
        if certificate is not None:
            certificate = {**certificate, "rows": len(index), "rows_of": rows_key(manifest)}
        del index
        chosen = {"setting": params.stored(), "certificate": certificate}
        return self._publish(manifest | chosen, manifest["parts"], bits)

    # ---------------------------------------------------------------- files

    def _opened(self) -> Index:
        """The index; removes files of killed writers and of the state before a change."""
        index = Index(self.path, self.num_threads)
        self._sweep(index.manifest)
        return index

    def _checked(self, batch: IndexRows) -> IndexRows:
        """The rows with arrays in place of lists.

        RetrievalError for rows, names, labels or origins that do not fit together.
        """
        rows = as_array(batch.rows, "embeddings", RetrievalError)
        check_rows(rows, 1, "embeddings")
        n = len(rows)
        if not n:
            raise RetrievalError("embeddings: have no rows; an index needs some")
        labels = as_array(batch.labels, "embeddings: labels", RetrievalError)
        if len(batch.names) != n or labels.shape != (n,) or labels.dtype.kind not in "iu":
            what = f"{len(batch.names)} names, labels {labels.dtype} {list(labels.shape)}"
            raise RetrievalError(
                f"embeddings: {n} rows, {what}; expected one name and one integer label per row"
            )
        labels = as_int64(labels, "embeddings: labels", RetrievalError)
        if batch.origins is None:
            return replace(batch, rows=rows, labels=labels)
        origins = as_array(batch.origins, "embeddings: origins", RetrievalError)
        origins = as_int64(origins, "embeddings: origins", RetrievalError)
        is_pair = origins.shape == (n, 2) and 0 <= origins.min() <= origins.max() < 1 << 32
        if not is_pair or not 0 <= origins[:, 0].min() <= origins[:, 0].max() < len(batch.data):
            raise RetrievalError(
                f"embeddings: origins {list(origins.shape)}, expected [{n}, 2] with numbers of "
                f"{len(batch.data)} data sets, and of images"
            )
        return replace(batch, rows=rows, labels=labels, origins=origins)

    def _check_unique(self, names: Sequence[str]) -> None:
        """RetrievalError for a name that occurs twice."""
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise RetrievalError(
                    f"embeddings: the name {name!r} occurs twice; names identify rows"
                )
            seen.add(name)

    def _write_part(self, batch: IndexRows, dim: int, lists: int, seed: int) -> str:
        """Write all files of a part and sync them; returns its name."""
        n, columns = batch.rows.shape
        needed = n * (2 * columns + dim + 64)  # 64: an estimate for names, labels, hashes
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise RetrievalError(
                f"{self.path}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there"
            )
        name = f"part-{secrets.token_hex(4)}"
        folder = self.path / name
        try:
            folder.mkdir()
            files = _Files(folder)
            files.write(
                "rows.f16", (to_float16(batch.rows[i : i + CHUNK]) for i in range(0, n, CHUNK))
            )
            # Codes are computed from the stored float16 rows, which searches re-rank by.
            rows = np.memmap(folder / "rows.f16", np.float16, "r", shape=(n, columns)).view(
                np.ndarray
            )
            if n >= MIN_ROWS_FOR_IVF or lists:
                shortlist = InvertedFile.build(
                    rows, dim, lists=lists, seed=seed, num_threads=self.num_threads
                )
                files.array("centroids.f32", shortlist.centres.astype(np.float32))
                files.array("starts.i64", shortlist.starts)
                files.array("sizes.i32", shortlist.sizes)
                files.array("slots.u32", shortlist.ids)
                count = len(shortlist.starts)
            else:
                shortlist = PrefixScan.build(rows, dim, self.num_threads)
                count = 0
            files.array("codes.u8", shortlist.packed)
            codec = np.stack([shortlist.codec.low, shortlist.codec.step])
            files.array("codec.f32", codec.astype(np.float32))
            files.array("bad.u64", shortlist.bad)
            files.array("labels.i64", np.ascontiguousarray(batch.labels, np.int64))
            origins = batch.origins
            if origins is None:
                origins = np.stack([np.zeros(n, np.uint32), np.arange(n, dtype=np.uint32)], 1)
            files.array("origins.u32", np.ascontiguousarray(origins, np.uint32))
            _write_names(files, batch.names)
            large, sums = files.sums()
            files.array(SUMS, sums)
            metadata = {
                "rows": n,
                "lists": count,
                "blocks": {"bytes": BLOCK, "files": large},
                "files": files.written,
                "classes": batch.classes,
                "data": [dict(source) for source in batch.data] or [{}],
            }
            _durable(folder / PART, with_checksum(metadata))
            sync_folder(folder)
        except BaseException as error:  # Ctrl-C as well
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise RetrievalError(
                    f"{folder}: {error.strerror}; the index is unchanged"
                ) from None
            raise
        return name

    def _publish(
        self, manifest: Mapping[str, Any], parts: Sequence[str], deleted: np.ndarray | None
    ) -> Index:
        """Replace index.json, which makes a change visible; returns the index opened anew."""
        entry = None
        state = "the index is unchanged"  # if the disk fails from here on
        try:
            if not (self.path / MANIFEST).exists():
                _sync_parents(self.path)
            if deleted is not None and deleted.any():
                file = f"deleted-{secrets.token_hex(4)}.bits"
                _durable(self.path / file, deleted.tobytes())
                entry = {"file": file, "crc32": zlib.crc32(deleted.tobytes())}
            content = with_checksum({**manifest, "parts": list(parts), "deleted": entry})
            temporary = self.path / f".{MANIFEST}.tmp"
            _durable(temporary, content)
            sync_folder(self.path)  # the new files' names, before the manifest refers to them
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

    def _sweep(self, manifest: Mapping[str, Any]) -> None:
        """Remove files of a writer (OWN_FILES) that this manifest does not name."""
        named = set(manifest.get("parts", ()))
        if manifest.get("deleted"):
            named.add(manifest["deleted"]["file"])
        for file in self.path.iterdir():
            if OWN_FILES.fullmatch(file.name) and file.name not in named:
                if file.is_dir():
                    shutil.rmtree(file, ignore_errors=True)
                else:
                    file.unlink(missing_ok=True)


class _Files:
    """Writes the files of a part; `written`: size and checksum by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[str, dict[str, int]] = {}
        self._sums: dict[str, np.ndarray] = {}

    def sums(self) -> tuple[list[str], np.ndarray]:
        """Names of the files that may be large, and the checksums of their blocks, one after the
        other.
        """
        return list(self._sums), np.concatenate(list(self._sums.values()))

    def write(self, name: str, blocks: Iterator[np.ndarray]) -> None:
        size = crc = 0
        sums = BlockSums()
        with (self.folder / name).open("wb") as file:
            for block in blocks:
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                file.write(data)
                size += len(data)
                crc = zlib.crc32(data, crc)
                if name in MAYBE_LARGE:
                    sums.add(data)
            file.flush()
            os.fsync(file.fileno())
        self.written[name] = {"bytes": size, "crc32": crc}
        if name in MAYBE_LARGE:
            self._sums[name] = sums.end()

    def array(self, name: str, array: np.ndarray) -> None:
        self.write(name, iter([array]))


def _write_names(files: _Files, names: Sequence[str]) -> None:
    """Write the names as one text, the end of each, and their sorted hashes with the rows."""
    lengths = np.zeros(len(names), np.int64)
    hashes = np.zeros(len(names), np.uint64)

    def encoded() -> Iterator[np.ndarray]:
        text = bytearray()
        for i, name in enumerate(names):
            name_bytes = name.encode("utf-8", "surrogatepass")
            lengths[i] = len(name_bytes)
            hashes[i] = name_hash(name)
            text += name_bytes
            if len(text) > 1 << 20:
                yield np.frombuffer(bytes(text), np.uint8)
                text.clear()
        yield np.frombuffer(bytes(text), np.uint8)

    files.write("names.utf8", encoded())
    files.array("name_ends.i64", lengths.cumsum())
    # In the order of the hashes: `Part.rows_named` finds a name by bisection.
    order = np.argsort(hashes, kind="stable")
    files.array("name_hashes.u64", hashes[order])
    files.array("name_rows.u32", order.astype(np.uint32))


def to_float16(rows: np.ndarray) -> np.ndarray:
    """Rows as float16, each times the power of two that brings its largest number to 256 .. 512.

    Nothing overflows or becomes subnormal, so that the only rounding is that to float16's 11 bits;
    cosines do not depend on the factor. Rows with NaN or infinity become NaN.
    """
    rows = as_float32(rows)
    with np.errstate(all="ignore"):
        largest = np.abs(rows).max(1)
        _, exponent = np.frexp(np.where(np.isfinite(largest) & (largest > 0), largest, 1))
        # frexp: largest = m * 2^exponent with 0.5 <= m < 1, so that m * 2^9 is 256 to 512.
        scaled = np.ldexp(rows, 9 - exponent[:, None])
        scaled[~np.isfinite(largest)] = np.nan
        return scaled.astype(np.float16)


def _search_key(manifest: Mapping[str, Any]) -> list[Any]:
    """Identifies everything that decides which neighbours a search finds."""
    return [*rows_key(manifest), manifest["dim"], manifest["columns"]]


def _extended(bits: np.ndarray, rows: int) -> np.ndarray:
    """The bitmap with clear bits for further rows."""
    out = empty_bits(rows)
    out[: len(bits)] = bits
    return out


def _durable(path: Path, content: bytes) -> None:
    """Write a file and sync it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_parents(path: Path) -> None:
    """Sync the parent folders: this writer, or a killed one, may have created any of them."""
    path = path.resolve()
    for folder in path.parents:
        if os.stat(folder).st_dev != os.stat(path).st_dev:  # a mount point existed before
            break
        with contextlib.suppress(PermissionError):  # then no writer created a folder in it
            sync_folder(folder)
