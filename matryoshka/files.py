"""Atomic file replacement, and reading of paths that may not be regular files.

    with AtomicFile(path) as file:      # a temporary name beside `path`
        file.append(content)
        file.flush()                    # to the disk
        file.publish()                  # renamed: readers see the old file or the whole new one

`write_atomically` does these steps for content that fits into memory.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import io
import os
import re
import secrets
import select
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_CONTENT = 1 << 30  # bytes that are read at once; a sparse file may claim any number
PIPE_SECONDS = 10  # for a command of the shell to start and write
KERNEL_FOLDERS = ("/proc", "/sys", "/sys/kernel/debug", "/sys/kernel/tracing", "/sys/fs/cgroup")


class FileError(OSError):
    """The disk or the quota is full; names the file and the bytes it needs."""

    user_error = True


class AtomicFile:
    """A file that readers see under its name only after `publish`.

    Until then it has a temporary name in the same folder (a rename is atomic only inside one file
    system); leaving the context without `publish` removes it. `temporary` is that name, for writers
    that open files themselves. Temporary files of killed writers of the same path are removed.

    An OSError of any of these methods names `path`, never the temporary file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.temporary = _temporary_name(self.path)
        self._written = 0  # bytes, of `write`

    def __enter__(self) -> AtomicFile:
        # A rename would replace a device or a pipe itself: /dev/null would become a file.
        if os.path.lexists(self.path):
            mode = _status(self.path, follow_links=False).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
                raise OSError(errno.EINVAL, "is not a regular file", str(self.path))
        _remove_left_behind(self.path)
        try:
            while not self._open():
                self.temporary = _temporary_name(self.path)
        except OSError as error:
            self._unlink()
            raise self._explained(error) from error
        except BaseException:  # a signal, between the file and its descriptor
            self._unlink()
            raise
        return self

    def _open(self) -> bool:
        """Create and lock the temporary file; False if another process has removed it already.

        The lock says that its writer is alive. Before that, `_remove_left_behind` may take the file
        for one of a killed writer.
        """
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        self._descriptor = os.open(self.temporary, flags, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.lexists(self.temporary)
        except BlockingIOError:
            is_ours = False
        except OSError:  # a file system without locks: then nobody removes it
            is_ours = True
        if not is_ours:
            os.close(self._descriptor)
        return is_ours

    def __exit__(self, *_) -> None:
        # Failures of the clean-up must not replace the exception that ended the context.
        try:
            with suppress(OSError):
                os.close(self._descriptor)
        finally:
            self._unlink()

    def _unlink(self) -> None:
        with suppress(OSError):  # `publish` has renamed it, or the disk is read-only by now
            self.temporary.unlink()

    def append(self, data: bytes | memoryview) -> None:
        """Append `data` to the file."""
        rest = memoryview(data)
        try:
            while rest:  # a system call may write a part only
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            raise self._explained(error) from error

    def write(self, data: bytes | bytearray, offset: int) -> None:
        """Write `data` at byte `offset`. FileError where the disk is full."""
        rest = memoryview(data)
        try:
            while rest:
                count = os.pwrite(self._descriptor, rest, offset)
                rest = rest[count:]
                offset += count
        except OSError as error:
            raise self._explained(error, max(self._written, offset + len(rest))) from error
        self._written = max(self._written, offset)

    def flush(self) -> None:
        """Wait until the content is on the disk."""
        # Before the rename: file systems may write the new name to disk before the data, and a
        # power cut then leaves an empty file under it.
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._explained(error, self._written) from error

    def publish(self) -> None:
        """Rename the file to `path`, replacing an older one. Call `flush` first."""
        try:
            os.replace(self.temporary, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError, needed: int = 0) -> OSError:
        return _explained(error, self.path, needed)


def _explained(error: OSError, path: Path, needed: int = 0) -> OSError:
    reason = error.strerror or str(error)
    if error.errno in _NO_SPACE:
        hint = f" ({needed} bytes or more are needed)" if needed else ""
        return FileError(error.errno, reason + hint, str(path))
    return OSError(error.errno, reason, str(path))


def _temporary_name(path: Path) -> Path:
    # Random: two writers of a path are apart, on two machines, too; the last to publish wins.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _remove_left_behind(path: Path) -> None:
    """Remove the temporary files of writers of `path` that were killed."""
    for name in _found_temporary(str(path.parent)):
        if not re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]+\.tmp", name):
            continue
        with suppress(OSError):
            temporary = path.with_name(name)
            # For writing: a lock on NFS needs it.
            flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(temporary, flags)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails: its writer lives
                temporary.unlink()
            finally:
                os.close(descriptor)


@functools.lru_cache(maxsize=64)
def _found_temporary(folder: str) -> list[str]:
    """Names of the temporary files in a folder when this process first wrote into it.

    Once, because a folder may have a million files: what is killed later is found by the next
    process.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [name for name in names if name.startswith(".") and name.endswith(".tmp")]


def as_text(name: str) -> str:
    """The name of a file or a folder as text that can be written and printed.

    A name is bytes. Those that are not UTF-8, which Python keeps as surrogate escapes (PEP 383),
    become `\\xNN`; other names stay as they are. The result does not find the file.
    """
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that no file name has, from JSON for example
        return name.encode("utf-8", "backslashreplace").decode("utf-8")


def check_writable(folder: Path) -> None:
    """OSError if a folder, which need not exist yet, cannot take files. Creates nothing."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    tempfile.TemporaryFile(dir=folder).close()


