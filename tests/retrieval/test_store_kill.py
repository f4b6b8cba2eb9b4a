"""Writers that are killed at every step, run out of disk, or are refused: the index is the old or
the new one.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from stored_indexes import MODEL, PREPARED, batch, built, random_rows

from matryoshka.retrieval import RetrievalError, SearchParams, Stage
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.store_writer import IndexRows, Writer

CHANGES = ("first build", "build", "add", "replace", "delete", "compact", "choose")
STEPS = ("fsync", "replace", "mkdir", "unlink", "rmdir", "open")
CHOSEN = SearchParams("scan", 8, 7, (Stage(8, 3),))


def named_rows(names):
    """float32 [n, 8]: every name has a row of its own."""
    return np.array(
        [np.random.default_rng(list(name.encode())).standard_normal(8) for name in names],
        np.float32,
    )


def named(names):
    return batch(named_rows(names), names)


def first(folder):
    """Two parts and a deletion."""
    with Writer(folder, 1) as writer:
        writer.build(named([f"a{i}" for i in range(70)]))
        writer.add(named(["b0", "b1"]))
        writer.delete(["a3"])


def change(writer, what):
    if what in ("first build", "build"):
        writer.build(named(["n0", "n1", "n2"]), overwrite=what == "build")
    elif what in ("add", "replace"):
        writer.add(
            named(["c0", "c1"] if what == "add" else ["a5", "b1", "c0"]), replace=what == "replace"
        )
    elif what == "delete":
        writer.delete(["a7", "b0"])
    elif what == "compact":
        writer.compact()
    elif what == "choose":
        writer.choose(CHOSEN, {"text": "chosen"})


def churn(folder, steps):
    """Add, replace, delete and compact in `steps` rounds."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        with Writer(folder, 1) as writer:
            writer.add(named([f"c{i}" for i in rng.permutation(30)[:5]]), replace=True)
            if step % 3 == 1:
                writer.delete([f"c{i}" for i in rng.permutation(30)[:8]], missing_ok=True)
            if step % 3 == 2:
                writer.compact()


def around_every_step(do):
    """Calls do(number) before and after each opening, flush, rename, removal ... of a file or
    folder, and does not wait for the disk. Returns what undoes it.
    """
    count, inside, real = (
        0,
        False,
        {(os, name): getattr(os, name) for name in STEPS} | {(io, "open"): io.open},
    )

    def stepped(name, function):
        def once():
            nonlocal count, inside
            if not inside:
                count, inside = count + 1, True
                do(count)
                inside = False

        def call(*args, **options):
            once()
            result = None if name == "fsync" else function(*args, **options)
            once()
            return result

        return call

    for (module, name), function in real.items():  # io.open is what Path.open calls
        setattr(module, name, stepped(name, function))
    return lambda: [setattr(module, name, function) for (module, name), function in real.items()]


def kill_at(step):
    around_every_step(lambda now: os.kill(os.getpid(), signal.SIGKILL) if now == step else None)


