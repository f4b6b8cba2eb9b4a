"""Write a folder of embeddings with any number of processes.

    with EmbeddingWriter(folder) as writer:       # one process
        plan = writer.begin(meta, labels, name)   # None: already finished
        rows = RowWriter(folder, plan)            # every process, for its part of missing_rows
        rows.write(np.array([0, 1]), features); rows.flush(); rows.close()
        writer.finish()

A killed run resumes from the rows that it has flushed; the files are the same as those of a run
without interruption. Until `finish` moves them, all files are in the hidden folder `.unfinished`:

    plan.json         the future meta.json and a token; written when the arrays below exist
    progress*.json    rows on disk: one file of each process, and one of all processes before a kill
    X.npy, y.npy, ids.npy, ids_ends.npy    in their final sizes
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from matryoshka import json_files
from matryoshka.embeddings.reading import (
    ARRAYS,
    HASHES,
    META,
    WORK,
    EmbeddingError,
    hash_file,
    open_embeddings,
    read_meta,
)
from matryoshka.files import read_regular, sync_folder, write_atomically

PLAN = "plan.json"
# Keys of meta.json that do not change the numbers: a resumed run may differ in them.
_IGNORED_KEYS = ("model.file", "model.adapter.file", "data.path", "code", HASHES, json_files.KEY)
_NAMES_PER_WRITE = 1 << 16  # bounds the memory for names


class Plan(NamedTuple):
    """What every process must know about a folder that is being written."""

    token: str  # identifies this attempt; progress files with another token are ignored
    rows: int
    columns: int
    dtype: str
    missing_rows: list[tuple[int, int]]  # ranges [from, to)


# ---------------------------------------------------------------- the folder


class EmbeddingWriter:
    """Creates and publishes a folder of embeddings.

    Used by one process, which calls `begin`, and `finish` when all rows are on disk. The rows
    themselves are written by RowWriter in every process.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.work = self.folder / WORK
        self._lock: int | None = None

    def begin(
        self,
        meta: Mapping[str, Any],
        labels: np.ndarray,
        name: Callable[[int], str],
        overwrite: bool = False,
    ) -> Plan | None:
        """Start, or resume a killed run with the same `meta`; None if the folder is already
        finished.

        meta: see docs/retrieval.md; labels: int64 [N]; name: index -> the image's name. overwrite:
        replace existing embeddings once the new ones are complete, and discard an unfinished run
        with another `meta`. Without it, EmbeddingError names the first difference. EmbeddingError
        also while another process writes into the folder.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EmbeddingError(
                f"{self.folder}: {error.strerror}; choose another --output"
            ) from None
        self._take_lock()
        is_finished = (self.folder / META).exists()
        if is_finished and not (self.work / "X.npy").exists():
            # Left by a kill inside `finish`, or before a new X.npy existed: nothing to resume.
            shutil.rmtree(self.work, ignore_errors=True)
        if is_finished and not overwrite:
            self._must_match(read_meta(self.folder), meta, "holds embeddings")
            open_embeddings(self.folder)
            return None

        stored = self._read_plan()
        if stored:
            if not overwrite:
                self._must_match(stored["meta"], meta, "is an unfinished run")
            if not differences(stored["meta"], meta):
                missing_rows = self._collect_progress(stored["token"], meta["rows"])
                # X.npy is gone if `finish` was killed after moving it; then no row is missing.
                if not missing_rows or (self.work / "X.npy").exists():
                    return Plan(stored["token"], *_size(meta), missing_rows)
        elif not overwrite and not is_finished:
            foreign = [file for file in ARRAYS if (self.folder / file).exists()]
            if foreign:
                raise EmbeddingError(
                    f"{self.folder}: has {foreign[0]}, but no {META}: choose another --output, "
                    "or add --overwrite"
                )
        return self._create(meta, labels, name)

    def _create(
        self, meta: Mapping[str, Any], labels: np.ndarray, name: Callable[[int], str]
    ) -> Plan:
        """Create the arrays in their final sizes; plan.json comes last and makes them valid."""
        rows, columns, dtype = _size(meta)
        with _name_file_in_errors(self.work):
            shutil.rmtree(self.work, ignore_errors=True)
            needed = rows * columns * np.dtype(dtype).itemsize
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                raise EmbeddingError(
                    f"{self.folder}: needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free"
                )
            self.work.mkdir()
            labels = np.ascontiguousarray(labels, np.int64)
            write_atomically(self.work / "y.npy", _header("int64", (rows,)), labels.data.cast("B"))
            self._write_names(rows, name)
            # A sparse file of the final size: processes write their rows at fixed offsets.
            with open(self.work / "X.npy", "wb") as out:
                out.write(_header(dtype, (rows, columns)))
                out.truncate(out.tell() + needed)
                out.flush()
                os.fsync(out.fileno())
            token = secrets.token_hex(8)
            write_atomically(self.work / PLAN, json_files.encode({"token": token, "meta": meta}))
        return Plan(token, rows, columns, dtype, missing_rows=[(0, rows)])

    def _write_names(self, rows: int, name: Callable[[int], str]) -> None:
        def encoded(i: int) -> bytes:
            # surrogatepass: a file name that is not valid UTF-8 keeps its bytes
            return name(i).encode("utf-8", "surrogatepass")

        ends = np.fromiter((len(encoded(i)) for i in range(rows)), np.int64, rows).cumsum()
        write_atomically(self.work / "ids_ends.npy", _header("int64", (rows,)), ends.data.cast("B"))
        with open(self.work / "ids.npy", "wb") as out:
            out.write(_header("uint8", (int(ends[-1]),)))
            for start in range(0, rows, _NAMES_PER_WRITE):
                stop = min(rows, start + _NAMES_PER_WRITE)
                out.write(b"".join(encoded(i) for i in range(start, stop)))
            out.flush()
            os.fsync(out.fileno())

    def finish(self) -> None:
        """Move the files to their final names, meta.json last. All rows must be on disk."""
        stored = self._read_plan()
        if stored is None:
            raise EmbeddingError(f"{self.work}: {PLAN} is missing; start again")
        hashes = {}
        for file in ARRAYS:
            # The hidden folder lacks the files that were moved before a kill.
            place = self.work if (self.work / file).exists() else self.folder
            hashes[file] = hash_file(place / file)
        # First, because a reader must never see old and new files together.
        (self.folder / META).unlink(missing_ok=True)
        for file in ARRAYS:
            if (self.work / file).exists():
                os.replace(self.work / file, self.folder / file)
        # written in the hidden folder first: a kill must not leave a temporary file in `folder`
        write_atomically(self.work / META, json_files.encode(stored["meta"] | {HASHES: hashes}))
        os.replace(self.work / META, self.folder / META)
        sync_folder(self.folder)
        shutil.rmtree(self.work, ignore_errors=True)

    def close(self) -> None:
        """Release the lock that keeps other processes from writing into the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _take_lock(self) -> None:
        """Lock the folder; the system releases the lock when the process ends.

        Some network file systems, and Windows, have no such locks: then continue without.
        """
        try:
            import fcntl
        except ImportError:
            return
        self.close()
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise EmbeddingError(
                f"{self.folder}: another process is writing into it; wait until it ends"
            ) from None
        except OSError:  # the file system has no locks, see above
            pass

    def _must_match(
        self, stored: Mapping[str, Any], requested: Mapping[str, Any], state: str
    ) -> None:
        """EmbeddingError naming the first difference between two meta.json."""
        different = differences(stored, requested)
        if different:
            key, old, new = different[0]
            more = f" (and {len(different) - 1} more differences)" if len(different) > 1 else ""
            raise EmbeddingError(
                f"{self.folder}: {state} with {key} {old}, not {new}{more}; choose another "
                "--output, or add --overwrite"
            )

    def _read_plan(self) -> dict | None:
        """plan.json; None if it is missing or damaged."""
        try:
            stored, _ = json_files.decode(read_regular(self.work / PLAN))
        except (OSError, ValueError):
            return None
        if not isinstance(stored, dict) or "token" not in stored:
            return None
        return stored if isinstance(stored.get("meta"), dict) else None

    def _collect_progress(self, token: str, rows: int) -> list[tuple[int, int]]:
        """Merge the progress files of all processes into one; return the missing rows."""
        ranges: list[tuple[int, int]] = []
        files = list(self.work.glob("progress*.json"))
        for file in files:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                stored, _ = json_files.decode(read_regular(file))
                # Another token: a process of an earlier attempt that still runs.
                if stored["token"] == token:
                    ranges += [(int(start), int(stop)) for start, stop in stored["rows"]]
        done = merged(ranges)
        combined = self.work / "progress.json"
        write_atomically(combined, json_files.encode({"token": token, "rows": done}))
        for file in files:
            if file != combined:
                file.unlink(missing_ok=True)
        return missing(done, rows)


