"""A LanceDB table as the system of record of an index: edit and filter it, search the index.

    record = Record.create("photos.lance", "photos", batch)      # columns: see COLUMNS
    record.table.add_columns({"licence": "'CC0'"})               # any edit of LanceDB
    record.sync("photos.index")                                  # the index follows
    index.search(queries, k=10, only=index.find(record.names("licence = 'CC0'")))

Needs the extra [lancedb]. LanceDB searches 1.28 million rows at 100 to 300 queries/s on two cores,
the index at thousands: docs/retrieval.md.
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
from matryoshka.retrieval.store_writer import IndexRows, Writer, to_float16

BATCH_ROWS = 4096  # 16 MB of 2048 float16
METADATA_KEY = b"matryoshka"  # in the table's schema: model, preprocessing and data sets
COLUMNS = ["id", "label", "class", "source", "item", "vector"]


class Change(NamedTuple):
    """Rows that `sync` added, replaced and deleted."""

    added: int
    replaced: int
    deleted: int


class _Block(NamedTuple):
    """Rows of the table. classes, sources: int64, numbers of `_Numbers`, -1 where absent."""

    names: list[str]
    labels: np.ndarray
    classes: np.ndarray
    sources: np.ndarray
    items: np.ndarray
    rows: np.ndarray


class Record:
    """A table that `create` made.

    table: LanceDB's own object. model, preprocessing, data: as embed wrote them.
    """

    def __init__(self, uri: str, name: str) -> None:
        """RetrievalError for a table that does not exist, or that `create` did not make."""
        self.uri = uri
        self.name = name
        self.table: Any = None if _is_absent(uri) else _opened(_connect(uri), name)
        if self.table is None:
            raise RetrievalError(
                f"{uri}: has no table {name!r}; `matryoshka index record` makes one"
            )
        metadata = json.loads((self.table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
        missing = [column for column in COLUMNS if column not in self.table.schema.names]
        if "model" not in metadata or missing:
            lacks = "does not name the model of its vectors"
            if missing:
                lacks = f"has no column {missing[0]!r}"
            raise RetrievalError(
                f"{uri}: table {name!r} {lacks}; make it with `matryoshka index record`"
            )
        self.model: dict[str, Any] = metadata["model"]
        self.preprocessing: dict[str, Any] = metadata["preprocessing"]
        self.data: list[dict[str, Any]] = metadata.get("data", [])  # absent in older tables

    @classmethod
    def create(cls, uri: str, name: str, batch: IndexRows, overwrite: bool = False) -> Record:
        """Write rows as a table, vectors as float16, as in the index.

        RetrievalError if the table exists and `overwrite` is false.
        """
        import pyarrow as pa

        database = _connect(uri)
        columns = batch.rows.shape[1]
        present = _opened(database, name) is not None
        if present and not overwrite:
            raise RetrievalError(f"{uri}: already has a table {name!r}; --overwrite replaces it")
        data = [dict(source) for source in batch.data]
        metadata = {
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
            list(zip(COLUMNS, types, strict=True)),
            metadata={METADATA_KEY: json.dumps(metadata).encode()},
        )
        sources = [_path(source) for source in data] or [""]

        # Block by block: the table may be larger than memory.
        def blocks() -> Iterator[Any]:
            for first in range(0, len(batch.rows), BATCH_ROWS):
                last = min(first + BATCH_ROWS, len(batch.rows))
                labels = np.asarray(batch.labels[first:last])
                if batch.origins is None:
                    numbers = np.arange(first, last)
                    origins = np.stack([np.zeros_like(numbers), numbers], 1)
                else:
                    origins = batch.origins[first:last].astype(np.int64)
                flat = pa.array(to_float16(batch.rows[first:last]).reshape(-1))
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

        # LanceDB warns about an overwrite of a table that does not exist.
        mode = "overwrite" if present else "create"
        database.create_table(name, pa.RecordBatchReader.from_batches(schema, blocks()), mode=mode)
        return cls(uri, name)

    def names(self, condition: str) -> list[str]:
        """Names of the rows that an SQL filter selects. RetrievalError for an invalid filter."""
        try:
            batches = self.table.search().where(condition).select(["id"]).to_batches()
            return [name for block in batches for name in block["id"].to_pylist()]
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise RetrievalError(
                f"{self.uri}: table {self.name!r}: filter {condition!r}: {reason}"
            ) from None

    def sync(self, folder: str | Path, num_threads: int = 0, dim: int = 0) -> Change:
        """Make the index equal to the table; builds it if the folder has none.

        A row is replaced if a bit of its vector, its class (without one: its label), its source or
        its item differs. After a kill, the next call completes the work.
        """
        with Writer(folder, num_threads) as writer:
            index = Index(folder, num_threads) if (Path(folder) / MANIFEST).exists() else None
            if index is not None:
                index.check_model(self.model["weights_sha256"], f"{self.uri} {self.name!r}")
            numbers = _Numbers(index)
            seen = np.zeros(0 if index is None else index.total, bool)
            replaced = 0
            # Changed vectors go through a file: all of a large table may differ. In the index's
            # folder, because /tmp may be in memory.
            with tempfile.TemporaryFile(dir=folder) as file:
                kept: list[_Block] = []
                for block in self._blocks(numbers):
                    changed = np.ones(len(block.names), bool)
                    if index is not None:
                        stored = index.find(block.names)
                        seen[stored[stored >= 0]] = True
                        changed = ~_same(index, numbers, stored, block)
                        replaced += int((changed & (stored >= 0)).sum())
                    rows = np.flatnonzero(changed)
                    file.write(block.rows[rows].tobytes())
                    kept.append(_select(block, rows))
                file.flush()
                count = sum(len(block.names) for block in kept)
                if count:
                    rows = np.memmap(file, np.float16, "r", shape=(count, kept[0].rows.shape[1]))
                    batch = self._batch(kept, rows.view(np.ndarray), numbers)
                    is_new = index is None
                    index = None  # closes its files before the writer opens the next index
                    index = writer.build(batch, dim) if is_new else writer.add(batch, replace=True)
            if index is None:
                raise RetrievalError(
                    f"{self.uri}: table {self.name!r} is empty; an index needs rows"
                )
            # Rows of the index that the table no longer has.
            unseen = np.flatnonzero(~seen)
            unseen = unseen[~index.is_deleted(unseen)]
            names = [index.name(int(row)) for row in unseen]
            index = None
            if names:
                writer.delete(names)
            return Change(count - replaced, replaced, len(names))

    def _blocks(self, numbers: _Numbers) -> Iterator[_Block]:
        """The table's rows, BATCH_ROWS at a time. RetrievalError for items beyond 32 bits."""
        # Rows that other tools added may lack values: null becomes -1, "" or 0.
        for block in self.table.search().select(COLUMNS).to_batches(batch_size=BATCH_ROWS):
            vectors = block["vector"]
            items = np.asarray(block["item"].fill_null(0), np.int64)
            rows = np.asarray(vectors.flatten(), np.float16).reshape(
                len(block), vectors.type.list_size
            )
            if len(items) and not 0 <= items.min() <= items.max() < 1 << 32:
                raise RetrievalError(
                    f"{self.uri}: table {self.name!r} has items outside 0 to 2^32 - 1; give the "
                    "number of each image in its source, or 0"
                )
            yield _Block(
                names=block["id"].to_pylist(),
                labels=np.asarray(block["label"].fill_null(-1), np.int64),
                classes=_numbered(numbers.classes, block["class"]),
                sources=_numbered(numbers.sources, block["source"].fill_null("")),
                items=items,
                rows=to_float16(rows),
            )

    def _batch(self, kept: Sequence[_Block], rows: np.ndarray, numbers: _Numbers) -> IndexRows:
        """Changed rows as a new part of the index."""
        labels = np.concatenate([block.labels for block in kept])
        classes = np.concatenate([block.classes for block in kept])
        sources = np.concatenate([block.sources for block in kept])
        items = np.concatenate([block.items for block in kept])
        named = np.unique(classes[classes >= 0])
        used = np.unique(sources)
        # Labels of this part: its named classes, then labels without a name, as in merge_classes.
        unnamed = np.where(labels < 0, labels, labels + len(named))
        labels = np.where(classes >= 0, np.searchsorted(named, classes), unnamed)
        texts = list(numbers.classes)
        paths = list(numbers.sources)
        known = {_path(source): source for source in self.data}
        data = []
        for i in used:
            path = paths[i]
            data.append(known.get(path, {"path": path} if path else {}))
        return IndexRows(
            rows,
            [name for block in kept for name in block.names],
            labels,
            self.model,
            self.preprocessing,
            classes=[texts[i] for i in named] or None,
            data=data,
            origins=np.stack([np.searchsorted(used, sources), items], 1).astype(np.uint32),
        )


