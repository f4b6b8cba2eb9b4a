"""Data of the retrieval benchmarks: synthetic or real nested embeddings and exact neighbours.

Synthetic rows have parents, classes, uneven sub-clusters, log-normal noise, a larger variance in
earlier dimensions and a softplus; they are shuffled and float16. Recall is a property of these
data, not of a trained model.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from matryoshka.embeddings.reading import open_embeddings
from matryoshka.retrieval import exact_search

WIDTH = 2048
K = 10  # exact neighbours of a query
BLOCK = 10_000  # points per random generator


class Data(NamedTuple):
    """rows: float16 [N, D], memory-mapped if synthetic. queries: float32 [Q, D]. truth: [Q, 10]."""

    rows: np.ndarray
    queries: np.ndarray
    truth: np.ndarray
    name: str


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--work", required=True, type=Path, help="folder for data and ground truth, reused"
    )
    p.add_argument("--rows", type=int, default=1_280_000)
    p.add_argument("--truth", type=int, default=10_000, help="queries with exact neighbours")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument(
        "--database",
        type=Path,
        help="embeddings of `matryoshka embed` instead of synthetic ones",
    )
    p.add_argument("--queries", type=Path, help="embeddings of the queries")
    p.add_argument("--no-record", action="store_true", help="do not append to bench/results/")


def prepared(args: argparse.Namespace) -> Data:
    args.work.mkdir(parents=True, exist_ok=True)
    if args.database:
        rows = open_embeddings(args.database).X.astype(np.float16)
        queries = open_embeddings(args.queries).X[: args.truth].astype(np.float32)
        return Data(rows, queries, neighbours(rows, queries), args.database.name)
    rows_file, queries_file, truth_file = (
        args.work / f"{name}_{args.rows}_{args.truth}.npy" for name in ("rows", "queries", "truth")
    )
    # The ground truth is written last: if it exists, the other files are complete.
    if not truth_file.exists():
        print(f"making {args.rows:,} rows", flush=True)
        generate(rows_file, queries_file, rows=args.rows, queries=args.truth, threads=args.threads)
        rows = np.lib.format.open_memmap(rows_file, "r")
        np.save(truth_file, neighbours(rows, np.load(queries_file)))
    rows, queries, truth = (
        np.lib.format.open_memmap(path, "r") for path in (rows_file, queries_file, truth_file)
    )
    return Data(rows, queries, truth, "synthetic")


def neighbours(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    started = time.perf_counter()
    truth = exact_search(rows, queries, rows.shape[1], K).ids
    print(
        f"exact neighbours of {len(queries):,} queries: {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    return truth


def generate(
    rows_file: Path, queries_file: Path, *, rows: int, queries: int, seed: int = 0, threads: int = 2
) -> None:
    """Write rows and queries as .npy files.

    A block of points is a function of (seed, block number), so that threads may compute blocks in
    any order.
    """
    rng = np.random.default_rng(seed)
    # The variance falls with the position, as a nested loss orders the dimensions.
    scale = ((1 + np.arange(WIDTH) / 16) ** -0.6).astype(np.float32)
    parents = rng.standard_normal((50, WIDTH), dtype=np.float32)
    classes = parents[rng.integers(0, 50, 1000)] + 0.8 * rng.standard_normal(
        (1000, WIDTH), dtype=np.float32
    )
    share = rng.dirichlet(np.full(64, 0.7), 1000).cumsum(1)

    def points(block: int, n: int) -> np.ndarray:
        rng = np.random.default_rng((seed, 1, block))
        c = rng.integers(0, 1000, n)
        sub = c * 64 + np.minimum((rng.random(n)[:, None] > share[c]).sum(1), 63)
        order = np.argsort(sub, kind="stable")
        noise = rng.lognormal(-0.7, 0.4, n).astype(np.float32)
        raw = rng.standard_normal((n, WIDTH), dtype=np.float32)
        raw *= noise[:, None]
        raw += classes[c]
        # The centre of a sub-cluster is a function of its number: 64,000 would take 0.5 GB.
        for members in np.split(order, np.flatnonzero(np.diff(sub[order])) + 1):
            centre_rng = np.random.default_rng((seed, 2, sub[members[0]]))
            raw[members] += 0.5 * centre_rng.standard_normal(WIDTH, dtype=np.float32)
        raw *= scale
        return np.log1p(np.exp(raw, out=raw), out=raw)

    def fill(out: np.ndarray, first_block: int) -> None:
        def fill_block(first: int) -> None:
            part = out[first : first + BLOCK]
            part[:] = points(first_block + first // BLOCK, len(part))

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill_block, range(0, len(out), BLOCK)))

    temporary = rows_file.with_suffix(".tmp")
    out = np.lib.format.open_memmap(temporary, "w+", np.float16, (rows, WIDTH))
    whole = np.empty((queries, WIDTH), np.float32)
    fill(out, 0)
    fill(whole, -(-rows // BLOCK))
    out.flush()
    np.save(queries_file, whole)
    os.replace(temporary, rows_file)
