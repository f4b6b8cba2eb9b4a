"""Latency of several ways to compute the same, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

BLOCKS = 7
BLOCK_SECONDS = 0.1


def latencies(
    calls: Mapping[str, Callable[[], object]],
    blocks: int = BLOCKS,
    block_seconds: float = BLOCK_SECONDS,
) -> dict[str, float]:
    """Seconds per call: the median over `blocks` of the mean in a block of about `block_seconds`.

    The calls take turns, block by block, so that another load on the machine affects all alike.
    """
    repeats = {}
    for name, call in calls.items():
        call()  # the first one allocates memory
        repeats[name] = max(1, round(block_seconds / max(_seconds(call, 1), 1e-9)))
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(blocks):
        for name, call in calls.items():
            measured[name].append(_seconds(call, repeats[name]) / repeats[name])
    return {name: statistics.median(times) for name, times in measured.items()}


def _seconds(call: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - started
