"""Signals and hangs: a stopped run saves a checkpoint, a hung run the stacks of its ranks."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from matryoshka.distributed import REQUEUE, World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Stopped(Exception):
    """The run received a stop signal and can be resumed; the program exits with status REQUEUE."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.exit_code = REQUEUE


class StopSignal:
    """Handles SIGTERM, SIGUSR1 and SIGHUP inside a `with` block, unless ignored, as by nohup.

    The first signal sets `received` to its name; a second one ends the process at once, but for
    SIGHUP, which a terminal sends to every process, and torchrun to its own once more.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGHUP:
            return
        if self.received is not None:  # the second one: the user does not want to wait
            os._exit(128 + number)
        self.received = signal.Signals(number).name


class AnyRankFlags:
    """All-reduces boolean requests asynchronously; results arrive one step late.

    count: number of flags. A flag is true on all ranks if any rank raised it. The all-reduce runs
    over gloo, beside the gradients, so that no rank waits for another one in the training step.
    """

    def __init__(self, count: int, world: World) -> None:
        self._single = world.size == 1
        # Not NCCL: it sends device memory only, and the flags would queue behind the gradients.
        self._group: Any = None if self._single else dist.new_group(backend="gloo")
        self._flags = torch.zeros(count, dtype=torch.uint8)
        self._work: dist.Work | None = None

    def exchange(self, *flags: bool) -> list[bool]:
        """Send this step's flags; return the result of the previous call (one process: of this)."""
        if self._single:
            return list(flags)
        if self._work is not None:
            self._work.wait()
        result = self._flags.tolist()
        self._flags = torch.tensor(flags, dtype=torch.uint8)  # in flight until the next call
        self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, self._group, async_op=True)
        return [bool(value) for value in result]

    def finish(self) -> list[bool]:
        """Wait for the last exchange and return its result."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        result = self._flags.tolist()
        self._flags = torch.zeros_like(self._flags)
        return [bool(value) for value in result]

    def agree(self, flag: bool) -> bool:
        """Whether any rank raised this flag, at once; between two epochs' exchanges."""
        if self._single:
            return flag
        raised = torch.tensor(flag, dtype=torch.uint8)
        dist.all_reduce(raised, dist.ReduceOp.MAX, self._group)
        return bool(raised)


class HangWatch:
    """Ends the process with status 1 if `beat` is not called for `seconds`; 0 disables it.

    The stacks of all threads are written to `<folder>/rank_<n>.txt`. faulthandler's timer is a C
    thread: it also fires if the GIL is never released.
    """

    def __init__(self, folder: Path, rank: int, seconds: float) -> None:
        self._seconds = seconds
        self._armed_at = 0.0
        self._path = folder / f"rank_{rank}.txt"
        self._file = None

    def __enter__(self) -> HangWatch:
        if self._seconds:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Open from the start: faulthandler's timer writes to a file descriptor.
            self._path.unlink(missing_ok=True)  # a pipe of this name would wait for a reader
            self._file = open(self._path, "w", encoding="utf-8")
            self.beat()
        return self

    def beat(self) -> None:
        """Record progress: restart the timer."""
        if self._file is None:
            return
        now = time.monotonic()
        # Arming starts a thread, which takes 50 us: not in every step.
        if now - self._armed_at > self._seconds / 20:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)
            self._armed_at = now

    def __exit__(self, *_) -> None:
        if self._file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self._path.stat().st_size:
            self._path.unlink()
            with contextlib.suppress(OSError):  # not empty: other ranks' files are in it
                self._path.parent.rmdir()
