"""Nearest neighbours of every query: how good, how fast, and how much of exact search they keep.

    matryoshka retrieve --database embeddings/train --queries embeddings/val --output neighbours
    matryoshka retrieve ... --index ivf --nprobe 32 --shortlist-dim 64 --k 200 --rerank-dim 2048
    matryoshka retrieve ... --funnel 16,32,64,128,256,2048 --funnel-k 200,100,50,25,10
    matryoshka retrieve ... --sweep --target-recall 0.99
    matryoshka retrieve serve photos.index

A shortlist of --k rows by the first --shortlist-dim numbers is put in order by the first
--rerank-dim. --funnel is the paper's notation: 200 rows by 16 numbers, of them the 100 best by 32,
and so on. Written are ids.npy (int64), distances.npy (squared, of normalised prefixes: 2 - 2
cosine) and results.json. --sweep tries many settings and prints the fastest whose recall of the
exact neighbours is certain. --database may be an index of `matryoshka index`, too: then the sweep
can become its default, with --choose. docs/retrieval.md has the rest.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # two thread pools that spin fight: a third of the speed

import numpy as np
import torch

from matryoshka import config
from matryoshka.embeddings.reading import META, WORK
from matryoshka.files import write_atomically
from matryoshka.retrieval import RetrievalError, Searcher, Setting, Stage
from matryoshka.retrieval import metrics as m
from matryoshka.retrieval.options import retrieve_parser as parser
from matryoshka.retrieval.store import MANIFEST
from matryoshka.retrieval.tables import Table, notes, open_pair, open_table

BATCH = 1000  # queries that are searched together
TOGETHER = 4000  # exactly: each pass converts all rows; 260 MB of scores
ANYWAY = 10  # neighbours whose recall of the exact ones is measured
SINGLE, FEWEST = 1000, 200  # queries, one by one, for the latency; where they take more than 10 s
TURNS = 5


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)  # of exact search
    database, queries = open_pair(
        open_table(args.database, args.threads), open_table(args.queries, args.threads)
    )
    print(f"database {args.database}: {len(database):,} x {database.columns}")
    print(f"queries  {args.queries}: {len(queries):,}")
    for text in notes(database, queries):
        print(f"note: {text}")
    if args.sweep:
        from matryoshka.inference import retrieve_sweep  # pyright: ignore[reportMissingImports]

        return retrieve_sweep.sweep(args, database, queries)
    return one(args, database, queries)


def check(args: Namespace) -> None:
    """ConfigError for options that contradict each other."""
    if (args.funnel is None) != (args.funnel_k is None):
        raise config.ConfigError("--funnel and --funnel-k: give both, one k less than prefixes")
    if args.funnel and not (args.k is args.shortlist_dim is args.rerank_dim is None):
        raise config.ConfigError(
            "--funnel gives all prefixes and k: leave out --k, --shortlist-dim and --rerank-dim"
        )
    if args.funnel:
        try:
            Setting.funnel(args.index or "scan", list(args.funnel), list(args.funnel_k))
        except RetrievalError as error:
            raise config.ConfigError(f"--funnel, --funnel-k: {error}") from None
    first = args.funnel[0] if args.funnel else args.shortlist_dim
    if args.index == "binary" and first and first % 64:
        option = "--funnel" if args.funnel else "--shortlist-dim"
        raise config.ConfigError(f"{option} {first}: binary takes multiples of 64")
    if args.rerank_dim and args.index != "binary" and args.rerank_dim < (args.shortlist_dim or 1):
        raise config.ConfigError(
            f"--rerank-dim {args.rerank_dim}: is below --shortlist-dim {args.shortlist_dim}"
        )
    if args.index and "," in args.index and not args.sweep:
        raise config.ConfigError(f"--index {args.index}: one, or several with --sweep")
    single = {
        "--k": args.k,
        "--rerank-dim": args.rerank_dim,
        "--funnel": args.funnel,
        "--nprobe": args.nprobe,
        "--ef": args.ef,
        "--at": args.at,
        "--no-speed": args.no_speed or None,
    }
    given = [option for option, value in single.items() if value is not None]
    if args.sweep and given:
        raise config.ConfigError(
            f"{', '.join(given)}: --sweep decides and measures by itself; leave it out"
        )
    if args.sweep and not args.truth:
        raise config.ConfigError("--sweep measures recall: --truth must be 1 or more")
    if (args.choose or args.target_recall is not None) and not args.sweep:
        raise config.ConfigError(
            f"--{'choose' if args.choose else 'target-recall'}: goes with --sweep"
        )
    args.target_recall = args.target_recall or 0.99
    output = Path(args.output)
    if not next(place for place in (output, *output.absolute().parents) if place.exists()).is_dir():
        raise config.ConfigError(
            f"--output {output}: is in the way or below a file; choose another folder"
        )
    for name in (META, WORK, MANIFEST):  # ids.npy is a name of both
        if (output / name).exists():
            what = "an index" if name == MANIFEST else "embeddings"
            raise config.ConfigError(
                f"--output {output}: holds {what} ({name}); choose another folder"
            )
    done = output / ("sweep.json" if args.sweep else "results.json")
    if done.exists() and not args.overwrite:
        raise config.ConfigError(f"{done}: exists; choose another --output, or add --overwrite")


def wanted(args: Namespace, database: Table) -> Setting:
    """The one setting that the options say."""
    own = database.index
    chosen = (
        args.index,
        args.k,
        args.shortlist_dim,
        args.rerank_dim,
        args.nprobe,
        args.ef,
        args.funnel,
    )
    if own and all(value is None for value in chosen):
        args.at = args.at or [ANYWAY]
        return own.setting.giving(min(max(args.at), len(database)))
    args.at = args.at or [10, 25, 50, 100]
    for option, dims in (
        ("--shortlist-dim", [args.shortlist_dim]),
        ("--rerank-dim", [args.rerank_dim]),
        ("--funnel", args.funnel or []),
    ):
        if (most := max((d or 0 for d in dims), default=0)) > database.columns:
            raise config.ConfigError(
                f"{option} {most}: {database.path} has {database.columns} dimensions"
            )
    index = args.index or (own.setting.index if own else "scan")
    for option, value, needs in (("--nprobe", args.nprobe, "ivf"), ("--ef", args.ef, "hnsw")):
        if value is not None and index != needs:
            raise config.ConfigError(f"{option} {value}: goes with --index {needs}, not {index}")
    effort = (args.ef or 200) if index == "hnsw" else (args.nprobe or 32)
    longest = max(args.funnel_k or [args.k or 0])
    if longest > len(database):
        print(f"note: a shortlist of {longest:,}: the database has no more than {len(database):,}")
    if args.funnel:
        return Setting.funnel(
            index, args.funnel, [min(k, len(database)) for k in args.funnel_k], effort
        )
    rerank_dim = database.columns if args.rerank_dim is None else args.rerank_dim
    k = min(args.k or 200, len(database))
    dim = args.shortlist_dim or (own.dim if own and index != "exact" else min(64, database.columns))
    if index == "exact" and args.shortlist_dim is None:
        dim, rerank_dim = (
            database.columns if args.rerank_dim is None else args.rerank_dim or database.columns,
            0,
        )
    return Setting(
        index,
        dim,
        k,
        (Stage(rerank_dim, min(k, max(*args.at, ANYWAY))),) if rerank_dim else (),
        effort,
    )


Search = Callable[[np.ndarray, Setting], Any]


def searcher(args: Namespace, database: Table) -> tuple[Search, Callable[[], int]]:
    """(queries, setting) -> Hits; and what the indexes take, bytes."""
    index = database.index
    if index is None:
        made = Searcher(database.rows, args.threads, args.seed)
        return made.search, lambda: made.nbytes
    index.warm()
    heads = sum(part.head.nbytes for part in index.parts if part.head is not None)
    codes = sum(part.shortlist.nbytes for part in index.parts)
    return lambda q, setting: index.search(q, setting.results, setting), lambda: heads + codes


def truth(args: Namespace, database: Table, queries: Table) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [T, D], int64 [T, 10]): some queries, and the exact neighbours of their whole width."""
    count = min(args.truth, len(queries))
    rows = np.sort(np.random.default_rng(args.seed).permutation(len(queries))[:count])
    asked = np.asarray(queries.rows[rows], np.float32)
    k = min(ANYWAY, len(database))
    ids = [
        database.exact(asked[first : first + TOGETHER], k) for first in range(0, count, TOGETHER)
    ]
    exact = np.concatenate(ids) if ids else np.empty((0, k), np.int64)
    if count and (exact < 0).all():
        raise RetrievalError(
            f"{database.path}, {queries.path}: one of them has NaN or infinity in every row"
        )
    return asked, exact


