"""Answers of the search page, without HTTP: an index that may change, a model, recent queries."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from matryoshka.data.reader import printable
from matryoshka.evaluation.embedding_map import EmbeddingMap, read_map
from matryoshka.retrieval import RetrievalError
from matryoshka.retrieval.store import Index
from matryoshka.search_page.classes import ClassRows, shown_class
from matryoshka.search_page.comparison import (
    MAX_NEIGHBOURS,
    NEIGHBOURS,
    Choice,
    Column,
    Comparison,
    recall,
)
from matryoshka.search_page.pictures import Pictures, Refusal

MAX_QUERIES = 256  # uploads whose embeddings are kept: at most 8 kB each
MAX_TRUTHS = 64  # queries whose exact neighbours are kept, for the sliders
MAX_PREDICTIONS = 256  # rows whose predicted classes are kept
T = TypeVar("T")
log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """An index as of one moment; version: a hash of its manifest."""

    index: Index
    comparison: Comparison
    version: str
    classes: ClassRows
    # Whether exact search is so fast that the page needs no other.
    exact_only: bool
    map: EmbeddingMap | None


class Wanted(NamedTuple):
    """What a search request asks for.

    Either `row`, or `query`, the key of an upload. k: neighbours. classes: shown names, a filter;
    () for all. choice: of the fast search, None for the index's own.
    """

    row: int | None = None
    query: str | None = None
    k: int = NEIGHBOURS
    classes: tuple[str, ...] = ()
    choice: Choice | None = None


class Predicted(NamedTuple):
    """A class by the model's own head, and its probability."""

    name: str
    probability: float


class Upload(NamedTuple):
    """The embedding of an uploaded image, float32 [D], and its most probable classes."""

    vector: np.ndarray
    predicted: list[Predicted]


