"""Exit of a program: errors that a user can correct become one line and exit status 2."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

from matryoshka.config.options import legible
from matryoshka.config.streams import Guarded, complaint, guarded
from matryoshka.interrupts import (
    INTERRUPTED,
    StopRequested,
    cause_of,
    raise_on_interrupt,
    raising_stops,
)

P = ParamSpec("P")
R = TypeVar("R")
# Reasons that a user can change, of errors that name no file, such as those of a buffered write.
RESOURCES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)


def program(main: Callable[P, R]) -> Callable[P, R]:
    """Decorate a program's `main(argv=None)`: errors of the user become `error: ...` and status 2.

    These are exceptions whose class has `user_error = True`, OSErrors that name a file or a
    resource of the machine, and a lack of memory; with MATRYOSHKA_TRACEBACK=1 in the environment
    they propagate. Any other exception is a bug of this package and propagates.

    A signal ends it in one line, once what was being written is removed: the status is 130 for an
    interrupt, 143 for SIGTERM and 129 for SIGHUP.

    A closed standard output changes nothing: the program does its work and exits with its status. A
    full disk behind it is an error once the work is done.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with guarded() as output:
            if output is None:  # inside another program, which says how it ended
                return _ended(output, main, *args, **kwargs)
            raise_on_interrupt()  # its imports are done
            with raising_stops():
                return _ended(output, main, *args, **kwargs)

    return run


def _ended(output: Guarded | None, main: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    try:
        result = main(*args, **kwargs)
    except SystemExit as end:
        if not end.code:
            _check_output(complaint(output))
        raise
    except KeyboardInterrupt as interrupt:
        _interrupted(interrupt)
    except Exception as error:
        interrupt = cause_of(error)
        if interrupt is not None:
            _interrupted(interrupt)
        message = _message(error)
        if message is None or os.environ.get("MATRYOSHKA_TRACEBACK") == "1":
            raise
        for line in message.splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    if not result:
        _check_output(complaint(output))
    return result


def _interrupted(interrupt: KeyboardInterrupt) -> NoReturn:
    """One line, and the status that a shell gives to a program which the signal has ended."""
    if isinstance(interrupt, StopRequested):
        print(interrupt, file=sys.stderr)
        raise SystemExit(interrupt.status) from None
    print("interrupted", file=sys.stderr)
    raise SystemExit(INTERRUPTED) from None


def _check_output(problem: str | None) -> None:
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None


def _message(error: Exception) -> str | None:
    """The text for the user; None for an exception that a user cannot correct."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{_name(error.filename)}: {error.strerror}"
    if getattr(error, "user_error", False):
        return str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno in RESOURCES:
        return error.strerror or str(error)
    if isinstance(error, UnicodeEncodeError) and not _is_text(error.object):
        return f"{legible(error.object)}: not text in UTF-8; give it another name"
    return _lack_of_memory(error) or _unusable_gpu(error)


def _name(name: object) -> str:
    """A file's name on one line."""
    text = os.fsdecode(name) if isinstance(name, bytes) else str(name)
    return text if text.isprintable() else legible(text)


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _lack_of_memory(error: Exception) -> str | None:
    """A line for a failed allocation, of Python, NumPy or torch; None for any other error."""
    text = str(error)
    # torch's on a CPU is a RuntimeError; its class for GPUs is not imported for a name
    is_torch = isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
    )
    if not isinstance(error, MemoryError) and not is_torch:
        return None
    reason = legible(text.splitlines()[0]) if text else "no reason given"
    return f"not enough memory ({reason}): smaller batches, images or models need less"


# How CUDA's errors begin that say nothing about this package: its own are those of a kernel.
GPU_ERRORS = (
    "CUDA error: all CUDA-capable devices are busy or unavailable",
    "CUDA error: out of memory",
    "CUDA error: no CUDA-capable device is detected",
    "CUDA driver initialization failed",
    "The NVIDIA driver on your system is too old",
    "Found no NVIDIA driver on your system",
)


def _unusable_gpu(error: Exception) -> str | None:
    """A line for a GPU that cannot be used, or a driver that does not fit; None for other errors.

    torch.AcceleratorError is a RuntimeError, too.
    """
    text = str(error).strip()
    if not isinstance(error, RuntimeError) or not text.startswith(GPU_ERRORS):
        return None
    return f"{text.splitlines()[0]}; nvidia-smi shows who uses the GPU; a CPU needs none of it"
