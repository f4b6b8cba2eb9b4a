"""Ctrl-C while a program is still importing: one line, as later."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

INTERRUPTED = 130  # exit status: 128 + SIGINT


def quit_at_once(_number: int, _frame: object) -> NoReturn:
    """Signal handler: print a line and end the process, without unwinding.

    A KeyboardInterrupt in the middle of an import shows the stack of somebody else's module, and
    some modules turn it into another error, or swallow it.
    """
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def quit_on_interrupt() -> None:
    """From now on, an interrupt ends the process at once; unless it is ignored, as after nohup."""
    _replace(signal.default_int_handler, quit_at_once)


def raise_on_interrupt() -> None:
    """From now on, an interrupt is a KeyboardInterrupt again."""
    _replace(quit_at_once, signal.default_int_handler)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """In the block, which imports modules and holds nothing, an interrupt ends the process."""
    quit_on_interrupt()
    try:
        yield
    finally:
        raise_on_interrupt()


def is_interrupt(error: BaseException | None) -> bool:
    """Whether an exception is a KeyboardInterrupt, or was raised because of one."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _replace(old: object, new: object) -> None:
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is old:
        signal.signal(signal.SIGINT, new)  # type: ignore[arg-type]
