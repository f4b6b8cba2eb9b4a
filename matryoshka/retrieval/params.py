"""Search parameters: index, shortlist and re-ranking stages, also from command-line options."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from itertools import pairwise
from typing import Any

from matryoshka.config import ConfigError
from matryoshka.retrieval.hits import RetrievalError, check_k
from matryoshka.retrieval.options import INDEXES
from matryoshka.retrieval.ranking_metrics import mflops
from matryoshka.retrieval.rerank import Stage

PREFIX_CACHE_DIMS = 256  # dimensions that are copied to memory where random access is fast

# Defaults of `matryoshka retrieve`; 200 is the shortlist of the paper, section 4.3.1.
SHORTLIST_DIM = 64
SHORTLIST_K = 200


@dataclass(frozen=True)
class SearchParams:
    """Parameters of a search: k rows by the first `dim` dimensions, then re-ranking stages.

    index: one of INDEXES. Without stages, the shortlist is the result.
    nprobe: inverted lists to visit, for "ivf" only.
    ef_search: size of the candidate queue, for "hnsw" only.
    """

    index: str
    dim: int
    k: int
    stages: tuple[Stage, ...] = ()
    _: KW_ONLY
    nprobe: int = 32
    ef_search: int = 200

    def __post_init__(self) -> None:
        if self.index not in INDEXES:
            raise RetrievalError(f"index {self.index!r}: unknown; known: {', '.join(INDEXES)}")

        # operator.index raises TypeError for 0.5 and turns NumPy's integers into Python's.
        for name in ("dim", "k", "nprobe", "ef_search"):
            object.__setattr__(self, name, operator.index(getattr(self, name)))
        stages = tuple(Stage(*map(operator.index, stage)) for stage in self.stages)
        object.__setattr__(self, "stages", stages)

        check_k(self.k)
        for name in ("nprobe", "ef_search"):
            if getattr(self, name) < 1:
                raise RetrievalError(f"{name}={getattr(self, name)}: expected 1 or more")
        dims = [stage.dim for stage in stages]
        keeps = [stage.keep for stage in stages]
        if min([self.dim, *dims]) < 1:
            raise RetrievalError(f"dimensions {[self.dim, *dims]}: expected 1 or more each")
        if min(keeps, default=1) < 1:
            raise RetrievalError(f"stages keep {keeps}: expected 1 or more each")
        if any(a >= b for a, b in pairwise(dims)):
            raise RetrievalError(
                f"stages of {dims} dimensions: each must be longer than the one before"
            )

    @classmethod
    def funnel(
        cls,
        index: str,
        dims: list[int],
        ks: list[int],
        *,
        nprobe: int = 32,
        ef_search: int = 200,
    ) -> SearchParams:
        """Funnel retrieval in the paper's notation (section 4.3.1).

        The ks[0] best rows by dims[0], of these the ks[1] best by dims[1], and so on; the last of
        the dims orders what remains. There is one dim more than there are ks.
        """
        if len(dims) != len(ks) + 1 or not ks:
            raise RetrievalError(
                f"a funnel of {len(dims)} dimensions needs {max(1, len(dims) - 1)} k, not {len(ks)}"
            )
        if any(a < b for a, b in pairwise(ks)):
            raise RetrievalError(
                f"a funnel of k {ks}: expected falling numbers, each stage keeps a part of the rows"
            )
        # Bits are coarser than numbers: 64 dimensions may order better than 256 bits.
        if index != "binary" and dims[1] < dims[0]:
            raise RetrievalError(
                f"a funnel of dimensions {dims}: expected rising numbers, each stage adds some"
            )
        # The shortlist keeps ks[0] rows; the last stage only orders the rows that it gets.
        keeps = [*ks[1:], ks[-1]]
        stages = tuple(Stage(dim, keep) for dim, keep in zip(dims[1:], keeps, strict=True))
        return cls(index, dims[0], ks[0], stages, nprobe=nprobe, ef_search=ef_search)

    @classmethod
    def from_options(
        cls,
        options: SearchOptions,
        *,
        columns: int,
        results: int,
        name: str = "the database",
        index: str = "scan",
        code_dim: int | None = None,
    ) -> SearchParams:
        """Parameters that command-line options select, for rows of `columns` dimensions.

        results: rows that the last stage keeps. index, code_dim: defaults for --index and
        --shortlist-dim; an index on disk has codes of one length only. name: of the database, for
        errors. ConfigError for options that do not fit.
        """
        options.check()
        for option, dims in (
            ("--shortlist-dim", [options.shortlist_dim or 0]),
            ("--rerank-dim", [options.rerank_dim or 0]),
            ("--funnel", options.funnel or [0]),
        ):
            if max(dims) > columns:
                raise ConfigError(f"{option} {max(dims)}: {name} has {columns} dimensions")
        index = options.index or index
        for option, value, needed in (
            ("--nprobe", options.nprobe, "ivf"),
            ("--ef", options.ef, "hnsw"),
        ):
            if value is not None and index != needed:
                raise ConfigError(f"{option} {value}: works with --index {needed}, not {index}")
        nprobe = options.nprobe or 32
        ef_search = options.ef or 200
        if options.funnel and options.funnel_k:
            return cls.funnel(
                index, options.funnel, options.funnel_k, nprobe=nprobe, ef_search=ef_search
            )

        k = options.k or SHORTLIST_K
        rerank_dim = columns if options.rerank_dim is None else options.rerank_dim
        if index == "exact" and options.shortlist_dim is None:
            # Exact search by the prefix of --rerank-dim needs no second stage.
            return cls(index, rerank_dim or columns, k)
        dim = options.shortlist_dim or min(SHORTLIST_DIM, columns)
        if code_dim is not None and options.shortlist_dim is None and index != "exact":
            dim = code_dim
        stages = (Stage(rerank_dim, results),) if rerank_dim else ()
        return cls(index, dim, k, stages, nprobe=nprobe, ef_search=ef_search)

    def clipped(self, *, rows: int) -> SearchParams:
        """These parameters for a database of `rows` rows: no shortlist is longer."""
        stages = tuple(Stage(stage.dim, min(stage.keep, self.k, rows)) for stage in self.stages)
        return replace(self, k=min(self.k, rows), stages=stages)

    def with_k(self, k: int) -> SearchParams:
        """These parameters for k results.

        If they give another number now, earlier shortlists grow to at least 4 k rows: a row that
        is not among the best by a prefix is lost.
        """
        check_k(k)
        if not self.stages:
            return replace(self, k=k)
        last = Stage(self.stages[-1].dim, k)
        if self.results == k == self.stages[-1].keep:
            return self  # the common case of single queries, without another validation
        if self.results == k:
            return replace(self, stages=(*self.stages[:-1], last))
        # No later stage recovers what a short prefix loses: 4 k is the advice of docs/retrieval.md.
        early = [Stage(stage.dim, max(stage.keep, 4 * k)) for stage in self.stages[:-1]]
        return replace(self, k=max(self.k, 4 * k), stages=(*early, last))

    @property
    def results(self) -> int:
        """The largest number of neighbours that a query can get."""
        return min([self.k, *(stage.keep for stage in self.stages)])

    @property
    def widest(self) -> int:
        """The longest prefix that any step reads."""
        return max([self.dim, *(stage.dim for stage in self.stages)])

    def __str__(self) -> str:
        text = f"{self.index} {self.dim}"
        if self.index == "ivf":
            text += f" nprobe {self.nprobe}"
        if self.index == "hnsw":
            text += f" ef {self.ef_search}"
        text += f" k {self.k}"
        for stage in self.stages[:-1]:
            text += f" -> {stage.dim} ({stage.keep})"
        if self.stages:
            text += f" -> {self.stages[-1].dim}"
        return text

    def as_options(self, seed: int = 0) -> str:
        """The options of `matryoshka retrieve` that select these parameters.

        seed: of the sweep that found them; it decides the lists of an inverted file.
        """
        dims = [self.dim, *(stage.dim for stage in self.stages)]
        ks = [self.k, *(stage.keep for stage in self.stages[:-1])]
        text = f"--index {self.index}"
        if self.index == "ivf":
            text += f" --nprobe {self.nprobe}"
        if self.index == "hnsw":
            text += f" --ef {self.ef_search}"
        if len(dims) == 2:
            text += f" --shortlist-dim {dims[0]} --k {ks[0]} --rerank-dim {dims[1]}"
        else:
            text += f" --funnel {','.join(map(str, dims))} --funnel-k {','.join(map(str, ks))}"
        if seed and self.index == "ivf":
            text += f" --seed {seed}"
        return text

    def as_dict(self) -> dict[str, Any]:
        """For results.json and sweep.json: "effort" is nprobe or ef_search, absent elsewhere."""
        stored = self.stored()
        if self.index not in ("ivf", "hnsw"):
            del stored["effort"]
        return stored

    def stored(self) -> dict[str, Any]:
        """For index.json, which has one key for nprobe and ef_search; `from_stored` reads it."""
        return {
            "index": self.index,
            "dim": self.dim,
            "k": self.k,
            "stages": [list(stage) for stage in self.stages],
            "effort": self.ef_search if self.index == "hnsw" else self.nprobe,
        }

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> SearchParams:
        """The inverse of `stored`. Raises KeyError, TypeError or RetrievalError for damage."""
        index = stored["index"]
        effort = stored["effort"]
        width = {"ef_search": effort} if index == "hnsw" else {"nprobe": effort}
        return cls(index, stored["dim"], stored["k"], tuple(stored["stages"]), **width)

    def mflops(self, database_size: int) -> float:
        """Million operations per query by the paper's formula (ranking_metrics.mflops).

        It counts an exhaustive shortlist for every index.
        """
        examined = [self.k, *(stage.keep for stage in self.stages)]
        stages = zip(self.stages, examined, strict=False)
        return mflops(self.dim, database_size, [(stage.dim, count) for stage, count in stages])


@dataclass(frozen=True)
class SearchOptions:
    """The options of `matryoshka retrieve` that select a search; None where one is absent."""

    index: str | None = None
    shortlist_dim: int | None = None
    k: int | None = None
    rerank_dim: int | None = None
    nprobe: int | None = None
    ef: int | None = None
    funnel: list[int] | None = None
    funnel_k: list[int] | None = None

    @property
    def are_set(self) -> bool:
        """Whether the command line has any of them."""
        return self != SearchOptions()

    def check(self) -> None:
        """ConfigError for options that exclude each other; needs no database."""
        if (self.funnel is None) != (self.funnel_k is None):
            raise ConfigError("--funnel and --funnel-k: give both, one k less than prefixes")
        if self.funnel and not (self.k is self.shortlist_dim is self.rerank_dim is None):
            raise ConfigError(
                "--funnel sets all prefixes and k: leave out --k, --shortlist-dim and --rerank-dim"
            )
        if self.funnel and self.funnel_k:
            try:
                SearchParams.funnel(self.index or "scan", self.funnel, self.funnel_k)
            except RetrievalError as error:
                raise ConfigError(f"--funnel, --funnel-k: {error}") from None

        first = self.funnel[0] if self.funnel else self.shortlist_dim
        if self.index == "binary" and first and first % 64:
            option = "--funnel" if self.funnel else "--shortlist-dim"
            raise ConfigError(f"{option} {first}: binary takes multiples of 64")
        # After a shortlist of bits, a shorter prefix of numbers may still be more precise.
        if self.index != "binary" and 0 < (self.rerank_dim or 0) < (self.shortlist_dim or 1):
            raise ConfigError(
                f"--rerank-dim {self.rerank_dim}: is below --shortlist-dim {self.shortlist_dim}"
            )


def default_params(columns: int, dim: int) -> SearchParams:
    """Parameters of a new index; recall@10 is 0.994 among 1.28 million rows (docs/retrieval.md)."""
    last = Stage(columns, 10)
    stages = (last,)
    if dim < PREFIX_CACHE_DIMS < columns:
        stages = (Stage(PREFIX_CACHE_DIMS, 40), last)
    return SearchParams("ivf", dim, SHORTLIST_K, stages)
