"""Benchmark of an index on disk: build, open, search, change, and memory of a searching process.

    python bench/index.py --work FOLDER [--rows 1280000] [--truth 10000] [--threads 2]

The data are those of bench/retrieval.py, made in FOLDER; the index is built there as well (5.4 GB).
A separate process searches all queries in batches of 1000, then one by one; recall is against the
exact neighbours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from nested_rows import add_options, prepared
from record import append
from retrieval import status

from matryoshka.retrieval.ranking_metrics import recall_against_exact, summarise_recall
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.store_writer import IndexRows, Writer

CHANGED = 1000  # rows that are added and deleted
K = 10


class Names(Sequence[str]):
    """Names like those of ImageNet's files."""

    def __init__(self, count: int, prefix: str = "") -> None:
        self._count = count
        self._prefix = prefix

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        if i >= self._count:
            raise IndexError
        return f"{self._prefix}n{i // 1300:08d}/{i:08d}.JPEG"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(p)
    p.add_argument(
        "--search-only",
        action="store_true",
        help="search an existing index; prints one line of JSON",
    )
    args = p.parse_args(argv)
    folder = args.work / f"index_{args.rows}"
    if args.search_only:
        print(json.dumps(searched(folder, args)))
        return 0
    rows = prepared(args).rows
    row: dict = {"case": "index", "rows": args.rows, "threads": args.threads}
    with Writer(folder, args.threads) as writer:
        started = time.perf_counter()
        writer.build(batch(rows, Names(len(rows))), overwrite=True)
        row["build s"] = time.perf_counter() - started
    # A new process: the memory and the warm caches of the build must not count.
    child = subprocess.run(
        [
            sys.executable,
            __file__,
            f"--work={args.work}",
            f"--rows={args.rows}",
            f"--truth={args.truth}",
            f"--threads={args.threads}",
            "--search-only",
        ],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    row |= json.loads(child.stdout.splitlines()[-1])
    names = Names(min(CHANGED, len(rows)), "new/")
    with Writer(folder, args.threads) as writer:
        for what, change in (
            ("add 1000 s", lambda: writer.add(batch(rows[: len(names)], names))),
            ("delete 1000 s", lambda: writer.delete(list(names))),
        ):
            started = time.perf_counter()
            change()
            row[what] = time.perf_counter() - started
    for key, value in row.items():
        print(f"{key:28} {value:,.4g}" if isinstance(value, float) else f"{key:28} {value}")
    if not args.no_record:
        print(f"rows     {append('index', [row])}")
    return 0


def batch(rows: np.ndarray, names) -> IndexRows:
    model = {"weights_sha256": "synthetic", "file": "none"}
    labels = np.arange(len(rows)) // 1300  # images per class, as in ImageNet-1K
    return IndexRows(rows, names, labels, model, preprocessing={})


def searched(folder: Path, args: argparse.Namespace) -> dict:
    """Measurements of searches; run in a process that does nothing else."""
    # ---- opening ----
    opening = []
    for _ in range(10):
        started = time.perf_counter()
        index = Index(folder, args.threads)
        opening.append(1000 * (time.perf_counter() - started))
    queries, truth = (
        np.lib.format.open_memmap(args.work / f"{name}_{args.rows}_{args.truth}.npy", "r")
        for name in ("queries", "truth")
    )
    # ---- searches in batches ----
    index.warm()
    size = min(1000, len(queries))
    rates = []
    found = []
    for turn in range(4):  # the first one warms up
        started = time.perf_counter()
        ids = [index.search(queries[i : i + size], k=K).ids for i in range(0, len(queries), size)]
        if turn:
            rates.append(len(queries) / (time.perf_counter() - started))
        found = ids
    # ---- single queries ----
    single = []
    for i in range(min(2000, len(queries))):
        started = time.perf_counter()
        index.search(queries[i : i + 1], k=K)
        single.append(1000 * (time.perf_counter() - started))
    recall = summarise_recall(recall_against_exact(np.concatenate(found), truth), K)
    p50, p99 = np.percentile(single, [50, 99])
    return {
        "open ms": median(opening),
        "open ms, first": opening[0],
        "setting": str(index.params),
        "recall@10": recall.mean,
        "lower": recall.lower,
        "q/s, batch 1000": median(rates),
        "latency p50 ms": float(p50),
        "latency p99 ms": float(p99),
        "peak memory GB": status("VmHWM") / 1e9,
        "of that no file's GB": status("RssAnon") / 1e9,
    }


if __name__ == "__main__":
    sys.exit(main())