class RecentlyUsed(Generic[T]):
    """LRU cache of `most` values. Not thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept = OrderedDict[Any, T]()

    def get(self, key: Any) -> T | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Any, value: T) -> None:
        self._kept[key] = value
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)


class Service:
    """Thread-safe answers; every method may raise Refusal.

    encode: pixels, uint8 [H, W, 3] of any size -> embedding, float [D], by the model and adapter
    with these weights (embeddings.embedding_sha256). classify: such an embedding -> (class,
    probability) of the most probable classes, best first; None for a model without class names.
    RetrievalError for an index of another model.
    """

    def __init__(
        self,
        index: Index,
        encode: Callable[[np.ndarray], np.ndarray],
        weights_sha256: str,
        pictures: Pictures,
        *,
        classify: Callable[[np.ndarray], Sequence[tuple[str, float]]] | None = None,
    ) -> None:
        self._encode = encode
        self._classify = classify
        self._weights = weights_sha256
        self._pictures = pictures
        self._opened = self._use(index)
        self._queries = RecentlyUsed[Upload](MAX_QUERIES)
        self._truths = RecentlyUsed[list[Column]](MAX_TRUTHS)
        self._predictions = RecentlyUsed[list[Predicted]](MAX_PREDICTIONS)
        # Separate locks: a slow search must not hold up uploads, nor an upload other queries.
        self._open_lock = threading.Lock()
        self._query_lock = threading.Lock()
        self._search_lock = threading.Lock()
        self._encode_lock = threading.Lock()

    def _use(self, index: Index) -> Opened:
        """Check and prepare an index for searches."""
        index.check_model(self._weights, "the model")
        index.warm()
        manifest = json.dumps(index.manifest, sort_keys=True).encode()
        version = hashlib.sha256(manifest).hexdigest()[:12]
        comparison = Comparison(index)
        exact_only = not comparison.needs_fast_search()
        classes = ClassRows(index)
        index.check_files()
        return Opened(index, comparison, version, classes, exact_only, read_map(index))

    def current(self) -> Opened:
        """The current index; opens it again if it has changed on disk."""
        opened = self._opened
        if opened.index.is_current():
            return opened
        # One of the waiting requests opens the index; the others find it opened.
        with self._open_lock:
            if self._opened is opened:
                try:
                    self._opened = self._use(Index(opened.index.path, opened.index.num_threads))
                except RetrievalError as error:
                    log.error("%s", error)
                    raise Refusal(
                        503, "the index has changed and cannot be opened; see the server's output"
                    ) from None
            return self._opened

    def index_info(self) -> dict[str, Any]:
        """Size, model, default search and sliders: the first request of the page."""
        opened = self.current()
        index, comparison = opened.index, opened.comparison
        own = comparison.default
        return {
            "version": opened.version,
            "name": printable(_title(index.path.resolve())),
            "rows": len(index),
            "columns": index.columns,
            "dims": comparison.dims,
            "neighbours": NEIGHBOURS,
            "most_neighbours": MAX_NEIGHBOURS,
            "classes": len(opened.classes.names),
            "map": None if opened.map is None else opened.map.dims,
            "predicts": self._classify is not None,
            "exact_only": opened.exact_only,
            "model": {key: printable(str(index.model.get(key) or "")) for key in ("arch", "head")},
            "setting": str(comparison.params(own)),
            "certificate": _recall(index),
            "shortlist": {
                "dim": index.dim,
                "low": NEIGHBOURS,
                "high": comparison.longest,
                "default": own.shortlist,
            },
            "nprobe": {"high": comparison.lists, "default": own.nprobe},
            "rerank": {"dims": comparison.rerank_dims, "default": own.rerank},
            "pictures": None in self.missing_pictures(index).values(),
        }

    def missing_pictures(self, index: Index | None = None) -> dict[str, str | None]:
        """The path of each data set of the index, and why it has no pictures; None if it has.

        Several parts may name the same data set; it has pictures if one of them can be used.
        """
        index = index or self._opened.index
        reasons = dict[str, str | None]()
        for part in index.parts:
            for source in part.data:
                path = self._pictures.path_of(source)
                try:
                    self._pictures.open(source)
                    reasons[path] = None
                except Refusal as error:
                    reasons.setdefault(path, str(error))
        return reasons

    def random_row(self) -> int:
        """A random row that is not deleted."""
        opened = self.current()
        index, comparison = opened.index, opened.comparison
        if not len(index):
            raise Refusal(404, "all rows of the index are deleted")
        return comparison.live_row(secrets.randbelow(len(index)))

    def class_sizes(self) -> list[dict[str, Any]]:
        """Name and number of rows of each class, by name; [] if the index names no classes."""
        opened = self.current()
        return [
            {"name": name, "rows": len(opened.classes.rows_of((name,)))}
            for name in opened.classes.names
        ]

    def add_query(self, data: bytes) -> str:
        """Embed an image file; returns the key of the query."""
        sources = [source for part in self.current().index.parts for source in part.data]
        # A photo of a phone must be turned as the photos it is compared with.
        exif_rotate = all(self._pictures.are_upright(source) for source in sources)
        with self._pictures.upload(data, exif_rotate) as pixels:
            upload = self._embed(pixels)
        # Random, so that nobody can guess the key of another visitor's upload.
        key = secrets.token_urlsafe(12)
        with self._query_lock:
            self._queries.put(key, upload)
        return key

    def _embed(self, pixels: np.ndarray) -> Upload:
        """An image's embedding and predicted classes. Refusal if they are not finite."""
        predicted = list[Predicted]()
        with self._encode_lock:
            vector = np.asarray(self._encode(pixels), np.float32)
            if not np.isfinite(vector).all():
                raise Refusal(400, "the model's embedding of this picture is not finite")
            if self._classify is not None:
                predicted = [
                    Predicted(shown_class(name), round(float(probability), 4))
                    for name, probability in self._classify(vector)
                ]
        return Upload(vector, predicted)

    def prediction(self, row: int | None, query: str | None) -> list[dict[str, Any]]:
        """The most probable classes of a query by the model's head; [] without class names.

        That of a row needs its picture: an index has prefixes of embeddings, in part normalised.
        """
        if (row is None) == (query is None):
            raise Refusal(400, "expected either row or query")
        if self._classify is None:
            return []
        if row is None:
            found = self._upload(query).predicted
        else:
            opened = self.current()
            self._check_row(opened.index, row)
            key = opened.version, row
            with self._query_lock:
                found = self._predictions.get(key)
            if found is None:
                source, number = opened.index.origin(row)
                name = opened.index.name(row)
                with self._pictures.pixels(source, number, name) as pixels:
                    found = self._embed(pixels).predicted
                with self._query_lock:
                    self._predictions.put(key, found)
        return [{"class": name, "probability": probability} for name, probability in found]

    def neighbours(self, wanted: Wanted) -> dict[str, Any]:
        """Exact neighbours at each prefix, and those of the fast search."""
        opened = self.current()
        vector, truth = self._truth(opened, wanted)
        widest = truth[-1]
        query = {} if wanted.row is None else self._shown(opened.index, wanted.row)
        expected = self._expected_class(opened, wanted)
        return {
            "query": query,
            "expected_class": expected,
            "columns": [
                {
                    "dim": column.dim,
                    "ms": _ms(column.seconds),
                    **self._hits(opened.index, column, widest, expected),
                    "map": self._places(opened, column, vector, wanted.row),
                }
                for column in truth
            ],
            **self._adaptive(opened, vector, truth, wanted),
        }

    def adaptive(self, wanted: Wanted) -> dict[str, Any]:
        """The fast search of `neighbours` alone."""
        opened = self.current()
        vector, truth = self._truth(opened, wanted)
        return self._adaptive(opened, vector, truth, wanted)

    def map_points(self, dim: int) -> dict[str, Any]:
        """Points of the map of a prefix, without deleted rows, as lists of equal length.

        class: numbers in `classes`, -1 without a class.
        """
        opened = self.current()
        if opened.map is None or dim not in opened.map.dims:
            raise Refusal(404, "the index has no map of this prefix")
        index = opened.index
        kept = ~index.is_deleted(opened.map.rows)
        rows = opened.map.rows[kept].tolist()
        points = opened.map.points[opened.map.dims.index(dim)][kept]
        shown = [self._shown(index, row) for row in rows]
        numbers = {name: number for number, name in enumerate(opened.classes.names)}
        return {
            "version": opened.version,
            "method": opened.map.method,
            "rows": rows,
            "names": [one["name"] for one in shown],
            "classes": opened.classes.names,
            "class": [numbers.get(one["class"], -1) for one in shown],
            "points": [_rounded(point) for point in points],
        }

    def _places(
        self, opened: Opened, column: Column, vector: np.ndarray, row: int | None
    ) -> dict[str, Any] | None:
        """Places of a query and its neighbours on the map of a prefix; null where unknown."""
        made = opened.map
        if made is None or column.dim not in made.dims:
            return None
        ids = np.array([-1 if row is None else row, *column.ids.tolist()])
        if len(made.axes):
            vectors = [vector, *(opened.index.vector(hit) for hit in column.ids.tolist())]
            places = made.place(column.dim, np.stack(vectors))
        elif len(made.rows):
            at = np.minimum(np.searchsorted(made.rows, ids), len(made.rows) - 1)
            places = made.points[made.dims.index(column.dim)][at]
            places = np.where((made.rows[at] == ids)[:, None], places, np.nan)
        else:
            return None
        query, *hits = [_rounded(place) for place in places]
        return {"query": query, "hits": hits}

    def picture(self, row: int, size: int, version: str | None) -> bytes:
        """JPEG of at most size x size. version: of the index that the row number is from."""
        opened = self.current()
        index = opened.index
        if version is not None and version != opened.version:
            raise Refusal(404, "the index has changed, and with it its row numbers")
        self._check_row(index, row)
        source, number = index.origin(row)
        return self._pictures.jpeg(source, number, index.name(row), size)

    def _adaptive(
        self, opened: Opened, vector: np.ndarray, truth: list[Column], wanted: Wanted
    ) -> dict[str, Any]:
        """The fast search and its comparison with the exact one, as JSON."""
        index, comparison = opened.index, opened.comparison
        choice = comparison.clipped(wanted.choice or comparison.default, wanted.k)
        with self._search_lock:
            found = comparison.adaptive(
                vector,
                choice,
                -1 if wanted.row is None else wanted.row,
                k=wanted.k,
                only=opened.classes.filter(wanted.classes),
            )
        exact = truth[-1]
        return {
            "version": opened.version,
            "adaptive": {
                "setting": str(comparison.params(choice, wanted.k)),
                **choice._asdict(),
                "recall": recall(found, exact),
                "ms": _ms(found.seconds),
                "exact_ms": _ms(exact.seconds),
                "ratio": exact.seconds / max(found.seconds, 1e-9),
                **self._hits(index, found, exact, self._expected_class(opened, wanted)),
            },
        }

    def _truth(self, opened: Opened, wanted: Wanted) -> tuple[np.ndarray, list[Column]]:
        """The query, float32 [D], and its exact neighbours; a row does not find itself."""
        index, comparison = opened.index, opened.comparison
        row = wanted.row
        if (row is None) == (wanted.query is None):
            raise Refusal(400, "expected either row or query")
        if row is not None:
            self._check_row(index, row)
            vector = index.vector(row)
            if not np.isfinite(vector).all():
                raise Refusal(404, f"the embedding of row {row} is not finite")
        else:
            # An index of embeddings that were truncated (`embed --truncate-dim`) has fewer columns.
            uploaded = self._upload(wanted.query).vector
            vector = np.ascontiguousarray(uploaded[: index.columns])
        if not 1 <= wanted.k <= MAX_NEIGHBOURS:
            raise Refusal(400, f"k: expected 1 to {MAX_NEIGHBOURS}")
        only = opened.classes.filter(wanted.classes)
        key = opened.version, wanted._replace(choice=None)
        with self._search_lock:  # one at a time, so that the times are comparable
            truth = self._truths.get(key)
            if truth is None:
                truth = comparison.exact(vector, -1 if row is None else row, k=wanted.k, only=only)
                self._truths.put(key, truth)
        return vector, truth

    def _upload(self, key: str | None) -> Upload:
        with self._query_lock:
            found = self._queries.get(key)
        if found is None:
            raise Refusal(404, "this query has expired; choose the picture again")
        return found

    def _expected_class(self, opened: Opened, wanted: Wanted) -> str | None:
        """The class that neighbours should have: the row's own, or the predicted one of an upload.

        None if it is unknown, or the index has no such class.
        """
        if wanted.row is not None:
            return self._shown(opened.index, wanted.row)["class"]
        predicted = self._upload(wanted.query).predicted
        if predicted and predicted[0].name in opened.classes.names:
            return predicted[0].name
        return None

    def _check_row(self, index: Index, row: int) -> None:
        if not 0 <= row < index.total or index.is_deleted(np.array([row]))[0]:
            raise Refusal(404, "the index does not have this row")

    def _hits(
        self, index: Index, column: Column, exact: Column, expected: str | None
    ) -> dict[str, Any]:
        """A column as JSON.

        "agrees": whether exact search by all dimensions finds the row. "same_class": whether it has
        the class of the query, null if that is unknown.
        """
        exact_rows = set(exact.ids.tolist())
        hits = []
        for row, cosine in zip(column.ids.tolist(), column.cosines, strict=True):
            shown = self._shown(index, row)
            hits.append(
                {
                    **shown,
                    "cosine": round(float(cosine), 4),
                    "agrees": row in exact_rows,
                    "same_class": None if expected is None else shown["class"] == expected,
                }
            )
        return {
            "agree": sum(hit["agrees"] for hit in hits),
            "of": len(exact_rows),
            "same_class": None if expected is None else sum(hit["same_class"] for hit in hits),
            "hits": hits,
        }

    def _shown(self, index: Index, row: int) -> dict[str, Any]:
        """Name and class of a row as JSON; names come from files and may hold anything."""
        class_name = index.class_name(row)
        return {
            "row": row,
            "name": printable(index.name(row)),
            "class": None if class_name is None else shown_class(class_name),
        }


def _recall(index: Index) -> str:
    """The certified recall of the default search; "" if it was never measured."""
    if index.certificate is None:
        return ""
    certificate, is_current = index.certificate
    if not is_current:
        return (
            "recall measured before the index changed: run `matryoshka retrieve --sweep --choose` "
            "again"
        )
    text = certificate.get("text")
    return f"recall {printable(str(text))}" if text else ""


def _rounded(point: np.ndarray) -> list[float] | None:
    """A point as JSON; null for NaN, which JSON does not have."""
    return [round(float(x), 5) for x in point] if np.isfinite(point).all() else None


def _ms(seconds: float) -> float:
    """Milliseconds with three digits."""
    return float(f"{1000 * seconds:.3g}")


def _title(path: Path) -> str:
    """The index's name; that of its folder for the `index` of a fit."""
    return path.parent.name if path.name == "index" and path.parent.name else path.name
