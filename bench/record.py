"""Rows of bench/results/: measurements with date, hardware, versions and commit.

The variable BENCH_RESULTS names another folder for them.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from matryoshka.environment import environment

RESULTS = Path(os.environ.get("BENCH_RESULTS") or Path(__file__).resolve().parent / "results")
AT_START = environment()  # at import: later edits do not change the code that is measured


def spread(values: Sequence[float]) -> dict[str, float]:
    """n, median, lowest and highest of repeated measurements."""
    return {
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def append(name: str, rows: Sequence[dict]) -> Path:
    """Append rows, with date, commit, hardware and versions, to results/<name>.jsonl; return its
    path.

    The rows are in the file when it returns: a program that is killed later keeps them.
    """
    metadata = {
        "date": datetime.date.today().isoformat(),
        **{k: AT_START[k] for k in ("git", "hardware", "versions")},
    }
    return append_lines(name, [metadata | row for row in rows])


def append_lines(name: str, rows: Sequence[dict]) -> Path:
    """Append rows that have their own metadata."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with open(path, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())
    return path
