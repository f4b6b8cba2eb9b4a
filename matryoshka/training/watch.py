"""Signals and hangs: a run that is asked to stop leaves a checkpoint; one that hangs leaves the
stacks of its ranks.
"""

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

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run was asked to stop and can go on later; ends the program with status REQUEUE."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.exit_code = REQUEUE


class StopSignal:
    """SIGTERM and SIGUSR1 while it is entered: the first sets `asked`, a second ends the process at
    once.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._received) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _received(self, number: int, _: FrameType | None) -> None:
        if self.asked is not None:
            os._exit(128 + number)
        self.asked = signal.Signals(number).name


class Vote:
    """What any rank wants, known to all ranks at the same step: one step later, without waiting for
    the others.

    wishes: how many yes-or-no questions. The votes travel over gloo, beside the gradients.
    """

    def __init__(self, wishes: int, world: World) -> None:
        self._alone = world.size == 1
        self._group: Any = None if self._alone else dist.new_group(backend="gloo")
        self._cast = torch.zeros(wishes, dtype=torch.uint8)
        self._work: dist.Work | None = None

    def __call__(self, *wishes: bool) -> list[bool]:
        """Cast this step's votes; the result of the last ones (with one process: of these)."""
        if self._alone:
            return list(wishes)
        if self._work is not None:
            self._work.wait()
        decided = self._cast.tolist()
        self._cast = torch.tensor(wishes, dtype=torch.uint8)
        self._work = dist.all_reduce(self._cast, dist.ReduceOp.MAX, self._group, async_op=True)
        return [bool(value) for value in decided]

    def finish(self) -> list[bool]:
        """The result of the last votes."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        decided, self._cast = self._cast.tolist(), torch.zeros_like(self._cast)
        return [bool(value) for value in decided]


class HangWatch:
    """Ends this process with status 1, its stacks in `<folder>/rank_<n>.txt`, when `beat` stays
    away for `seconds`.

    faulthandler's timer is a thread of C: it also fires when Python's lock is never given back. 0
    seconds: off.
    """

    def __init__(self, folder: Path, rank: int, seconds: float) -> None:
        self._seconds, self._armed = seconds, 0.0
        self._path = folder / f"rank_{rank}.txt"
        self._file = None

    def __enter__(self) -> HangWatch:
        if self._seconds:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "w", encoding="utf-8")
            self.beat()
        return self

    def beat(self) -> None:
        """Progress was made."""
        now = time.monotonic()
        if (
            self._file is not None and now - self._armed > self._seconds / 20
        ):  # arming starts a thread: 50 us
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)
            self._armed = now

    def __exit__(self, *_) -> None:
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()
                with contextlib.suppress(OSError):  # other ranks' files are still there
                    self._path.parent.rmdir()
