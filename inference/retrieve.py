"""Find the nearest neighbours of every query; measure their quality, recall and speed.

    matryoshka retrieve --database embeddings/train --queries embeddings/val --output neighbours
    matryoshka retrieve ... --index ivf --nprobe 32 --shortlist-dim 64 --k 200 --rerank-dim 2048
    matryoshka retrieve ... --funnel 16,32,64,128,256,2048 --funnel-k 200,100,50,25,10
    matryoshka retrieve ... --sweep --target-recall 0.99
    matryoshka retrieve serve photos.index

A search takes a shortlist of --k rows by the first --shortlist-dim dimensions and orders it by the
first --rerank-dim. --funnel is the paper's notation: 200 rows by 16 dimensions, of these the 100
best by 32, and so on. The program writes ids.npy (int64), distances.npy (squared distances of
normalised prefixes, 2 - 2 cosine) and results.json. --sweep tries many settings and prints the
fastest one that meets a bound on recall with confidence. --database may be an index of `matryoshka
index`; --choose then makes the result of the sweep its default. See docs/retrieval.md.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Two spinning thread pools compete for the cores: a third of the speed is lost. Read at import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from matryoshka import config
from matryoshka.retrieval.options import retrieve_parser as parser

if __name__ == "__main__" and sys.argv[1:2] != ["serve"]:  # main refuses it with a hint
    config.check_first(parser())  # torch takes two seconds to import

import numpy as np
import torch
from tqdm import tqdm

from matryoshka.embeddings.reading import META, WORK
from matryoshka.files import write_atomically
from matryoshka.retrieval import Engine, SearchParams, sweep_report
from matryoshka.retrieval import ranking_metrics as metrics
from matryoshka.retrieval.adapted import adapt_table
from matryoshka.retrieval.params import SearchOptions
from matryoshka.retrieval.store import MANIFEST
from matryoshka.retrieval.store_writer import Writer
from matryoshka.retrieval.sweep import (
    Measured,
    certified,
    frontier,
    grid,
    measure,
    remeasure_frontier,
)
from matryoshka.retrieval.sweep_report import finite
from matryoshka.retrieval.tables import Table, exact_neighbours, notes, open_pair, open_table

BATCH = 1000  # queries per search
RECALL_K = 10  # neighbours of the recall against exact search
DEFAULT_AT = (10, 25, 50, 100)  # k of the metrics, as in the paper
SWEPT_INDEXES = ("scan", "ivf", "binary")

# Speed measurements.
TURNS = 5
SINGLE_QUERIES = 1000  # for the latency
MIN_SINGLE_QUERIES = 200  # if they take more than 10 s


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["serve"]:
        raise config.ConfigError(
            "serve is a program of its own: `matryoshka retrieve serve`, or inference/serve.py"
        )
    args = parser().parse_args(argv)
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)  # of exact search
    tables = [open_table(args.database, args.threads), open_table(args.queries, args.threads)]
    if args.adapter:
        tables = [adapt_table(table, args.adapter) for table in tables]
    database, queries = open_pair(*tables)
    print(f"database {args.database}: {len(database):,} x {database.columns}")
    print(f"queries  {args.queries}: {len(queries):,}")
    for text in notes(database, queries):
        print(f"note: {text}")
    if args.sweep:
        return run_sweep(args, database, queries)
    return run_single(args, database, queries)


# ---------------------------------------------------------------- options


def check(args: SimpleNamespace) -> None:
    """ConfigError for options that contradict each other, and for a bad --output."""
    search_options(args).check()
    if args.sweep:
        check_sweep(args)
    elif args.index and "," in args.index:
        raise config.ConfigError(f"--index {args.index}: expected one; --sweep takes several")
    if (args.choose or args.target_recall is not None) and not args.sweep:
        option = "--choose" if args.choose else "--target-recall"
        raise config.ConfigError(f"{option}: works with --sweep only")
    check_output(Path(args.output), args.sweep, args.overwrite)


def check_sweep(args: SimpleNamespace) -> None:
    """ConfigError for options that a sweep chooses or measures by itself."""
    single = {
        "--k": args.k,
        "--rerank-dim": args.rerank_dim,
        "--funnel": args.funnel,
        "--nprobe": args.nprobe,
        "--ef": args.ef,
        "--at": args.at,
        "--no-speed": args.no_speed or None,
    }
    unused = [option for option, value in single.items() if value is not None]
    if unused:
        raise config.ConfigError(
            f"{', '.join(unused)}: --sweep chooses and measures by itself; leave this out"
        )
    if not args.truth:
        raise config.ConfigError("--sweep measures recall: --truth must be 1 or more")


def check_output(output: Path, sweep: bool, overwrite: bool) -> None:
    """ConfigError for an --output that cannot be created, or holds other files of these names."""
    # Of the path's folders, those that do not exist yet are created later.
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise config.ConfigError(f"--output {output}: {existing} is a file, not a folder")
    for name in (META, WORK, MANIFEST):  # embeddings have an ids.npy, too
        if (output / name).exists():
            what = "an index" if name == MANIFEST else "embeddings"
            raise config.ConfigError(
                f"--output {output}: contains {what} ({name}); choose another folder"
            )
    done = output / ("sweep.json" if sweep else "results.json")
    if done.exists() and not overwrite:
        raise config.ConfigError(f"{done}: exists; choose another --output, or add --overwrite")


def search_options(args: SimpleNamespace) -> SearchOptions:
    """The options that select a search."""
    return SearchOptions(
        index=args.index,
        shortlist_dim=args.shortlist_dim,
        k=args.k,
        rerank_dim=args.rerank_dim,
        nprobe=args.nprobe,
        ef=args.ef,
        funnel=list(args.funnel) if args.funnel else None,
        funnel_k=list(args.funnel_k) if args.funnel_k else None,
    )


@dataclass(frozen=True)
class Request:
    """A single search. at: the k of its metrics. longest: rows of the shortlist that was asked for,
    0 if the options leave it open.
    """

    params: SearchParams
    at: list[int]
    longest: int = 0


def resolve_params(args: SimpleNamespace, database: Table) -> Request:
    """The search that the options select, clipped to the database's rows and columns."""
    options = search_options(args)
    at = list(args.at) if args.at else None
    own = database.index
    if own is not None and not options.are_set:
        at = at or [RECALL_K]
        return Request(own.params.with_k(min(max(at), len(database))), at)

    at = at or list(DEFAULT_AT)
    params = SearchParams.from_options(
        options,
        columns=database.columns,
        results=max(*at, RECALL_K),
        name=str(database.path),
        index=own.params.index if own else "scan",
        code_dim=own.dim if own else None,
    )
    longest = max(options.funnel_k or [options.k or 0])
    return Request(params.clipped(rows=len(database)), at, longest)


