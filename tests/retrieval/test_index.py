"""`matryoshka index`: build, add, delete, compact and info of an index; what a user gets wrong is
one line.
"""

import os
import re

import numpy as np
import pytest
from matryoshka.inference.index import main

from matryoshka import cli
from matryoshka.embeddings.reading import AGAIN
from matryoshka.embeddings.writing import EmbeddingWriter, RowWriter
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.store_writer import Writer

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def embed(folder, names, *, columns=24, seed=0, weights="ab" * 32, size=32, **more):
    """Embeddings of `names` as `matryoshka embed` writes them; their rows."""
    rows = np.random.default_rng(seed).random((len(names), columns), dtype=np.float32)
    meta = {
        "format": "matryoshka-embeddings-1",
        "rows": len(names),
        "columns": columns,
        "dtype": "float32",
        "normalised": False,
        "preprocessing": {"size": size, "mean": [0.5, 0.5, 0.5]},
        "code": {"version": "1"},
        "model": {
            "file": "model.safetensors",
            "arch": "resnet10",
            "head": "MRL",
            "weights_sha256": weights,
        },
        "data": {
            "path": str(folder.name),
            "fingerprint": "ff",
            "num_classes": 3,
            "classes": CLASSES,
        },
    } | more
    with EmbeddingWriter(folder) as unfinished:
        plan = unfinished.begin(meta, np.arange(len(names)) % 3, names.__getitem__)
        writer = RowWriter(folder, plan)
        writer.write(np.arange(len(names)), rows)
        writer.close()
        unfinished.finish()
    return rows


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Embeddings of 60 images in the current folder; their names and rows."""
    monkeypatch.chdir(tmp_path)
    names = [f"a/{i}.jpg" for i in range(57)] + ["n\u2028b.jpg", "a b.jpg", "\udc80.jpg"]
    return names, embed(tmp_path / "photos", names)


def nearest(folder, rows):
    index = Index(folder)
    return [index.name(row) for row in index.search(rows, k=1).ids[:, 0].tolist()]


def test_a_life_of_an_index(tmp_path, photos, capsys):
    names, rows = photos
    assert main(["build", "x.index", "--embeddings", "photos", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "60 x 24 float16" in out
    assert "60 rows without lists" in out
    assert "resnet10, MRL, model.safetensors (abababababab)" in out
    assert nearest("x.index", rows) == names
    index = Index("x.index")
    assert index.origin(5) == (
        {"path": "photos", "fingerprint": "ff", "num_classes": 3} | index.origin(5)[0],
        5,
    )
    assert index.origin(5)[0]["path"] == str(tmp_path / "photos")  # found from elsewhere, too
    assert (index.class_name(5), index.dim, index.model["normalised"]) == ("cat", 24, False)

    new = embed(tmp_path / "new", ["5.jpg", "6.jpg", "z.jpg"], seed=1)
    assert main(["add", "x.index", "--embeddings", "new", "--prefix", "a/", "--replace"]) == 0
    out = capsys.readouterr().out
    assert "3 rows added (a/5.jpg and so on), 2 of them replace others" in out
    assert "61 x 24 float16, 2 deleted" in out
    assert nearest("x.index", new) == ["a/5.jpg", "a/6.jpg", "a/z.jpg"]

    (tmp_path / "gone.txt").write_text("a/7.jpg\r\nn\u2028b.jpg\n\na/z.jpg", encoding="utf-8")
    assert main(["delete", "x.index", "a/1.jpg", "\udc80.jpg", "--names-from", "gone.txt"]) == 0
    assert "5 rows deleted" in capsys.readouterr().out
    assert main(["delete", "x.index", "a/1.jpg", "a b.jpg", "nothing", "--missing-ok"]) == 0
    assert "1 rows deleted" in capsys.readouterr().out
    assert main(["info", "x.index", "--verify"]) == 0
    out = capsys.readouterr().out
    assert "55 x 24 float16, 8 deleted" in out
    assert "60 rows without lists; 3 rows without lists" in out
    assert "verified" in out
    assert "advice" not in out  # a sixth is not yet a crowd

    assert main(["delete", "x.index", *(f"a/{i}.jpg" for i in range(10, 16))]) == 0
    assert "advice   matryoshka index compact x.index" in capsys.readouterr().out
    kept = nearest("x.index", rows)
    assert main(["compact", "x.index", "--threads", "2"]) == 0
    out = capsys.readouterr().out
    assert "49 x 24 float16\n" in out
    assert "49 rows without lists" in out
    assert "advice" not in out
    assert nearest("x.index", rows) == kept
    assert (
        main(
            [
                "build",
                "x.index",
                "--embeddings",
                "new",
                "--shortlist-dim",
                "7",
                "--lists",
                "2",
                "--overwrite",
            ]
        )
        == 0
    )
    assert "3 rows in 2 lists" in capsys.readouterr().out
    index = Index("x.index")
    assert (index.dim, len(index), [*map(index.name, range(3))]) == (
        7,
        3,
        ["5.jpg", "6.jpg", "z.jpg"],
    )


def test_the_command_knows_it(photos, capsys):
    assert cli.main(["index", "build", "x", "--embeddings", "photos"]) == 0
    assert "60 x 24" in capsys.readouterr().out


def snapshot(folder):
    return {str(f): (f.read_bytes() if f.is_file() else None) for f in folder.rglob("*")}


MISTAKES = {
    "an index is there": (
        ["build", "x", "--embeddings", "photos"],
        "x: is an index already.*--overwrite",
    ),
    "more dimensions than there are": (
        ["build", "y", "--embeddings", "photos", "--shortlist-dim", "25"],
        "--shortlist-dim 25: photos has 24",
    ),
    "negative dimensions": (
        ["build", "y", "--embeddings", "photos", "--shortlist-dim", "-1"],
        "--shortlist-dim",
    ),
    "negative lists": (["build", "y", "--embeddings", "photos", "--lists", "-1"], "--lists"),
    "a negative seed": (
        ["build", "y", "--embeddings", "photos", "--lists", "3", "--seed", "-1"],
        "--seed",
    ),
    "a large seed": (
        ["build", "y", "--embeddings", "photos", "--lists", "3", "--seed", "2147483648"],
        "--seed",
    ),
    "too many threads": (["info", "x", "--threads", "5000"], "--threads"),
    "negative threads": (["info", "x", "--threads", "-1"], "--threads"),
    "no embeddings": (["build", "y", "--embeddings", "nothing"], "nothing: no such folder"),
    "an empty folder": (["build", "y", "--embeddings", "empty"], "empty: has no embeddings"),
    "a folder of other things": (
        ["build", "other", "--embeddings", "photos"],
        "other: contains .*empty folder",
    ),
    "a folder of other parts": (
        ["build", "parts", "--embeddings", "photos"],
        "parts: contains part-1.*empty folder",
    ),
    "a file": (["build", "file", "--embeddings", "photos"], "file: "),
    "another model": (
        ["add", "x", "--embeddings", "model"],
        "of another model .*cdcdcdcdcdcd.*abababababab",
    ),
    "another width": (
        ["add", "x", "--embeddings", "width"],
        "x: has 24 dimensions, the embeddings 12",
    ),
    "other preparation": (
        ["add", "x", "--embeddings", "prepared"],
        r"another preprocessing \(size 32 in the index, 64 in the embeddings",
    ),
    "names that are there": (
        ["add", "x", "--embeddings", "photos"],
        "already has 'a/0.jpg', and 59 more.*--replace",
    ),
    "names twice": (["add", "x", "--embeddings", "twice"], "'b.jpg' occurs twice"),
    "names twice in the first": (
        ["build", "x", "--overwrite", "--embeddings", "twice"],
        "'b.jpg' occurs twice",
    ),
    "embeddings that do not say enough": (
        ["add", "x", "--embeddings", "silent"],
        "silent/meta.json.*'path'.*" + AGAIN,
    ),
    "names that are not there": (
        ["delete", "x", "a/1.jpg", "q", "r"],
        "no row 'q', nor 1 more .*; --missing-ok",
    ),
    "no names": (["delete", "x"], "give names"),
    "no names in a file": (["delete", "x", "--names-from", "empty.txt"], "give names"),
    "a file of names that is none": (
        ["delete", "x", "--names-from", "binary"],
        "binary: is not UTF-8",
    ),
    "no file of names": (
        ["delete", "x", "--names-from", "nothing.txt"],
        "nothing.txt: No such file",
    ),
    "a folder as names": (["delete", "x", "--names-from", "empty"], "empty: Is a directory"),
    "delete from nothing": (["delete", "nothing", "a"], "nothing: no such index"),
    "delete from a folder": (["delete", "other", "a"], "other: is not an index"),
    "delete from embeddings": (["delete", "photos", "a"], "photos: is not an index"),
    "delete from a file": (["delete", "file", "a"], "file"),
    "add to nothing": (["add", "nothing", "--embeddings", "photos"], "nothing: no such index"),
    "add to a folder": (["add", "empty", "--embeddings", "photos"], "empty: is not an index"),
    "compact nothing": (["compact", "nothing"], "nothing: no such index"),
    "info of nothing": (["info", "nothing"], "nothing: no such index; `matryoshka index build`"),
    "info of a folder": (["info", "other"], "other: is not an index"),
    "info of a first build that was killed": (
        ["info", "killed"],
        "killed: the index is incomplete",
    ),
    "info of another format": (
        ["info", "later"],
        "format 'matryoshka-index-9', expected matryoshka-index-1",
    ),
}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """A folder with everything that the mistakes need."""
    from matryoshka.retrieval.store_part import with_checksum

    root = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.chdir(root)
        embed(root / "photos", [f"a/{i}.jpg" for i in range(60)])
        assert main(["build", "x", "--embeddings", "photos"]) == 0
        embed(root / "model", ["m.jpg"], weights="cd" * 32)
        embed(root / "width", ["w.jpg"], columns=12)
        embed(root / "prepared", ["p.jpg"], size=64)
        embed(root / "twice", ["a.jpg", "b.jpg", "b.jpg"])
        embed(root / "silent", ["s.jpg"], data={"num_classes": 3, "classes": CLASSES})
    for folder in ("empty", "other", "parts/part-1", "killed/part-0123abcd", "later"):
        (root / folder).mkdir(parents=True)
    (root / "later" / "index.json").write_bytes(with_checksum({"format": "matryoshka-index-9"}))
    for file, content in (
        ("file", b""),
        ("other/holiday.jpg", b"x"),
        ("binary", b"\xff\n"),
        ("empty.txt", b"\n\r\n"),
    ):
        (root / file).write_bytes(content)
    (root / "parts" / "part-1" / "dog.jpg").write_bytes(b"x")
    return root


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_change_nothing(mistaken, mistake, monkeypatch, capsys):
    monkeypatch.chdir(mistaken)
    before = snapshot(mistaken)
    argv, words = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert re.search(words, line), line
    assert snapshot(mistaken) == before


def test_another_process_writes(photos, capsys):
    assert main(["build", "x", "--embeddings", "photos"]) == 0
    capsys.readouterr()
    with Writer("x"):
        for argv in (
            ["compact", "x"],
            ["delete", "x", "a b.jpg"],
            ["build", "x", "--overwrite", "--embeddings", "photos"],
        ):
            with pytest.raises(SystemExit) as stopped:
                main(argv)
            assert stopped.value.code == 2
            assert "another process is changing it" in capsys.readouterr().err
        assert main(["info", "x"]) == 0
    assert main(["delete", "x", "a b.jpg"]) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_must_not_be_written(photos, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(SystemExit) as stopped:
        main(["build", "locked/x", "--embeddings", "photos"])
    assert stopped.value.code == 2
    assert "locked/x: Permission denied; choose another folder" in capsys.readouterr().err
