"""Rows of bench/results/: what was measured, on what, with which code."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from matryoshka.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
BEGUN = environment()  # the code that is measured, whatever is edited meanwhile


def spread(values: Sequence[float]) -> dict[str, float]:
    """n, median, lowest and highest of repeated measurements."""
    return {
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def append(name: str, rows: Sequence[dict]) -> Path:
    """Add rows (with date, commit, hardware, versions) to results/<name>.jsonl; returns its path."""
    about = {
        "date": datetime.date.today().isoformat(),
        **{k: BEGUN[k] for k in ("git", "hardware", "versions")},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with open(path, "a") as file:
        for row in rows:
            file.write(json.dumps(about | row) + "\n")
    return path
