"""Temporary files of killed writers are removed; those of living ones, and of others, are not."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading

import pytest
from attacks.scale import scaled

from matryoshka import files
from matryoshka.files import AppendedFile, AtomicFile, FileError, write_atomically


@pytest.fixture(autouse=True)
def _as_a_new_process():
    files._found_temporary.cache_clear()


def killed_writer(path) -> None:
    """A process dies while it writes `path`."""
    pid = os.fork()
    if pid == 0:
        with AtomicFile(path) as file:
            file.append(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_next_writer_removes_them(tmp_path):
    path = tmp_path / "a.json"
    for _ in range(scaled(3, 50)):
        killed_writer(path)
        killed_writer(tmp_path / "b.json")
    (tmp_path / ".a.json.12345.tmp").write_bytes(b"of an older version")
    kept = {".c.json.deadbeef.tmp", ".a.json.notes.tmp", ".a.json.tmp", "a.json.deadbeef.tmp"}
    for name in kept:
        (tmp_path / name).write_bytes(b"of somebody else")
    write_atomically(path, b"whole")
    assert path.read_bytes() == b"whole"
    left = {name for name in os.listdir(tmp_path) if not name.startswith(".b.json")}
    assert left == {"a.json", *kept}
    files._found_temporary.cache_clear()
    write_atomically(tmp_path / "b.json", b"whole")
    assert set(os.listdir(tmp_path)) == {"a.json", "b.json", *kept}


def test_a_living_writer_keeps_its_file(tmp_path):
    path = tmp_path / "a"
    with AtomicFile(path) as slow:
        slow.append(b"slow")
        pid = os.fork()
        if pid == 0:  # another process
            files._found_temporary.cache_clear()
            write_atomically(path, b"fast")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert path.read_bytes() == b"fast"
        files._found_temporary.cache_clear()
        write_atomically(path, b"of a thread")  # of the same process
        slow.flush()
        slow.publish()
    assert path.read_bytes() == b"slow"
    assert os.listdir(tmp_path) == ["a"]


def test_rivals_of_one_path(tmp_path):
    """Threads and processes that all clean up, write and die: the file is one of theirs, whole."""
    path = tmp_path / "a"
    contents = [bytes([number]) * 100_000 for number in range(6)]

    def write(content: bytes) -> None:
        for _ in range(scaled(5, 200)):
            files._found_temporary.cache_clear()
            write_atomically(path, content)

    children = []
    for content in contents[:3]:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                write(content)
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    threads = [threading.Thread(target=write, args=(content,)) for content in contents[3:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    """Nobody can tell a killed writer from a slow one: nothing is removed."""
    killed_writer(tmp_path / "a")

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    write_atomically(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert len(os.listdir(tmp_path)) == 2


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"x")
    (tmp_path / ".a.deadbeef.tmp").symlink_to("precious")
    write_atomically(tmp_path / "a", b"whole")
    assert (tmp_path / "precious").read_bytes() == b"x"


@pytest.mark.parametrize("call", ["open", "flock"])
def test_a_signal_between_the_file_and_its_descriptor(tmp_path, monkeypatch, call):
    module = os if call == "open" else fcntl
    truth = getattr(module, call)

    def interrupted(*args, **kwargs):
        truth(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, call, interrupted)
    with pytest.raises(KeyboardInterrupt), AtomicFile(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- appended pieces


def test_a_piece_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "log"
    with AppendedFile(path) as file:
        file.write("first\n")
        truth = os.write

        def full(descriptor, data):
            if len(data) > 3:
                return truth(descriptor, data[:3])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(FileError) as refusal:
            file.write("second\n")
        monkeypatch.undo()
        assert refusal.value.filename == str(path)
        assert path.read_text() == "first\n"
        file.write("third ä\n")
    file.close()  # twice is once
    assert path.read_text() == "first\nthird ä\n"


def test_an_interrupt_in_a_piece_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "log"
    with AppendedFile(path) as file:
        file.write(b"first\n")
        truth = os.write

        def interrupted(descriptor, data):
            truth(descriptor, data[:3])
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            file.write(b"second\n")
    assert path.read_bytes() == b"first\n"
