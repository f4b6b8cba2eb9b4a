"""Exit of a program: errors that a user can correct become one line and exit status 2."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def program(main: Callable[P, R]) -> Callable[P, R]:
    """Decorate a program's `main(argv=None)`: errors of the user become `error: ...` and status 2.

    These are exceptions whose class has `user_error = True`, and OSErrors that name a file; with
    MATRYOSHKA_TRACEBACK=1 in the environment they propagate. An interrupt exits with status 130. A
    closed pipe behind standard output exits with status 141, without a message. Any other
    exception is a bug of this package and propagates.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()  # a closed pipe shows here, not at the interpreter's exit
            return result
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:
            # Without this, flushing the rest of the buffer raises again at exit.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except Exception as error:
            message = _message(error)
            if message is None or os.environ.get("MATRYOSHKA_TRACEBACK") == "1":
                raise
            for line in message.splitlines():
                print(f"error: {line}", file=sys.stderr)
            raise SystemExit(2) from None

    return run


def _message(error: Exception) -> str | None:
    """The text for the user; None for an exception that a user cannot correct."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if getattr(error, "user_error", False):
        return str(error) or type(error).__name__
    return None