# ---------------------------------------------------------------- rows


class RowWriter:
    """Writes the rows of one process into X.npy.

    Uses pwrite, not a memory map: there a full disk kills the process with a signal, here it is an
    EmbeddingError. Rows are safe from a kill once `flush` has returned.
    """

    def __init__(self, folder: str | os.PathLike, plan: Plan, rank: int = 0) -> None:
        work = Path(folder) / WORK
        self._path = work / "X.npy"
        self._progress = work / f"progress-{rank}.json"
        self._token = plan.token
        self._dtype = np.dtype(plan.dtype)
        self._start = len(_header(plan.dtype, (plan.rows, plan.columns)))
        self._row_bytes = plan.columns * self._dtype.itemsize
        self._written: list[tuple[int, int]] = []
        with _name_file_in_errors(self._path):
            self._file = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Write values [B, D], of the plan's type, as the rows int64 [B], which increase."""
        # Split where row numbers are not consecutive: one write for each run of rows.
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for run, part in zip(np.split(rows, breaks), np.split(values, breaks), strict=True):
            first = int(run[0])
            last = int(run[-1])
            rest = np.ascontiguousarray(part, self._dtype).data.cast("B")
            offset = self._start + first * self._row_bytes
            with _name_file_in_errors(self._path):
                while rest:  # pwrite may write less than it is given
                    count = os.pwrite(self._file, rest, offset)
                    rest = rest[count:]
                    offset += count
            self._written = merged([*self._written, (first, last + 1)])

    def flush(self) -> None:
        """Sync the rows written so far to disk, then record them as done.

        May run in another thread than `write`, at the same time.
        """
        done = self._written  # `write` replaces this list and never changes it
        with _name_file_in_errors(self._path):
            # First the rows, then the record: it must never list rows that a power cut can lose.
            os.fsync(self._file)
            content = {"token": self._token, "rows": done}
            write_atomically(self._progress, json_files.encode(content))

    def close(self) -> None:
        os.close(self._file)


