"""Benchmark of searches in 1.28 million nested embeddings: ours, faiss and others, with recall.

    python bench/retrieval.py --work FOLDER [--rows 1280000] [--truth 10000] [--threads 2]
    python bench/retrieval.py --work FOLDER --database embeddings/train --queries embeddings/val

The data are synthetic (nested_rows.py; 5.3 GB in FOLDER) or real embeddings. Parts: scans, of
prefixes alone; rerank, of 200 candidates by one thread; pipelines, with recall@10 of the whole
embedding, its 95 % lower bound, and the fastest above some bounds; graphs, which take minutes to
build. All competitors take turns on the same queries; times are wall times. faiss has the same
number of threads, passive waiting, one BLAS thread (two thread pools would compete for the cores),
and the BLAS kernels of this CPU, which it does not select by itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from cpu import blas_kernels

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when the libraries are loaded
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ |= blas_kernels() | os.environ

import numpy as np
from nested_rows import Data, K, add_options, prepared
from record import append, spread

from matryoshka.retrieval import BinaryScan, InvertedFile, PrefixScan, Stage, _native, rerank
from matryoshka.retrieval.hits import huge_page_zeros, unit
from matryoshka.retrieval.params import PREFIX_CACHE_DIMS
from matryoshka.retrieval.ranking_metrics import recall_against_exact, summarise_recall
from matryoshka.retrieval.rerank import build_prefix_cache

BATCHES = (1, 32, 1000)
ALL = ("scans", "rerank", "pipelines", "graphs")
# (nprobe, k, rows after the middle stage) of inverted files
FILES = (
    (8, 100, 25),
    (8, 130, 25),
    (8, 200, 40),
    (32, 100, 25),
    (32, 200, 40),
    (64, 200, 40),
)
BOUNDS = (0.99, 0.985)
PEER = "faiss IVF,SQ8 64"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(p)
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--seconds", type=float, default=1.0, help="of a turn, about")
    p.add_argument("--lists", type=int, default=0, help="of the inverted files; 0: 4 x sqrt(rows)")
    p.add_argument("--only", nargs="+", choices=ALL, default=ALL)
    args = p.parse_args(argv)
    if (args.database is None) != (args.queries is None):
        p.error("--database and --queries: give both or none")
    import faiss
    import torch

    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    data = prepared(args)
    machine = {
        "data": data.name,
        "rows": len(data.rows),
        "columns": data.rows.shape[1],
        "threads": args.threads,
        "kernels": _native.kernels()[0],
    }
    print(
        f"{data.name}: {len(data.rows):,} x {data.rows.shape[1]}, {machine['kernels']}, "
        f"{args.threads} threads"
    )

    # ---- measurements ----
    found = []
    if "scans" in args.only:
        found += scans(data, args)
    if "rerank" in args.only:
        found += reranking(data, args)
    if "pipelines" in args.only:
        found += pipelines(data, args)
    peak = status("VmHWM") / 1e9
    own = status("RssAnon") / 1e9
    print(
        f"peak memory {peak:.1f} GB, of which {own:.1f} GB not backed by files "
        "(including peers' indexes)"
    )
    if not args.no_record:
        print(f"rows     {append('retrieval', [machine | row for row in found])}")
    return 0


# ---------------------------------------------------------------- measuring

Search = Callable[[np.ndarray], np.ndarray]  # queries -> ids
Rates = dict[str, dict[int, list[float]]]  # queries per second of every turn, by name and batch


def rates(searches: dict[str, Search], queries: np.ndarray, args: argparse.Namespace) -> Rates:
    """Queries per second by batch, in wall time; competitors take turns."""
    found: Rates = {name: {} for name in searches}
    for batch in sorted({min(batch, len(queries)) for batch in BATCHES}):
        for turn in range(args.turns + 1):
            for name, search in searches.items():
                done = 0
                started = time.perf_counter()
                while done == 0 or time.perf_counter() - started < args.seconds:
                    first = done * 7 % max(1, len(queries) - batch + 1)
                    search(queries[first : first + batch])
                    done += batch
                if turn:  # the first one warms up
                    found[name].setdefault(batch, []).append(done / (time.perf_counter() - started))
    return found


def over(measured: Rates, ours: str, theirs: str, batch: int) -> list[float]:
    """Speed-up of ours over theirs, turn by turn."""
    return [a / b for a, b in zip(measured[ours][batch], measured[theirs][batch], strict=True)]


# ---------------------------------------------------------------- parts


def scans(data: Data, args: argparse.Namespace) -> list[dict]:
    """k = 200 in one prefix, ours over faiss' flat indexes."""
    import faiss

    rows = data.rows
    columns = rows.shape[1]
    k = min(200, len(rows))
    out = []
    # ---- int8 codes ----
    for dim in (16, 32, 64):
        prefixes = huge_page_zeros((len(rows), dim), np.float32)
        for first in range(0, len(rows), 65_536):
            prefixes[first : first + 65_536] = unit(rows[first : first + 65_536], dim)
        ours = PrefixScan.build(rows, dim, args.threads)
        flat = faiss.IndexFlatIP(dim)
        flat.add(prefixes)
        prefixes_of_queries = unit(data.queries[:500], dim)
        out += compared(
            f"int8 scan, {dim} dims",
            {
                "matryoshka": lambda q, ours=ours: ours.search(q, k).ids,
                "faiss FlatIP": lambda q, flat=flat, dim=dim: flat.search(unit(q, dim), k)[1],
            },
            data.queries,
            flat.search(prefixes_of_queries, k)[1],
            args,
        )
    # ---- bits ----
    for dim in (d for d in (64, 256, 512) if d <= columns):
        bits = BinaryScan.build(rows, dim, args.threads)

        def codes(vectors: np.ndarray, dim: int = dim, bits: BinaryScan = bits) -> np.ndarray:
            return np.packbits(unit(vectors, dim) > bits.medians, axis=1, bitorder="little")

        flat = faiss.IndexBinaryFlat(dim)
        for first in range(0, len(rows), 65_536):
            flat.add(codes(rows[first : first + 65_536]))
        out += compared(
            f"binary scan, {dim} bits",
            {
                "matryoshka": lambda q, bits=bits: bits.search(q, k).ids,
                "faiss BinaryFlat": lambda q, flat=flat, codes=codes: flat.search(codes(q), k)[1],
            },
            data.queries,
            None,
            args,
        )
    return out


