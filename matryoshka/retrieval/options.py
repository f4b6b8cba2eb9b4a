"""Options of the retrieval programs, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matryoshka.config import CommandParser, FlagParser, command_parser, flat_parser, option
from matryoshka.config.options import did_you_mean
from matryoshka.runtime import ThreadOptions

INDEXES = ("exact", "scan", "ivf", "binary", "hnsw")
MAX_COUNT = 2**31 - 1  # of the kernels' integers
MAX_SEED = 2**31 - 1  # of k-means
_TABLE = "a folder of `matryoshka embed`, or an array NAME-X.npy (with labels in NAME-y.npy)"

# ---------------------------------------------------------------- retrieve


def _index_names(text: str) -> None:
    for name in text.split(","):
        if name not in INDEXES:
            hint = did_you_mean(name, INDEXES)
            raise ValueError(f"{name!r} is unknown; known: {', '.join(INDEXES)}{hint}")


@dataclass(frozen=True, kw_only=True)
class RetrieveOptions:
    """Options of a search and of its measurements."""

    database: str = option(help=f"{_TABLE}, or an index", metavar="DIR", common=True, existing=True)
    queries: str = option(help=_TABLE, metavar="DIR", common=True, existing=True)
    adapter: str | None = option(
        None,
        help="adapter of `matryoshka adapt`, which embeddings and arrays go through; indexes, and "
        "embeddings that did already, stay as they are",
        metavar="FILE",
        common=True,
        existing=True,
    )
    output: str = option(help="folder of the results", metavar="DIR", common=True, file_name=True)
    overwrite: bool = option(False, help="replace results in it", common=True)
    index: str | None = option(
        None,
        help=f"{', '.join(INDEXES)}; a sweep takes several, with commas. Unset: scan; for an index "
        "without any of the options down to --funnel-k: its own search parameters",
        check=_index_names,
        common=True,
    )
    shortlist_dim: int | None = option(
        None,
        help="unset: 64, or all dimensions; also of hnsw and binary",
        low=1,
        high=MAX_COUNT,
        common=True,
    )
    k: int | None = option(
        None,
        help="length of the shortlist; unset: 200, as in the paper",
        low=1,
        high=MAX_COUNT,
        common=True,
    )
    rerank_dim: int | None = option(
        None,
        help="unset: all dimensions; 0: the shortlist is the result",
        low=0,
        high=MAX_COUNT,
    )
    nprobe: int | None = option(
        None, help="ivf: number of lists to scan; unset: 32", low=1, high=MAX_COUNT
    )
    ef: int | None = option(None, help="hnsw: efSearch; unset: 200", low=1, high=MAX_COUNT)
    funnel: tuple[int, ...] | None = option(
        None,
        help="increasing prefix lengths; the first is the shortlist's",
        metavar="D,D,...",
        low=1,
        nonempty=True,
        high=MAX_COUNT,
    )
    funnel_k: tuple[int, ...] | None = option(
        None,
        help="number of rows that each prefix but the last passes on",
        metavar="K,K,...",
        low=1,
        nonempty=True,
        high=MAX_COUNT,
    )
    at: tuple[int, ...] | None = option(
        None,
        help="k of the metrics; unset: 10,25,50,100, of an index's own search 10; results of the "
        "largest are written",
        metavar="K,K,...",
        low=1,
        nonempty=True,
        high=MAX_COUNT,
    )
    truth: int = option(
        2000,
        help="number of queries to compare with exact search; 0: none",
        low=0,
        high=MAX_COUNT,
        common=True,
    )
    batches: tuple[int, ...] = option(
        (1, 32, 1000),
        help="batch sizes for queries/s",
        metavar="B,B,...",
        low=1,
        nonempty=True,
        high=MAX_COUNT,
    )
    no_speed: bool = option(False, help="do not measure speed")
    sweep: bool = option(False, help="try many search parameters instead of one set", common=True)
    target_recall: float | None = option(
        None, help="recall bound of the sweep; unset: 0.99", above=0, high=1, common=True
    )
    choose: bool = option(
        False, help="with --sweep: make the fastest parameters the default of an index", common=True
    )
    seed: int = option(0, help="seed of k-means and of the choice of queries", low=0, high=MAX_SEED)


def retrieve_parser() -> FlagParser:
    """The options of retrieve.py."""
    return flat_parser(
        "retrieve.py",
        "Nearest neighbours of every query: quality, speed, and recall of exact search.\n\n"
        "    matryoshka retrieve --database embeddings/train --queries embeddings/val --output "
        "neighbours\n"
        "    matryoshka retrieve --database photos.index --queries embeddings/val --output sweep "
        "--sweep --choose\n"
        "    matryoshka retrieve serve photos.index\n\n"
        "The --k rows with the best scores by the first --shortlist-dim dimensions are reranked by "
        "the first --rerank-dim. --sweep tries many search parameters and prints the fastest whose "
        "recall of the exact neighbours is certain. docs/retrieval.md has the rest.",
        RetrieveOptions,
        ThreadOptions,
    )


# ---------------------------------------------------------------- index


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """The index of a command."""

    index: str = option(help="folder of the index", metavar="DIR", positional=True, file_name=True)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Rows to add."""

    embeddings: str = option(
        help="folder that `matryoshka embed` wrote", metavar="DIR", existing=True
    )
    prefix: str = option("", help="text before every name", file_name=True)
    adapter: str | None = option(
        None,
        help="adapter of `matryoshka adapt`, which these embeddings go through; not for embeddings "
        "that did already",
        metavar="FILE",
        existing=True,
    )


