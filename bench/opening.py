"""Seconds and memory until a .beton is open, as JSON: ours and, where it is wanted and installed,
FFCV's.

    python bench/opening.py FILE TURNS [FFCV]

Every opening happens in a fork of this process, which has imported both before. FFCV's: its Reader
and the tables that its Loader builds from it before anything else.
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


def openers(wanted: list[str]) -> dict[str, Callable[[str], object]]:
    found: dict[str, Callable[[str], object]] = {"matryoshka": BetonFile}
    if "FFCV" not in wanted:
        return found
    try:
        from ffcv.memory_managers import OSCacheManager
        from ffcv.reader import Reader
    except ImportError:
        return found
    return found | {"FFCV": lambda path: OSCacheManager(Reader(path))}


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most that `resident` has been."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def main(argv: list[str]) -> int:
    path, turns = argv[0], int(argv[1])
    for _ in range(turns):
        for name, opener in openers(argv[2:]).items():
            if os.fork():
                os.wait()
                continue
            before, cpu, wall = resident(), time.process_time(), time.perf_counter()
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