def compared(
    case: str,
    searches: dict[str, Search],
    queries: np.ndarray,
    truth: np.ndarray | None,
    args: argparse.Namespace,
) -> list[dict]:
    measured = rates(searches, queries, args)
    ours, theirs = searches
    out = []
    for batch in measured[ours]:
        ratio = spread(over(measured, ours, theirs, batch))
        row: dict[str, Any] = {"case": case, "batch": batch, "peer": theirs, "ratio": ratio}
        row |= {f"{name} q/s": spread(measured[name][batch]) for name in searches}
        text = "  ".join(f"{name} {median(measured[name][batch]):,.0f} q/s" for name in searches)
        print(f"{case:24} batch {batch:5}  {ratio['median']:6.1f}x  {text}", flush=True)
        out.append(row)
    if truth is not None:
        share = recall_against_exact(searches[ours](queries[: len(truth)]), truth).mean()
        print(
            f"{case:24} finds {100 * share:.1f} % of the prefix's own {truth.shape[1]}", flush=True
        )
        out[-1]["of the prefix's own"] = float(share)
    return out


def reranking(data: Data, args: argparse.Namespace) -> list[dict]:
    """Re-ranking of 200 candidates of an int8 scan, one thread: in one step, and in two."""
    rows = data.rows
    columns = rows.shape[1]
    queries = np.ascontiguousarray(data.queries[:1000])
    candidates = PrefixScan.build(rows, 64, args.threads).search(queries, min(200, len(rows))).ids
    middle = min(PREFIX_CACHE_DIMS, columns // 2)
    cache = build_prefix_cache(rows, middle)
    ways = {
        "one step": ([Stage(columns, K)], None),
        f"{middle} (40), then all": ([Stage(middle, 40), Stage(columns, K)], cache),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for turn in range(args.turns + 1):
        for name, (stages, copy) in ways.items():
            started = time.perf_counter()
            found[name] = rerank(
                rows, queries, candidates, stages, prefix_cache=copy, num_threads=1
            ).ids
            if turn:
                seconds[name].append(1e6 * (time.perf_counter() - started) / len(queries))
    truth = data.truth[: len(queries)]
    out = []
    for name in ways:
        recall = float(recall_against_exact(found[name], truth).mean())
        case = f"re-rank of {candidates.shape[1]} x {columns}, {name}"
        print(
            f"{case:40} {median(seconds[name]):6.1f} us a query and core, recall@{K} {recall:.4f}",
            flush=True,
        )
        out.append(
            {"case": case, "us": spread(seconds[name]), "recall": recall, "queries": len(queries)}
        )
    return out


def pipelines(data: Data, args: argparse.Namespace) -> list[dict]:
    """Shortlists and re-ranking to the whole width; exact search for scale."""
    rows = data.rows
    queries = data.queries
    columns = rows.shape[1]
    threads = args.threads
    middle = min(PREFIX_CACHE_DIMS, columns // 2)

    # ---- indexes ----
    cache = build_prefix_cache(rows, middle)
    started = time.perf_counter()
    scan = PrefixScan.build(rows, 64, threads)
    bits = BinaryScan.build(rows, 256, threads)
    file = InvertedFile.build(rows, 64, lists=args.lists, num_threads=threads)
    print(
        f"built in {time.perf_counter() - started:.0f} s: int8-64, 256 bits, {len(file.starts)} "
        "lists of int8-64"
    )
    points = np.concatenate([unit(rows[i : i + 65_536], 64) for i in range(0, len(rows), 65_536)])
    sq8 = faiss_file(points, len(file.starts))

    # ---- searches: ours, faiss', the paper's ----
    def then(search: Search, *stages: Stage) -> Search:
        def run(q: np.ndarray) -> np.ndarray:
            return rerank(rows, q, search(q), stages, prefix_cache=cache, num_threads=threads).ids

        return run

    full = Stage(columns, K)
    few = Stage(middle, 25)
    many = Stage(middle, 40)
    scanned = f"int8-64 k200 -> {columns}"
    counted = f"bits-256 k800 -> {columns}"
    searches: dict[str, Search] = {
        f"int8-64 k100 -> {columns}": then(lambda q: scan.search(q, 100).ids, full),
        scanned: then(lambda q: scan.search(q, 200).ids, full),
        f"int8-64 k200 -> {middle} -> {columns}": then(
            lambda q: scan.search(q, 200).ids, many, full
        ),
        counted: then(lambda q: bits.search(q, 800).ids, full),
        f"bits-256 k800 -> 64 -> {middle} -> {columns}": then(
            lambda q: bits.search(q, 800).ids, Stage(64, 120), few, full
        ),
    }
    # Speed-ups to report: over one step of re-ranking, and over faiss.
    funnels = {
        f"int8-64 k200 -> {middle} -> {columns}": scanned,
        f"bits-256 k800 -> 64 -> {middle} -> {columns}": counted,
    }
    rivals = {}
    for probes, k, keep in FILES:

        def listed(
            q: np.ndarray, file: InvertedFile = file, probes: int = probes, k: int = k
        ) -> np.ndarray:
            return file.search(q, k, probes).ids

        def theirs(q: np.ndarray, probes: int = probes, k: int = k) -> np.ndarray:
            sq8.nprobe = probes
            return sq8.search(unit(q, 64), k)[1]

        early = Stage(middle, keep)
        one_step = f"IVF int8-64 np{probes} k{k} -> {columns}"
        name = f"IVF int8-64 np{probes} k{k} -> {middle} -> {columns}"
        rival = f"{PEER} np{probes} k{k} -> {middle} -> {columns}"
        searches[one_step] = then(listed, full)
        searches[name] = then(listed, early, full)
        searches[rival] = then(theirs, early, full)
        funnels[name] = one_step
        rivals[name] = rival
    if "graphs" in args.only:
        searches |= graphs(points, lambda search: then(search, many, full), args)
    searches |= upstream(rows)
    # ---- measurements ----
    exact = exact_rate(rows, queries)
    print(
        f"exact, {columns} dims: {exact:.1f} q/s (faiss, flat, batch {min(1000, len(queries))})",
        flush=True,
    )
    print(
        f"{'pipeline':58} {'recall@10':>9} {'at least':>8} {'b1':>8} {'b32':>8} {'b1000':>8} "
        f"{'x exact':>8}"
    )
    out: list[dict] = [{"case": "exact", "q/s": exact}]
    measured = rates(searches, queries, args)
    batch = max(measured[scanned])
    lower = {}
    speed = {}
    for name, search in searches.items():
        ids = np.concatenate(
            [search(queries[i : i + 1000]) for i in range(0, len(data.truth), 1000)]
        )
        summary = summarise_recall(recall_against_exact(ids, data.truth), K)
        by_batch = {str(b): spread(values) for b, values in measured[name].items()}
        lower[name] = summary.lower
        speed[name] = by_batch[str(batch)]["median"]
        print(
            f"{name:58} {summary.mean:9.4f} {summary.lower:8.4f} "
            + " ".join(f"{row['median']:8,.0f}" for row in by_batch.values())
            + f" {speed[name] / exact:8.0f}",
            flush=True,
        )
        out.append(
            {
                "case": name,
                "queries": len(data.truth),
                "recall": summary.mean,
                "lower": summary.lower,
                "q/s": by_batch,
                "x exact": speed[name] / exact,
            }
        )
    # ---- the fastest, and speed-ups over others ----
    ours = [name for name in searches if name.startswith(("int8", "bits", "IVF"))]
    for bound in BOUNDS:
        certain = [name for name in ours if lower[name] >= bound]
        if certain:
            best = max(certain, key=speed.__getitem__)
            times = f"{speed[best]:,.0f} q/s, {speed[best] / exact:.0f}x exact"
            print(f"fastest with recall of at least {bound}: {best}: {times}", flush=True)
    for what, pairs in (
        ("funnel over one step", funnels),
        (f"over {PEER}, same lists and re-rank", rivals),
    ):
        for name, other in pairs.items():
            ratio = spread(over(measured, name, other, batch))
            print(f"{name:58} {ratio['median']:.2f}x {what}", flush=True)
            out.append({"case": name, "peer": other, "batch": batch, "ratio": ratio})
    return out


# ---------------------------------------------------------------- peers


def faiss_file(points: np.ndarray, lists: int) -> Any:
    import faiss

    quantizer = faiss.IndexFlatIP(64)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, 64, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    # 64 training points per list, as InvertedFile.
    index.train(points[:: max(1, len(points) // (64 * lists))])
    index.add(points)
    return index


def graphs(
    points: np.ndarray, then: Callable[[Search], Search], args: argparse.Namespace
) -> dict[str, Search]:
    """Graphs of the 64-d prefixes, with our re-ranking: the paper's HNSW32, and usearch's."""
    import faiss

    k = min(200, len(points))
    started = time.perf_counter()
    graph = faiss.IndexHNSWFlat(64, 32)
    graph.add(points)
    print(f"built in {time.perf_counter() - started:.0f} s: faiss HNSW32", flush=True)
    found: dict[str, Search] = {}
    for ef in (200, 400):

        def hnsw(q: np.ndarray, ef: int = ef) -> np.ndarray:
            options = faiss.SearchParametersHNSW(efSearch=ef)  # pyright: ignore[reportAttributeAccessIssue]
            return graph.search(unit(q, 64), k, params=options)[1]

        found[f"faiss HNSW32 64 ef{ef} k200, re-ranked"] = then(hnsw)
    try:
        from usearch.index import Index  # pyright: ignore[reportMissingImports] (requirements-peers.txt)
    except ImportError:
        print("usearch: missing, pip install -r requirements-peers.txt")
        return found
    started = time.perf_counter()
    index = Index(ndim=64, metric="ip", dtype="f16", connectivity=16, expansion_search=200)
    index.add(np.arange(len(points)), points, threads=args.threads)
    print(f"built in {time.perf_counter() - started:.0f} s: usearch M16 f16", flush=True)

    def usearch(q: np.ndarray) -> np.ndarray:
        keys = index.search(unit(q, 64), k, threads=args.threads).keys
        return keys.reshape(len(q), -1).astype(np.int64)

    return found | {"usearch M16 f16 64 ef200 k200, re-ranked": then(usearch)}


def upstream(rows: np.ndarray) -> dict[str, Search]:
    """The paper's notebooks, rewritten from their description.

    faiss' flat L2 index of the first 16 dimensions finds 200 neighbours. NumPy sorts them by the
    distance of longer normalised prefixes, one query after the other.
    """
    import faiss

    columns = rows.shape[1]
    flat = faiss.IndexFlatL2(16)
    for first in range(0, len(rows), 65_536):
        flat.add(unit(rows[first : first + 65_536], 16))

    def search(q: np.ndarray, stages: list[tuple[int, int]]) -> np.ndarray:
        out = np.empty((len(q), K), np.int64)
        for i, shortlist in enumerate(flat.search(unit(q, 16), min(200, len(rows)))[1]):
            kept = shortlist
            for dim, examined in stages:
                kept = kept[:examined]
                distance = ((unit(rows[kept], dim) - unit(q[i : i + 1], dim)) ** 2).sum(1)
                kept = kept[np.argsort(distance, kind="stable")]
            out[i] = kept[:K]
        return out

    funnel = [(dim, k) for dim, k in ((32, 200), (64, 100), (128, 50), (256, 25)) if dim < columns]
    funnel.append((columns, K))
    return {
        f"upstream: FlatL2 16 k200 -> {columns} (NumPy)": lambda q: search(q, [(columns, 200)]),
        "upstream: FlatL2 16 -> funnel 200,100,50,25,10 (NumPy)": lambda q: search(q, funnel),
    }


def exact_rate(rows: np.ndarray, queries: np.ndarray) -> float:
    """Queries per second of faiss' flat search of whole float32 rows.

    Searches block by block, because all rows take 10 GB. The time to make a block does not count:
    the rest is the work of IndexFlatIP.
    """
    import faiss

    sample = unit(queries[:1000], rows.shape[1])
    seconds = 0.0
    for first in range(0, len(rows), 65_536):
        block = unit(rows[first : first + 65_536], rows.shape[1])
        started = time.perf_counter()
        faiss.knn(sample, block, min(K, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        seconds += time.perf_counter() - started
    return len(sample) / seconds


def status(key: str) -> int:
    """Bytes of a field of /proc/self/status.

    VmHWM: peak memory (getrusage would count the parent's before exec). RssAnon: present memory
    that is not backed by a file.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
