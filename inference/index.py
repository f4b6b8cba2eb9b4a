"""An index of embeddings as a folder that is searched from a memory map: build it, add to it,
delete from it.

    matryoshka index build photos.index --embeddings embeddings/photos
    matryoshka index add photos.index --embeddings embeddings/new --prefix new/
    matryoshka index delete photos.index cats/17.jpg --names-from gone.txt
    matryoshka index compact photos.index
    matryoshka index info photos.index --verify
    matryoshka index record --lancedb photos.lance --embeddings embeddings/photos
    matryoshka index sync photos.index --lancedb photos.lance

A change is all there or not at all, also when it is killed; one process changes an index while any
number search it. Deleted rows are passed over and added ones scanned; compact makes one part of
them. `matryoshka retrieve serve` shows an index in a browser. With LanceDB (the extra [lancedb]) a
table keeps the embeddings, and whatever else is known of the images; sync makes the index follow
it. docs/retrieval.md has the rest.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka import config
from matryoshka.embeddings.reading import AGAIN, META, EmbeddingError, open_embeddings
from matryoshka.retrieval.options import index_parser as parser
from matryoshka.retrieval.store import MANIFEST, Index
from matryoshka.retrieval.store_writer import Batch, Writer

CROWDED = (
    0.2  # share of rows deleted, or outside of the first part, from which on compacting is advised
)


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    actions = {
        "build": build,
        "add": add,
        "delete": delete,
        "compact": compact,
        "info": info,
        "record": record,
        "sync": sync,
    }
    return actions[args.action](args)


def build(args: Namespace) -> int:
    batch, started = read(args), time.perf_counter()
    if (args.shortlist_dim or 0) > batch.rows.shape[1]:
        raise config.ConfigError(
            f"--shortlist-dim {args.shortlist_dim}: {args.embeddings} has {batch.rows.shape[1]} "
            "dimensions"
        )
    with Writer(args.index, args.threads) as writer:
        index = writer.build(
            batch, args.shortlist_dim or 0, args.lists or 0, args.seed, args.overwrite
        )
    print(
        f"{describe(index)}\nnames    {batch.names[0]} and so on\nbuilt in "
        f"{time.perf_counter() - started:.1f} s"
    )
    return 0


def add(args: Namespace) -> int:
    batch = read(args)
    with existing(args) as writer:
        before = len(Index(args.index))
        index = writer.add(batch, args.replace)
    replaced = before + len(batch.rows) - len(index)
    in_place = f", {replaced:,} of them in place of others" if replaced else ""
    print(f"{len(batch.rows):,} rows added ({batch.names[0]} and so on){in_place}")
    print(describe(index))
    return 0


def delete(args: Namespace) -> int:
    names = list(args.names)
    if args.names_from:
        try:
            lines = (
                args.names_from.read_bytes().decode().split("\n")
            )  # splitlines would split some names
            names += [name for line in lines if (name := line.removesuffix("\r"))]
        except UnicodeDecodeError:
            raise config.ConfigError(f"--names-from {args.names_from}: is not UTF-8 text") from None
    if not names:
        raise config.ConfigError("delete: give names, or --names-from FILE")
    with existing(args) as writer:
        before = len(Index(args.index))
        index = writer.delete(names, args.missing_ok)
    print(f"{before - len(index):,} rows deleted\n{describe(index)}")
    return 0


def compact(args: Namespace) -> int:
    started = time.perf_counter()
    with existing(args) as writer:
        index = writer.compact()
    print(f"{describe(index)}\ncompacted in {time.perf_counter() - started:.1f} s")
    return 0


def info(args: Namespace) -> int:
    started = time.perf_counter()
    index = Index(args.index, args.threads)
    opened = 1000 * (time.perf_counter() - started)
    print(f"{describe(index)}\nopened   in {opened:.1f} ms")
    if args.verify:
        index.verify()
        print("verified every byte is as it was written")
    return 0


def record(args: Namespace) -> int:
    from matryoshka.retrieval.lance import Record

    made = Record.create(args.lancedb, args.table, read(args), args.overwrite)
    print(f"{args.lancedb}: table {args.table!r} of {made.table.count_rows():,} rows")
    return 0


def sync(args: Namespace) -> int:
    from matryoshka.retrieval.lance import Record

    change = Record(args.lancedb, args.table).sync(
        args.index, args.threads, args.shortlist_dim or 0
    )
    print(f"{change.added:,} rows added, {change.replaced:,} replaced, {change.deleted:,} deleted")
    print(describe(Index(args.index)))
    return 0


def existing(args: Namespace) -> Writer:
    """A writer of an index that is there: a folder is made by build alone."""
    if not (Path(args.index) / MANIFEST).exists():
        Index(args.index)  # raises: nothing is made there, not even a lock
    return Writer(args.index, args.threads)


def read(args: Namespace) -> Batch:
    """Embeddings as rows to add; files named relative to here are named absolutely, for who opens
    the index elsewhere.
    """
    found = open_embeddings(args.embeddings)
    model, data = dict(found.meta["model"]), dict(found.meta["data"])
    missing = [
        key
        for key, about in (("file", model), ("path", data), ("preprocessing", found.meta))
        if key not in about
    ]
    if missing:
        raise EmbeddingError(f"{found.path / META}: does not say {missing[0]!r}; {AGAIN}")
    for about, key in ((model, "file"), (data, "path")):
        if os.path.exists(about[key]):
            about[key] = os.path.abspath(about[key])
    model["normalised"] = found.meta["normalised"]
    classes = data.pop("classes")
    names: Any = Prefixed(found.ids, args.prefix) if args.prefix else found.ids
    return Batch(
        found.X, names, np.asarray(found.y), model, found.meta["preprocessing"], classes, [data]
    )


class Prefixed(Sequence[str]):
    """Names with a text before each."""

    def __init__(self, names: Sequence[str], prefix: str) -> None:
        self._names, self._prefix = names, prefix

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, at: Any) -> Any:
        return self._prefix + str(self._names[at])


def describe(index: Index) -> str:
    model = index.model
    lists = [part.about["lists"] for part in index.parts]
    gone = index.total - len(index)
    lines = [
        ("index", str(index.path)),
        (
            "rows",
            f"{len(index):,} x {index.columns} float16" + (f", {gone:,} deleted" if gone else ""),
        ),
        (
            "parts",
            "; ".join(
                f"{part.count:,} rows " + (f"in {n:,} lists" if n else "without lists")
                for part, n in zip(index.parts, lists, strict=True)
            ),
        ),
        ("search", f"{index.setting}"),
        (
            "model",
            f"{model.get('arch')}, {model.get('head')}, {model.get('file')} "
            f"({model['weights_sha256'][:12]})",
        ),
        ("size", f"{index.nbytes / 1e6:,.1f} MB"),
    ]
    if found := index.certificate:
        about, current = found
        stale = f"was measured before the index changed: matryoshka retrieve --database {index.path} --sweep --choose"
        lines.insert(4, ("recall", about["text"] if current else stale))
    outside = index.total - (index.parts[0].count if index.parts else 0)
    if gone + outside > CROWDED * index.total:
        lines.append(("advice", f"matryoshka index compact {index.path}"))
    return "\n".join(f"{key:8} {text}" for key, text in lines)


if __name__ == "__main__":
    raise SystemExit(main())
