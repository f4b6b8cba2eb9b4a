"""Build and change an index of embeddings: a folder that is searched from a memory map.

    matryoshka index build photos.index --embeddings embeddings/photos
    matryoshka index add photos.index --embeddings embeddings/new --prefix new/
    matryoshka index delete photos.index cats/17.jpg --names-from gone.txt
    matryoshka index compact photos.index
    matryoshka index info photos.index
    matryoshka index verify photos.index
    matryoshka index record --lancedb photos.lance --embeddings embeddings/photos
    matryoshka index sync photos.index --lancedb photos.lance

A change is atomic, even if the process is killed. One process changes an index while any number of
others search it. Searches skip deleted rows and scan added ones; compact merges all of them into
one part. `matryoshka retrieve serve` shows an index in a browser. With LanceDB (the extra
[lancedb]) a table holds the embeddings and further columns; sync makes the index equal to it. See
docs/retrieval.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matryoshka import config
from matryoshka.files import read_stream
from matryoshka.retrieval.options import index_parser as parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

import numpy as np

from matryoshka.embeddings.reading import AGAIN, META, EmbeddingError, open_embeddings
from matryoshka.evaluation.embedding_map import (
    EmbeddingMap,
    make_map,
    map_dims,
    read_map,
    remove_map,
    write_map,
)
from matryoshka.retrieval.adapted import AdaptedRows
from matryoshka.retrieval.store import MANIFEST, Index, trained_dims
from matryoshka.retrieval.store_writer import IndexRows, Writer

# `info` advises compacting when this share of the rows is deleted, or outside of the first part.
COMPACT_SHARE = 0.2
MAX_NAMES_BYTES = 1 << 30  # of --names-from


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    actions = {
        "build": build,
        "add": add,
        "delete": delete,
        "compact": compact,
        "info": info,
        "verify": verify,
        "record": record,
        "sync": sync,
    }
    return actions[args.action](args)


def build(args: SimpleNamespace) -> int:
    batch = read_embeddings(args)
    started = time.perf_counter()
    if (args.shortlist_dim or 0) > batch.rows.shape[1]:
        raise config.ConfigError(
            f"--shortlist-dim {args.shortlist_dim}: {args.embeddings} has {batch.rows.shape[1]} "
            "dimensions"
        )
    with Writer(args.index, args.threads) as writer:
        index = writer.build(
            batch,
            args.shortlist_dim or 0,
            lists=args.lists or 0,
            seed=args.seed,
            overwrite=args.overwrite,
        )
        if args.map == "none":
            remove_map(index)
        else:
            write_map(index, map_of(index, args.map, args.seed))
    print(describe(index))
    print(f"names    {batch.names[0]} and so on")
    print(f"built in {time.perf_counter() - started:.1f} s")
    return 0


def add(args: SimpleNamespace) -> int:
    batch = read_embeddings(args)
    with existing(args) as writer:
        before = len(Index(args.index))
        index = writer.add(batch, args.replace)
    replaced = before + len(batch.rows) - len(index)
    in_place = f", {replaced:,} of them replace others" if replaced else ""
    print(f"{len(batch.rows):,} rows added ({batch.names[0]} and so on){in_place}")
    print(describe(index))
    return 0


def delete(args: SimpleNamespace) -> int:
    names = list(args.names)
    if args.names_from:
        try:
            # Not splitlines, which splits at characters that names may contain.
            lines = read_stream(args.names_from, max_bytes=MAX_NAMES_BYTES).decode().split("\n")
            names += [line.removesuffix("\r") for line in lines if line not in ("", "\r")]
        except UnicodeDecodeError:
            raise config.ConfigError(f"--names-from {args.names_from}: is not UTF-8 text") from None
    if not names:
        raise config.ConfigError("delete: give names, or --names-from FILE")
    with existing(args) as writer:
        before = len(Index(args.index))
        index = writer.delete(names, args.missing_ok)
    print(f"{before - len(index):,} rows deleted\n{describe(index)}")
    return 0


def compact(args: SimpleNamespace) -> int:
    started = time.perf_counter()
    with existing(args) as writer:
        old_map = read_map(Index(args.index))
        index = writer.compact()
        # Row numbers have changed: the old map is of no use.
        if old_map is None:
            remove_map(index)
        else:
            write_map(index, map_of(index, old_map.method, index.manifest["seed"]))
    print(f"{describe(index)}\ncompacted in {time.perf_counter() - started:.1f} s")
    return 0


def info(args: SimpleNamespace) -> int:
    started = time.perf_counter()
    index = Index(args.index, args.threads)
    opened = 1000 * (time.perf_counter() - started)
    print(f"{describe(index)}\nopened   in {opened:.1f} ms")
    if args.verify:
        index.verify()
        print("verified all checksums match")
    return 0


def verify(args: SimpleNamespace) -> int:
    started = time.perf_counter()
    index = Index(args.index, args.threads)
    index.verify()
    print(
        f"{args.index}: {index.nbytes / 1e6:,.1f} MB in {len(index.parts)} parts: all checksums "
        f"match ({time.perf_counter() - started:.1f} s)"
    )
    return 0


def record(args: SimpleNamespace) -> int:
    from matryoshka.retrieval.lance import Record

    made = Record.create(args.lancedb, args.table, read_embeddings(args), args.overwrite)
    print(f"{args.lancedb}: table {args.table!r} of {made.table.count_rows():,} rows")
    return 0


def sync(args: SimpleNamespace) -> int:
    from matryoshka.retrieval.lance import Record

    change = Record(args.lancedb, args.table).sync(
        args.index, args.threads, args.shortlist_dim or 0
    )
    print(f"{change.added:,} rows added, {change.replaced:,} replaced, {change.deleted:,} deleted")
    print(describe(Index(args.index)))
    return 0


def map_of(index: Index, method: str, seed: int) -> EmbeddingMap:
    """A map of the index's first part, for the prefixes that its model was trained for."""
    dims = map_dims(trained_dims(index), method)
    made = make_map(index.parts[0].rows, dims, method=method, seed=seed)
    index.check_files()
    return made


