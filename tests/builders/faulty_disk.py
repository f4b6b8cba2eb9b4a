"""Programs on a disk that fails at a chosen call: full, read-only, or the process is signalled.

    with FaultyDisk(folder_of_the_library) as disk:
        calls = disk.run(argv, below=out).calls                     # without a fault
        disk.run(argv, below=out, at=3, action=Action.FULL)         # the third call and later ones

Every run is a fork of one process that has imported the programs and in which disk_faults.c is
preloaded: it takes the time of the work alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import importlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from matryoshka import cli

HERE = Path(__file__).resolve().parent
LIBRARY = "MATRYOSHKA_DISK_FAULTS"  # environment variable: the library's path
MODULE = "import"  # begins a line of the calls
SECONDS = 120  # of a run that takes one: a hang


class Action(enum.IntEnum):
    """What happens at call `at`; see disk_faults.c."""

    COUNT = 0
    SIGNAL = 1
    TORN = 2
    FULL = 3
    READ_ONLY = 4
    FAILED = 5


VALUES = {
    Action.SIGNAL: signal.SIGKILL,
    Action.TORN: signal.SIGKILL,
    Action.FULL: errno.ENOSPC,
    Action.READ_ONLY: errno.EROFS,
    Action.FAILED: errno.EIO,
}


@dataclass(frozen=True)
class Ended:
    """How a run ended. status: negative for a signal. calls: those that change files, one a line"""

    status: int
    out: str
    err: str
    calls: list[str]


class FaultyDisk:
    """The process whose forks run programs. Skips the test where there is no C compiler."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None or sys.platform != "linux":
            pytest.skip("needs Linux and a C compiler")
        self._folder = folder
        library = folder / "disk_faults.so"
        source = HERE / "disk_faults.c"
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "LD_PRELOAD": str(library), LIBRARY: str(library)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._imported: set[str] = set()

    def __enter__(self) -> FaultyDisk:
        return self

    def __exit__(self, *_) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(
        self,
        argv: list[str],
        *,
        below: Path,
        at: int = 0,
        action: Action = Action.COUNT,
        value: int | None = None,
        **more: Any,
    ) -> Ended:
        """`matryoshka ARGV`, with a fault at the call number `at` that changes files in `below`.

        more: see Task.
        """
        value = VALUES.get(action, 0) if value is None else value
        names = {name: str(self._folder / name) for name in ("out", "err", "calls")}
        task = {"argv": argv, "below": str(below), "at": at, "action": int(action), "value": value}
        status = self._ask({**task, **names, **more})
        texts = {name: Path(path).read_text(errors="replace") for name, path in names.items()}
        calls = []
        modules = []
        for line in texts["calls"].splitlines():
            kind, _, rest = line.partition(" ")
            (modules if kind == MODULE else calls).append(rest if kind == MODULE else line)
        self._import(modules)
        return Ended(status, texts["out"], texts["err"], calls)

    def _import(self, modules: list[str]) -> None:
        """Import what a program imports late, so that its next run finds it."""
        new = [name for name in modules if name not in self._imported]
        if new:
            self._imported.update(new)
            self._ask({"modules": new})

    def _ask(self, task: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


# ---------------------------------------------------------------- the other process


def _serve() -> None:
    for program in cli.PROGRAMS.values():
        importlib.import_module(program.module)
    for line in sys.stdin:
        task = json.loads(line)
        if "modules" in task:
            for name in task["modules"]:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
            print(0, flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _run(Task(**task))
        print(_status(pid), flush=True)


def _status(pid: int) -> int:
    end = time.monotonic() + SECONDS
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 1000
        time.sleep(0.002)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run in a fork. More than FaultyDisk.run says:

    file_size: the largest file that it may write. user: to which it belongs. seconds: until it gets
    the signal `signal_after`. clock: what time.time() adds to the truth at its calls, in turn.
    """

    argv: list[str]
    below: str
    at: int
    action: int
    value: int
    out: str
    err: str
    calls: str
    cwd: str = "."
    file_size: int = 0
    user: int = 0
    seconds: float = 0
    signal_after: int = signal.SIGTERM
    clock: list[float] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def _run(task: Task) -> None:
    """Run a program in this process, which then ends."""
    before = set(sys.modules)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, name in ((1, task.out), (2, task.err)):
        os.dup2(os.open(name, flags), number)
    trace = os.open(task.calls, flags)
    os.chdir(task.cwd)
    os.environ.update(task.environment)
    if task.file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task.file_size, task.file_size))
    if task.user:
        os.setgroups([])
        os.setgid(task.user)
        os.setuid(task.user)
    if task.clock:
        _jump(task.clock)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
    below = os.fsencode(task.below)
    library = ctypes.CDLL(os.environ[LIBRARY])
    library.faults_arm(below, ctypes.c_long(task.at), task.action, task.value, trace)
    status: Any = 1
    if task.seconds:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), task.signal_after))
        signal.setitimer(signal.ITIMER_REAL, task.seconds)
    try:
        try:
            status = cli.main(task.argv)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        library.faults_arm(b"", ctypes.c_long(0), 0, 0, -1)
        for name in sorted(set(sys.modules) - before):
            os.write(trace, f"{MODULE} {name}\n".encode())
        os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def _jump(clock: list[float]) -> None:
    truth = time.time
    jumps = iter(clock * 1000)
    time.time = lambda: truth() + next(jumps)


if __name__ == "__main__":
    _serve()