# ---------------------------------------------------------------- ranges, meta


def merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same rows as sorted, disjoint ranges [from, to), as few as possible."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            previous_start, previous_end = result[-1]
            result[-1] = (previous_start, max(end, previous_end))
        elif start < end:
            result.append((start, end))
    return result


def missing(done: Sequence[tuple[int, int]], rows: int) -> list[tuple[int, int]]:
    """Ranges of the rows below `rows` that are not in `done`, a result of `merged`."""
    edges = [0, *(edge for pair in done for edge in pair), rows]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def _size(meta: Mapping[str, Any]) -> tuple[int, int, str]:
    """(rows, columns, dtype)."""
    return meta["rows"], meta["columns"], meta["dtype"]


def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Header of a .npy file, version 1.0."""
    buffer = io.BytesIO()
    fields = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


@contextlib.contextmanager
def _name_file_in_errors(path: Path) -> Iterator[Path]:
    """Turn an OSError into an EmbeddingError that names the file."""
    try:
        yield path
    except OSError as error:
        raise EmbeddingError(
            f"{path}: {error.strerror}; start the same command again when that is fixed"
        ) from error


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """("model.arch", value), ... of nested mappings; tuples become lists, as in JSON."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, list(value) if isinstance(value, tuple) else value


def differences(
    stored: Mapping[str, Any], requested: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """(key, stored, requested) of the differences between two meta.json that change the numbers."""
    old = dict(_flat(stored))
    new = dict(_flat(requested))

    def short(value: Any) -> str:
        text = str(value)
        return text if len(text) <= 24 else f"{text[:21]}..."

    different = []
    for key in dict.fromkeys([*new, *old]):
        if not key.startswith(_IGNORED_KEYS) and old.get(key) != new.get(key):
            different.append((key, short(old.get(key)), short(new.get(key))))
    return different