# ---------------------------------------------------------------- a single search


def run_single(args: SimpleNamespace, database: Table, queries: Table) -> int:
    """Search with one set of parameters, measure it, write the results."""
    request = resolve_params(args, database)
    params = request.params
    if request.longest > len(database):
        print(
            f"note: a shortlist of {request.longest:,}: the database has no more than "
            f"{len(database):,}"
        )
    if min(request.at) > params.results:
        raise config.ConfigError(
            f"--at {min(request.at)}: {params} returns {params.results}; give a longer --k"
        )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)  # fails now rather than after an hour of search

    # ---- search ----
    engine = database.engine(args.threads, args.seed)
    # The first search builds the index.
    started = time.perf_counter()
    engine.search(np.asarray(queries.rows[:1], np.float32), params)
    build_seconds = time.perf_counter() - started
    ids, cosines = search_batches(engine, params, queries.rows)
    keep = min(max(request.at), ids.shape[1])
    ids = ids[:, :keep]
    cosines = cosines[:, :keep]
    left_out = [k for k in request.at if k > keep]
    if left_out:
        print(f"note: {params} returns {keep}: --at {','.join(map(str, left_out))} left out")

    # ---- measurements ----
    results: dict[str, Any] = {
        "setting": params.as_dict(),
        "database": str(args.database),
        "queries": str(args.queries),
        "rows": len(database),
        "columns": database.columns,
        "count": len(queries),
        "neighbours": keep,
        "mflops": params.mflops(len(database)),
        "build_seconds": round(build_seconds, 3),
    }
    print(f"setting  {params}")
    print(f"MFLOPs   {results['mflops']:,.2f} per query, by the paper's formula")
    if database.labels is not None and queries.labels is not None:
        hits = metrics.class_hits(ids, database.labels, queries.labels)
        relevant = metrics.relevant_rows(database.labels, queries.labels)
        at = [k for k in request.at if k <= keep]
        results["classes"] = report_classes(hits, relevant, at)
    else:
        print("note: no labels on both sides: no mAP, precision and recall")
    sample, exact = exact_neighbours(
        database, queries, count=args.truth, k=RECALL_K, seed=args.seed
    )
    if len(exact):
        found, _ = search_batches(engine, params, sample)
        k = min(exact.shape[1], found.shape[1])  # a funnel may end with fewer than RECALL_K
        recall = metrics.recall_against_exact(found[:, :k], exact[:, :k])
        results["exact"] = report_recall(metrics.summarise_recall(recall, k), k)
    if not args.no_speed:
        results["speed"] = report_speed(engine, params, queries, args.batches)
    results["memory"] = report_memory(engine.memory_bytes)

    # ---- files; results.json comes last, and never describes other arrays ----
    (output / "results.json").unlink(missing_ok=True)
    with np.errstate(invalid="ignore"):
        distances = np.where(ids < 0, np.inf, np.maximum(2 - 2 * cosines, 0)).astype(np.float32)
    write_npy(output / "ids.npy", ids)
    write_npy(output / "distances.npy", distances)
    write_json(output / "results.json", results)
    print(f"written  {output}: ids.npy, distances.npy [{len(ids)}, {keep}], results.json")
    return 0


