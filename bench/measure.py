"""Time competitors in turns, block by block, in CPU seconds.

A competitor that fails or hangs is dropped and named with the reason.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

Run = Callable[[], int]  # does one block and returns its number of images
OURS = "matryoshka"


class Missing(Exception):
    """A competitor is not installed."""


class Block(NamedTuple):
    images: int
    cpu: float  # seconds, all threads and child processes
    wall: float


class Outcome(NamedTuple):
    blocks: dict[str, list[Block]]
    failed: dict[str, str]  # name: reason


def cpu_seconds() -> float:
    """CPU time of this process and of its children, running and ended."""
    # active_children() also reaps ended children, which RUSAGE_CHILDREN then counts.
    running = sum(_cpu_of(child.pid) for child in multiprocessing.active_children())
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + running


def _cpu_of(pid: int | None) -> float:
    try:
        # After the name, which is in parentheses and may contain spaces: utime and stime are the
        # 12th and 13th of the remaining fields (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:  # it has just ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after `seconds`; only in the main thread, as others get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        raise TimeoutError(f"not finished after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def take_turns(
    make: Mapping[str, Callable[[], Run]],
    blocks: int,
    limit: float = 300,
    *,
    first_turn: Callable[[Outcome], object] | None = None,
) -> Outcome:
    """Run `blocks` blocks of every competitor in turns, after one that does not count (caches,
    compilation).

    make: name -> function that prepares a competitor and returns its Run. limit: seconds for one
    block or one preparation. first_turn: called after the first turn that counts, if more follow:
    for what must be kept if this process is killed.
    """
    runs: dict[str, Run] = {}
    outcome = Outcome({name: [] for name in make}, {})

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        try:
            with time_limit(limit):
                yield
        except Missing as error:
            outcome.failed[name] = f"missing: {error}"
        except Exception as error:  # of any type: the others continue
            outcome.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        if name in outcome.failed:
            runs.pop(name, None)
            outcome.blocks.pop(name)

    # ---- preparation ----
    for name, prepare in make.items():
        with noted(name):
            runs[name] = prepare()
    # ---- turns ----
    for block in range(blocks + 1):
        for name, run in list(runs.items()):
            torch.set_num_threads(1)  # FFCV changes it
            with noted(name):
                cpu = cpu_seconds()
                wall = time.perf_counter()
                images = run()
                done = Block(images, cpu_seconds() - cpu, time.perf_counter() - wall)
                if block:  # the first one warms up
                    outcome.blocks[name].append(done)
        if block == 1 and block < blocks and first_turn is not None:
            first_turn(outcome)
    return outcome


def rate(blocks: list[Block], clock: str = "cpu") -> float:
    """Images per second of a clock (cpu or wall), the median over blocks."""
    return statistics.median(block.images / getattr(block, clock) for block in blocks)


def ratio(ours: list[Block], theirs: list[Block], clock: str = "cpu") -> float:
    """Our speed divided by theirs, the median over turns."""
    # Turn by turn: both blocks of a turn see the same load of the machine.
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(
        (a.images / getattr(a, clock)) / (b.images / getattr(b, clock)) for a, b in pairs
    )
