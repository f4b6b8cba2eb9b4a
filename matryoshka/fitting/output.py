"""What a fit prints: lines of its stages and of the programs, and one when nothing else came."""

from __future__ import annotations

import contextlib
import importlib
import io
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from matryoshka.files import AppendedFile, open_append
from matryoshka.training.progress import LINE_SECONDS, duration

Report = Callable[[str], None]

# Lines of a training that the user sees; its summary repeats the choices.
SHOWN = ("epoch", "note", "evaluated", "resume", "stopped", "usage")


class Progress:
    """Lines for the user: those of the stages, of the programs, and one when nothing else came.

    report: receives every line. seconds: the time of the whole run, which began at `started`.
    """

    def __init__(self, report: Report, seconds: float, started: float) -> None:
        self._report = report
        self.seconds = seconds
        self._started = started
        self._stage = ""
        self._stage_began = self._printed = time.perf_counter()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._log: AppendedFile | None = None
        self._output = _Output(sys.stdout)
        self._thread = threading.Thread(target=self._repeat, name="matryoshka-fit", daemon=True)

    def __enter__(self) -> Progress:
        sys.stdout = self._output
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()
        sys.stdout = self._output.passed
        self.close_log()

    def elapsed(self) -> float:
        return time.perf_counter() - self._started

    def open_log(self, path: Path) -> None:
        """Append all that the programs print to a file."""
        self._log = open_append(path)

    def close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def line(self, label: str, text: str) -> None:
        """A line with a label of the summary, such as `photos   7,500 images`."""
        self.print(f"{label:9}{text}")

    def print(self, text: str) -> None:
        with self._lock:
            self._printed = time.perf_counter()
            self._emit(text)

    def _emit(self, text: str) -> None:
        with self._output.reporting():
            self._report(text)

    def stage(self, text: str) -> None:
        """The name of what follows, for the lines that are printed when nothing else comes."""
        with self._lock:
            self._stage = text
            self._stage_began = time.perf_counter()

    def call(self, program: str, argv: Sequence[str], *, show: bool = False) -> None:
        """Run a program's main(argv); its lines go to the log, with `show` to the user, too.

        Its errors are raised as exceptions. SystemExit with its status if it stopped.
        """
        main = importlib.import_module(f"matryoshka.{program}").main
        # Without config.program, errors arrive here as exceptions.
        main = getattr(main, "__wrapped__", main)
        if self._log is not None:
            self._log.write(f"\n$ {program} {shlex.join(argv)}\n")
        self._output.take = lambda text: self._program_line(text, show)
        try:
            status = main(list(argv))
        finally:
            self._output.take = None
        if status:
            raise SystemExit(status)

    def _program_line(self, text: str, show: bool) -> None:
        if self._log is not None:
            self._log.write(text + "\n")
        if show and text.startswith(SHOWN):
            self.print(f"  {text}")

    def _repeat(self) -> None:
        """Print a line when none came for LINE_SECONDS; terminals show bars instead."""
        while not self._ended.wait(0.5):
            now = time.perf_counter()
            with self._lock:
                if now - self._printed < LINE_SECONDS or not self._stage or sys.stderr.isatty():
                    continue
                self._printed = now
                stage, began = self._stage, self._stage_began
                self._emit(
                    f"  {stage}, {duration(now - began)}; the whole run: "
                    f"{duration(max(0, self.seconds - (now - self._started)))} left"
                )


class _Output(io.TextIOBase):
    """Standard output during a fit: lines of a running program go to `take`, all else passes.

    A report such as `print` passes, too, although a program is running in the meantime.
    """

    def __init__(self, passed: TextIO) -> None:
        self.passed = passed
        self.take: Callable[[str], None] | None = None
        self._reporting = threading.local()
        self._rest = ""

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.passed.isatty()

    def fileno(self) -> int:
        return self.passed.fileno()

    def flush(self) -> None:
        self.passed.flush()

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        self._reporting.now = True
        try:
            yield
        finally:
            self._reporting.now = False

    def write(self, text: str) -> int:
        if self.take is None or getattr(self._reporting, "now", False):
            return self.passed.write(text)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self.take(line)
        return len(text)


@contextlib.contextmanager
def bar(total: int, text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; yields update(done, total)."""
    from tqdm import tqdm

    with tqdm(total=total, desc=text, unit="image", leave=False, disable=None) as shown:

        def update(done: int, total: int) -> None:
            shown.update(done - shown.n)

        yield update