def search_batches(
    engine: Engine, params: SearchParams, queries: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and cosines of all queries, BATCH at a time."""
    found = []
    for first in range(0, len(queries), BATCH):
        part = np.asarray(queries[first : first + BATCH], np.float32)
        found.append(engine.search(part, params))
    ids = np.concatenate([hits.ids for hits in found])
    cosines = np.concatenate([hits.scores for hits in found])
    return ids, cosines


def report_classes(hits: np.ndarray, relevant: np.ndarray, at: Sequence[int]) -> dict[str, Any]:
    """Top-1 and, for each k, both forms of mAP, precision and recall; prints a table."""
    top1 = metrics.top1(hits)
    excluded = int((relevant == 0).sum())
    without = f"   ({excluded:,} queries without a row of their class)" if excluded else ""
    print(f"\ntop-1 {100 * top1:.2f} %{without}")
    print(
        f"{'k':>5} {'mAP@k, / k (paper)':>19} {'mAP@k, / min(k, R)':>19} {'P@k':>7} {'recall@k':>9}"
    )
    rows = {}
    for k in at:
        paper = metrics.mean_average_precision(hits, k).value
        usual = metrics.mean_average_precision(hits, k, relevant, "min").value
        precision = metrics.precision_at(hits, k)
        recall = metrics.recall_at(hits, k, relevant).value
        rows[str(k)] = {
            "map_over_k": finite(paper),
            "map_over_min": finite(usual),
            "precision": finite(precision),
            "recall": finite(recall),
        }
        print(
            f"{k:5} {100 * paper:19.2f} {100 * usual:19.2f} {100 * precision:7.2f} "
            f"{100 * recall:9.2f}"
        )
    print()
    return {"top1": finite(top1), "excluded": excluded, "at": rows}


def report_recall(summary: metrics.RecallSummary, k: int) -> dict[str, Any]:
    """Recall of the exact neighbours for results.json; prints it."""
    half_lost = summary.at_most(k // 2)
    print(
        f"recall   of the exact {k}: {summary.mean:.4f}, with 95 % confidence "
        f"{summary.lower:.4f} or more"
    )
    shares = f"{100 * summary.perfect:.1f} % found all, {100 * half_lost:.1f} % half or less"
    bad = f" ({summary.excluded:,} more have NaN or infinity)" if summary.excluded else ""
    print(f"         {summary.queries:,} queries: {shares}{bad}")
    return {
        "k": k,
        "queries": summary.queries,
        "recall": finite(summary.mean),
        "lower": finite(summary.lower),
        "standard_error": finite(summary.standard_error),
        "interval": [finite(x) for x in summary.interval],
        "perfect": finite(summary.perfect),
        "half_lost": finite(half_lost),
        "found": summary.found.tolist(),
    }


def report_speed(
    engine: Engine, params: SearchParams, queries: Table, batches: Sequence[int]
) -> dict[str, Any]:
    """Queries per second by batch size, median of TURNS, and the latency of single queries.

    Wall time. Batches move through the queries, because repeated ones would be in the cache.
    """
    # ---- batches ----
    pool = np.asarray(queries.rows[: max(10 * max(batches), SINGLE_QUERIES)], np.float32)
    rates = {}
    for batch in sorted({min(b, len(pool)) for b in batches}):
        turns = []
        for turn in range(TURNS + 1):
            done = 0
            started = time.perf_counter()
            while done == 0 or time.perf_counter() - started < 0.2:
                first = done * 7 % (len(pool) - batch + 1)
                engine.search(pool[first : first + batch], params)
                done += batch
            if turn:  # the first one warms up
                turns.append(done / (time.perf_counter() - started))
        rates[str(batch)] = {
            "median": float(np.median(turns)),
            "min": min(turns),
            "max": max(turns),
        }

    # ---- single queries ----
    milliseconds = []
    begun = time.perf_counter()
    for i in range(min(SINGLE_QUERIES, len(pool))):
        started = time.perf_counter()
        if i >= MIN_SINGLE_QUERIES and started - begun > 10:
            break
        engine.search(pool[i : i + 1], params)
        milliseconds.append(1000 * (time.perf_counter() - started))
    p50, p99 = np.percentile(milliseconds, [50, 99])

    shown = [
        f"batch {batch}: {rate['median']:,.0f} queries/s ({rate['min']:,.0f} to {rate['max']:,.0f})"
        for batch, rate in rates.items()
    ]
    print(f"speed    {', '.join(shown)}")
    print(f"latency  p50 {p50:.2f} ms, p99 {p99:.2f} ms of {len(milliseconds):,} single queries")
    return {
        "batches": rates,
        "latency_ms": {"p50": float(p50), "p99": float(p99), "queries": len(milliseconds)},
    }


def report_memory(index_bytes: int) -> dict[str, Any]:
    """Memory of the index and of this process; prints it."""
    # ru_maxrss is in bytes on macOS, in kilobytes on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    anonymous = None
    status = Path("/proc/self/status")
    if status.exists():
        # Preferred to getrusage, which counts the parent process before exec as well.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        sizes = {
            key: int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "VmHWM") if key in lines
        }
        anonymous = sizes.get("RssAnon")
        peak = sizes.get("VmHWM", peak)
    text = "" if anonymous is None else f", {anonymous / 1e9:.2f} GB now not backed by a file"
    print(
        f"memory   index {index_bytes / 1e6:,.1f} MB; this process {peak / 1e9:.2f} GB at its "
        f"peak{text}"
    )
    return {"index_bytes": index_bytes, "peak_bytes": peak, "anonymous_bytes": anonymous}


# ---------------------------------------------------------------- a sweep


def run_sweep(args: SimpleNamespace, database: Table, queries: Table) -> int:
    """Measure many searches; write the frontier and the certificate."""
    target = args.target_recall or 0.99
    candidates = sweep_candidates(args, database)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    outlook = sweep_report.outlook(
        target=target,
        tried=len(candidates),
        queries=min(args.truth, len(queries)),
        available=len(queries),
    )
    print(outlook, flush=True)  # before a sweep of minutes that may be in vain

    # ---- ground truth ----
    started = time.perf_counter()
    sample, exact = exact_neighbours(
        database, queries, count=args.truth, k=RECALL_K, seed=args.seed
    )
    exact_rate = len(sample) / (time.perf_counter() - started)
    print(
        f"exact    {len(sample):,} queries, {exact_rate:,.0f} queries/s; then {len(candidates)} "
        "settings"
    )

    # ---- measurements ----
    engine = database.engine(args.threads, args.seed)
    batch = min(max(args.batches), len(sample))

    def search(part: np.ndarray, params: SearchParams) -> np.ndarray:
        return engine.search(part, params).ids[:, : exact.shape[1]]

    bar = tqdm(candidates, leave=False, unit="setting", disable=not sys.stderr.isatty())
    measured = list(measure(search, bar, sample, exact, batch=batch, tried=len(candidates)))
    measured = remeasure_frontier(search, measured, sample, batch=batch, target=target)
    best = frontier(measured)
    chosen = certified(measured, target)

    # ---- results ----
    print(sweep_report.frontier_table(best, chosen, exact_rate=exact_rate, rows=len(database)))
    text = sweep_report.certificate_text(
        measured,
        chosen,
        target=target,
        k=exact.shape[1],
        queries=len(sample),
        available=len(queries),
        seed=args.seed,
    )
    print(text)
    title = f"{len(database):,} x {database.columns}: {len(measured)} settings"
    image = sweep_report.frontier_plot(measured, best, chosen, target=target, title=title)
    write_atomically(output / "frontier.png", image)
    certificate = None
    if chosen is not None:
        certificate = sweep_report.certificate(
            chosen, target=target, queries=len(sample), tried=len(candidates), seed=args.seed
        )
    content = {
        "database": str(args.database),
        "queries": str(args.queries),
        "rows": len(database),
        "truth": len(sample),
        "neighbours": exact.shape[1],
        "batch": batch,
        "exact_rate": exact_rate,
        "target_recall": target,
        "settings": [sweep_report.measurement(m, len(database)) for m in measured],
        "frontier": [sweep_report.measurement(m, len(database)) for m in best],
        "certificate": certificate,
    }
    write_json(output / "sweep.json", content)
    if args.choose and chosen is not None and certificate is not None:
        choose(args, database, chosen, certificate)
    print(f"written  {output}: frontier.png, sweep.json")
    if args.choose and chosen is None:
        print(f"--choose: the default of {args.database} is unchanged", file=sys.stderr)
        return 1
    return 0


def sweep_candidates(args: SimpleNamespace, database: Table) -> list[SearchParams]:
    """The parameters to try; an index on disk has codes of one kind and length only."""
    names = tuple(args.index.split(",")) if args.index else SWEPT_INDEXES
    dims = (args.shortlist_dim,) if args.shortlist_dim else ()
    own = database.index
    if own is not None:
        if args.index and set(names) - {"scan", "ivf"}:
            raise config.ConfigError(
                f"--index {args.index}: {args.database} has scan or ivf; leave it out"
            )
        if args.shortlist_dim not in (None, own.dim):
            raise config.ConfigError(
                f"--shortlist-dim {args.shortlist_dim}: {args.database} has {own.dim}; leave it out"
            )
        has_lists = any(part.metadata["lists"] for part in own.parts)
        names = ("ivf",) if has_lists and "ivf" in names else ("scan",)
        dims = (own.dim,)
    elif args.choose:
        raise config.ConfigError(
            f"--choose: {args.database} is not an index; `matryoshka index build` makes one"
        )
    if args.shortlist_dim and args.shortlist_dim > database.columns:
        raise config.ConfigError(
            f"--shortlist-dim {args.shortlist_dim}: {args.database} has {database.columns}"
        )
    found = grid(
        names,
        columns=database.columns,
        rows=len(database),
        neighbours=min(RECALL_K, len(database)),
        dims=dims,
    )
    if not found:
        raise config.ConfigError(
            f"--index {','.join(names)}: nothing to try in {database.columns} dimensions"
        )
    return found


def choose(
    args: SimpleNamespace, database: Table, chosen: Measured, certificate: dict[str, Any]
) -> None:
    """Make the certified search the default of the index."""
    assert database.index is not None  # sweep_candidates checks it
    summary = sweep_report.certificate_summary(chosen, certificate["queries"])
    with Writer(args.database, args.threads) as writer:
        writer.choose(chosen.params, certificate | {"text": summary}, database.index.manifest)
    print(f"chosen   {chosen.params} is now the default of {args.database}")


# ---------------------------------------------------------------- files


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def write_npy(path: Path, array: np.ndarray) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    write_atomically(path, header.getvalue(), np.ascontiguousarray(array).data.cast("B"))


if __name__ == "__main__":
    raise SystemExit(main())
