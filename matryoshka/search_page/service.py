"""What the page asks for, without HTTP: an index that may change meanwhile, a model, and what was
asked before.
"""

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

QUERIES = 256  # uploads whose embeddings are kept: at most 8 kB each
TRUTHS = 64  # queries whose exact neighbours are kept, for the sliders
WNID = re.compile(r"n\d{8}")
T = TypeVar("T")
log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """An index as it was at one moment; version: a text that changes with it."""

    index: Index
    comparison: Comparison
    version: str


class Recent(Generic[T]):
    """The last `most` values that were put in or asked for, by key. For one thread at a time."""

    def __init__(self, most: int) -> None:
        self._most, self._kept = most, OrderedDict[Any, T]()

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
    """Answers for any number of threads. Every method raises Refusal.

    encode: uint8 pixels [H, W, 3] of any size -> float [W], the embedding, by the model of these
    weights (embeddings.trunk_sha256). RetrievalError for an index of another model.
    """

    def __init__(
        self,
        index: Index,
        encode: Callable[[np.ndarray], np.ndarray],
        weights_sha256: str,
        pictures: Pictures,
    ) -> None:
        self._encode, self._weights, self._pictures = encode, weights_sha256, pictures
        self._opened = self._use(index)
        self._queries, self._truths = Recent[np.ndarray](QUERIES), Recent[list[Column]](TRUTHS)
        self._opening, self._keeping, self._searching, self._encoding = (
            threading.Lock() for _ in range(4)
        )

    def _use(self, index: Index) -> Opened:
        index.check_model(self._weights, "the model")
        index.warm()
        version = hashlib.sha256(json.dumps(index.about, sort_keys=True).encode()).hexdigest()[:12]
        return Opened(index, Comparison(index), version)

    def current(self) -> Opened:
        """The index as it is on the disk now."""
        opened = self._opened
        if opened.index.is_current():
            return opened
        with self._opening:
            if self._opened is opened:
                try:
                    self._opened = self._use(Index(opened.index.path, opened.index.num_threads))
                except RetrievalError as error:
                    log.error("%s", error)
                    raise Refusal(
                        503, "the index has changed and cannot be used; the server says why"
                    ) from None
            return self._opened

    def about(self) -> dict[str, Any]:
        """What the page needs to know before it asks for anything."""
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
            "setting": str(comparison.setting(own)),
            "certificate": _recall(index),
            "shortlist": {
                "dim": index.dim,
                "low": NEIGHBOURS,
                "high": comparison.longest,
                "default": own.shortlist,
            },
            "nprobe": {"high": comparison.lists, "default": own.nprobe},
            "rerank": {"dims": comparison.rerank_dims, "default": own.rerank},
            "pictures": None in self.places(index).values(),
        }

    def places(self, index: Index | None = None) -> dict[str, str | None]:
        """Where each of the index's data sets is looked for, and why there are no pictures of it:
        None where there are. Parts that were added or compacted may name the same one.
        """
        found = dict[str, str | None]()
        for source in (
            source for part in (index or self._opened.index).parts for source in part.data
        ):
            try:
                self._pictures.open(source)
                found[self._pictures.place(source)] = None
            except Refusal as error:
                found.setdefault(self._pictures.place(source), str(error))
        return found

    def any_row(self) -> int:
        index, comparison, _ = self.current()
        if not len(index):
            raise Refusal(404, "all rows of the index are deleted")
        return comparison.live_row(secrets.randbelow(len(index)))

    def ask(self, data: bytes) -> str:
        """The key of a query, by the bytes of an image file."""
        pixels = read_upload(data)
        with self._encoding:
            vector = np.asarray(self._encode(pixels), np.float32)
        if not np.isfinite(vector).all():
            raise Refusal(400, "the model has no finite numbers for this picture")
        key = secrets.token_urlsafe(12)
        with self._keeping:
            self._queries.put(key, vector)
        return key

    def neighbours(
        self, row: int | None, query: str | None, choice: Choice | None
    ) -> dict[str, Any]:
        """Of a row, or of a query by its key: exact ones at each prefix, and those of the fast
        search.
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
            **self._adaptive(opened, vector, truth, row, choice),
        }

    def adaptive(self, row: int | None, query: str | None, choice: Choice | None) -> dict[str, Any]:
        """The second half of `neighbours`."""
        opened = self.current()
        vector, truth = self._truth(opened, row, query)
        return self._adaptive(opened, vector, truth, row, choice)

    def picture(self, row: int, size: int, version: str | None) -> bytes:
        """JPEG of at most size x size. version: of the index whose row is meant."""
        index, _, now = self.current()
        if version is not None and version != now:
            raise Refusal(404, "the index has changed, and with it the numbers of its rows")
        self._check_row(index, row)
        source, number = index.origin(row)
        return self._pictures.jpeg(source, number, index.name(row), size)

    def _adaptive(
        self,
        opened: Opened,
        vector: np.ndarray,
        truth: list[Column],
        row: int | None,
        choice: Choice | None,
    ) -> dict[str, Any]:
        index, comparison, version = opened
        choice = comparison.clipped(choice or comparison.default)
        with self._searching:
            found = comparison.adaptive(vector, choice, -1 if row is None else row)
        exact = truth[-1]
        return {
            "version": version,
            "adaptive": {
                "setting": str(comparison.setting(choice)),
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
        """(float32 [D], exact columns): a row does not find itself."""
        index, comparison, version = opened
        if (row is None) == (query is None):
            raise Refusal(400, "give a row, or a query")
        if row is not None:
            self._check_row(index, row)
            vector = index.vector(row)
            if not np.isfinite(vector).all():
                raise Refusal(404, f"row {row} has no finite numbers")
        else:
            with self._keeping:
                found = self._queries.get(query)
            if found is None:
                raise Refusal(404, "this query is not known any more; choose the picture again")
            vector = np.ascontiguousarray(found[: index.columns])
        key = version, row, query
        with self._searching:  # one at a time, also for the sake of the times
            truth = self._truths.get(key)
            if truth is None:
                truth = comparison.exact(vector, -1 if row is None else row)
                self._truths.put(key, truth)
        return vector, truth

    def _check_row(self, index: Index, row: int) -> None:
        if not 0 <= row < index.total or index.is_deleted(np.array([row]))[0]:
            raise Refusal(404, "the index has no such row, or no more")

    def _hits(self, index: Index, column: Column, exact: Column) -> dict[str, Any]:
        true = set(exact.ids.tolist())
        hits = [
            {**self._shown(index, row), "cosine": round(float(cosine), 4), "agrees": row in true}
            for row, cosine in zip(column.ids.tolist(), column.cosines, strict=True)
        ]
        return {"agree": sum(hit["agrees"] for hit in hits), "of": len(true), "hits": hits}

    def _shown(self, index: Index, row: int) -> dict[str, Any]:
        name = index.class_name(row)
        return {
            "row": row,
            "name": printable(index.name(row)),
            "class": None
            if name is None
            else printable(name_of(name) if WNID.fullmatch(name) else name),
        }


def _recall(index: Index) -> str:
    """What is known of the fast search's recall; "" where it was not measured."""
    if index.certificate is None:
        return ""
    about, current = index.certificate
    if not current:
        return "recall measured before the index changed: run `matryoshka retrieve --sweep --choose` again"
    return f"recall {printable(str(about['text']))}" if about.get("text") else ""


def _ms(seconds: float) -> float:
    return float(f"{1000 * seconds:.3g}")