def serve():
    """Lines of JSON (folder, change, step) -> exit statuses of children that did it, and were
    killed at that step.
    """
    for line in sys.stdin:
        folder, what, step = json.loads(line)
        child = os.fork()
        if not child:
            if what == "churn":
                os.fsync = lambda _: None
                churn(folder, step)
            else:
                kill_at(step)
                with Writer(folder, 1) as writer:
                    change(writer, what)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def server():
    """ask(folder, change, step) -> exit status."""
    tests = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(tests.with_name("builders"))
    command = [sys.executable, "-c", "import test_store_kill; test_store_kill.serve()"]
    with subprocess.Popen(
        command,
        cwd=tests,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(folder, what, step):
            print(json.dumps([str(folder), what, step]), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield ask
        process.stdin.close()
        assert process.wait(30) == 0


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def content(folder):
    """All that an index says."""
    index = Index(folder, 1)
    index.verify()
    rows = [row for row in range(index.total) if not index.is_deleted(np.array([row]))[0]]
    assert index.find([index.name(row) for row in rows]).tolist() == rows
    said = {
        index.name(row): (index.vector(row).tobytes(), index.class_name(row), index.origin(row))
        for row in rows
    }
    return said, index.total, index.params, index.manifest["certificate"]


def only_what_is_named(folder):
    index = Index(folder, 1)
    entry = index.manifest["deleted"]
    expected = [
        "index.json",
        "writer.lock",
        *index.manifest["parts"],
        *([entry["file"]] if entry else []),
    ]
    assert sorted(os.listdir(folder)) == sorted(expected)
    for part in index.manifest["parts"]:
        assert set(os.listdir(folder / part)) == {"part.json", *index.parts[0]._files}


def prepared(tmp_path, what):
    """(folder before a change, content before, content after it)."""
    base, after = tmp_path / "base", tmp_path / "after"
    base.mkdir()
    if what != "first build":
        first(base)
    shutil.copytree(base, after)
    with Writer(after, 1) as writer:
        change(writer, what)
    old, new = None if what == "first build" else content(base), content(after)
    assert new != old
    return base, old, new


def survives(folder, what, old, new):
    """What an index says whose writer was killed; the next writer works, and leaves nothing of the
    other.
    """
    if old is None and not (folder / "index.json").exists():
        begun = any(name.startswith("part-") for name in os.listdir(folder))
        with pytest.raises(RetrievalError, match="incomplete" if begun else "is not an index"):
            Index(folder)
        said = None
        with Writer(folder, 1) as writer:
            change(writer, what)
        assert content(folder) == new
    else:
        said = content(folder)
        name = "n0" if "n0" in said[0] else "a69"
        with Writer(folder, 1) as writer:
            assert writer.delete([name]).find([name]).tolist() == [-1]
    assert said in (old, new)
    only_what_is_named(folder)
    return said


@pytest.mark.parametrize("what", CHANGES)
def test_stopped_at_every_step(tmp_path, what):
    """The files as they are before each step of a change are those that a process killed there
    leaves.
    """
    base, old, new = prepared(tmp_path, what)
    folder, left, states = tmp_path / "index", [], {}

    def keep(step):
        files = [
            (str(f.relative_to(folder)), f.stat().st_size, f.stat().st_ino)
            for f in sorted(folder.rglob("*"))
        ]
        if files and states.get("last") != files:
            states["last"] = files
            left.append(tmp_path / f"step {step}")
            shutil.copytree(folder, left[-1])

    shutil.copytree(base, folder)
    undo = around_every_step(keep)
    try:
        with Writer(folder, 1) as writer:
            change(writer, what)
    finally:
        undo()
    assert content(folder) == new
    said = [survives(one, what, old, new) for one in left]
    done = said.index(new)
    assert said == [old] * done + [new] * (len(said) - done)  # once new, never old again
    assert done >= {"delete": 2, "choose": 2}.get(what, 20), f"only {done} kills hit a change"
    if what in ("build", "replace", "delete", "compact"):
        assert len(said) > done + 1, (
            "no kill hit the removal of old files"
        )  # also stopped while it swept


@pytest.mark.parametrize("what", CHANGES)
def test_killed(tmp_path, server, what):
    base, old, new = prepared(tmp_path, what)
    said, step = [], 1
    while True:
        folder = tmp_path / f"index {step}"
        shutil.copytree(base, folder)
        status = server(folder, what, step)
        said.append(survives(folder, what, old, new))
        if not status:
            break
        assert status == -signal.SIGKILL
        step += {"add": 33, "replace": 33, "compact": 33}.get(what, 17)
    assert said[-1] == new
    assert sum(one == old for one in said) >= 3, "too few kills left the old index"
    assert len(said) > 4, "the kills hit too few different moments"


def test_readers_meanwhile(tmp_path, server):
    """A process changes the index while it is opened and searched here."""
    first(tmp_path)
    always = [f"a{i}" for i in range(70) if i != 3]
    asked = named_rows([*always, "a3", *(f"c{i}" for i in range(30))])
    seen, stale, index = set(), 0, Index(tmp_path, 1)
    with ThreadPoolExecutor(1) as thread:
        finished = thread.submit(server, tmp_path, "churn", 30)
        while not finished.done() or not index.is_current():
            if (
                len(seen) + stale
            ) % 2 and not index.is_current():  # now and then an old one is searched
                index = Index(tmp_path, 1)
            stale += not index.is_current()
            seen.add(json.dumps(index.manifest))
            hits = index.search(asked, k=2)
            assert [index.name(row) for row in hits.ids[: len(always), 0].tolist()] == always
            rows = hits.ids.ravel()
            assert (rows >= 0).all(), "every row must be found"
            names = [index.name(row) for row in rows.tolist()]
            assert "a3" not in names
            assert index.find(names).tolist() == rows.tolist()
            vectors, own = np.array([index.vector(row) for row in rows.tolist()]), named_rows(names)
            cosines = (
                (vectors * own).sum(1)
                / np.linalg.norm(vectors, axis=1)
                / np.linalg.norm(own, axis=1)
            )
            assert cosines.min() > 0.9999, "a hit has another cosine than its vector"
            np.testing.assert_allclose(cosines_of(own, asked), hits.scores, atol=1e-3)
    assert finished.result() == 0
    assert len(seen) > 5, f"the reader saw only {len(seen)} states"
    only_what_is_named(tmp_path)


def cosines_of(found, asked):
    """[Q, k] of found [Q x k, 8] and asked [Q, 8]."""
    found = found.reshape(len(asked), -1, 8)
    lengths = np.linalg.norm(found, axis=2) * np.linalg.norm(asked, axis=1)[:, None]
    return np.einsum("qkd,qd->qk", found, asked) / lengths


# ---------------------------------------------------------------- writers


def test_changes_that_are_refused_change_nothing(tmp_path):
    index = built(tmp_path, rows := random_rows(5))
    before = (
        {file: (tmp_path / file).read_bytes() for file in ("index.json",)},
        sorted(os.listdir(tmp_path)),
    )
    good = batch(rows, list("vwxyz"))
    other = IndexRows(rows, good.names, good.labels, {"weights_sha256": "cd" * 32}, PREPARED)
    calls = (
        (lambda w: w.build(good), "--overwrite"),
        (lambda w: w.build(good, dim=25, overwrite=True), "prefix of 25"),
        (lambda w: w.build(batch(rows[:0]), overwrite=True), "no rows"),
        (lambda w: w.build(batch(rows, list("aabcd")), overwrite=True), "'a' occurs twice"),
        (lambda w: w.add(batch(rows, list("vvxyz"))), "'v' occurs twice"),
        (lambda w: w.add(batch(rows)), r"already has 'photos/0', and 4 more"),
        (lambda w: w.add(other), "another model"),
        (
            lambda w: w.add(batch(random_rows(5, 23), good.names)),
            "24 dimensions, the embeddings 23",
        ),
        (
            lambda w: w.add(IndexRows(rows, good.names, good.labels, MODEL, {"size": 64})),
            "another preprocessing",
        ),
        (lambda w: w.add(IndexRows(rows, list("xyz"), good.labels, MODEL, PREPARED)), "3 names"),
        (lambda w: w.add(IndexRows(rows, good.names, good.labels[:4], MODEL, PREPARED)), "labels"),
        (lambda w: w.add(batch(rows, good.names, origins=np.ones((5, 2), np.int64))), "origins"),
        (lambda w: w.add(batch(rows, good.names, origins=np.zeros((4, 2), np.int64))), "origins"),
        (lambda w: w.add(batch(rows.astype(int).tolist(), good.names, labels=[0.5] * 5)), "labels"),
        (lambda w: w.delete(["photos/0", "x", "y"]), "no row 'x', nor 1 more of these names"),
    )
    with Writer(tmp_path, 1) as writer:
        for call, words in calls:
            with pytest.raises(RetrievalError, match=words) as caught:
                call(writer)
            assert "\n" not in str(caught.value)
    assert index.is_current()
    assert before == (
        {"index.json": (tmp_path / "index.json").read_bytes()},
        sorted(os.listdir(tmp_path)),
    )
    with Writer(tmp_path, 1) as writer:
        writer.delete([index.name(i) for i in range(5)])
        with pytest.raises(RetrievalError, match="all rows are deleted"):
            writer.compact()
        assert (Index(tmp_path).search(rows, k=3).ids == -1).all()
        assert len(writer.add(batch(rows))) == 5


def test_one_writer_at_a_time(tmp_path):
    with Writer(tmp_path) as writer:
        writer.build(batch(random_rows(5)))
        with pytest.raises(RetrievalError, match="another process"), Writer(tmp_path):
            pass
        assert len(Index(tmp_path)) == 5
    with Writer(tmp_path) as writer:
        assert len(writer.delete(["photos/3"])) == 4


def test_folders_of_other_things_stay_as_they_are(tmp_path):
    for name in ("part-1", "part-00000000x", "deleted-scenes", "holiday.jpg"):
        folder = tmp_path / name
        (folder / name).mkdir(parents=True)
        (folder / name / "a.jpg").write_bytes(b"")
        with pytest.raises(RetrievalError, match="empty folder"):
            built(folder, random_rows(3))
        with pytest.raises(RetrievalError, match="no index"):
            Index(folder)
        assert [str(f.relative_to(folder)) for f in folder.rglob("*")] == [name, f"{name}/a.jpg"]
    (tmp_path / "file").write_bytes(b"")
    for what in (
        lambda: Index(tmp_path / "file"),
        lambda: built(tmp_path / "file", random_rows(3)),
    ):
        with pytest.raises(RetrievalError, match="file"):
            what()
    index = tmp_path / "index"
    built(index, random_rows(3))
    (index / "part-1").mkdir()
    (index / "notes.txt").write_bytes(b"")
    built(index, random_rows(4), overwrite=True)
    assert {"part-1", "notes.txt"} < set(os.listdir(index)), "files of others were removed"


def test_a_disk_that_fills_leaves_the_index_as_it_was(tmp_path, monkeypatch):
    def full_at(step):
        left = [step]

        def full(_):
            left[0] -= 1
            if not left[0]:
                raise OSError(28, "No space left on device")

        return full

    built(tmp_path, random_rows(5))
    for step in range(1, 100):
        with Writer(tmp_path, 1) as writer:
            monkeypatch.setattr(os, "fsync", full_at(step))
            try:
                writer.add(batch(random_rows(1), ["new"]), replace=True)
            except RetrievalError as error:
                words = str(error)
            else:
                break
        assert "No space left" in words
        assert len(Index(tmp_path)) == 5 + ("has changed" in words)
        assert ("is unchanged" in words) != ("has changed" in words)
    assert step > 10, f"only {step} file operations failed"
    assert len(Index(tmp_path)) == 6
    only_what_is_named(tmp_path)


def test_what_was_chosen_stays(tmp_path):
    chosen = SearchParams("scan", 24, 77, (Stage(24, 9),))
    built(tmp_path, random_rows(5))
    with Writer(tmp_path, 1) as writer:
        writer.choose(chosen, {"text": "0.99"})
        writer.add(batch(random_rows(1), ["new"]))
        writer.delete(["new"])
        index = writer.compact()
    certificate, still = index.certificate
    assert (index.params, certificate["text"], certificate["rows"], still) == (
        chosen,
        "0.99",
        5,
        False,
    )


def test_many_parts_do_not_run_out_of_open_files(tmp_path):
    built(tmp_path, random_rows(5))
    with Writer(tmp_path, 1) as writer:
        for i in range(20):
            writer.add(batch(random_rows(2), [f"{i} a", f"{i} b"]))
    before = len(os.listdir("/proc/self/fd"))
    index = Index(tmp_path)
    assert len(index.parts) == 21
    assert len(os.listdir("/proc/self/fd")) <= before + 21, "files stay open"