class _Numbers:
    """Numbers class names and sources of index and table alike, so that rows compare as integers.

    parts: for each part of the index, the numbers of its classes and of its sources, each followed
    by -1, the number of unknown ones.
    """

    def __init__(self, index: Index | None) -> None:
        self.classes: dict[str, int] = {}
        self.sources: dict[str, int] = {}
        self.parts = [
            (_known(self.classes, part.classes or ()), _known(self.sources, map(_path, part.data)))
            for part in (index.parts if index is not None else ())
        ]


def _known(numbers: dict[str, int], texts: Iterable[str]) -> np.ndarray:
    """The number of each text, int64, followed by -1; new texts get the next numbers."""
    found = [numbers.setdefault(text, len(numbers)) for text in texts]
    return np.array([*found, -1], np.int64)


def _numbered(numbers: dict[str, int], column: Any) -> np.ndarray:
    """The number of each text of a column, int64; -1 where it is null."""
    encoded = column.dictionary_encode()
    return _known(numbers, encoded.dictionary.to_pylist())[
        np.asarray(encoded.indices.fill_null(-1), np.int64)
    ]


def _is_absent(uri: str) -> bool:
    """Whether `_connect` would create an empty folder."""
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
    """The table; None if it does not exist."""
    try:
        return database.open_table(name)
    except ValueError:
        return None