def one(args: Namespace, database: Table, queries: Table) -> int:
    """A single setting, written and measured."""
    setting = wanted(args, database)
    if min(args.at) > setting.results:
        raise config.ConfigError(
            f"--at {min(args.at)}: {setting} returns {setting.results}; give a longer --k"
        )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)  # an error of it shall not come after an hour
    search, nbytes = searcher(args, database)
    started = time.perf_counter()
    search(np.asarray(queries.rows[:1], np.float32), setting)
    built = time.perf_counter() - started
    found = [
        search(np.asarray(queries.rows[i : i + BATCH], np.float32), setting)
        for i in range(0, len(queries), BATCH)
    ]
    keep = min(max(args.at), found[0].ids.shape[1])
    ids = np.concatenate([hits.ids[:, :keep] for hits in found])
    cosines = np.concatenate([hits.scores[:, :keep] for hits in found])
    at = [k for k in args.at if k <= keep]
    if len(at) < len(args.at):
        print(
            f"note: {setting} returns {keep}: --at "
            f"{','.join(str(k) for k in args.at if k > keep)} left out"
        )
    results: dict[str, Any] = {
        "setting": describe(setting),
        "database": str(args.database),
        "queries": str(args.queries),
        "rows": len(database),
        "columns": database.columns,
        "count": len(queries),
        "neighbours": keep,
        "mflops": setting.mflops(len(database)),
        "build_seconds": round(built, 3),
    }
    print(f"setting  {setting}")
    print(f"MFLOPs   {results['mflops']:,.2f} a query, by the paper's formula")
    if database.labels is not None and queries.labels is not None:
        results["classes"] = against_classes(ids, database.labels, queries.labels, at)
    else:
        print("note: no labels on both sides: no mAP, precision and recall")
    asked, exact = truth(args, database, queries)
    if len(exact):
        shown = np.concatenate(
            [search(asked[i : i + BATCH], setting).ids for i in range(0, len(asked), BATCH)]
        )
        k = min(
            exact.shape[1], shown.shape[1]
        )  # fewer are not to be found by a funnel that ends with 5
        recall = m.recall_against_exact(shown[:, :k], exact[:, :k])
        results["exact"] = against_exact(m.summarise_recall(recall, k), k)
    if not args.no_speed:
        results["speed"] = speed(search, setting, queries, args.batches)
    results["memory"] = memory(nbytes())
    (output / "results.json").unlink(missing_ok=True)  # those of other arrays
    with np.errstate(invalid="ignore"):
        distances = np.where(ids < 0, np.inf, np.maximum(2 - 2 * cosines, 0)).astype(np.float32)
    write_npy(output / "ids.npy", ids)
    write_npy(output / "distances.npy", distances)
    write_atomically(
        output / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode()
    )
    print(f"written  {output}: ids.npy, distances.npy [{len(ids)}, {keep}], results.json")
    return 0


