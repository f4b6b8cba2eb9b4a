"""Searches in 1.28 million nested embeddings: ours beside faiss, each with its recall of the exact neighbours.

    python bench/retrieval.py --work FOLDER [--rows 1280000] [--truth 10000] [--threads 2]

The data are synthetic: parents, classes, uneven sub-clusters, log-normal noise, earlier dimensions vary more, softplus,
rows shuffled, float16; recall is a property of these data, not of a trained model. They and the exact neighbours are
kept in FOLDER (5.3 GB) and used again. scans: prefixes alone, recall@k of their own neighbours; pipelines: recall@10 of
the whole embedding, with a 95 % lower bound. Every competitor takes the same queries, in turns, wall time; faiss runs
with as many threads, passive waiting and one BLAS thread, without which two thread pools fight.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when the libraries are loaded
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from record import append, spread

from matryoshka.retrieval import BinaryScan, InvertedFile, PrefixScan, Stage, exact_search, rerank
from matryoshka.retrieval.hits import memory, unit
from matryoshka.retrieval.metrics import recall_against_exact, summarise_recall
from matryoshka.retrieval.rerank import head_of

WIDTH, HEAD, K = 2048, 256, 10
BLOCK = 10_000  # points that are made together
BATCHES = (1, 32, 1000)
ALL = ("scans", "pipelines", "graphs")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", required=True, type=Path, help="folder for data and truth")
    p.add_argument("--rows", type=int, default=1_280_000)
    p.add_argument("--truth", type=int, default=10_000, help="queries with exact neighbours")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--seconds", type=float, default=1.0, help="of a turn, about")
    p.add_argument("--lists", type=int, default=0, help="of the inverted files; 0: 4 x sqrt(rows)")
    p.add_argument("--only", nargs="+", choices=ALL, default=ALL, help="graphs: peers of the pipelines")
    p.add_argument("--no-record", action="store_true", help="do not append to bench/results/")
    args = p.parse_args(argv)
    import torch

    torch.set_num_threads(args.threads)
    rows, queries, truth = prepared(args)
    found = []
    if "scans" in args.only:
        found += scans(rows, queries, args)
    if "pipelines" in args.only:
        found += pipelines(rows, queries, truth, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory {peak / 1e9:.1f} GB, of which {anonymous() / 1e9:.1f} GB is no file's (peers' indexes, too)")
    if not args.no_record:
        print(f"rows     {append('retrieval', found)}")
    return 0


# ---------------------------------------------------------------- data


def prepared(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows float16 [N, 2048] in a memory map, queries float32 [Q, 2048], exact neighbours int64 [Q, 10])."""
    args.work.mkdir(parents=True, exist_ok=True)
    stored, asked, known = (args.work / f"{name}_{args.rows}_{args.truth}.npy" for name in ("rows", "queries", "truth"))
    if not known.exists():
        print(f"making {args.rows:,} rows", flush=True)
        generate(stored, asked, args.rows, args.truth, threads=args.threads)
        rows, queries = np.lib.format.open_memmap(stored, "r"), np.lib.format.open_memmap(asked, "r")
        started = time.perf_counter()
        truth = exact_search(rows, queries, WIDTH, K).ids
        print(f"exact neighbours of {len(queries):,} queries: {time.perf_counter() - started:.0f} s", flush=True)
        np.save(known, truth)
    return tuple(np.lib.format.open_memmap(path, "r") for path in (stored, asked, known))  # type: ignore[return-value]


