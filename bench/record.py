"""Rows of bench/results/: measurements with date, hardware, versions and commit."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from matryoshka.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
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
    """
    metadata = {
        "date": datetime.date.today().isoformat(),
        **{k: AT_START[k] for k in ("git", "hardware", "versions")},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with open(path, "a") as file:
        for row in rows:
            file.write(json.dumps(metadata | row) + "\n")
    return path
