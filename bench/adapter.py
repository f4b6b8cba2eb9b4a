"""Adapters behind a frozen encoder: `matryoshka adapt` with and without labels, against PCA.

    matryoshka cifar --config-file vit_configs/fast_cnn.yaml --data A --size 32 --bs 500 \\
        --training.epochs=8 --training.precision=bf16      # A: 50 classes of Tiny-ImageNet
    matryoshka embed --path RUN/model.safetensors --data B/train --output E     # B: 50 others
    python bench/adapter.py E --data "what E is" --record
    python bench/adapter.py --time 100000x768 --record

The embeddings are rotated at random first, so that they have no good prefixes. Three runs each use
their own parts: labels of other images of the same classes; labels of other classes, so that the
table is of classes that neither encoder nor map has seen; no labels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import record

from matryoshka import cli
from matryoshka.embeddings import open_embeddings

SHOWN = ("right_1nn", "precision", "recall")
CASES = {
    "labels of the same classes": ["--split=random"],
    "labels of other classes": ["--split=classes"],
    "no labels": ["--loss=neighbours"],
}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("embeddings", nargs="?", metavar="E", help="folder of `matryoshka embed`")
    p.add_argument("--data", default="", help="what the embeddings are")
    p.add_argument("--time", metavar="NxD", help="measure the time on random embeddings instead")
    p.add_argument("--dims", default="8,16,32,64,128,256")
    p.add_argument("--only", choices=CASES, help="one of the cases")
    p.add_argument("--seed", type=int, default=0, help="of the rotation and of each run")
    p.add_argument("--more", default="", help="further options of `matryoshka adapt`")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--record", action="store_true", help="append to bench/results/")
    args = p.parse_args(argv)
    if bool(args.embeddings) == bool(args.time):
        p.error("give either E or --time")

    def keep(row: dict) -> None:
        if args.record:
            print(record.append("adapter", [row]), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "given"
        given.mkdir()
        if args.time:
            count, width = map(int, args.time.split("x"))
            write_random(given, count, width)
            keep(timed(given, Path(folder) / "out", args))
        else:
            write_rotated(given, args.embeddings, args.seed)
            for case, words in CASES.items():
                if args.only in (None, case):
                    keep(compared(case, words, given, Path(folder) / case, args))
    return 0


def write_rotated(folder: Path, embeddings: str, seed: int) -> None:
    """The embeddings of E in a random rotation, as arrays from elsewhere."""
    stored = open_embeddings(embeddings)
    width = stored.X.shape[1]
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0]
    np.save(folder / "embeddings.npy", (stored.X @ rotation).astype(np.float32))
    np.save(folder / "labels.npy", np.asarray(stored.y))


def write_random(folder: Path, count: int, width: int, classes: int = 1000) -> None:
    """Clusters with labels, whose spread falls with the direction as that of real embeddings."""
    rng = np.random.default_rng(0)
    spread = (1 + np.arange(width)) ** -0.5
    labels = rng.integers(0, classes, count)
    centres = rng.standard_normal((classes, width)) * spread
    noise = rng.standard_normal((count, width), dtype=np.float32) * spread
    np.save(folder / "embeddings.npy", (centres[labels] + noise).astype(np.float32))
    np.save(folder / "labels.npy", labels)


def adapted(given: Path, output: Path, words: list[str]) -> dict:
    """results.json of a run of `matryoshka adapt`."""
    argv = ["adapt", f"--embeddings={given}", f"--output={output}", *words]
    if cli.main(argv) != 0:
        sys.exit(1)
    return json.loads((output / "results.json").read_text())


def compared(
    case: str, words: list[str], given: Path, output: Path, args: argparse.Namespace
) -> dict:
    """One case as a row of results/adapter.jsonl."""
    options = [*words, *args.more.split()]
    fixed = [f"--dims={args.dims}", f"--seed={args.seed}", f"--threads={args.threads}"]
    results = adapted(given, output, [*options, *fixed])
    metrics = {name: table for name, table in results["metrics"].items() if name in SHOWN}
    return {
        "case": case,
        "data": args.data,
        "options": " ".join(options),
        "seed": args.seed,
        "threads": args.threads,
        "metrics": metrics,
        **{key: results[key] for key in KEPT},
    }


KEPT = (
    "rows",
    "width",
    "dims",
    "classes",
    "parts",
    "queries",
    "settings",
    "chosen",
    "choice",
    "best_epoch",
    "seconds",
)


def timed(given: Path, output: Path, args: argparse.Namespace) -> dict:
    """The time of a whole run, wall and of all cores, as a row of results/adapter.jsonl."""
    started, cores = time.perf_counter(), time.process_time()
    words = [f"--threads={args.threads}", f"--seed={args.seed}", *args.more.split()]
    results = adapted(given, output, words)
    row = {
        "case": "time",
        "embeddings": args.time,
        "options": args.more,
        "threads": args.threads,
        "wall_s": round(time.perf_counter() - started, 1),
        "core_s": round(time.process_time() - cores, 1),
        "epochs": len(results["history"]) - 1,
        **{key: results[key] for key in KEPT},
    }
    print(f"{row['wall_s']} s, {row['core_s']} s of all cores, {row['epochs']} epochs")
    return row


if __name__ == "__main__":
    raise SystemExit(main())