def generate(stored: Path, asked: Path, rows: int, queries: int, seed: int = 0, threads: int = 2) -> None:
    """A block of points is a function of (seed, its number), so that threads may make them in any order."""
    rng = np.random.default_rng(seed)
    scale = ((1 + np.arange(WIDTH) / 16) ** -0.6).astype(np.float32)
    parents = rng.standard_normal((50, WIDTH), dtype=np.float32)
    classes = parents[rng.integers(0, 50, 1000)] + 0.8 * rng.standard_normal((1000, WIDTH), dtype=np.float32)
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
        # the centre of a sub-cluster is a function of its number, as 64,000 of them would take 0.5 GB
        for mine in np.split(order, np.flatnonzero(np.diff(sub[order])) + 1):
            raw[mine] += 0.5 * np.random.default_rng((seed, 2, sub[mine[0]])).standard_normal(WIDTH, dtype=np.float32)
        raw *= scale
        return np.log1p(np.exp(raw, out=raw), out=raw)

    def fill(out: np.ndarray, first_block: int) -> None:
        def one(first: int) -> None:
            part = out[first : first + BLOCK]
            part[:] = points(first_block + first // BLOCK, len(part))

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, range(0, len(out), BLOCK)))

    temporary = stored.with_suffix(".tmp")
    out = np.lib.format.open_memmap(temporary, "w+", np.float16, (rows, WIDTH))
    whole = np.empty((queries, WIDTH), np.float32)
    fill(out, 0)
    fill(whole, -(-rows // BLOCK))
    out.flush()
    np.save(asked, whole)
    os.replace(temporary, stored)


# ---------------------------------------------------------------- measuring

Search = Callable[[np.ndarray], np.ndarray]  # queries -> ids


def rates(
    searches: dict[str, Search], queries: np.ndarray, args: argparse.Namespace
) -> dict[str, dict[int, list[float]]]:
    """Queries per second of wall time by batch; competitors take turns."""
    found: dict[str, dict[int, list[float]]] = {name: {} for name in searches}
    for batch in sorted({min(batch, len(queries)) for batch in BATCHES}):
        for turn in range(args.turns + 1):
            for name, search in searches.items():
                done, started = 0, time.perf_counter()
                while done == 0 or time.perf_counter() - started < args.seconds:
                    first = done * 7 % max(1, len(queries) - batch + 1)
                    search(queries[first : first + batch])
                    done += batch
                if turn:
                    found[name].setdefault(batch, []).append(done / (time.perf_counter() - started))
    return found


def scans(rows: np.ndarray, queries: np.ndarray, args: argparse.Namespace) -> list[dict]:
    """k = 200 in one prefix, ours over faiss' flat indexes."""
    import faiss

    faiss.omp_set_num_threads(args.threads)
    out, k = [], min(200, len(rows))
    for dim in (16, 64):
        prefixes = memory((len(rows), dim), np.float32)
        for first in range(0, len(rows), 65_536):
            prefixes[first : first + 65_536] = unit(rows[first : first + 65_536], dim)
        ours, flat = PrefixScan.build(rows, dim, args.threads), faiss.IndexFlatIP(dim)
        flat.add(prefixes)
        asked = unit(queries, dim)
        out += compared(f"int8 scan, {dim} dims", {
            "matryoshka": lambda q, ours=ours: ours.search(q, k).ids,
            "faiss FlatIP": lambda q, flat=flat, dim=dim: flat.search(unit(q, dim), k)[1],
        }, queries, flat.search(asked[:500], k)[1], args)  # fmt: skip
    for dim in (64, 256):
        bits = BinaryScan.build(rows, dim, args.threads)

        def codes(vectors: np.ndarray, dim: int = dim, bits: BinaryScan = bits) -> np.ndarray:
            return np.packbits(unit(vectors, dim) > bits.medians, axis=1, bitorder="little")

        flat = faiss.IndexBinaryFlat(dim)
        for first in range(0, len(rows), 65_536):
            flat.add(codes(rows[first : first + 65_536]))
        out += compared(f"binary scan, {dim} bits", {
            "matryoshka": lambda q, bits=bits: bits.search(q, k).ids,
            "faiss BinaryFlat": lambda q, flat=flat, codes=codes: flat.search(codes(q), k)[1],
        }, queries, None, args)  # fmt: skip
    return out


def compared(
    case: str, searches: dict[str, Search], queries: np.ndarray, truth, args: argparse.Namespace
) -> list[dict]:
    measured = rates(searches, queries, args)
    names = list(searches)
    out = []
    for batch in measured[names[0]]:
        pairs = zip(measured[names[0]][batch], measured[names[1]][batch], strict=True)
        ratio = [a / b for a, b in pairs]
        row = {"case": case, "batch": batch, "threads": args.threads, "rows": args.rows, "peer": names[1],
               "ratio": spread(ratio)}  # fmt: skip
        row |= {f"{name} q/s": spread(measured[name][batch]) for name in names}
        text = "  ".join(f"{name} {median(measured[name][batch]):,.0f} q/s" for name in names)
        print(f"{case:24} batch {batch:5}  {median(ratio):6.1f}x  {text}", flush=True)
        out.append(row)
    if truth is not None:
        share = recall_against_exact(searches["matryoshka"](queries[: len(truth)]), truth).mean()
        print(f"{case:24} finds {100 * share:.1f} % of the prefix's own {truth.shape[1]}", flush=True)
        out[-1]["of the prefix's own"] = float(share)
    return out


def pipelines(rows: np.ndarray, queries: np.ndarray, truth: np.ndarray, args: argparse.Namespace) -> list[dict]:
    """Shortlists and re-ranking to 2048 dimensions; exact search for scale."""
    import faiss

    faiss.omp_set_num_threads(args.threads)
    head, t = head_of(rows, HEAD), args.threads
    started = time.perf_counter()
    scan, bits = PrefixScan.build(rows, 64, t), BinaryScan.build(rows, 256, t)
    file = InvertedFile.build(rows, 64, args.lists, num_threads=t)
    print(f"built in {time.perf_counter() - started:.0f} s: int8-64, 256 bits, {len(file.starts)} lists of int8-64")
    points = np.concatenate([unit(rows[i : i + 65_536], 64) for i in range(0, len(rows), 65_536)])
    peers = faiss_files(points, len(file.starts))

    def then(search: Callable[[np.ndarray], np.ndarray], stages: list[Stage]) -> Search:
        return lambda q: rerank(rows, q, search(q), stages, head, t).ids

    full, staged = [Stage(WIDTH, K)], [Stage(HEAD, 40), Stage(WIDTH, K)]
    short = [Stage(HEAD, 25), Stage(WIDTH, K)]
    searches: dict[str, Search] = {
        "int8-64 k100 -> 2048": then(lambda q: scan.search(q, 100).ids, full),
        "int8-64 k100 -> 256 (25) -> 2048": then(lambda q: scan.search(q, 100).ids, short),
        "bits-256 k800 -> 2048": then(lambda q: bits.search(q, 800).ids, full),
        "bits-256 k800 -> 64 (120) -> 256 (25) -> 2048": then(
            lambda q: bits.search(q, 800).ids, [Stage(64, 120), Stage(HEAD, 25), Stage(WIDTH, K)]),
    }  # fmt: skip
    for probes, k in ((8, 100), (32, 100), (32, 200), (64, 200)):

        def listed(q: np.ndarray, probes: int = probes, k: int = k) -> np.ndarray:
            return file.search(q, k, probes).ids

        searches[f"IVF int8-64 np{probes} k{k} -> 2048"] = then(listed, full)
        searches[f"IVF int8-64 np{probes} k{k} -> 256 -> 2048"] = then(listed, staged if k > 100 else short)
    for name, index in peers.items():
        for probes, k in ((8, 100), (32, 200)):

            def theirs(q: np.ndarray, index=index, probes: int = probes, k: int = k) -> np.ndarray:
                index.nprobe = probes
                return index.search(unit(q, 64), k)[1]

            searches[f"{name} np{probes} k{k} -> 256 -> 2048 (our re-rank)"] = then(
                theirs, staged if k > 100 else short
            )

    if "graphs" in args.only:
        searches |= graphs(points, rows, head, args)
    searches |= upstream(rows)
    exact = exact_rate(rows, queries)
    print(f"exact, 2048 dims: {exact:.1f} q/s (faiss, flat, batch 1000)", flush=True)
    print(f"{'pipeline':58} {'recall@10':>9} {'at least':>8} {'b1':>8} {'b32':>8} {'b1000':>8} {'x exact':>8}")
    out = [{"case": "exact", "threads": t, "rows": args.rows, "q/s": exact}]
    measured = rates(searches, queries, args)
    for name, search in searches.items():
        ids = np.concatenate([search(queries[i : i + 1000]) for i in range(0, len(truth), 1000)])
        summary = summarise_recall(recall_against_exact(ids, truth), K)
        by_batch = {str(b): spread(values) for b, values in measured[name].items() if values}
        fastest = by_batch[str(max(map(int, by_batch)))]["median"]
        print(f"{name:58} {summary.mean:9.4f} {summary.lower:8.4f} "
              + " ".join(f"{row['median']:8,.0f}" for row in by_batch.values()) + f" {fastest / exact:8.0f}",
              flush=True)  # fmt: skip
        out.append({"case": name, "threads": t, "rows": args.rows, "queries": len(truth), "recall": summary.mean,
                    "lower": summary.lower, "q/s": by_batch, "x exact": fastest / exact})  # fmt: skip
    return out


def graphs(points: np.ndarray, rows: np.ndarray, head: np.ndarray, args: argparse.Namespace) -> dict[str, Search]:
    """Peers that are graphs of the 64-d prefixes, with our re-ranking: the paper's HNSW32, and usearch's."""
    import faiss

    k, started = min(200, len(points)), time.perf_counter()
    graph = faiss.IndexHNSWFlat(64, 32)
    graph.add(points)
    print(f"built in {time.perf_counter() - started:.0f} s: faiss HNSW32", flush=True)
    found: dict[str, Search] = {}
    stages = [Stage(HEAD, 40), Stage(WIDTH, K)]
    for ef in (200, 400):

        def hnsw(q: np.ndarray, ef: int = ef) -> np.ndarray:
            options = faiss.SearchParametersHNSW(efSearch=ef)  # pyright: ignore[reportAttributeAccessIssue]
            return rerank(rows, q, graph.search(unit(q, 64), k, params=options)[1], stages, head, args.threads).ids

        found[f"faiss HNSW32 64 ef{ef} k200 -> 256 -> 2048 (our re-rank)"] = hnsw
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
        ids = keys.reshape(len(q), -1).astype(np.int64)
        return rerank(rows, q, ids, stages, head, args.threads).ids

    return found | {"usearch M16 f16 64 ef200 k200 -> 256 -> 2048 (our re-rank)": usearch}


def upstream(rows: np.ndarray) -> dict[str, Search]:
    """The paper's notebooks, from their description: faiss' flat L2 index of the first 16 dimensions, 200 neighbours,
    put in order by the distance of longer normalised prefixes, in NumPy, one query after the other."""
    import faiss

    flat = faiss.IndexFlatL2(16)
    for first in range(0, len(rows), 65_536):
        flat.add(unit(rows[first : first + 65_536], 16))

    def search(q: np.ndarray, stages: list[tuple[int, int]]) -> np.ndarray:
        out = np.empty((len(q), K), np.int64)
        for i, shortlist in enumerate(flat.search(unit(q, 16), min(200, len(rows)))[1]):
            kept = shortlist
            for dim, looked_at in stages:
                kept = kept[:looked_at]
                distance = ((unit(rows[kept], dim) - unit(q[i : i + 1], dim)) ** 2).sum(1)
                kept = kept[np.argsort(distance, kind="stable")]
            out[i] = kept[:K]
        return out

    funnel = [(32, 200), (64, 100), (128, 50), (256, 25), (2048, 10)]
    return {
        "upstream: FlatL2 16 k200 -> 2048 (NumPy)": lambda q: search(q, [(WIDTH, 200)]),
        "upstream: FlatL2 16 -> funnel 200,100,50,25,10 (NumPy)": lambda q: search(q, funnel),
    }


def exact_rate(rows: np.ndarray, queries: np.ndarray) -> float:
    """Queries per second of faiss' flat search of whole float32 rows. Block by block, as all of them take 10 GB; making
    a block is not counted, so that it is what IndexFlatIP would do."""
    import faiss

    asked, seconds = unit(queries[:1000], WIDTH), 0.0
    for first in range(0, len(rows), 65_536):
        block = unit(rows[first : first + 65_536], WIDTH)
        started = time.perf_counter()
        faiss.knn(asked, block, min(K, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        seconds += time.perf_counter() - started
    return len(asked) / seconds


def faiss_files(points: np.ndarray, lists: int) -> dict:
    import faiss

    quantizer = faiss.IndexFlatIP(64)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, 64, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.train(points[:: max(1, len(points) // (64 * lists))])
    index.add(points)
    return {"faiss IVF,SQ8 64": index}


def anonymous() -> int:
    """Bytes of memory that belong to no file, now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
