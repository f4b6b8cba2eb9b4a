"""One owner of a run folder at a time: a lock that the system frees when its process ends.

    with RunLock(path):         # RunInUse if another process has the folder
        ...

The lock is flock(2) on `<folder>/run.lock`, which also says who holds it. A killed process leaves
the file, but no lock: the next start takes it over. A file system without locks is used without,
which `note` reports.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import stat
import time
import weakref
from pathlib import Path

LOCK = "run.lock"
SUFFIX = ".lock"
POLL = 0.05  # seconds between two attempts
# Seconds: `holder` has the lock of a free folder for an instant.
PATIENCE = 1.0
# The end of RunInUse's message, for programs with the options of a run.
OTHER_FOLDER = "wait for its end, or choose another --logging.run_id or --logging.folder"
MOST_TEXT = 4096  # bytes that are read of a lock file

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
# NFS without lockd, Lustre without `-o flock`, some FUSE file systems
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class RunInUse(ValueError):
    """Another process uses the folder; the message says which one."""

    user_error = True


class LockError(ValueError):
    """The folder cannot be made or locked."""

    user_error = True


def is_unused(folder: Path) -> bool:
    """Whether a folder does not exist, or holds nothing but lock files."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.suffix == SUFFIX for path in folder.iterdir())


class RunLock:
    """The ownership of a folder, from here to `release`; a context manager, too.

    Makes the folder if it does not exist; `release` removes it if nothing is in it by then. name:
    of the lock file. patience: seconds to wait for an earlier owner. remedy: the end of RunInUse's
    message. note: why there is no lock, "" where there is one. LockError if the folder cannot be
    made or locked.
    """

    def __init__(
        self,
        folder: Path,
        name: str = LOCK,
        *,
        patience: float = PATIENCE,
        remedy: str = "wait for its end, or choose another folder",
    ) -> None:
        self.folder = folder
        self.note = ""
        self._path = folder / name
        self._remedy = remedy
        self._descriptor: int | None = None
        self._made: list[Path] = []
        self._acquire(patience)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def renew(self) -> None:
        """Make sure that the lock still excludes others: the folder may have been removed.

        RunInUse if another process has made the folder again and owns it.
        """
        if self._descriptor is None or _is_at(self._descriptor, self._path):
            return
        self._close()
        self._acquire(PATIENCE)

    def release(self) -> None:
        """Give the folder back. A second call does nothing."""
        if self._descriptor is not None and _is_at(self._descriptor, self._path):
            # While it is still locked: whoever opens it later finds that it is no longer there.
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._close()
        for folder in self._made:
            with contextlib.suppress(OSError):  # not empty: the run has begun
                folder.rmdir()
        self._made.clear()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self)

    def _acquire(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        while self._descriptor is None and not self.note:
            descriptor = self._open()
            if descriptor is None:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in _BUSY:
                    if time.monotonic() >= deadline:
                        raise RunInUse(self._in_use()) from None
                    time.sleep(POLL)
                    continue
                if error.errno not in _NO_LOCKS:
                    raise self._error(error) from error
                self.note = (
                    f"{self.folder}: its file system has no locks ({error.strerror}): a second "
                    "start of this run would not be noticed"
                )
                return
            if not _is_at(descriptor, self._path):  # its owner has just removed it
                os.close(descriptor)
                continue
            self._descriptor = descriptor
            _held.add(self)
            with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _about_this_process(), 0)

    def _open(self) -> int | None:
        """The lock file's descriptor; None if the folder has gone since it was made."""
        # O_NONBLOCK: a pipe under this name would wait for its other end.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._make_folder()
            descriptor = os.open(self._path, flags, 0o666)
        except FileNotFoundError:
            return None
        except FileExistsError as error:
            # mkdir found the folder that a rival has removed since; or a file has its name.
            if self.folder.is_dir() or not self.folder.exists():
                return None
            raise self._error(error) from error
        except OSError as error:
            raise self._error(error) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise LockError(f"{self._path}: is not a regular file; remove it")
        return descriptor

    def _make_folder(self) -> None:
        missing = []
        folder = self.folder
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = missing or self._made

    def _error(self, error: OSError) -> LockError:
        path = error.filename or self._path
        return LockError(f"{os.fspath(path)}: {error.strerror or error}; the run needs this folder")

    def _in_use(self) -> str:
        return f"{self.folder}: {_owner(self._path)}; {self._remedy}"


# ---------------------------------------------------------------- who holds a lock


def holder(folder: Path, name: str = LOCK) -> str | None:
    """`in use by process 12 on host since ...` if a process owns the folder; None if none does.

    Changes nothing. None, too, where the lock cannot be asked: no file, no permission, no locks.
    """
    path = folder / name
    return _owner(path) if _is_held(path) else None


def was_killed(folder: Path, name: str = LOCK) -> bool:
    """Whether a process of this host has ended without giving the folder back.

    False where that cannot be known: the owner was on another host, whose locks may not be seen
    here, or the file system has no locks.
    """
    path = folder / name
    if _is_held(path) is not False:
        return False
    try:
        return _about(path)["host"] == os.uname().nodename
    except _DAMAGED:  # without locks, nobody writes the text
        return False


def _is_held(path: Path) -> bool | None:
    """Whether a process has the lock; None where it cannot be asked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        # Shared: two that ask do not exclude each other. Freed by closing.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in _BUSY else None
    finally:
        os.close(descriptor)
    return False


def _about_this_process() -> bytes:
    now = datetime.datetime.now().astimezone()
    about = {
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "since": now.isoformat(sep=" ", timespec="seconds"),
    }
    return (json.dumps(about) + "\n").encode()


# What `_about` may raise: the text may be missing or damaged.
_DAMAGED = (OSError, ValueError, TypeError, LookupError, RecursionError)


def _about(path: Path) -> dict[str, object]:
    """What a lock file says about its owner."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return json.loads(os.read(descriptor, MOST_TEXT))
    finally:
        os.close(descriptor)


def _owner(path: Path) -> str:
    """The holder of a lock, in words."""
    try:
        about = _about(path)
        text = f"process {about['pid']:d} on {about['host']} since {about['since']}"
    except _DAMAGED:
        text = "another process"
    return f"in use by {text}" if text.isprintable() else "in use by another process"


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still names the file of a descriptor."""
    opened = os.fstat(descriptor)
    try:
        named = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino)


# A lock belongs to the open file, which a fork shares: a child that outlives its parent, such as a
# worker of a data loader, would keep the folder locked.
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _disown() -> None:
    for lock in list(_held):
        lock._close()


os.register_at_fork(after_in_child=_disown)