def write_atomically(path: str | Path, *content: bytes | memoryview) -> None:
    """Replace `path` by the concatenated `content`, completely or not at all.

    OSError that names `path`; the old file, if there was one, is then unchanged.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; give the name of a file", str(path))
    with AtomicFile(path) as file:
        for part in content:
            file.append(part)
        file.flush()
        file.publish()


def sync_folder(path: str | Path) -> None:
    """Flush a folder to the disk: a rename survives a power cut only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(
    path: str | Path, *, max_bytes: int | None = None, follow_links: bool = True
) -> io.BufferedReader:
    """Open a file for reading if it is a regular file of at most `max_bytes` bytes.

    Opening a pipe would wait for its other end, a device has no end, and a file of the kernel (in
    /proc or /sys) may have either fault: none is opened. OSError that names `path`, with the reason
    as `strerror`.
    """
    # O_NONBLOCK: open() returns at once also for a pipe. It does not affect regular files.
    flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
    if not follow_links:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    # Before opening as well: opening a device or a pipe can have effects on its other end.
    _check_kind(path, _status(path, follow_links))
    descriptor = os.open(path, flags)
    try:
        # once more, of what was opened: the name may belong to another file by now
        status = os.fstat(descriptor)
        _check_kind(path, status)
        if max_bytes is not None and status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"is larger than {max_bytes} bytes", str(path))
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | Path, *, max_bytes: int | None = MAX_CONTENT) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes; see `open_regular`."""
    with open_regular(path, max_bytes=max_bytes) as file:
        try:
            return file.read()  # not read(max_bytes), which first allocates as many
        except OSError as error:  # of a failing disk, without a name
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def check_regular(path: str | Path) -> None:
    """OSError, as of `open_regular`, for a path that a library is about to open by its name."""
    _check_kind(path, _status(path))


class AppendedFile:
    """A file that grows by whole pieces: one that does not fit leaves no half of it behind.

    Nothing is buffered. An OSError names the file; FileError if the disk is full. The file must
    have one writer at a time.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if os.path.lexists(path):
            check_regular(path)
        flags = os.O_CREAT | os.O_APPEND | os.O_RDWR | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise _explained(error, self.path) from error

    def __enter__(self) -> AppendedFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, piece: str | bytes) -> None:
        """Append a piece; text as UTF-8."""
        rest = memoryview(piece.encode() if isinstance(piece, str) else piece)
        end = self.size()
        try:
            while rest:  # a system call may write a part only
                rest = rest[os.write(self._descriptor, rest) :]
        except BaseException as error:  # a signal as well
            with suppress(OSError):
                os.ftruncate(self._descriptor, end)
            if isinstance(error, OSError):
                raise _explained(error, self.path) from error
            raise

    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._descriptor).st_size

    def cut(self, size: int) -> None:
        """Drop what is behind the first `size` bytes."""
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            raise _explained(error, self.path) from error

    def sync(self) -> None:
        """Wait until the content is on the disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise _explained(error, self.path) from error

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with suppress(OSError):
                os.close(descriptor)


def open_append(path: str | Path) -> AppendedFile:
    """Open a file, new or regular, for whole pieces at its end."""
    return AppendedFile(path)


def read_stream(path: str | Path, *, max_bytes: int) -> bytes:
    """The content of a regular file, or of a pipe, such as `<(command)` in a shell.

    OSError for more than max_bytes, and for a pipe into which nobody writes for PIPE_SECONDS.
    """
    try:
        is_pipe = stat.S_ISFIFO(_status(path).st_mode)
    except OSError:
        is_pipe = False  # open_regular says why
    if not is_pipe:
        return read_regular(path, max_bytes=max_bytes)
    # O_NONBLOCK: without it, opening waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    content = b""
    try:
        while True:
            ready, _, _ = select.select([descriptor], [], [], PIPE_SECONDS)
            if not ready:
                reason = f"is a pipe into which nobody wrote for {PIPE_SECONDS} seconds"
                raise OSError(errno.ETIMEDOUT, reason, str(path))
            part = os.read(descriptor, max_bytes + 1 - len(content))
            if not part:
                return content
            content += part
            if len(content) > max_bytes:
                raise OSError(errno.EFBIG, f"is larger than {max_bytes} bytes", str(path))
    finally:
        os.close(descriptor)


def _status(path: str | Path, follow_links: bool = True) -> os.stat_result:
    try:
        return os.stat(path, follow_symlinks=follow_links)
    except ValueError:  # a NUL character: no such name can exist
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None


def _check_kind(path: str | Path, status: os.stat_result) -> None:
    """OSError unless it is a regular file, on a disk."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    if status.st_dev in _kernel_devices():
        raise OSError(errno.EINVAL, "is a file of the kernel, not of a disk", str(path))


@functools.cache
def _kernel_devices() -> frozenset[int]:
    """Device numbers of the file systems that show the kernel's state."""
    found = set()
    for name in KERNEL_FOLDERS:
        with suppress(OSError):
            found.add(os.stat(name).st_dev)
    with suppress(OSError):
        found.discard(os.stat("/").st_dev)  # a folder of that name on an ordinary disk
    return frozenset(found)
