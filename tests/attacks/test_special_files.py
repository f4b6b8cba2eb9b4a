"""Pipes, devices, sockets, folders and files of the kernel where a regular file is expected."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import threading
from pathlib import Path

import hostile_options
import pytest
import small_commands
from attacks.scale import scaled

from matryoshka import files


def bound(path: Path) -> None:
    """A socket of that name, which may be longer than a socket's address."""
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


# A name, and a function that makes it; the last two are regular files by their status alone.
KINDS = {
    "pipe": os.mkfifo,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "socket": bound,
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path),
    "memory": lambda path: path.symlink_to("/proc/self/mem"),
    "pages": lambda path: path.symlink_to("/proc/self/pagemap"),
}


# ---------------------------------------------------------------- files.py


@pytest.fixture(params=KINDS)
def special(request, tmp_path):
    path = tmp_path / "special"
    KINDS[request.param](path)
    return path


def test_no_reader_opens_them(special):
    for read in (files.open_regular, files.read_regular, files.check_regular, files.open_append):
        with pytest.raises(OSError, match=r".") as caught:
            read(special)
        assert caught.value.filename == str(special) or caught.value.filename == special
        assert caught.value.strerror


def test_a_new_file_does_not_replace_them(special):
    """As root, a rename would make /dev/null a file."""
    kind = special.lstat().st_mode
    if special.is_symlink():  # a link is replaced, not what it points to
        files.write_atomically(special, b"x")
        assert special.read_bytes() == b"x"
        return
    with pytest.raises(OSError, match=r"."):
        files.write_atomically(special, b"x")
    assert special.lstat().st_mode == kind
    assert list(special.parent.iterdir()) == [special]


def test_regular_files_are_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"content")
    (tmp_path / "link").symlink_to(path)
    assert files.read_regular(path) == files.read_regular(tmp_path / "link") == b"content"
    assert files.read_stream(path, max_bytes=7) == b"content"
    for read in (files.read_regular, files.read_stream):
        with pytest.raises(OSError, match="larger than 6 bytes"):
            read(path, max_bytes=6)
    with files.open_append(path) as file:
        file.write(" and more")
    assert path.read_text() == "content and more"
    with pytest.raises(FileNotFoundError):
        files.read_regular("a\0b")


def test_a_pipe_is_a_stream_while_somebody_writes(tmp_path, monkeypatch):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for size in (3, 300_000):
        writer = threading.Thread(target=path.write_bytes, args=(b"x" * size,))
        writer.start()
        assert files.read_stream(path, max_bytes=1 << 20) == b"x" * size
        writer.join()
    monkeypatch.setattr(files, "PIPE_SECONDS", 0.01)
    with pytest.raises(OSError, match=r"nobody wrote for 0\.01 seconds"):
        files.read_stream(path, max_bytes=10)


# ---------------------------------------------------------------- programs


@pytest.mark.parametrize("program", small_commands.names())
def test_options_that_name_a_file(program, inputs, tmp_path, monkeypatch, capsys):
    """One line and status 2, for every option that names an existing file or folder."""
    monkeypatch.chdir(tmp_path)
    kinds = {kind: make for kind, make in KINDS.items() if kind != "folder"}
    for kind, make in kinds.items():
        make(tmp_path / kind)
    cases = []
    for option in hostile_options.declared():
        if option.program == program and option.field.metadata.get("existing"):
            cases += [(option, kind) for kind in kinds]
    random.Random(program).shuffle(cases)
    for option, kind in cases[: scaled(2, 1000)]:
        argv = small_commands.command(program, inputs, tmp_path / "out")
        code = small_commands.status([*argv, *option.words(str(tmp_path / kind))])
        shown = capsys.readouterr()
        assert code == 2, f"{option}={kind}: {code} {shown.err[-500:]}"
        assert shown.err.startswith("error: "), f"{option}={kind}: {shown.err[-500:]}"
        assert len(shown.err.splitlines()) == 1, f"{option}={kind}: {shown.err[-500:]}"


# (program, the folder of its inputs)
FOLDERS = [
    ("runs", "run"),
    ("report", "run"),
    ("report", "."),
    ("analyze", "."),
    ("adapt", "embeddings"),
    ("retrieve", "embeddings"),
    ("index build", "embeddings"),
    ("index info", "photos.index"),
]


@pytest.mark.parametrize(("program", "folder"), FOLDERS)
def test_files_inside_a_folder(program, folder, inputs, tmp_path, capsys):
    """A run, embeddings, predictions or an index with one special file: 0, or 2 with its line."""
    below = [path for path in (inputs / "inputs" / folder).rglob("*") if path.is_file()]
    names = sorted(path.relative_to(inputs / "inputs" / folder) for path in below)
    cases = [(name, kind) for name in names for kind in KINDS if kind != "loop"]
    random.Random(program + folder).shuffle(cases)
    for name, kind in cases[: scaled(3, 1000)]:
        root = tmp_path / "copy"
        shutil.copytree(inputs, root, symlinks=True)
        target = root / "inputs" / folder / name
        target.unlink()
        KINDS[kind](target)
        code = small_commands.status(small_commands.command(program, root, tmp_path / "out"))
        shown = capsys.readouterr()
        assert code in (0, 2), f"{name} is a {kind}: {code} {shown.err[-500:]}"
        if code == 2:
            assert shown.err.startswith("error: "), f"{name} is a {kind}: {shown.err[-500:]}"
        shutil.rmtree(root)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("kind", ["pipe", "zeros", "memory"])
def test_a_config_file_and_a_list_of_names(kind, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "PIPE_SECONDS", 0.01)
    path = tmp_path / kind
    KINDS[kind](path)
    index = inputs / "inputs/photos.index"
    for argv in (
        ["train", f"--config-file={path}"],
        ["sweep", str(path)],
        ["index", "delete", str(index), f"--names-from={path}"],
        ["fit", str(inputs / "photos"), f"--labels={path}", f"--output={tmp_path / 'fit'}"],
    ):
        assert small_commands.status(argv) == 2, argv
        shown = capsys.readouterr().err
        assert len(shown.splitlines()) == 1, shown
    with contextlib.suppress(FileNotFoundError):
        assert not list((tmp_path / "fit").iterdir())
