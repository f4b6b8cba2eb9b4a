"""Measure the time and memory that opening a .beton takes: ours and, if requested, FFCV's.

    python bench/opening.py FILE TURNS [FFCV]

Prints one line of JSON per opening. Each happens in a fork of this process, which has imported both
before. FFCV's part is its Reader and the tables that its Loader builds from it first.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from matryoshka.data import BetonFile


def openers(peers: list[str]) -> dict[str, Callable[[str], object]]:
    ours: dict[str, Callable[[str], object]] = {"matryoshka": BetonFile}
    if "FFCV" not in peers:
        return ours
    try:
        from ffcv.memory_managers import OSCacheManager
        from ffcv.reader import Reader
    except ImportError:
        return ours
    return ours | {"FFCV": lambda path: OSCacheManager(Reader(path))}


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The maximum of `resident` so far."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main(argv: list[str]) -> int:
    path = argv[0]
    turns = int(argv[1])
    for _ in range(turns):
        for name, opener in openers(argv[2:]).items():
            # A fork for each opening, because memory that was freed still counts for its peak.
            if os.fork():
                os.wait()
                continue
            before = resident()
            cpu = time.process_time()
            wall = time.perf_counter()
            opened = opener(path)
            row = {
                "peer": name,
                "cpu": time.process_time() - cpu,
                "wall": time.perf_counter() - wall,
                "peak_mb": (peak() - before) / 1e6,
                "held_mb": (resident() - before) / 1e6,
            }
            print(json.dumps(row), flush=True)
            del opened
            os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
