"""Search inputs on disk: embeddings, an index or bare arrays, with labels matched by class name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.arrays import as_float32
from matryoshka.embeddings.reading import META, Classes, Embeddings, matched_labels, open_embeddings
from matryoshka.files import check_regular
from matryoshka.retrieval.exact import exact_search
from matryoshka.retrieval.hits import RetrievalError
from matryoshka.retrieval.params import SearchParams
from matryoshka.retrieval.pipeline import Engine, Searcher
from matryoshka.retrieval.store import MANIFEST, Index, merge_classes

MAX_EXACT_FLOAT16 = 2048  # float16 merges larger neighbouring integers; upstream's labels
TRUTH_BATCH = 4000  # queries of an exact search: each pass converts all rows; 260 MB of scores


@dataclass(frozen=True)
class Table:
    """One side of a search, database or queries.

    rows: float [N, D], empty for an index. labels: int64 [N] or None. weights: hash of the model
    that made the rows, None if unknown.
    """

    path: Path
    rows: np.ndarray
    labels: np.ndarray | None
    classes: list[str] | None
    weights: str | None
    num_classes: int = 0
    embeddings: Embeddings | None = None
    index: Index | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.index is None else len(self.index)

    @property
    def columns(self) -> int:
        return self.rows.shape[1] if self.index is None else self.index.columns

    @property
    def model(self) -> dict[str, Any]:
        """The entry `model` of meta.json; empty for bare arrays."""
        if self.index is not None:
            return self.index.model
        return {} if self.embeddings is None else self.embeddings.meta["model"]

    @property
    def adapter(self) -> dict[str, Any] | None:
        """What is known about the adapter that the rows are behind; None without one."""
        return self.model.get("adapter")

    @property
    def encoder(self) -> str | None:
        """Hash of the encoder before the adapter."""
        return self.model.get("encoder_sha256")

    def exact(self, queries: np.ndarray, k: int) -> np.ndarray:
        """The nearest neighbours by all dimensions, int64 [Q, k]."""
        if self.index is not None:
            return self.index.search(queries, SearchParams("exact", self.columns, k)).ids
        return exact_search(self.rows, queries, self.columns, k).ids

    def engine(self, num_threads: int = 0, seed: int = 0) -> Engine:
        """The search engine of this table; an index gets its prefix caches. seed: of k-means."""
        if self.index is not None:
            self.index.warm()
            return self.index
        return Searcher(self.rows, num_threads, seed)


def open_table(path: str, num_threads: int = 0) -> Table:
    """Open embeddings, an index, or an array.

    Embeddings are read once, to compare them with their hashes. RetrievalError or EmbeddingError,
    one line, for anything else.
    """
    location = Path(path)
    if (location / MANIFEST).is_file():
        index = Index(location, num_threads)
        every_row = np.arange(index.total)
        classes, labels = merge_classes(index, every_row)
        # Deleted rows must not count among the relevant rows of a class.
        labels = np.where(index.is_deleted(every_row), -1, labels)
        index.check_files()
        known = [source.get("num_classes", 0) for part in index.parts for source in part.data]
        count = len(classes) if classes else max([*known, int(labels.max()) + 1])
        return Table(
            location,
            rows=np.empty((0, index.columns), np.float32),
            labels=known_labels(labels),
            classes=classes,
            weights=index.model["weights_sha256"],
            num_classes=count,
            index=index,
        )
    if location.suffix == ".npy":
        return _arrays(location)
    if not location.is_dir() or not (location / META).is_file():
        open_embeddings(location)  # raises an error that names the remedy
    embeddings = open_embeddings(location)
    embeddings.verify()
    return Table(
        location,
        rows=embeddings.X,
        labels=known_labels(np.asarray(embeddings.y)),
        classes=embeddings.classes,
        weights=embeddings.meta["model"]["weights_sha256"],
        num_classes=embeddings.meta["data"]["num_classes"],
        embeddings=embeddings,
    )


def known_labels(labels: np.ndarray) -> np.ndarray | None:
    """The labels; None if no row has one: images without classes have -1."""
    return labels if len(labels) and labels.max() >= 0 else None


def _arrays(path: Path) -> Table:
    """An array of rows, with labels from NAME-y.npy beside NAME-X.npy."""
    rows = _read(path)
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise RetrievalError(
            f"{path}: is {rows.dtype} {list(rows.shape)}, "
            "expected floating point [rows, dimensions]"
        )
    is_fortran_order = rows.strides[1] != rows.itemsize
    if rows.dtype not in (np.float16, np.float32) or is_fortran_order:
        # The native code reads consecutive float16 or float32.
        if rows.dtype == np.float16:
            rows = np.ascontiguousarray(rows)
        else:
            rows = np.ascontiguousarray(as_float32(rows))
    labels = None
    labels_file = path.with_name(path.name.removesuffix("-X.npy") + "-y.npy")
    if path.name.endswith("-X.npy") and labels_file.exists():
        stored = _read(labels_file).reshape(-1)
        labels = stored.astype(np.int64)
        if len(labels) != len(rows) or not np.array_equal(labels, stored):
            raise RetrievalError(
                f"{labels_file}: is {stored.dtype} {list(stored.shape)}, expected integer labels "
                "of "
                f"{len(rows)} rows"
            )
        if stored.dtype == np.float16 and len(labels) and labels.max() >= MAX_EXACT_FLOAT16:
            raise RetrievalError(
                f"{labels_file}: float16 labels up to {labels.max()} cannot tell classes above "
                f"{MAX_EXACT_FLOAT16} apart; make the arrays again with pytorch_inference.py "
                "--retrieval"
            )
    return Table(path, rows, labels, None, None)


def _read(path: Path) -> np.ndarray:
    """Memory-map an .npy file, never a pickled one. RetrievalError."""
    try:
        check_regular(path)
        return np.lib.format.open_memmap(path, "r")
    except OSError as error:
        raise RetrievalError(f"{path}: {error.strerror or error}") from None
    except Exception:  # numpy's parser raises many types for damaged headers
        raise RetrievalError(f"{path}: is not a complete .npy file") from None


def open_pair(database: Table, queries: Table) -> tuple[Table, Table]:
    """Both tables, with the queries' labels converted to the database's numbers.

    RetrievalError if the tables do not fit together.
    """
    if queries.index is not None:
        raise RetrievalError(f"{queries.path}: is an index; --queries needs embeddings")
    for table in (database, queries):
        if not len(table):
            raise RetrievalError(f"{table.path}: has no rows")
    if database.columns != queries.columns:
        raise RetrievalError(
            f"{queries.path}: has {queries.columns} dimensions, {database.path} has "
            f"{database.columns}; embed both in the same way"
        )
    if database.weights and queries.weights and database.weights != queries.weights:
        for one, other in ((database, queries), (queries, database)):
            if one.adapter and one.encoder == other.weights:
                raise RetrievalError(
                    f"{other.path}: is not behind the adapter of {one.path}; add --adapter "
                    f"{one.adapter['file']}"
                )
        raise RetrievalError(
            f"{queries.path}: is of another model (weights {queries.weights[:12]}) than "
            f"{database.path} ({database.weights[:12]}); embed both with the same model"
        )
    # Bare arrays have no class names; their labels are compared as they are.
    if database.weights and queries.weights and queries.labels is not None:
        query_classes = Classes(queries.path, queries.classes, queries.num_classes)
        database_classes = Classes(database.path, database.classes, database.num_classes)
        labels = matched_labels(queries.labels, query_classes, database_classes)
        queries = replace(queries, labels=known_labels(labels))
    return database, queries


def notes(database: Table, queries: Table) -> list[str]:
    """Warnings about a pair: another preprocessing, queries that are in the database, and arrays of
    which nobody knows whether they are behind an adapter.
    """
    if queries.embeddings is None:
        if database.adapter:
            return [
                f"{database.path} is behind the adapter {database.adapter['file']}: the rows of "
                f"{queries.path} must be, too"
            ]
        return []
    metadata = queries.embeddings.meta
    if database.index is not None:
        preprocessing = database.index.preprocessing
        # By name, because an index may hold several data sets, or a part of one.
        is_same = bool((database.index.find(queries.embeddings.ids[:50]) >= 0).any())
    elif database.embeddings is not None:
        database_metadata = database.embeddings.meta
        preprocessing = database_metadata.get("preprocessing")
        fingerprint = metadata["data"].get("fingerprint")
        is_same = fingerprint is not None and fingerprint == database_metadata["data"].get(
            "fingerprint"
        )
    else:
        return []

    texts = []
    if metadata.get("preprocessing") != preprocessing:
        texts.append(
            f"the images of {queries.path} have another preprocessing "
            f"({metadata.get('preprocessing')}) than the database's ({preprocessing})"
        )
    if is_same:
        texts.append(
            "the database contains the queries: each finds itself, and accuracies are not those "
            "of new images"
        )
    return texts


def exact_neighbours(
    database: Table, queries: Table, *, count: int, k: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`count` random queries, float32 [T, D], and their exact neighbours, int64 [T, k].

    RetrievalError if no query has a neighbour.
    """
    count = min(count, len(queries))
    k = min(k, len(database))
    # Sorted: a memory map is read faster in the order of the file.
    rows = np.sort(np.random.default_rng(seed).permutation(len(queries))[:count])
    sample = np.asarray(queries.rows[rows], np.float32)
    exact = np.empty((count, k), np.int64)
    for first in range(0, count, TRUTH_BATCH):
        part = slice(first, first + TRUTH_BATCH)
        exact[part] = database.exact(sample[part], k)
    if count and (exact < 0).all():
        raise RetrievalError(
            f"{database.path}, {queries.path}: one of them has NaN or infinity in every row"
        )
    return sample, exact
