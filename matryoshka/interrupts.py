"""Signals that end a program: one line, and what it was writing is removed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

INTERRUPTED = 130  # exit status: 128 + SIGINT
STOPS = (signal.SIGTERM, signal.SIGHUP)  # of a scheduler, and of a terminal that closes


class StopRequested(KeyboardInterrupt):
    """SIGTERM or SIGHUP: ends a program as Ctrl-C does, so that temporary files are removed."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


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
    _replace(signal.SIGINT, signal.default_int_handler, quit_at_once)


def raise_on_interrupt() -> None:
    """From now on, an interrupt is a KeyboardInterrupt again."""
    _replace(signal.SIGINT, quit_at_once, signal.default_int_handler)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """In the block, which imports modules and holds nothing, a signal ends the process."""
    quit_on_interrupt()
    swapped = [number for number in STOPS if _replace(number, _raise_stop, signal.SIG_DFL)]
    try:
        yield
    finally:
        raise_on_interrupt()
        for number in swapped:
            _replace(number, signal.SIG_DFL, _raise_stop)


@contextlib.contextmanager
def raising_stops() -> Iterator[None]:
    """In the block, SIGTERM and SIGHUP raise StopRequested, once, unless something handles them.

    Forks have the default again: a worker is not to unwind the program that started it.
    """
    numbers = [number for number in STOPS if _replace(number, signal.SIG_DFL, _raise_stop)]
    try:
        yield
    finally:
        for number in numbers:
            _replace(number, _raise_stop, signal.SIG_DFL)
            _replace(number, _ignore, signal.SIG_DFL)


def is_interrupt(error: BaseException | None) -> bool:
    """Whether an exception is a KeyboardInterrupt, or was raised because of one."""
    return cause_of(error) is not None


def cause_of(error: BaseException | None) -> KeyboardInterrupt | None:
    """The KeyboardInterrupt that an exception is, or because of which it was raised."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _raise_stop(number: int, _frame: object) -> None:
    # A second signal must not interrupt the removal of what is unfinished; SIGKILL can.
    for stop in STOPS:
        _replace(stop, _raise_stop, _ignore)
    raise StopRequested(number)


def _ignore(_number: int, _frame: object) -> None:
    """Not SIG_IGN, which programs that are started meanwhile would inherit."""


def _default_in_child() -> None:
    for number in STOPS:
        _replace(number, _raise_stop, signal.SIG_DFL)
        _replace(number, _ignore, signal.SIG_DFL)


os.register_at_fork(after_in_child=_default_in_child)


def _replace(number: int, old: object, new: object) -> bool:
    """Whether `old` was the handler of a signal, and is now replaced."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(number) is not old:
        return False
    signal.signal(number, new)  # type: ignore[arg-type]
    return True