def describe(setting: Setting) -> dict[str, Any]:
    about = {
        "index": setting.index,
        "dim": setting.dim,
        "k": setting.k,
        "stages": [list(s) for s in setting.stages],
    }
    return about | ({"effort": setting.effort} if setting.index in ("ivf", "hnsw") else {})


def against_classes(
    ids: np.ndarray, labels: np.ndarray, query_labels: np.ndarray, at: Sequence[int]
) -> dict[str, Any]:
    """Top-1 and, for each k, both forms of mAP, P and recall; prints them as a table."""
    right, relevant = m.hits(ids, labels, query_labels), m.relevant_rows(labels, query_labels)
    excluded = int((relevant == 0).sum())
    print(
        f"\ntop-1 {100 * m.top1(right):.2f} %"
        + (f"   ({excluded:,} queries without a row of their class)" if excluded else "")
    )
    print(
        f"{'k':>5} {'mAP@k, / k (paper)':>19} {'mAP@k, / min(k, R)':>19} {'P@k':>7} {'recall@k':>9}"
    )
    rows = {}
    for k in at:
        paper, usual = (
            m.mean_average_precision(right, k),
            m.mean_average_precision(right, k, relevant, "min"),
        )
        recall = m.recall_at(right, k, relevant)
        rows[str(k)] = {
            "map_over_k": number(paper.value),
            "map_over_min": number(usual.value),
            "precision": number(m.precision_at(right, k)),
            "recall": number(recall.value),
        }
        print(
            f"{k:5} {100 * paper.value:19.2f} {100 * usual.value:19.2f} "
            f"{100 * m.precision_at(right, k):7.2f} "
            f"{100 * recall.value:9.2f}"
        )
    print()
    return {"top1": number(m.top1(right)), "excluded": excluded, "at": rows}