@dataclass(frozen=True, kw_only=True)
class LanceOptions:
    """A table of LanceDB."""

    lancedb: str = option(help="folder or address of the database", metavar="URI", file_name=True)
    table: str = option("embeddings", help="name of the table")


@dataclass(frozen=True, kw_only=True)
class ShortlistOptions:
    """The codes of a new index."""

    shortlist_dim: int | None = option(
        None, help="dimensions of the codes; unset: 64, or all", metavar="D", low=1, high=MAX_COUNT
    )


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """A new index."""

    lists: int | None = option(
        None, help="lists of the inverted file; unset: about 4 x sqrt(rows)", low=1, high=MAX_COUNT
    )
    seed: int = option(0, help="seed of k-means and of the map", low=0, high=MAX_SEED)
    map: str = option(
        "pca",
        help="two-dimensional map of up to 5,000 images for the search page; tsne takes a minute",
        choices=("pca", "tsne", "none"),
    )
    overwrite: bool = option(False, help="replace the index in DIR once the new one is complete")


@dataclass(frozen=True, kw_only=True)
class AddOptions:
    """Rows that are in the index already."""

    replace: bool = option(False, help="delete rows of the same names in the same step")


@dataclass(frozen=True, kw_only=True)
class DeleteOptions:
    """Rows to delete."""

    names: tuple[str, ...] = option(
        (), help="names of rows", metavar="NAME", positional=True, file_name=True
    )
    names_from: Path | None = option(
        None, help="file of names, one per line, UTF-8", metavar="FILE", existing=True
    )
    missing_ok: bool = option(False, help="ignore names that the index does not have")


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Options of the check."""

    verify: bool = option(False, help="read the whole index and compare checksums")


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """A new table."""

    overwrite: bool = option(False, help="replace a table of this name")


def index_parser() -> CommandParser:
    """The options of index.py."""
    folder = (FolderOptions, ThreadOptions)
    return command_parser(
        "index.py",
        "An index of embeddings as a folder, searched from a memory map.\n\n"
        "    matryoshka index build photos.index --embeddings embeddings/photos\n"
        "    matryoshka index add photos.index --embeddings embeddings/new --prefix new/\n"
        "    matryoshka index delete photos.index cats/17.jpg --names-from gone.txt\n"
        "    matryoshka index sync photos.index --lancedb photos.lance\n\n"
        "Every change is atomic. One process may change an index while others search it. "
        "docs/retrieval.md has the rest.",
        "action",
        {
            "build": (
                "Build a new index of embeddings.",
                (*folder, SourceOptions, ShortlistOptions, BuildOptions),
            ),
            "add": (
                "Add more embeddings of the same model.",
                (*folder, SourceOptions, AddOptions),
            ),
            "record": (
                "Write embeddings to a LanceDB table.",
                (LanceOptions, SourceOptions, RecordOptions, ThreadOptions),
            ),
            "sync": (
                "Create an index, or update it to the content of a LanceDB table.",
                (*folder, LanceOptions, ShortlistOptions),
            ),
            "delete": ("Delete rows by name.", (*folder, DeleteOptions)),
            "compact": (
                "Merge all rows that are not deleted into one part, with lists for all of them.",
                folder,
            ),
            "info": ("Show what an index holds.", (*folder, InfoOptions)),
            "verify": ("Read a whole index and compare all checksums.", folder),
        },
    )
