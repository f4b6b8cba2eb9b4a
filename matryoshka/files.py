"""Files that appear under their name only when they are whole and on the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileError(ValueError):
    """A file that cannot be written; the message names it and the remedy."""

    user_error = True


class Replacement:
    """A file under a temporary name beside `path`; `publish` gives it that name, leaving removes
    it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._written = 0

    def __enter__(self) -> Replacement:
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC
        try:
            self._fd = os.open(self._temporary, flags, 0o666)
        except OSError as error:
            raise self._explained(error, 0) from error
        return self

    def __exit__(self, *_) -> None:
        with suppress(OSError):
            os.close(self._fd)
        with suppress(FileNotFoundError):
            self._temporary.unlink()

    def write(self, data: bytes | bytearray, offset: int) -> None:
        view = memoryview(data)
        try:
            while view:
                n = os.pwrite(self._fd, view, offset)
                view, offset = view[n:], offset + n
        except OSError as error:
            raise self._explained(error, max(self._written, offset + len(view))) from error
        self._written = max(self._written, offset)

    def flush(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._explained(error, self._written) from error

    def publish(self) -> None:
        os.replace(self._temporary, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too, must survive a power cut
        finally:
            os.close(folder)

    def _explained(self, error: OSError, needed: int) -> Exception:
        if error.errno in _NO_SPACE:
            return FileError(
                f"{self.path}: not written: {error.strerror} ({needed} bytes and more are needed)"
            )
        return OSError(error.errno, error.strerror, str(self.path))


def write_atomically(path: str | Path, *content: bytes | memoryview) -> None:
    """Replace `path` by `content`, whole or not at all: temporary name, flush to disk, rename,
    flush the folder.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder; give the name of a file")
        _replace(path, path.with_name(f".{path.name}.{os.getpid()}.tmp"), content)
    except OSError as error:  # a full disk, too, has an error without a file's name
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _replace(path: Path, temporary: Path, content: Sequence[bytes | memoryview]) -> None:
    try:
        file = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        try:
            for part in content:
                rest = memoryview(part)
                while rest:
                    rest = rest[os.write(file, rest) :]
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
