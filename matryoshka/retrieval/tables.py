"""What a search is made of: embeddings, an index, or bare arrays, with labels that mean the same on
both sides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from matryoshka.embeddings.reading import META, Classes, Embeddings, matched_labels, open_embeddings
from matryoshka.retrieval.exact import exact_search
from matryoshka.retrieval.hits import RetrievalError
from matryoshka.retrieval.pipeline import Setting
from matryoshka.retrieval.store import MANIFEST, Index, joined_classes

LAST_OF_HALF = 2048  # from which on float16 merges neighbouring integers: upstream's labels


@dataclass(frozen=True)
class Table:
    """rows: float [N, D], empty of an index; labels: int64 [N] or None. weights: which model made
    them, or None.
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

    def exact(self, queries: np.ndarray, k: int) -> np.ndarray:
        """int64 [Q, k]: the neighbours by all dimensions."""
        if self.index is not None:
            return self.index.search(queries, k, Setting("exact", self.columns, k)).ids
        return exact_search(self.rows, queries, self.columns, k).ids


def open_table(path: str, num_threads: int = 0) -> Table:
    """Embeddings, an index, or an array. RetrievalError or EmbeddingError, one line, for anything
    else.
    """
    place = Path(path)
    if (place / MANIFEST).is_file():
        index = Index(place, num_threads)
        everything = np.arange(index.total)
        classes, labels = joined_classes(index, everything)
        labels = np.where(index.is_deleted(everything), -1, labels)
        known = [source.get("num_classes", 0) for part in index.parts for source in part.data]
        count = len(classes) if classes else max([*known, int(labels.max()) + 1])
        return Table(
            place,
            np.empty((0, index.columns), np.float32),
            labels,
            classes,
            index.model["weights_sha256"],
            count,
            index=index,
        )
    if place.suffix == ".npy":
        return _arrays(place)
    if not place.is_dir() or not (place / META).is_file():
        open_embeddings(place)  # says what is wrong
    found = open_embeddings(place)
    about = found.meta
    return Table(
        place,
        found.X,
        np.asarray(found.y),
        found.classes,
        about["model"]["weights_sha256"],
        about["data"]["num_classes"],
        found,
    )


def _arrays(path: Path) -> Table:
    rows = _read(path)
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise RetrievalError(
            f"{path}: is {rows.dtype} {list(rows.shape)}, expected floating point [rows, "
            "dimensions]"
        )
    if (
        rows.dtype not in (np.float16, np.float32) or rows.strides[1] != rows.itemsize
    ):  # or in Fortran's order
        rows = np.ascontiguousarray(rows, np.float16 if rows.dtype == np.float16 else np.float32)
    labels = None
    beside = path.with_name(path.name.removesuffix("-X.npy") + "-y.npy")
    if path.name.endswith("-X.npy") and beside.exists():
        stored = _read(beside).reshape(-1)
        labels = stored.astype(np.int64)
        if len(labels) != len(rows) or not np.array_equal(labels, stored):
            raise RetrievalError(
                f"{beside}: {stored.dtype} {list(stored.shape)} are no labels of {len(rows)} rows"
            )
        if stored.dtype == np.float16 and len(labels) and labels.max() >= LAST_OF_HALF:
            raise RetrievalError(
                f"{beside}: are float16 up to {labels.max()}, which cannot tell classes above "
                f"{LAST_OF_HALF} apart; "
                "make the arrays again with pytorch_inference.py --retrieval"
            )
    return Table(path, rows, labels, None, None)


def _read(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, "r")
    except OSError as error:
        raise RetrievalError(f"{path}: {error.strerror or error}") from None
    except Exception:  # of a damaged header numpy's parser raises many types
        raise RetrievalError(f"{path}: is not a whole .npy file") from None


def open_pair(database: Table, queries: Table) -> tuple[Table, Table]:
    """Both, with the queries' labels as the database's numbers. RetrievalError where they do not go
    together.
    """
    if queries.index is not None:
        raise RetrievalError(f"{queries.path}: is an index; --queries needs embeddings")
    for table in (database, queries):
        if not len(table):
            raise RetrievalError(f"{table.path}: has no rows")
    if database.columns != queries.columns:
        raise RetrievalError(
            f"{queries.path}: has {queries.columns} dimensions, {database.path} "
            f"{database.columns}; embed both alike"
        )
    if database.weights and queries.weights and database.weights != queries.weights:
        raise RetrievalError(
            f"{queries.path}: is of another model (weights {queries.weights[:12]}) than "
            f"{database.path} "
            f"({database.weights[:12]}); embed both with the same"
        )
    if (
        database.weights and queries.weights and queries.labels is not None
    ):  # neither is a bare array
        own, theirs = (
            Classes(table.path, table.classes, table.num_classes) for table in (queries, database)
        )
        queries = replace(queries, labels=matched_labels(queries.labels, own, theirs))
    return database, queries


def notes(database: Table, queries: Table) -> list[str]:
    """What may surprise in the numbers of a pair."""
    found = []
    if queries.embeddings is not None:
        about = queries.embeddings.meta
        prepared, itself = about.get("preprocessing"), False
        if database.index is not None:
            other = database.index.preprocessing
            itself = bool((database.index.find(queries.embeddings.ids[:50]) >= 0).any())
        elif database.embeddings is not None:
            other = database.embeddings.meta.get("preprocessing")
            one, two = (
                about["data"].get("fingerprint"),
                database.embeddings.meta["data"].get("fingerprint"),
            )
            itself = one is not None and one == two
        else:
            other = prepared
        if prepared != other:
            found.append(
                f"images of {queries.path} were prepared otherwise ({prepared}) than the "
                f"database's ({other})"
            )
        if itself:
            found.append(
                "queries are rows of the database, too: each finds itself, accuracies are not of "
                "new images"
            )
    return found