def existing(args: SimpleNamespace) -> Writer:
    """A writer for an index that exists; only `build` creates a folder."""
    if not (Path(args.index) / MANIFEST).exists():
        Index(args.index)  # raises before Writer creates the folder and a lock
    return Writer(args.index, args.threads)


def read_embeddings(args: SimpleNamespace) -> IndexRows:
    """Embeddings as rows to add.

    Relative paths of model and data set become absolute, because the index may be opened from
    another folder.
    """
    embeddings = open_embeddings(args.embeddings)
    embeddings.verify()  # damage would get checksums of its own in the index
    model = dict(embeddings.meta["model"])
    data = dict(embeddings.meta["data"])
    for key, section in (("file", model), ("path", data), ("preprocessing", embeddings.meta)):
        if key not in section:
            raise EmbeddingError(f"{embeddings.path / META}: has no {key!r}; {AGAIN}")
    for section, key in ((model, "file"), (data, "path")):
        if os.path.exists(section[key]):
            section[key] = os.path.abspath(section[key])
    rows: Any = embeddings.X
    if args.adapter:
        rows = AdaptedRows(rows, args.adapter)
        model = rows.model(model, os.path.abspath(args.adapter), args.embeddings)
    elif "adapter" in model and os.path.exists(model["adapter"]["file"]):
        # A copy: meta.json's own must not change.
        model["adapter"] = dict(model["adapter"], file=os.path.abspath(model["adapter"]["file"]))
    model["normalised"] = embeddings.meta["normalised"] and not args.adapter
    classes = data.pop("classes")
    names: Any = Prefixed(embeddings.ids, args.prefix) if args.prefix else embeddings.ids
    return IndexRows(
        rows=rows,
        names=names,
        labels=np.asarray(embeddings.y),
        model=model,
        preprocessing=embeddings.meta["preprocessing"],
        classes=classes,
        data=[data],
    )


class Prefixed(Sequence[str]):
    """Names with a common prefix."""

    def __init__(self, names: Sequence[str], prefix: str) -> None:
        self._names = names
        self._prefix = prefix

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, at: Any) -> Any:
        return self._prefix + str(self._names[at])


def describe(index: Index) -> str:
    """What an index holds, one line per subject."""
    model = index.model
    num_deleted = index.total - len(index)
    parts = []
    for part in index.parts:
        lists = part.metadata["lists"]
        layout = f"in {lists:,} lists" if lists else "without lists"
        parts.append(f"{part.count:,} rows {layout}")
    deleted = f", {num_deleted:,} deleted" if num_deleted else ""
    lines = [
        ("index", str(index.path)),
        ("rows", f"{len(index):,} x {index.columns} float16{deleted}"),
        ("parts", "; ".join(parts)),
        ("search", f"{index.params}"),
    ]
    if index.certificate is not None:
        certificate, is_current = index.certificate
        stale = (
            "was measured before the index changed: "
            f"matryoshka retrieve --database {index.path} --sweep --choose"
        )
        lines.append(("recall", certificate["text"] if is_current else stale))
    lines.append(
        (
            "model",
            f"{model.get('arch')}, {model.get('head')}, {model.get('file')} "
            f"({model['weights_sha256'][:12]})",
        )
    )
    lines.append(("size", f"{index.nbytes / 1e6:,.1f} MB"))
    if "adapter" in model:
        adapter = model["adapter"]
        lines.append(("adapter", f"{adapter['file']} ({adapter['sha256'][:12]})"))
    if not index.has_sums:
        # Of a version before the checksums of blocks: only `verify` finds damage.
        text = f"without checksums of blocks; matryoshka index compact {index.path} adds them"
        lines.append(("note", text))
    # Deleted rows take time and space, and later parts are usually scanned without lists.
    outside = index.total - (index.parts[0].count if index.parts else 0)
    if num_deleted + outside > COMPACT_SHARE * index.total:
        lines.append(("advice", f"matryoshka index compact {index.path}"))
    return "\n".join(f"{key:8} {text}" for key, text in lines)


if __name__ == "__main__":
    raise SystemExit(main())
