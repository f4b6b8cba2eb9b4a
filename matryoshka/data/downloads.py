"""Verified downloads that continue where they stopped.

    path = downloaded(SETS["cifar10"].archive, Path("data"))

Until a file is complete and its checksum right, it is `<name>.part`; a later call asks the server
for the rest of it. A file that is already there, from any source, is verified and used.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from matryoshka.data.catalogue import RemoteFile
from matryoshka.data.layout import BetonError
from matryoshka.files import AppendedFile, open_append, open_regular, sync_folder

NETWORK_SECONDS = 10.0  # to reach the server, and the longest stall of a download
_BLOCK = 1 << 20
_ATTEMPTS = 5  # that bring no byte, one after the other

Progress = Callable[[str, int, int], None]  # task, done, total


class DownloadError(BetonError):
    """A file that cannot be fetched, or is not the expected one; names the file and the remedy."""


def downloaded(file: RemoteFile, folder: Path, progress: Progress | None = None) -> Path:
    """Path of `file` in `folder`, which is fetched unless it is there; its MD5 is always verified.

    progress: called with bytes. DownloadError; what was received stays for the next call, unless
    its checksum is wrong. A file with another checksum that was there before is kept.
    """
    path = folder / file.name
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            if _fetched(file, path, progress):
                return path
        _verify(path, file)
    except OSError as error:
        raise DownloadError(f"{error.filename or path}: {error.strerror or error}") from error
    return path


def within(seconds: float, work: Callable[[], None]) -> bool:
    """Whether `work` ends in time; its exception is raised.

    The lookup of a host's address has no time limit of its own, so the work is left to a thread.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # raised again below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="matryoshka-network", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return not thread.is_alive()


def _fetched(file: RemoteFile, path: Path, progress: Progress | None) -> bool:
    """Fetch and verify `path`; False if another process has done so in the meantime."""
    part = path.with_name(f"{path.name}.part")
    with open_append(part) as output:
        # Two processes that append to one file would damage it: the second one waits.
        fcntl.flock(output, fcntl.LOCK_EX)
        if not part.exists() or not os.path.samestat(os.fstat(output.fileno()), part.stat()):
            # The other process has finished, or has refused what it received: look again.
            return not path.exists() and _fetched(file, path, progress)
        if path.exists():
            if output.size() == 0:  # created by the line above
                part.unlink(missing_ok=True)
            return False
        try:
            _receive(file, path, output, progress)
        finally:
            if output.size() == 0:
                part.unlink(missing_ok=True)
        output.sync()
        found = _md5(part)
        if found != file.md5:
            part.unlink()
            raise DownloadError(
                f"{file.url}: the file received has the MD5 {found}, not {file.md5}, and was not "
                f"kept; start again, or put the file at {path}"
            )
        os.replace(part, path)
        sync_folder(path.parent)
    return True


def _receive(file: RemoteFile, path: Path, output: AppendedFile, progress: Progress | None) -> None:
    """Append the missing bytes to `output`. DownloadError if they do not come."""
    failures = 0
    while (start := output.size()) < file.size:
        reason = "the connection ended"
        try:
            with _opened(file.url, start) as response:
                _check_length(file, start, response)
                if start and response.status != 206:  # the server sends all of it
                    start = _emptied(output)
                while output.size() < file.size and (block := response.read(_BLOCK)):
                    _append(block, output, path)
                    if progress is not None:
                        progress(f"download {file.name}", output.size(), file.size)
        except (OSError, HTTPException) as error:
            reason = _reason(error)
            if isinstance(error, urllib.error.HTTPError) and error.code != 416:
                failures = _ATTEMPTS  # asking again does not help
            elif isinstance(error, urllib.error.HTTPError):
                start = _emptied(output)
        if output.size() > start:
            failures = 0
            continue
        failures += 1
        if failures >= _ATTEMPTS or output.size() == 0:
            received = f" after {start:,} of {file.size:,} bytes" if start else ""
            raise DownloadError(
                f"{file.url}: cannot be fetched{received} ({reason}); start again with a network "
                f"connection to continue, or put the file at {path}"
            )


def _append(block: bytes, output: AppendedFile, path: Path) -> None:
    try:
        output.write(block)
    except OSError as error:  # a full disk, which must not look like a problem of the network
        raise DownloadError(f"{path}: cannot be written: {error.strerror or error}") from error


def _emptied(output: AppendedFile) -> int:
    output.cut(0)
    return 0


def _opened(url: str, start: int):
    """The server's answer to a request for the bytes from `start` on."""
    headers = {"User-Agent": "matryoshka-vision", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    answers = []

    def ask() -> None:
        answers.append(urllib.request.urlopen(request, timeout=NETWORK_SECONDS))

    if not within(2 * NETWORK_SECONDS, ask):
        raise TimeoutError("no answer")
    return answers[0]


def _check_length(file: RemoteFile, start: int, response) -> None:
    """DownloadError before the bytes of another file are received, such as an error page."""
    length = response.headers.get("Content-Length")
    if not length or not length.isdigit():
        return  # the checksum decides
    whole = int(length) + (start if response.status == 206 else 0)
    if whole != file.size:
        raise DownloadError(
            f"{file.url}: the server's file has {whole:,} bytes, not {file.size:,}; put the right "
            "file there yourself"
        )


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause) or type(cause).__name__


def _verify(path: Path, file: RemoteFile) -> None:
    size = path.stat().st_size
    if size != file.size:
        raise DownloadError(
            f"{path}: has {size:,} bytes, not the {file.size:,} of {file.url}; move it away and "
            "start again"
        )
    found = _md5(path)
    if found != file.md5:
        raise DownloadError(
            f"{path}: is damaged or another file: its MD5 is {found}, that of {file.url} is "
            f"{file.md5}; move it away and start again"
        )


def _md5(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
