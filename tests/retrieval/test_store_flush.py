"""What reaches the disk before what: the files that a new index.json names are there for ever when
it is.
"""

import os
from pathlib import Path
from typing import NamedTuple

import pytest
from stored_indexes import batch, random_rows

from matryoshka.retrieval import RetrievalError, SearchParams, Stage
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.store_writer import Writer

CHANGES = {
    "first build": lambda w: w.build(batch(random_rows(70), path="more")),
    "build": lambda w: w.build(batch(random_rows(70), path="more"), lists=3, overwrite=True),
    "add": lambda w: w.add(batch(random_rows(3), path="more")),
    "replace": lambda w: w.add(batch(random_rows(3)), replace=True),
    "delete": lambda w: w.delete(["photos/7"]),
    "compact": lambda w: w.compact(),
    "choose": lambda w: w.choose(SearchParams("scan", 24, 20, (Stage(24, 5),)), {"text": "chosen"}),
}


class Call(NamedTuple):
    """A flush of a file or folder, or a rename to it. content: of the file, or what is in the
    folder, by then.
    """

    what: str
    path: Path
    content: bytes | set[str]


@pytest.fixture
def calls(monkeypatch):
    made: list[Call] = []
    replace = os.replace

    def flushed(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        made.append(
            Call("flush", path, set(os.listdir(path)) if path.is_dir() else path.read_bytes())
        )

    def replaced(source, target):
        made.append(Call("rename", Path(target), Path(source).read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    return made


@pytest.mark.parametrize("what", CHANGES)
def test_files_are_on_the_disk_before_their_names(tmp_path, calls, what):
    folder = tmp_path.resolve() / "new" / "index"
    if what != "first build":
        with Writer(folder, 1) as writer:
            writer.build(batch(random_rows(70)))
            writer.delete(["photos/3"])
    before = {f for f in folder.rglob("*") if f.is_file()}
    calls.clear()
    with Writer(folder, 1) as writer:
        CHANGES[what](writer)
    new = {f for f in folder.rglob("*") if f.is_file() and f not in before} - {
        folder / name for name in ("index.json", "writer.lock")
    }
    manifest = Index(folder).manifest
    parts = {folder / part for part in manifest["parts"]} & {f.parent for f in new}
    assert len(parts) == (what not in ("delete", "choose"))
    assert bool(manifest["deleted"]) == (what not in ("first build", "build", "compact"))
    (rename,) = [i for i, call in enumerate(calls) if call.what == "rename"]
    assert calls[rename].path == folder / "index.json"

    flushed = {
        path: [i for i, c in enumerate(calls) if c.path == path and c.what == "flush"]
        for path in (*new, *parts, folder, folder.parent, folder / ".index.json.tmp")
    }
    for file in new:
        first, *more = flushed[file]
        assert not more
        assert first < rename, file
        assert calls[first].content == file.read_bytes(), file  # nothing is written after it
    for part in parts:
        assert any(i < rename and calls[i].content == set(os.listdir(part)) for i in flushed[part])
    (temporary,) = flushed[folder / ".index.json.tmp"]
    assert calls[temporary].content == calls[rename].content == (folder / "index.json").read_bytes()
    names = {file.relative_to(folder).parts[0] for file in new} | {".index.json.tmp"}
    assert any(temporary < i < rename and names <= calls[i].content for i in flushed[folder])
    assert any(i > rename and "index.json" in calls[i].content for i in flushed[folder])
    if what == "first build":  # every folder that was made for it has a name
        for made in (folder, folder.parent):
            assert any(c.path == made.parent and made.name in c.content for c in calls[:rename])


def test_after_the_rename_an_error_says_that_the_index_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    with Writer(tmp_path, 1) as writer:
        writer.build(batch(random_rows(5)))
        for error in (OSError(24, "Too many open files"), MemoryError()):
            number = len(Index(tmp_path))

            def fails(path, *_, error=error, number=number):
                if len(Index(path)) > number:
                    raise error
                return Index(path)

            monkeypatch.setattr("matryoshka.retrieval.store_writer.Index", fails)
            with pytest.raises(
                RetrievalError, match="the index has changed, but cannot be opened now: "
            ) as caught:
                writer.add(batch(random_rows(1), [f"new {number}"]))
            assert ("Too many open files" if error.args else "MemoryError") in str(caught.value)
            assert len(Index(tmp_path)) == number + 1


def test_a_folder_above_that_may_not_be_read_is_passed_over(tmp_path, monkeypatch):
    opened = os.open

    def closed(path, *args, **options):
        if Path(path) == tmp_path.resolve():
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", closed)
    with Writer(tmp_path / "index", 1) as writer:
        assert len(writer.build(batch(random_rows(5)))) == 5