def against_exact(summary: m.RecallSummary, k: int) -> dict[str, Any]:
    lost = summary.at_most(k // 2)
    print(
        f"recall   of the exact {k}: {summary.mean:.4f}, with 95 % confidence "
        f"{summary.lower:.4f} or more"
    )
    shares = f"{100 * summary.perfect:.1f} % found all, {100 * lost:.1f} % half or less"
    bad = f" ({summary.excluded:,} more have NaN or infinity)" if summary.excluded else ""
    print(f"         {summary.queries:,} queries: {shares}{bad}")
    return {
        "k": k,
        "queries": summary.queries,
        "recall": number(summary.mean),
        "lower": number(summary.lower),
        "standard_error": number(summary.standard_error),
        "interval": [number(x) for x in summary.interval],
        "perfect": number(summary.perfect),
        "half_lost": number(lost),
        "found": summary.found.tolist(),
    }


def speed(
    search: Search, setting: Setting, queries: Table, batches: Sequence[int]
) -> dict[str, Any]:
    """Queries per second of wall time by batch, median of TURNS; latency of single ones."""
    pool = np.asarray(
        queries.rows[: max(10 * max(batches), SINGLE)], np.float32
    )  # the same rows would be in the cache
    rates = {}
    for batch in sorted({min(b, len(pool)) for b in batches}):
        turns = []
        for turn in range(TURNS + 1):
            done, started = 0, time.perf_counter()
            while done == 0 or time.perf_counter() - started < 0.2:
                first = done * 7 % (len(pool) - batch + 1)
                search(pool[first : first + batch], setting)
                done += batch
            if turn:
                turns.append(done / (time.perf_counter() - started))
        rates[str(batch)] = {
            "median": float(np.median(turns)),
            "min": min(turns),
            "max": max(turns),
        }
    single = []
    begun = time.perf_counter()
    for i in range(min(SINGLE, len(pool))):
        started = time.perf_counter()
        if i >= FEWEST and started - begun > 10:
            break
        search(pool[i : i + 1], setting)
        single.append(1000 * (time.perf_counter() - started))
    p50, p99 = np.percentile(single, [50, 99])
    print(
        "speed    "
        + ", ".join(
            f"batch {b}: {r['median']:,.0f} queries/s ({r['min']:,.0f} to {r['max']:,.0f})"
            for b, r in rates.items()
        )
    )
    print(f"latency  p50 {p50:.2f} ms, p99 {p99:.2f} ms of {len(single):,} single queries")
    return {
        "batches": rates,
        "latency_ms": {"p50": float(p50), "p99": float(p99), "queries": len(single)},
    }


def memory(index_bytes: int) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    anonymous = None
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        found = {
            key: int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "VmHWM") if key in lines
        }
        anonymous, peak = (
            found.get("RssAnon"),
            found.get("VmHWM", peak),
        )  # getrusage counts the parent before exec, too
    text = "" if anonymous is None else f", {anonymous / 1e9:.2f} GB that is no file's now"
    print(
        f"memory   index {index_bytes / 1e6:,.1f} MB; this process at most {peak / 1e9:.2f} "
        f"GB{text}"
    )
    return {"index_bytes": index_bytes, "peak_bytes": peak, "anonymous_bytes": anonymous}


def number(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None


def write_npy(path: Path, array: np.ndarray) -> None:
    import io

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    write_atomically(path, header.getvalue(), np.ascontiguousarray(array).data.cast("B"))


if __name__ == "__main__":
    raise SystemExit(main())
