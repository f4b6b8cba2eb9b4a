"""Standard output and error of a program, when nobody reads them or the disk is full.

A program whose reader has gone, such as `matryoshka train ... | head`, does its work to the end. A
line that does not fit on a disk is an error, reported once the work is done.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

NOBODY = (errno.EPIPE, errno.EBADF, errno.ESHUTDOWN, errno.ECONNRESET)  # the reader has gone


class Guarded:
    """A text stream that takes every text. lost: the first error that kept a text from its place.

    From then on, the stream's descriptor is that of the null device: child processes and Python's
    own last flush do not meet the same error again.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # a file name that is not text, or a terminal of few characters
            encoding = self._stream.encoding or "ascii"
            shown = text.encode(encoding, "backslashreplace").decode(encoding)
            return self.write(shown)
        except OSError as error:
            self._lose(error)
        except ValueError:  # closed in Python
            self._lose(OSError(errno.EBADF, os.strerror(errno.EBADF)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)
        except ValueError:
            self._lose(OSError(errno.EBADF, os.strerror(errno.EBADF)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        self.lost = self.lost or error
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextlib.contextmanager
def guarded() -> Iterator[Guarded | None]:
    """In the block, sys.stdout and sys.stderr are guarded; gives the former.

    None inside another such block: its end decides what a lost line means.
    """
    if isinstance(sys.stdout, Guarded):
        yield None
        return
    _occupy_descriptors()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nobody:
        output = Guarded(before[0] or nobody)
        sys.stdout = output  # type: ignore[assignment]
        sys.stderr = Guarded(before[1] or nobody)  # type: ignore[assignment]
        try:
            yield output
        finally:
            output.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


def complaint(output: Guarded | None) -> str | None:
    """What to tell the user about lost output; None if nothing is lost, or nobody wanted it."""
    if output is None:
        return None
    output.flush()
    if output.lost is None or output.lost.errno in NOBODY:
        return None
    return f"standard output: {output.lost.strerror}; the program itself has ended as it should"


def _occupy_descriptors() -> None:
    """Open the null device as each of the descriptors 0 to 2 that is closed.

    Otherwise the next file that the program opens has the number of standard output, and a library
    that prints writes into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
