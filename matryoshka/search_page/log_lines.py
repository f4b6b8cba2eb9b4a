"""A log of at most one line a second: no visitor can fill a disk with it."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

INTERVAL = 1.0  # seconds
MAX_LENGTH = 500  # of a line


class OneLineASecond(logging.Handler):
    """Writes a record as one line to stderr; those that come sooner are counted, not written.

    An exception is its type, its message and the line that raised it, without a traceback.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._left_out = 0
        self._next = 0.0
        self._own_lock = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        with self._own_lock:
            now = time.monotonic()
            if now < self._next:
                self._left_out += 1
                return
            self._next = now + INTERVAL
            left_out, self._left_out = self._left_out, 0
        try:
            more = f" ({left_out:,} further lines left out)" if left_out else ""
            sys.stderr.write(f"{one_line(record)}{more}\n")
            sys.stderr.flush()
        except Exception:  # a closed stderr, or a record whose arguments do not fit
            self._left_out += 1


def one_line(record: logging.LogRecord) -> str:
    """A record without line breaks and control characters, at most MAX_LENGTH long."""
    text = record.getMessage().strip()
    if record.exc_info and record.exc_info[1] is not None:
        text = f"{text}: {described(record.exc_info[1])}" if text else described(record.exc_info[1])
    shown = "".join(char if char.isprintable() else " " for char in text)
    return f"{record.levelname.lower()}: {shown[:MAX_LENGTH]}"


def described(error: BaseException) -> str:
    """An exception in one line, with the place that raised it."""
    text = f"{type(error).__name__}: {error}"
    places = traceback.extract_tb(error.__traceback__)
    if places:
        text += f" ({places[-1].filename.rpartition('/')[2]}:{places[-1].lineno})"
    return text


@contextmanager
def quiet_log() -> Iterator[None]:
    """All warnings and errors of this process go through one OneLineASecond meanwhile."""
    root = logging.getLogger()
    handler = OneLineASecond()
    before = root.handlers[:]
    root.handlers[:] = [handler]
    try:
        yield
    finally:
        root.handlers[:] = before
