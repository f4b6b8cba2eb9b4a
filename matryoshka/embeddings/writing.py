"""Writing a folder of embeddings: any number of processes, stopped at any moment, the same files in
the end.

    with Unfinished(folder) as unfinished:              # one process
        plan = unfinished.begin(meta, labels, name)     # None: finished already
        rows = RowWriter(folder, plan)                  # every process, for its part of plan.todo
        rows.write(np.array([0, 1]), features); rows.flush(); rows.close()
        unfinished.finish()

Everything is in the hidden folder `.unfinished` until `finish` moves it:

    plan.json         the coming meta.json, and a token; written when the files below are there
    progress*.json    rows that are on the disk: one file of each process, and one of all processes before
    X.npy, y.npy, ids.npy, ids_ends.npy    in their final sizes
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from matryoshka.embeddings.reading import (
    ARRAYS,
    META,
    WORK,
    EmbeddingError,
    open_embeddings,
    read_meta,
)
from matryoshka.files import sync_folder, write_atomically

PLAN = "plan.json"
# Where things lie and which version of the code ran may differ between a start and the next.
_FREE = ("model.file", "data.path", "code")
_NAMES_AT_ONCE = 1 << 16


class Plan(NamedTuple):
    """What every process has to know about a folder that is being written. todo: missing rows, as
    [from, to).
    """

    token: str
    rows: int
    columns: int
    dtype: str
    todo: list[tuple[int, int]]


class Unfinished:
    """A folder while it is written. For one process, which calls `begin`, then, when all rows are
    there, `finish`.
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
        """Start, or go on where a process with the same `meta` was killed; None when all is
        finished already.

        meta: see open_embeddings; labels: int64 [N]; name: index -> the image's name. overwrite:
        embeddings that are there are replaced, once the new ones are whole; an unfinished folder of
        another `meta` is begun anew. EmbeddingError naming the first difference without it, and
        where another process writes into the folder.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EmbeddingError(
                f"{self.folder}: {error.strerror}; choose another --output"
            ) from None
        self._take_lock()
        if (self.folder / META).exists() and not (self.work / "X.npy").exists():
            shutil.rmtree(
                self.work, ignore_errors=True
            )  # killed while it swept, or before there was anything
        if not overwrite and (self.folder / META).exists():
            self._must_match(read_meta(self.folder), meta, "holds embeddings")
            open_embeddings(self.folder)
            return None
        stored = self._read_plan()
        if stored:
            if not overwrite:
                self._must_match(stored["meta"], meta, "was begun")
            if not differences(stored["meta"], meta):
                todo = self._collect(stored["token"], meta["rows"])
                if not todo or (self.work / "X.npy").exists():
                    return Plan(stored["token"], *_size(meta), todo)
        elif not overwrite and not (self.folder / META).exists():
            foreign = [file for file in ARRAYS if (self.folder / file).exists()]
            if foreign:
                raise EmbeddingError(
                    f"{self.folder}: has {foreign[0]}, but no {META}: choose another --output, "
                    "or add --overwrite"
                )
        return self._start(meta, labels, name)

    def _start(
        self, meta: Mapping[str, Any], labels: np.ndarray, name: Callable[[int], str]
    ) -> Plan:
        rows, columns, dtype = _size(meta)
        with _reported(self.work):
            shutil.rmtree(self.work, ignore_errors=True)
            needed, free = (
                rows * columns * np.dtype(dtype).itemsize,
                shutil.disk_usage(self.folder).free,
            )
            if needed > free:
                raise EmbeddingError(
                    f"{self.folder}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free "
                    "there"
                )
            self.work.mkdir()
            labels = np.ascontiguousarray(labels, np.int64)
            write_atomically(self.work / "y.npy", _header("int64", (rows,)), labels.data.cast("B"))
            self._write_names(rows, name)
            with open(self.work / "X.npy", "wb") as out:
                out.write(_header(dtype, (rows, columns)))
                out.truncate(out.tell() + needed)
                out.flush()
                os.fsync(out.fileno())
            token = secrets.token_hex(8)
            write_atomically(self.work / PLAN, json.dumps({"token": token, "meta": meta}).encode())
        return Plan(token, rows, columns, dtype, [(0, rows)])

    def _write_names(self, rows: int, name: Callable[[int], str]) -> None:
        def encoded(i: int) -> bytes:
            return name(i).encode("utf-8", "surrogatepass")

        ends = np.fromiter((len(encoded(i)) for i in range(rows)), np.int64, rows).cumsum()
        write_atomically(self.work / "ids_ends.npy", _header("int64", (rows,)), ends.data.cast("B"))
        with open(self.work / "ids.npy", "wb") as out:
            out.write(_header("uint8", (int(ends[-1]),)))
            for start in range(0, rows, _NAMES_AT_ONCE):  # never all of them at once
                out.write(
                    b"".join(encoded(i) for i in range(start, min(rows, start + _NAMES_AT_ONCE)))
                )
            out.flush()
            os.fsync(out.fileno())

    def finish(self) -> None:
        """Give the files their names, meta.json last. All rows have to be there and on the disk."""
        stored = self._read_plan()
        if stored is None:
            raise EmbeddingError(f"{self.work}: {PLAN} is gone; start again")
        (self.folder / META).unlink(missing_ok=True)  # a reader must never see old and new together
        for file in ARRAYS:
            if (self.work / file).exists():  # else it was moved before a kill
                os.replace(self.work / file, self.folder / file)
        # made in there too: what a kill leaves behind is in one place
        write_atomically(self.work / META, (json.dumps(stored["meta"], indent=1) + "\n").encode())
        os.replace(self.work / META, self.folder / META)
        sync_folder(self.folder)
        shutil.rmtree(self.work, ignore_errors=True)

    def close(self) -> None:
        """Let other processes write into the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _take_lock(self) -> None:
        """Held by an open file: it ends with the process. Some network file systems have no locks;
        then without.
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
                f"{self.folder}: another process is writing into it; wait for its end"
            ) from None
        except OSError:
            pass

    def _must_match(self, stored: Mapping[str, Any], wanted: Mapping[str, Any], state: str) -> None:
        if different := differences(stored, wanted):
            key, old, new = different[0]
            more = f" (and {len(different) - 1} more differences)" if len(different) > 1 else ""
            raise EmbeddingError(
                f"{self.folder}: {state} with {key} {old}, not {new}{more}; choose another "
                "--output, or add --overwrite"
            )

    def _read_plan(self) -> dict | None:
        with contextlib.suppress(OSError, ValueError):
            stored = json.loads((self.work / PLAN).read_bytes())
            if (
                isinstance(stored, dict)
                and isinstance(stored.get("meta"), dict)
                and "token" in stored
            ):
                return stored
        return None

    def _collect(self, token: str, rows: int) -> list[tuple[int, int]]:
        """The rows that are missing; the progress of all processes becomes one file."""
        ranges: list[tuple[int, int]] = []
        files = list(self.work.glob("progress*.json"))
        for file in files:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                stored = json.loads(file.read_bytes())
                if (
                    stored["token"] == token
                ):  # not of a process that works on for a folder that was begun anew
                    ranges += [(int(a), int(b)) for a, b in stored["rows"]]
        done = merged(ranges)
        whole = self.work / "progress.json"
        write_atomically(whole, json.dumps({"token": token, "rows": done}).encode())
        for file in files:
            if file != whole:
                file.unlink(missing_ok=True)
        return missing(done, rows)


class RowWriter:
    """One process's rows. They are written where they belong, not through a map: a full disk is an
    error, no signal.

    What `flush` has put on the disk is not done again after a kill. EmbeddingError when the disk is
    full.
    """

    def __init__(self, folder: str | os.PathLike, plan: Plan, rank: int = 0) -> None:
        work = Path(folder) / WORK
        self._path, self._progress = work / "X.npy", work / f"progress-{rank}.json"
        self._token, self._dtype = plan.token, np.dtype(plan.dtype)
        self._start = len(_header(plan.dtype, (plan.rows, plan.columns)))
        self._row_bytes = plan.columns * self._dtype.itemsize
        self._written: list[tuple[int, int]] = []
        with _reported(self._path):
            self._file = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """rows: int64 [B], increasing; values: [B, D] of the plan's type."""
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for which, part in zip(np.split(rows, breaks), np.split(values, breaks), strict=True):
            rest = np.ascontiguousarray(part, self._dtype).data.cast("B")
            offset = self._start + int(which[0]) * self._row_bytes
            with _reported(self._path):
                while rest:
                    n = os.pwrite(self._file, rest, offset)
                    rest, offset = rest[n:], offset + n
            self._written = merged([*self._written, (int(which[0]), int(which[-1]) + 1)])

    def flush(self) -> None:
        """The rows written so far onto the disk, then the note that they are there. `write` may go
        on meanwhile.
        """
        there = self._written  # replaced, never changed, by `write`
        with _reported(self._path):
            os.fsync(self._file)
            write_atomically(
                self._progress, json.dumps({"token": self._token, "rows": there}).encode()
            )

    def close(self) -> None:
        os.close(self._file)


def merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same rows as few, sorted and separate ranges [from, to)."""
    whole: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if whole and start <= whole[-1][1]:
            whole[-1] = whole[-1][0], max(end, whole[-1][1])
        elif start < end:
            whole.append((start, end))
    return whole


def missing(done: Sequence[tuple[int, int]], rows: int) -> list[tuple[int, int]]:
    """The rows of 0 to `rows` that are in none of the ranges of `merged`."""
    edges = [0, *(edge for pair in done for edge in pair), rows]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def _size(meta: Mapping[str, Any]) -> tuple[int, int, str]:
    return meta["rows"], meta["columns"], meta["dtype"]


def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    fields = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[Path]:
    """What the system refuses, as an error that names the file."""
    try:
        yield path
    except OSError as error:
        raise EmbeddingError(
            f"{path}: {error.strerror}; start the same command again when that is mended"
        ) from error


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, list(value) if isinstance(value, tuple) else value


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, stored, wanted) of what decides the numbers and differs between two meta.json."""
    old, new = dict(_flat(stored)), dict(_flat(wanted))

    def short(value: Any) -> str:
        text = str(value)
        return text if len(text) <= 24 else f"{text[:21]}..."

    return [
        (key, short(old.get(key)), short(new.get(key)))
        for key in dict.fromkeys([*new, *old])
        if not key.startswith(_FREE) and old.get(key) != new.get(key)
    ]
