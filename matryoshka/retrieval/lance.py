"""A LanceDB table as the system of record of an index: metadata, filters and edits there, searches
here.

    record = Record.create("photos.lance", "photos", batch)      # columns id, label, class, source, item, vector
    record.table.add_columns({"licence": "'CC0'"})               # any edit that LanceDB knows
    record.sync("photos.index")                                  # the index follows: rows added, changed, deleted
    index.search(queries, 10, only=index.find(record.names("licence = 'CC0'")))

Needs the extra [lancedb]. LanceDB's own search of 1.28 million rows does 0.1 to 0.3 thousand
queries/s on two cores, the index thousands: docs/retrieval.md.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from matryoshka.retrieval.hits import RetrievalError
from matryoshka.retrieval.store import MANIFEST, Index
from matryoshka.retrieval.store_writer import Batch, Writer, half

ROWS = 4096  # of a batch: 16 MB of 2048 float16
KEY = b"matryoshka"  # of the schema's metadata: model, preprocessing and data sets
COLUMNS = ["id", "label", "class", "source", "item", "vector"]


class Change(NamedTuple):
    """Rows that `sync` added, replaced and deleted."""

    added: int
    replaced: int
    deleted: int


class _Found(NamedTuple):
    """Rows of the table. classes, sources: int64, numbers of `_Numbers`, -1 for none."""

    names: list[str]
    labels: np.ndarray
    classes: np.ndarray
    sources: np.ndarray
    items: np.ndarray
    rows: np.ndarray


class Record:
    """A table that `create` made. `table`: LanceDB's own object; model, preprocessing, data: as
    embed wrote them.
    """

    def __init__(self, uri: str, name: str) -> None:
        """RetrievalError for a table that is not there, or that `create` did not make."""
        self.uri, self.name = uri, name
        self.table: Any = None if _is_absent(uri) else _opened(_connect(uri), name)
        if self.table is None:
            raise RetrievalError(
                f"{uri}: has no table {name!r}; `matryoshka index record` makes one"
            )
        about = json.loads((self.table.schema.metadata or {}).get(KEY, b"{}"))
        missing = [column for column in COLUMNS if column not in self.table.schema.names]
        if "model" not in about or missing:
            lacks = (
                f"has no column {missing[0]!r}"
                if missing
                else "does not say which model made its vectors"
            )
            raise RetrievalError(
                f"{uri}: table {name!r} {lacks}; make it with `matryoshka index record`"
            )
        self.model: dict[str, Any] = about["model"]
        self.preprocessing: dict[str, Any] = about["preprocessing"]
        self.data: list[dict[str, Any]] = about.get("data", [])  # older tables have none

    @classmethod
    def create(cls, uri: str, name: str, batch: Batch, overwrite: bool = False) -> Record:
        """Vectors are float16, as the index has them. RetrievalError for a table that is there,
        without `overwrite`.
        """
        import pyarrow as pa

        database, columns = _connect(uri), batch.rows.shape[1]
        present = _opened(database, name) is not None
        if present and not overwrite:
            raise RetrievalError(f"{uri}: has a table {name!r} already; --overwrite replaces it")
        data = [dict(source) for source in batch.data]
        about = {
            "model": dict(batch.model),
            "preprocessing": dict(batch.preprocessing),
            "data": data,
        }
        types = [
            pa.string(),
            pa.int64(),
            pa.string(),
            pa.string(),
            pa.int64(),
            pa.list_(pa.float16(), columns),
        ]
        schema = pa.schema(
            list(zip(COLUMNS, types, strict=True)), metadata={KEY: json.dumps(about).encode()}
        )
        sources = [_path(source) for source in data] or [""]

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
                        pa.array(
                            [_class(batch.classes, label) for label in labels.tolist()], pa.string()
                        ),
                        pa.array([sources[s] for s in origins[:, 0].tolist()]),
                        pa.array(origins[:, 1]),
                        pa.FixedSizeListArray.from_arrays(flat, columns),
                    ],
                    schema=schema,
                )

        mode = (
            "overwrite" if present else "create"
        )  # LanceDB warns of an overwrite where there is nothing
        database.create_table(name, pa.RecordBatchReader.from_batches(schema, blocks()), mode=mode)
        return cls(uri, name)

    def names(self, where: str) -> list[str]:
        """Names of the rows that a filter in SQL selects. RetrievalError for one that LanceDB does
        not understand.
        """
        try:
            found = self.table.search().where(where).select(["id"]).to_batches()
            return [name for block in found for name in block["id"].to_pylist()]
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise RetrievalError(
                f"{self.uri}: table {self.name!r}: filter {where!r}: {reason}"
            ) from None

    def sync(self, folder: str | Path, num_threads: int = 0, dim: int = 0) -> Change:
        """Makes the index have the table's rows; a folder without one becomes one. A row is
        replaced where its vector has other bits, or its class (of rows without one: its label),
        source or item differs. Killed in between, the next call does the rest.
        """
        with Writer(folder, num_threads) as writer:
            index = Index(folder, num_threads) if (Path(folder) / MANIFEST).exists() else None
            if index is not None:
                index.check_model(self.model["weights_sha256"], f"{self.uri} {self.name!r}")
            numbers = _Numbers(index)
            seen = np.zeros(0 if index is None else index.total, bool)
            replaced = 0
            with tempfile.TemporaryFile(dir=folder) as file:
                kept: list[_Found] = []
                for block in self._blocks(numbers):
                    wanted = np.ones(len(block.names), bool)
                    if index is not None:
                        there = index.find(block.names)
                        seen[there[there >= 0]] = True
                        wanted = ~_same(index, numbers, there, block)
                        replaced += int((wanted & (there >= 0)).sum())
                    rows = np.flatnonzero(wanted)
                    file.write(block.rows[rows].tobytes())
                    kept.append(_some(block, rows))
                file.flush()
                count = sum(len(block.names) for block in kept)
                if count:
                    rows = np.memmap(file, np.float16, "r", shape=(count, kept[0].rows.shape[1]))
                    batch = self._batch(kept, rows.view(np.ndarray), numbers)
                    is_new, index = index is None, None  # closed before the writer opens it
                    index = writer.build(batch, dim) if is_new else writer.add(batch, replace=True)
            if index is None:
                raise RetrievalError(
                    f"{self.uri}: table {self.name!r} is empty; nothing can be found in it"
                )
            gone = np.flatnonzero(~seen)
            gone = gone[~index.is_deleted(gone)]
            names, index = [index.name(int(row)) for row in gone], None
            if names:
                writer.delete(names)
            return Change(count - replaced, replaced, len(names))

    def _blocks(self, numbers: _Numbers) -> Iterator[_Found]:
        for block in self.table.search().select(COLUMNS).to_batches(batch_size=ROWS):
            vectors, items = block["vector"], np.asarray(block["item"].fill_null(0), np.int64)
            rows = np.asarray(vectors.flatten(), np.float16).reshape(
                len(block), vectors.type.list_size
            )
            if len(items) and not 0 <= items.min() <= items.max() < 1 << 32:
                raise RetrievalError(
                    f"{self.uri}: table {self.name!r} has items that are no numbers of 32 bits; "
                    "give each row's place in its source, or 0"
                )
            yield _Found(
                block["id"].to_pylist(),
                np.asarray(block["label"].fill_null(-1), np.int64),
                _numbered(numbers.classes, block["class"]),
                _numbered(numbers.sources, block["source"].fill_null("")),
                items,
                half(rows),
            )

    def _batch(self, kept: Sequence[_Found], rows: np.ndarray, numbers: _Numbers) -> Batch:
        labels, classes, sources, items = map(np.concatenate, list(zip(*kept, strict=True))[1:5])
        named, used = np.unique(classes[classes >= 0]), np.unique(sources)
        # numbers of this part's classes; those without a name follow, as joined_classes has it
        unnamed = np.where(labels < 0, labels, labels + len(named))
        labels = np.where(classes >= 0, np.searchsorted(named, classes), unnamed)
        texts, paths = list(numbers.classes), list(numbers.sources)
        known = {_path(source): source for source in self.data}
        return Batch(
            rows,
            [name for block in kept for name in block.names],
            labels,
            self.model,
            self.preprocessing,
            [texts[i] for i in named] or None,
            [
                known.get(path, {"path": path} if path else {})
                for path in map(paths.__getitem__, used)
            ],
            np.stack([np.searchsorted(used, sources), items], 1).astype(np.uint32),
        )


class _Numbers:
    """Numbers of class names and sources, of the index and then of the table: what is compared row
    by row.

    parts: of each part of the index, the numbers of its classes and sources, -1 after them.
    """

    def __init__(self, index: Index | None) -> None:
        self.classes: dict[str, int] = {}
        self.sources: dict[str, int] = {}
        self.parts = [
            (_known(self.classes, part.classes or ()), _known(self.sources, map(_path, part.data)))
            for part in (index.parts if index is not None else ())
        ]


def _known(numbers: dict[str, int], texts: Iterable[str]) -> np.ndarray:
    """int64: the number of each, of new ones the next; -1 after them."""
    return np.array([*(numbers.setdefault(text, len(numbers)) for text in texts), -1], np.int64)


def _numbered(numbers: dict[str, int], column: Any) -> np.ndarray:
    """The same for a column of a table, -1 where it has none."""
    encoded = column.dictionary_encode()
    return _known(numbers, encoded.dictionary.to_pylist())[
        np.asarray(encoded.indices.fill_null(-1), np.int64)
    ]


def _is_absent(uri: str) -> bool:
    """Whether `_connect` would make an empty folder."""
    return "://" not in uri and not Path(uri).expanduser().exists()


def _connect(uri: str) -> Any:
    try:
        import lancedb
    except ImportError:
        raise RetrievalError(
            "LanceDB is missing: pip install 'matryoshka-vision[lancedb]'"
        ) from None
    try:
        return lancedb.connect(uri)
    except (FileExistsError, NotADirectoryError):
        raise RetrievalError(f"{uri}: is a file, or in one; --lancedb takes a folder") from None


def _opened(database: Any, name: str) -> Any:
    """None where there is no such table."""
    try:
        return database.open_table(name)
    except ValueError:
        return None


def _class(classes: list[str] | None, label: int) -> str | None:
    return classes[label] if classes and 0 <= label < len(classes) else None


def _path(source: Mapping[str, Any]) -> str:
    return str(source.get("path", ""))


def _same(index: Index, numbers: _Numbers, rows: np.ndarray, found: _Found) -> np.ndarray:
    """bool [n]: whether a row (-1: none) of the index is what was found, its vector bit by bit."""
    same = np.zeros(len(rows), bool)
    for part, (classes, sources) in zip(index.parts, numbers.parts, strict=True):
        mine = np.flatnonzero((rows >= part.first) & (rows < part.first + part.count))
        at, last = rows[mine] - part.first, len(classes) - 1
        label, origin = part.labels[at], part.origins[at]
        named = (label >= 0) & (label < last)
        unnamed = np.where(label < 0, label, label - last)  # see Record._batch
        same[mine] = (
            (part.rows[at].view(np.uint16) == found.rows[mine].view(np.uint16)).all(1)
            & (classes[np.where(named, label, last)] == found.classes[mine])
            & (named | (unnamed == found.labels[mine]))
            & (sources[np.minimum(origin[:, 0], len(sources) - 1)] == found.sources[mine])
            & (origin[:, 1] == found.items[mine])
        )
    return same


def _some(block: _Found, rows: np.ndarray) -> _Found:
    return _Found(
        [block.names[i] for i in rows.tolist()],
        block.labels[rows],
        block.classes[rows],
        block.sources[rows],
        block.items[rows],
        block.rows[:0],
    )
