"""Which of many searches is the fastest of those whose recall is certain: settings to try,
frontier, certificate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from matryoshka.retrieval.hits import RetrievalError
from matryoshka.retrieval.metrics import RecallSummary, recall_against_exact, summarise_recall
from matryoshka.retrieval.pipeline import HEAD, Setting
from matryoshka.retrieval.rerank import Stage

PREFIXES = (
    16,
    32,
    64,
    128,
)  # of int8 shortlists: 0.89, 0.976, 0.997, 1.0 of the exact ten are in their first 200
BITS = (64, 128, 256, 512)
LENGTHS = (50, 100, 200, 400, 800)
PROBES = (4, 8, 16, 32, 64, 128)
# rows from which on an inverted file is built for one prefix only: k-means takes a minute
LARGE = 200_000


@dataclass(frozen=True)
class Measured:
    """recall: of the exact neighbours, with bounds that hold for all settings of a sweep together.
    rate: queries per second of each turn, in batches of `batch`.
    """

    setting: Setting
    recall: RecallSummary
    rate: tuple[float, ...]
    batch: int

    @property
    def speed(self) -> float:
        return float(np.median(self.rate))


def grid(
    indexes: Sequence[str], columns: int, rows: int, neighbours: int = 10, dims: Sequence[int] = ()
) -> list[Setting]:
    """Settings worth a try for `rows` x `columns`. dims: prefixes of the shortlists, default: by
    the index.
    """
    found: list[Setting] = []
    for index in indexes:
        if index == "exact":
            continue  # that is the truth
        own = BITS if index == "binary" else PREFIXES
        if index == "ivf":
            own = (64,) if rows > LARGE else (32, 64)
        chosen = dims or own
        usable = [d for d in chosen if d <= columns and (index != "binary" or d % 64 == 0)]
        if not usable and index != "binary":
            usable = [columns]
        lists = 2 ** round(
            math.log2(4 * math.sqrt(rows))
        )  # of an InvertedFile; more are all of them once more
        probes = tuple(p for p in PROBES if p <= lists) or (lists,)
        efforts = (
            probes if index == "ivf" else tuple(4 * p for p in PROBES) if index == "hnsw" else (1,)
        )
        lengths = (*LENGTHS[2:], 1600) if index == "binary" else LENGTHS
        for dim in usable:
            for k in sorted({max(neighbours, min(k, rows)) for k in lengths}):
                for stages in _stages(index, dim, k, columns, neighbours):
                    found += [Setting(index, dim, k, stages, effort) for effort in efforts]
    return list(dict.fromkeys(found))


def _stages(
    index: str, dim: int, k: int, columns: int, neighbours: int
) -> Iterator[tuple[Stage, ...]]:
    """To the whole width at once; by a middle prefix; for bits, whose order is rough, by two."""
    last = Stage(columns, neighbours)
    yield (last,)
    middle = 2 ** int(math.log2(min(HEAD, max(columns // 2, 1))))
    for keep in (25, 40):
        if (
            (index == "binary" or middle > dim)
            and 4 * neighbours <= 4 * keep < 4 * k
            and middle < columns
        ):
            yield Stage(middle, keep), last
            if index == "binary" and middle > 64 and k >= 400:
                yield Stage(64, 120), Stage(middle, keep), last


def measure(
    search: Callable[[np.ndarray, Setting], np.ndarray],
    settings: Iterable[Setting],
    queries: np.ndarray,
    truth: np.ndarray,
    batch: int,
    tried: int,
) -> Iterator[Measured]:
    """Each setting over all queries. search: (queries, setting) -> ids; truth: int64 [Q, n], exact
    neighbours. tried: how many settings there are in all; recall bounds hold for all of them
    together (Bonferroni).
    """
    for setting in settings:
        search(queries[: min(batch, len(queries))], setting)  # builds, warms up
        found, rates = [], []
        for first in range(0, len(queries), batch):
            started = time.perf_counter()
            found.append(search(queries[first : first + batch], setting))
            rates.append(len(found[-1]) / (time.perf_counter() - started))
        recall = recall_against_exact(np.concatenate(found), truth)
        yield Measured(
            setting, summarise_recall(recall, truth.shape[1], bonferroni=tried), tuple(rates), batch
        )


def frontier(measured: Iterable[Measured]) -> list[Measured]:
    """Those that no other beats in both recall and speed, the fastest first."""
    best: list[Measured] = []
    for one in sorted(measured, key=lambda m: (-m.speed, -m.recall.mean)):
        if not best or one.recall.mean > best[-1].recall.mean:
            best.append(one)
    return best


def certified(measured: Iterable[Measured], target: float) -> Measured | None:
    """The fastest whose lower bound of recall is `target` or more; None where there is none."""
    if not 0 < target <= 1:
        raise RetrievalError(f"target recall {target}: expected a number above 0, up to 1")
    sure = [one for one in measured if one.recall.lower >= target]
    return max(sure, key=lambda one: one.speed, default=None)


def queries_needed(target: float, tried: int, confidence: float = 0.95) -> int:
    """Queries that a setting which loses nothing needs for a lower bound of `target`, below 1."""

    def reached(queries: int) -> bool:
        return summarise_recall(np.ones(queries), 1, confidence, tried).lower >= target

    many = 1
    while not reached(many):
        many *= 2
    few = many // 2  # not reached
    while few + 1 < many:
        middle = (few + many) // 2
        few, many = (few, middle) if reached(middle) else (middle, many)
    return many
