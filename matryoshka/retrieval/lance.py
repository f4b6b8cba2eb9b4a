"""A LanceDB table as the system of record of an index: metadata, filters and edits there, searches here.

    record = Record.create("photos.lance", "photos", batch)      # columns id, label, class, source, item, vector
    record.table.add_columns({"licence": "'CC0'"})               # any edit that LanceDB knows
    record.sync("photos.index")                                  # the index follows: rows added, changed, deleted
    index.search(queries, 10, only=index.find(record.names("licence = 'CC0'")))

Needs the extra [lancedb]. LanceDB's own search of 1.28 million rows does 0.1 to 0.3 thousand queries/s on two cores,
the index thousands: docs/retrieval.md.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from matryoshka.retrieval.hits import RetrievalError
from matryoshka.retrieval.store import MANIFEST, Index
from matryoshka.retrieval.store_writer import Batch, Writer, half

ROWS = 4096  # of a batch: 16 MB of 2048 float16
KEY = b"matryoshka"  # of the schema's metadata: model and preprocessing
COLUMNS = ["id", "label", "class", "source", "item", "vector"]


class Change(NamedTuple):
    """Rows that `sync` added, replaced and deleted."""

    added: int
    replaced: int
    deleted: int


class _Found(NamedTuple):
    names: list[str]
    labels: np.ndarray
    classes: list[str | None]
    sources: list[str]
    items: np.ndarray
    rows: np.ndarray


class Record:
    """A table that `create` made. `table`: LanceDB's own object; model, preprocessing: as embed wrote them."""

    def __init__(self, uri: str, name: str) -> None:
        """RetrievalError for a table that is not there, or that `create` did not make."""
        self.uri, self.name = uri, name
        self.table = _opened(_connect(uri), name)
        if self.table is None:
            raise RetrievalError(f"{uri}: has no table {name!r}; `matryoshka index record` makes one")
        about = json.loads((self.table.schema.metadata or {}).get(KEY, b"{}"))
        missing = [column for column in COLUMNS if column not in self.table.schema.names]
        if "model" not in about or missing:
            lacks = f"has no column {missing[0]!r}" if missing else "does not say which model made its vectors"
            raise RetrievalError(f"{uri}: table {name!r} {lacks}; make it with `matryoshka index record`")
        self.model: dict[str, Any] = about["model"]
        self.preprocessing: dict[str, Any] = about["preprocessing"]

    @classmethod
    def create(cls, uri: str, name: str, batch: Batch, overwrite: bool = False) -> Record:
        """Vectors are float16, as the index has them. RetrievalError for a table that is there, without `overwrite`."""
        import pyarrow as pa

        database, columns = _connect(uri), batch.rows.shape[1]
        if not overwrite and _opened(database, name) is not None:
            raise RetrievalError(f"{uri}: has a table {name!r} already; --overwrite replaces it")
        about = {"model": dict(batch.model), "preprocessing": dict(batch.preprocessing)}
        types = [pa.string(), pa.int64(), pa.string(), pa.string(), pa.int64(), pa.list_(pa.float16(), columns)]
        schema = pa.schema(list(zip(COLUMNS, types, strict=True)), metadata={KEY: json.dumps(about).encode()})
        sources = [str(source.get("path", "")) for source in batch.data] or [""]

        def blocks() -> Iterator[Any]:
            for first in range(0, len(batch.rows), ROWS):
                last = min(first + ROWS, len(batch.rows))
                labels = np.asarray(batch.labels[first:last])
                origins = np.stack([np.zeros(last - first, np.int64), np.arange(first, last)], 1)
                if batch.origins is not None:
                    origins = batch.origins[first:last].astype(np.int64)
                flat = pa.array(half(batch.rows[first:last]).reshape(-1))
                yield pa.record_batch(
                    [
                        pa.array([batch.names[i] for i in range(first, last)]),
                        pa.array(labels),
                        pa.array([_class(batch.classes, label) for label in labels.tolist()], pa.string()),
                        pa.array([sources[s] for s in origins[:, 0].tolist()]),
                        pa.array(origins[:, 1]),
                        pa.FixedSizeListArray.from_arrays(flat, columns),
                    ],
                    schema=schema,
                )

        database.create_table(name, pa.RecordBatchReader.from_batches(schema, blocks()), mode="overwrite")
        return cls(uri, name)

    def names(self, where: str) -> list[str]:
        """Names of the rows that a filter in SQL selects. RetrievalError for one that LanceDB does not understand."""
        try:
            found = self.table.search().where(where).select(["id"]).to_batches()
            return [name for block in found for name in block["id"].to_pylist()]
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise RetrievalError(f"{self.uri}: table {self.name!r}: filter {where!r}: {reason}") from None

    def sync(self, folder: str | Path, num_threads: int = 0, dim: int = 0) -> Change:
        """Makes the index have the table's rows; a folder without one becomes one. Killed in between, the next call
        does the rest."""
        with Writer(folder, num_threads) as writer:
            index = Index(folder, num_threads) if (Path(folder) / MANIFEST).exists() else None
            if index is not None:
                index.check_model(self.model["weights_sha256"], f"{self.uri} {self.name!r}")
            seen = np.zeros(0 if index is None else index.total, bool)
            replaced = 0
            with tempfile.TemporaryFile(dir=folder) as file:
                kept: list[_Found] = []
                for block in self._blocks():
                    wanted = np.ones(len(block.names), bool)
                    if index is not None:
                        there = index.find(block.names)
                        seen[there[there >= 0]] = True
                        wanted = ~_same(index, there, block.rows)
                        replaced += int((wanted & (there >= 0)).sum())
                    rows = np.flatnonzero(wanted)
                    file.write(block.rows[rows].tobytes())
                    kept.append(_some(block, rows))
                file.flush()
                count = sum(len(block.names) for block in kept)
                if count:
                    rows = np.memmap(file, np.float16, "r", shape=(count, kept[0].rows.shape[1]))
                    batch = self._batch(kept, rows.view(np.ndarray))
                    index = writer.build(batch, dim) if index is None else writer.add(batch, replace=True)
            if index is None:
                raise RetrievalError(f"{self.uri}: table {self.name!r} is empty; nothing can be found in it")
            gone = np.flatnonzero(~seen)
            gone = gone[~index.is_deleted(gone)]
            if len(gone):
                writer.delete([index.name(int(row)) for row in gone])
            return Change(count - replaced, replaced, len(gone))

    def _blocks(self) -> Iterator[_Found]:
        for block in self.table.search().select(COLUMNS).to_batches(batch_size=ROWS):
            vectors = block["vector"]
            rows = np.asarray(vectors.flatten(), np.float16).reshape(len(block), vectors.type.list_size)
            yield _Found(
                block["id"].to_pylist(), np.asarray(block["label"], np.int64), block["class"].to_pylist(),
                block["source"].to_pylist(), np.asarray(block["item"], np.int64), half(rows),
            )  # fmt: skip

    def _batch(self, kept: Sequence[_Found], rows: np.ndarray) -> Batch:
        classes: dict[str, int] = {}
        sources: dict[str, int] = {}
        labels, origins, names = [], [], []
        for block in kept:
            names += block.names
            for label, name, source, item in zip(
                block.labels.tolist(), block.classes, block.sources, block.items.tolist(), strict=True
            ):
                labels.append(label if name is None else classes.setdefault(name, len(classes)))
                origins.append((sources.setdefault(source, len(sources)), item))
        return Batch(
            rows, names, np.array(labels, np.int64), self.model, self.preprocessing, list(classes) or None,
            [{"path": path} for path in sources], np.array(origins, np.uint32),
        )  # fmt: skip


def _connect(uri: str) -> Any:
    try:
        import lancedb
    except ImportError:
        raise RetrievalError("LanceDB is missing: pip install 'matryoshka[lancedb]'") from None
    return lancedb.connect(uri)


def _opened(database: Any, name: str) -> Any:
    """None where there is no such table."""
    try:
        return database.open_table(name)
    except ValueError:
        return None


def _class(classes: list[str] | None, label: int) -> str | None:
    return classes[label] if classes and 0 <= label < len(classes) else None


def _same(index: Index, rows: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """bool [n]: whether a row (-1: none) has this vector, bit by bit."""
    same = np.zeros(len(rows), bool)
    for part in index.parts:
        mine = np.flatnonzero((rows >= part.first) & (rows < part.first + part.count))
        stored = part.rows[rows[mine] - part.first].view(np.uint16)
        same[mine] = (stored == vectors[mine].view(np.uint16)).all(1)
    return same


def _some(block: _Found, rows: np.ndarray) -> _Found:
    pick = rows.tolist()
    return _Found(
        [block.names[i] for i in pick], block.labels[rows], [block.classes[i] for i in pick],
        [block.sources[i] for i in pick], block.items[rows], block.rows[:0],
    )  # fmt: skip
