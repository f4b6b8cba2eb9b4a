"""`matryoshka retrieve --sweep`: the frontier of recall and speed, and the fastest setting that is
certain enough.
"""

from __future__ import annotations

import io
import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matryoshka.inference.retrieve import describe, number, searcher, truth  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from matryoshka import config
from matryoshka.files import write_atomically
from matryoshka.retrieval import Setting
from matryoshka.retrieval.store_writer import Writer
from matryoshka.retrieval.sweep import Measured, certified, frontier, grid, measure, queries_needed
from matryoshka.retrieval.tables import Table

DEFAULT = ("scan", "ivf", "binary")
AGAIN = 5  # turns for what is on the frontier, whose order decides
COLOURS = {"scan": "#2a6fbb", "ivf": "#d1662a", "binary": "#3c8f5a", "hnsw": "#8a56a8"}


def sweep(args: Namespace, database: Table, queries: Table) -> int:
    names = args.index.split(",") if args.index else DEFAULT
    dims: Sequence[int] = (args.shortlist_dim,) if args.shortlist_dim else ()
    if database.index is not None:
        lists = any(part.about["lists"] for part in database.index.parts)
        own = database.index.dim
        if args.index and set(names) - {"scan", "ivf"}:
            raise config.ConfigError(
                f"--index {args.index}: {args.database} has scan or ivf; leave it out"
            )
        if args.shortlist_dim not in (None, own):
            raise config.ConfigError(
                f"--shortlist-dim {args.shortlist_dim}: {args.database} has {own}; leave it out"
            )
        names, dims = ("ivf",) if lists and "ivf" in names else ("scan",), (own,)
    elif args.choose:
        raise config.ConfigError(
            f"--choose: {args.database} is no index; `matryoshka index build` makes one"
        )
    if args.shortlist_dim and args.shortlist_dim > database.columns:
        raise config.ConfigError(
            f"--shortlist-dim {args.shortlist_dim}: {args.database} has {database.columns}"
        )
    settings = grid(names, database.columns, len(database), min(10, len(database)), dims)
    if not settings:
        raise config.ConfigError(
            f"--index {','.join(names)}: nothing to try in {database.columns} dimensions"
        )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    asked, exact = truth(args, database, queries)
    exact_rate = len(asked) / (time.perf_counter() - started)
    print(
        f"exact    {len(asked):,} queries, {exact_rate:,.0f} queries/s; then {len(settings)} "
        "settings"
    )
    search, _ = searcher(args, database)
    batch = min(max(args.batches), len(asked))

    def ids(part: np.ndarray, setting: Setting) -> np.ndarray:
        return search(part, setting).ids[:, : exact.shape[1]]

    bar = tqdm(settings, leave=False, unit="setting", disable=not sys.stderr.isatty())
    measured = list(measure(ids, bar, asked, exact, batch, len(settings)))
    measured = again(ids, measured, asked, exact, batch, args.target_recall)
    best, chosen = frontier(measured), certified(measured, args.target_recall)
    print(table(best, chosen, exact_rate, len(database)))
    text = said(args, measured, chosen, len(asked), exact.shape[1], len(queries))
    print(text)
    plot(
        output / "frontier.png",
        measured,
        best,
        chosen,
        args.target_recall,
        f"{len(database):,} x {database.columns}",
    )
    content = {
        "database": str(args.database),
        "queries": str(args.queries),
        "rows": len(database),
        "truth": len(asked),
        "neighbours": exact.shape[1],
        "batch": batch,
        "exact_rate": exact_rate,
        "target_recall": args.target_recall,
        "settings": [row(one, len(database)) for one in measured],
        "frontier": [row(one, len(database)) for one in best],
        "certificate": certificate(chosen, args, len(asked), len(settings)),
    }
    write_atomically(
        output / "sweep.json", (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    )
    if args.choose and chosen is not None and database.index is not None:
        known = content["certificate"] | {"text": short(chosen, len(asked))}
        with Writer(args.database, args.threads) as writer:
            writer.choose(chosen.setting, known, database.index.about)
        print(f"chosen   {chosen.setting} is now the default of {args.database}")
    print(f"written  {output}: frontier.png, sweep.json")
    if args.choose and chosen is None:
        print(f"--choose: the default of {args.database} is left as it was", file=sys.stderr)
        return 1
    return 0


def again(
    ids: Any,
    measured: list[Measured],
    asked: np.ndarray,
    exact: np.ndarray,
    batch: int,
    target: float,
) -> list[Measured]:
    """The same with the speed of the best measured in turns: single ones are noisy, and the
    luckiest would win.

    Until all that are now the best have been, as these fall behind some that were measured once.
    """
    rates: dict[Setting, tuple[float, ...]] = {}
    while True:
        measured = [replace(one, rate=rates.get(one.setting, one.rate)) for one in measured]
        sure = [one for one in measured if one.recall.lower >= target]
        sure.sort(key=lambda one: -one.speed)
        best = dict.fromkeys(
            one.setting for one in (*frontier(measured), *sure[:3]) if one.setting not in rates
        )
        if not best:
            return measured
        turns = [
            {setting: once(ids, setting, asked, batch) for setting in best} for _ in range(AGAIN)
        ]
        rates |= {setting: tuple(turn[setting] for turn in turns) for setting in best}


def once(ids: Any, setting: Setting, asked: np.ndarray, batch: int) -> float:
    """Queries per second over all of them."""
    started = time.perf_counter()
    for first in range(0, len(asked), batch):
        ids(asked[first : first + batch], setting)
    return len(asked) / (time.perf_counter() - started)


def table(best: Sequence[Measured], chosen: Measured | None, exact_rate: float, rows: int) -> str:
    head = f"{'setting':52} {'recall':>7} {'at least':>8} {'queries/s':>10} {'x exact':>8} {'MFLOPs':>9}"
    shown = (
        [*best, chosen] if chosen is not None and all(one is not chosen for one in best) else best
    )
    lines = [
        f"{one.setting!s:52} {one.recall.mean:7.4f} {one.recall.lower:8.4f} {one.speed:10,.0f} "
        f"{one.speed / exact_rate:8,.1f} {one.setting.mflops(rows):9,.2f}"
        + ("  <- certified" if one is chosen else "")
        for one in sorted(shown, key=lambda one: -one.speed)
    ]
    return "\n".join(
        [
            "",
            f"The frontier: no other setting is faster and finds more (batch {best[0].batch})",
            head,
            *lines,
            "",
        ]
    )


def said(
    args: Namespace,
    measured: Sequence[Measured],
    chosen: Measured | None,
    queries: int,
    k: int,
    there: int,
) -> str:
    """The certificate in words, or what is missing for one. queries: that were asked, of `there`."""
    tried = len(measured)
    if chosen is not None:
        return (
            f"certificate: recall@{k} of the exact is {chosen.recall.lower:.4f} or more with 95 "
            "% confidence\n"
            f"             measured {chosen.recall.mean:.4f} on {queries:,} queries at random, "
            f"{tried} settings tried "
            f"(Bonferroni)\noptions:     {options(chosen.setting, args.seed)}"
        )
    top = max(measured, key=lambda one: (one.recall.lower, one.speed))
    needed = queries_needed(args.target_recall, tried) if args.target_recall < 1 else 0
    if needed > queries:
        remedy = (
            f"--truth {needed}"
            if needed <= there
            else f"these are all {there:,}, give more, or a lower target"
        )
        more = f"even one that loses nothing needs {needed:,} queries for that: {remedy}"
    else:
        more = (
            "more queries (--truth), or a longer shortlist, may do"
            if queries < there
            else "more queries may do"
        )
    return (
        f"no certificate: no setting's recall@{k} is {args.target_recall} or more with 95 % "
        "confidence; the best is "
        f"{top.setting}: {top.recall.mean:.4f}, at least {top.recall.lower:.4f}\n                "
        f"{more}"
    )


def options(setting: Setting, seed: int = 0) -> str:
    """The options of `matryoshka retrieve` that select a setting. seed: of the sweep; it decides an
    inverted file.
    """
    dims = [setting.dim, *(stage.dim for stage in setting.stages)]
    ks = [setting.k, *(stage.keep for stage in setting.stages[:-1])]
    effort = {"ivf": f" --nprobe {setting.effort}", "hnsw": f" --ef {setting.effort}"}.get(
        setting.index, ""
    )
    if len(dims) == 2:
        path = f" --shortlist-dim {dims[0]} --k {ks[0]} --rerank-dim {dims[1]}"
    else:
        path = f" --funnel {','.join(map(str, dims))} --funnel-k {','.join(map(str, ks))}"
    return f"--index {setting.index}{effort}{path}" + (
        f" --seed {seed}" if seed and setting.index == "ivf" else ""
    )


def short(chosen: Measured, queries: int) -> str:
    return f"{chosen.recall.lower:.4f} or more, with 95 % confidence ({queries:,} queries)"


def certificate(
    chosen: Measured | None, args: Namespace, queries: int, tried: int
) -> dict[str, Any] | None:
    if chosen is None:
        return None
    return {
        "setting": describe(chosen.setting),
        "options": options(chosen.setting, args.seed),
        "recall": number(chosen.recall.mean),
        "lower": number(chosen.recall.lower),
        "confidence": 0.95,
        "queries": queries,
        "settings_tried": tried,
        "target": args.target_recall,
        "seed": args.seed,
    }


def row(one: Measured, rows: int) -> dict[str, Any]:
    return {
        "setting": describe(one.setting),
        "recall": number(one.recall.mean),
        "lower": number(one.recall.lower),
        "perfect": number(one.recall.perfect),
        "rate": one.speed,
        "rates": list(one.rate),
        "mflops": one.setting.mflops(rows),
    }


def plot(
    path: Path,
    measured: Sequence[Measured],
    best: Sequence[Measured],
    chosen: Measured | None,
    target: float,
    size: str,
) -> None:
    """Speed against recall lost, both logarithmic: between 0.99 and 0.999 lies what matters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    floor = 0.5 * min(
        [1 - one.recall.mean for one in measured if one.recall.mean < 1], default=1e-3
    )

    def lost(one: Measured) -> float:
        return max(1 - one.recall.mean, floor)

    for index in dict.fromkeys(one.setting.index for one in measured):
        for certain, alpha in ((False, 0.25), (True, 0.9)):
            mine = [
                o
                for o in measured
                if o.setting.index == index and (o.recall.lower >= target) == certain
            ]
            label = f"{index}, certainly {target:g} or more" if certain else index
            axes.scatter(
                [lost(o) for o in mine],
                [o.speed for o in mine],
                s=16,
                alpha=alpha,
                linewidths=0,
                color=COLOURS[index],
                label=label if mine else None,
            )
    line = sorted(best, key=lost)
    axes.plot(
        [lost(o) for o in line],
        [o.speed for o in line],
        color="#333333",
        linewidth=1.2,
        label="frontier",
    )
    if target < 1:
        axes.axvline(1 - target, color="#999999", linestyle="--", linewidth=1)
        axes.annotate(
            f"recall {target:g}",
            (1 - target, 0.98),
            xycoords=("data", "axes fraction"),
            rotation=90,
            xytext=(3, 0),
            textcoords="offset points",
            va="top",
            color="#666666",
            fontsize=9,
        )
    if chosen is not None:
        axes.scatter(
            [lost(chosen)],
            [chosen.speed],
            s=130,
            facecolors="none",
            edgecolors="#c02020",
            linewidths=2,
            label=f"certified: {chosen.setting}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("recall of the exact neighbours")
    axes.set_ylabel(f"queries per second, batch {best[0].batch}")
    ticks = [
        10.0**i for i in range(-6, 1) if 1.5 * floor < 10.0**i < 1.1 * max(map(lost, measured))
    ]
    axes.set_xticks([*ticks, floor] if any(one.recall.mean == 1 for one in measured) else ticks)
    axes.xaxis.set_major_formatter(lambda x, _: f"{1 - x:.6g}" if x > floor * 1.01 else "1")
    axes.xaxis.set_minor_formatter("")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(lambda y, _: f"{y:,.0f}" if f"{y:.0e}"[0] in "125" else "")
    axes.set_title(f"{size}: {len(measured)} settings", fontsize=11)
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", fontsize=9, frameon=True)
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_atomically(path, content.getvalue())
