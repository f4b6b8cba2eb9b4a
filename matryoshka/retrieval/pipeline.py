"""A whole search, shortlist and re-ranking, by one description of it; indexes are built once and
kept.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from matryoshka.retrieval.exact import exact_search
from matryoshka.retrieval.graph import Graph
from matryoshka.retrieval.hits import Hits, RetrievalError, as_rows, check_k, check_rows
from matryoshka.retrieval.ivf import InvertedFile
from matryoshka.retrieval.metrics import mflops
from matryoshka.retrieval.rerank import Stage, head_of, rerank
from matryoshka.retrieval.scan import BinaryScan, PrefixScan

INDEXES = {
    "exact": None,
    "scan": PrefixScan,
    "ivf": InvertedFile,
    "binary": BinaryScan,
    "hnsw": Graph,
}
HEAD = 256  # dimensions that are copied to where random rows are fast


@dataclass(frozen=True)
class Setting:
    """The shortlist, k rows by the first `dim` dimensions, and the stages that put it in order.

    index: a key of INDEXES. effort: lists that an inverted file looks at, or candidates that a
    graph keeps (efSearch); the others have none. No stages: the shortlist is the result.
    """

    index: str
    dim: int
    k: int
    stages: tuple[Stage, ...] = ()
    effort: int = 32

    def __post_init__(self) -> None:
        if self.index not in INDEXES:
            raise RetrievalError(f"index {self.index!r}: unknown; known: {', '.join(INDEXES)}")
        for key in ("dim", "k", "effort"):  # TypeError for 0.5; NumPy's numbers become Python's
            object.__setattr__(self, key, operator.index(getattr(self, key)))
        object.__setattr__(
            self, "stages", tuple(Stage(*map(operator.index, stage)) for stage in self.stages)
        )
        check_k(self.k)
        if self.effort < 1:
            raise RetrievalError(
                f"{self.index}: looks at {self.effort} lists or candidates; give 1 or more"
            )
        if min([self.dim, *(stage.dim for stage in self.stages)]) < 1:
            raise RetrievalError(
                f"dimensions {[self.dim, *(s.dim for s in self.stages)]}: a prefix has 1 or more"
            )
        if any(stage.keep < 1 for stage in self.stages):
            raise RetrievalError(
                f"stages keep {[stage.keep for stage in self.stages]}: each keeps 1 or more"
            )
        if any(a.dim >= b.dim for a, b in pairwise(self.stages)):
            dims = [stage.dim for stage in self.stages]
            raise RetrievalError(
                f"stages of {dims} dimensions: each must be longer than the one before"
            )

    @classmethod
    def funnel(cls, index: str, dims: list[int], ks: list[int], effort: int = 32) -> Setting:
        """The paper's notation: the ks[0] best of dims[0], of which the ks[1] best of dims[1], ...;
        the rows that are left are put in order by the last of the dims, which are one more than the
        ks. Section 4.3.1.
        """
        if len(dims) != len(ks) + 1 or not ks:
            raise RetrievalError(
                f"a funnel of {len(dims)} dimensions needs {max(1, len(dims) - 1)} k, not {len(ks)}"
            )
        if any(a < b for a, b in pairwise(ks)):
            raise RetrievalError(
                f"a funnel of k {ks}: give them falling, each stage keeps some of the one before"
            )
        if index != "binary" and dims[1] < dims[0]:  # 64 numbers may know more than 256 bits
            raise RetrievalError(
                f"a funnel of dimensions {dims}: give them rising, each stage adds some"
            )
        keep = [*ks[1:], ks[-1]]
        return cls(index, dims[0], ks[0], tuple(map(Stage, dims[1:], keep)), effort)

    def giving(self, neighbours: int) -> Setting:
        """This setting for so many results, where it gives others: lists before the last stage are
        lengthened to four times as many where they are shorter, for what is not among the best of a
        prefix is lost.
        """
        check_k(neighbours)
        if not self.stages:
            return replace(self, k=neighbours)
        last = Stage(self.stages[-1].dim, neighbours)
        if self.results == neighbours:
            return replace(self, stages=(*self.stages[:-1], last))
        early = [Stage(stage.dim, max(stage.keep, 4 * neighbours)) for stage in self.stages[:-1]]
        return replace(self, k=max(self.k, 4 * neighbours), stages=(*early, last))

    @property
    def results(self) -> int:
        """The most neighbours that a query can get."""
        return min([self.k, *(stage.keep for stage in self.stages)])

    def __str__(self) -> str:
        effort = {"ivf": f" nprobe {self.effort}", "hnsw": f" ef {self.effort}"}.get(self.index, "")
        path = "".join(
            f" -> {stage.dim}" + (f" ({stage.keep})" if stage is not self.stages[-1] else "")
            for stage in self.stages
        )
        return f"{self.index} {self.dim}{effort} k {self.k}{path}"

    def mflops(self, database_size: int) -> float:
        """By the paper's formula, which counts an exhaustive shortlist whatever the index:
        metrics.mflops.
        """
        looked_at = [self.k, *(stage.keep for stage in self.stages)]
        return mflops(
            self.dim,
            database_size,
            [(s.dim, n) for s, n in zip(self.stages, looked_at, strict=False)],
        )


def default_setting(columns: int, dim: int) -> Setting:
    """What found recall@10 of 0.994 among 1.28 million: docs/retrieval.md."""
    last = Stage(columns, 10)
    stages = (Stage(HEAD, 40), last) if dim < HEAD < columns else (last,)
    return Setting("ivf", dim, 200, stages, 32)


class Searcher:
    """Searcher(rows).search(queries, Setting("ivf", 64, 200, (Stage(256, 40), Stage(2048, 10)))).

    rows: float16 or float32 [N, D], any array or memory map. Indexes and the head of the rows are
    made when a setting first needs them (`prepare` does it ahead of time), and kept in `indexes` by
    (kind, dim).
    """

    def __init__(self, rows: np.ndarray, num_threads: int = 0, seed: int = 0) -> None:
        check_rows(rows, 1, "database")
        if not len(rows):
            raise RetrievalError("database: is empty; nothing can be found in it")
        self.rows, self.num_threads, self.seed = rows, num_threads, seed
        self.indexes: dict[tuple[str, int], Any] = {}
        self.head: np.ndarray | None = None

    def prepare(self, setting: Setting) -> None:
        """Builds what a search of this setting needs. RetrievalError for dimensions that the rows
        do not have.
        """
        widest = max([setting.dim, *(stage.dim for stage in setting.stages)])
        check_rows(self.rows, widest, "database")
        key = setting.index, setting.dim
        if setting.index != "exact" and key not in self.indexes:
            options = {"seed": self.seed} if setting.index == "ivf" else {}
            self.indexes[key] = INDEXES[setting.index].build(
                self.rows, setting.dim, num_threads=self.num_threads, **options
            )
        short = max((stage.dim for stage in setting.stages if stage.dim <= HEAD), default=0)
        if short and (self.head is None or self.head.shape[1] < short):
            self.head = head_of(self.rows, min(HEAD, self.rows.shape[1]))

    def shortlist(
        self, queries: np.ndarray, setting: Setting, deleted: np.ndarray | None = None
    ) -> Hits:
        """The first part alone: estimates of cosines, but for "exact"."""
        queries = as_rows(queries)
        self.prepare(setting)
        if setting.index == "exact":
            return exact_search(self.rows, queries, setting.dim, setting.k, deleted=deleted)
        effort = {"ivf": {"nprobe": setting.effort}, "hnsw": {"ef": setting.effort}}.get(
            setting.index, {}
        )
        return self.indexes[setting.index, setting.dim].search(
            queries, setting.k, deleted=deleted, **effort
        )

    def search(
        self, queries: np.ndarray, setting: Setting, deleted: np.ndarray | None = None
    ) -> Hits:
        """queries: float [Q, D], anything that NumPy reads -> the last stage's `keep` of each.
        deleted: bits of rows to leave out.
        """
        queries = as_rows(queries)
        found = self.shortlist(queries, setting, deleted)
        if not setting.stages:
            return found
        return rerank(self.rows, queries, found.ids, setting.stages, self.head, self.num_threads)

    @property
    def nbytes(self) -> int:
        """Memory of the indexes and the head; rows not counted."""
        return sum(index.nbytes for index in self.indexes.values()) + (
            0 if self.head is None else self.head.nbytes
        )
