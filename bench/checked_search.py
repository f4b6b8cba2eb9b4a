"""What the checksums of an index cost: searches with and without them, and the first reads.

    python bench/checked_search.py [--rows 200000] [--columns 512] [--rounds 20] [--threads 1]

An index of random rows is built in a temporary folder. The same queries are searched in turn with
the checks and without; `overhead` is the median of the ratios of neighbouring rounds. `first` is
the first search after opening, which checks the blocks that it reads; `whole` reads all.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from record import append

from matryoshka.retrieval import SearchParams, Stage
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.store_writer import IndexRows, Writer

QUERIES = 500
BATCH = 100


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rows", type=int, default=200_000)
    p.add_argument("--columns", type=int, default=512)
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder) / "x.index", args)
    print(found)
    append("checked_search", [found])
    return 0


def measured(folder: Path, args: argparse.Namespace) -> dict:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((args.rows, args.columns), np.float32)
    queries = rows[rng.integers(0, args.rows, QUERIES)]
    batch = IndexRows(
        rows=rows,
        names=[f"{i:08d}.jpg" for i in range(args.rows)],
        labels=np.zeros(args.rows, np.int64),
        model={"weights_sha256": "0" * 64},
        preprocessing={},
        data=[{}],
    )
    with Writer(folder, args.threads) as writer:
        writer.build(batch, 64, lists=1024)
    params = SearchParams("ivf", 64, 200, (Stage(args.columns, 10),), nprobe=32)

    def search(index: Index) -> None:
        for first in range(0, QUERIES, BATCH):
            index.search(queries[first : first + BATCH], params)

    index = Index(folder, args.threads)
    first = seconds(lambda: index.search(queries[:1], params))
    whole = seconds(index.warm)
    with_checks = Index(folder, args.threads)
    without = Index(folder, args.threads)
    for part in without.parts:
        for file in part.mapped_files:
            file.check()  # nothing is left to check
    search(with_checks)
    ratios = []
    for _ in range(args.rounds):
        slower = seconds(lambda: search(with_checks))
        faster = seconds(lambda: search(without))
        ratios.append(slower / faster)
    return {
        "rows": args.rows,
        "columns": args.columns,
        "threads": args.threads,
        "overhead": round(median(ratios) - 1, 4),
        "first_ms": round(1000 * first, 2),
        "whole_ms": round(1000 * whole, 1),
        "open_ms": round(1000 * seconds(lambda: Index(folder, args.threads)), 2),
        "verify_s": round(seconds(index.verify), 2),
    }


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