def _class(classes: list[str] | None, label: int) -> str | None:
    return classes[label] if classes and 0 <= label < len(classes) else None


def _path(source: Mapping[str, Any]) -> str:
    return str(source.get("path", ""))


def _same(index: Index, numbers: _Numbers, rows: np.ndarray, block: _Block) -> np.ndarray:
    """Whether rows of the index (-1: unknown) equal the block's, bool [n]; vectors bit by bit."""
    same = np.zeros(len(rows), bool)
    for part, (classes, sources) in zip(index.parts, numbers.parts, strict=True):
        inside = np.flatnonzero((rows >= part.first) & (rows < part.first + part.count))
        at = rows[inside] - part.first
        last = len(classes) - 1
        label = part.labels[at]
        origin = part.origins[at]
        named = (label >= 0) & (label < last)
        unnamed = np.where(label < 0, label, label - last)  # see Record._batch
        # Vectors as bits, because NaN would differ from itself and be replaced at every sync.
        same[inside] = (
            (part.rows[at].view(np.uint16) == block.rows[inside].view(np.uint16)).all(1)
            & (classes[np.where(named, label, last)] == block.classes[inside])
            & (named | (unnamed == block.labels[inside]))
            & (sources[np.minimum(origin[:, 0], len(sources) - 1)] == block.sources[inside])
            & (origin[:, 1] == block.items[inside])
        )
        part.check_files()
    return same


def _select(block: _Block, rows: np.ndarray) -> _Block:
    """Some rows of a block, without their vectors."""
    return _Block(
        names=[block.names[i] for i in rows.tolist()],
        labels=block.labels[rows],
        classes=block.classes[rows],
        sources=block.sources[rows],
        items=block.items[rows],
        rows=block.rows[:0],
    )
