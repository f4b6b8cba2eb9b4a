"""Answers of the search page, without HTTP: an index that may change, a model, recent queries."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from matryoshka.data.reader import printable
from matryoshka.evaluation.superclasses import name_of
from matryoshka.retrieval import RetrievalError
from matryoshka.retrieval.store import Index
from matryoshka.search_page.comparison import NEIGHBOURS, Choice, Column, Comparison, recall
from matryoshka.search_page.pictures import Pictures, Refusal, read_upload

MAX_QUERIES = 256  # uploads whose embeddings are kept: at most 8 kB each
MAX_TRUTHS = 64  # queries whose exact neighbours are kept, for the sliders
WNID = re.compile(r"n\d{8}")
T = TypeVar("T")
log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """An index as of one moment; version: a hash of its manifest."""

    index: Index
    comparison: Comparison
    version: str


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

    encode: pixels, uint8 [H, W, 3] of any size -> embedding, float [D], by the model with these
    weights (embeddings.trunk_sha256). RetrievalError for an index of another model.
    """

    def __init__(
        self,
        index: Index,
        encode: Callable[[np.ndarray], np.ndarray],
        weights_sha256: str,
        pictures: Pictures,
    ) -> None:
        self._encode = encode
        self._weights = weights_sha256
        self._pictures = pictures
        self._opened = self._use(index)
        self._queries = RecentlyUsed[np.ndarray](MAX_QUERIES)
        self._truths = RecentlyUsed[list[Column]](MAX_TRUTHS)
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
        return Opened(index, Comparison(index), version)

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
        index, comparison, version = self.current()
        own = comparison.default
        names = {name for part in index.parts for name in part.classes or ()}
        return {
            "version": version,
            "name": printable(index.path.resolve().name),
            "rows": len(index),
            "columns": index.columns,
            "dims": comparison.dims,
            "neighbours": NEIGHBOURS,
            "classes": len(names),
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
        index, comparison, _ = self.current()
        if not len(index):
            raise Refusal(404, "all rows of the index are deleted")
        return comparison.live_row(secrets.randbelow(len(index)))

    def add_query(self, data: bytes) -> str:
        """Embed an image file; returns the key of the query."""
        pixels = read_upload(data)
        with self._encode_lock:
            vector = np.asarray(self._encode(pixels), np.float32)
        if not np.isfinite(vector).all():
            raise Refusal(400, "the model's embedding of this picture is not finite")
        # Random, so that nobody can guess the key of another visitor's upload.
        key = secrets.token_urlsafe(12)
        with self._query_lock:
            self._queries.put(key, vector)
        return key

    def neighbours(
        self, row: int | None, query: str | None, choice: Choice | None
    ) -> dict[str, Any]:
        """Exact neighbours at each prefix, and those of the fast search.

        Either `row`, or `query`, the key of an upload.
        """
        opened = self.current()
        vector, truth = self._truth(opened, row, query)
        widest = truth[-1]
        return {
            "query": self._shown(opened.index, row) if row is not None else {},
            "columns": [
                {
                    "dim": column.dim,
                    "ms": _ms(column.seconds),
                    **self._hits(opened.index, column, widest),
                }
                for column in truth
            ],
            **self._adaptive(opened, vector, truth, row=row, choice=choice),
        }

    def adaptive(self, row: int | None, query: str | None, choice: Choice | None) -> dict[str, Any]:
        """The fast search of `neighbours` alone."""
        opened = self.current()
        vector, truth = self._truth(opened, row, query)
        return self._adaptive(opened, vector, truth, row=row, choice=choice)

    def picture(self, row: int, size: int, version: str | None) -> bytes:
        """JPEG of at most size x size. version: of the index that the row number is from."""
        index, _, now = self.current()
        if version is not None and version != now:
            raise Refusal(404, "the index has changed, and with it its row numbers")
        self._check_row(index, row)
        source, number = index.origin(row)
        return self._pictures.jpeg(source, number, index.name(row), size)

    def _adaptive(
        self,
        opened: Opened,
        vector: np.ndarray,
        truth: list[Column],
        *,
        row: int | None,
        choice: Choice | None,
    ) -> dict[str, Any]:
        """The fast search and its comparison with the exact one, as JSON."""
        index, comparison, version = opened
        choice = comparison.clipped(choice or comparison.default)
        with self._search_lock:
            found = comparison.adaptive(vector, choice, -1 if row is None else row)
        exact = truth[-1]
        return {
            "version": version,
            "adaptive": {
                "setting": str(comparison.params(choice)),
                **choice._asdict(),
                "recall": recall(found, exact),
                "ms": _ms(found.seconds),
                "exact_ms": _ms(exact.seconds),
                "ratio": exact.seconds / max(found.seconds, 1e-9),
                **self._hits(index, found, exact),
            },
        }

    def _truth(
        self, opened: Opened, row: int | None, query: str | None
    ) -> tuple[np.ndarray, list[Column]]:
        """The query, float32 [D], and its exact neighbours; a row does not find itself."""
        index, comparison, version = opened
        if (row is None) == (query is None):
            raise Refusal(400, "expected either row or query")
        if row is not None:
            self._check_row(index, row)
            vector = index.vector(row)
            if not np.isfinite(vector).all():
                raise Refusal(404, f"the embedding of row {row} is not finite")
        else:
            with self._query_lock:
                found = self._queries.get(query)
            if found is None:
                raise Refusal(404, "this query has expired; choose the picture again")
            # An index of embeddings that were truncated (`embed --truncate-dim`) has fewer columns.
            vector = np.ascontiguousarray(found[: index.columns])
        key = version, row, query
        with self._search_lock:  # one at a time, so that the times are comparable
            truth = self._truths.get(key)
            if truth is None:
                truth = comparison.exact(vector, -1 if row is None else row)
                self._truths.put(key, truth)
        return vector, truth

    def _check_row(self, index: Index, row: int) -> None:
        if not 0 <= row < index.total or index.is_deleted(np.array([row]))[0]:
            raise Refusal(404, "the index does not have this row")

    def _hits(self, index: Index, column: Column, exact: Column) -> dict[str, Any]:
        """A column as JSON; "agrees": whether exact search by all dimensions finds the row."""
        exact_rows = set(exact.ids.tolist())
        hits = [
            {
                **self._shown(index, row),
                "cosine": round(float(cosine), 4),
                "agrees": row in exact_rows,
            }
            for row, cosine in zip(column.ids.tolist(), column.cosines, strict=True)
        ]
        return {"agree": sum(hit["agrees"] for hit in hits), "of": len(exact_rows), "hits": hits}

    def _shown(self, index: Index, row: int) -> dict[str, Any]:
        """Name and class of a row as JSON; names come from files and may hold anything."""
        class_name = index.class_name(row)
        # ImageNet's class folders have WordNet ids: show the class's English name.
        if class_name is not None and WNID.fullmatch(class_name):
            class_name = name_of(class_name)
        return {
            "row": row,
            "name": printable(index.name(row)),
            "class": None if class_name is None else printable(class_name),
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


def _ms(seconds: float) -> float:
    """Milliseconds with three digits."""
    return float(f"{1000 * seconds:.3g}")
