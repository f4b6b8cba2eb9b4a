"""Damaged files of an index: it is searched, or one line says which file is damaged; `verify` finds
all of it.
"""

import itertools
import json
import os
import shutil
import zlib

import numpy as np
import pytest
from matryoshka.inference import index as program
from stored_indexes import batch, built, random_rows

from matryoshka.retrieval import RetrievalError, SearchParams, Stage, store_part
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.store_part import MAYBE_LARGE, with_checksum
from matryoshka.retrieval.store_writer import Writer

SETTINGS = (
    None,
    SearchParams("scan", 10, 50, (Stage(24, 5),)),
    SearchParams("exact", 24, 5),
    SearchParams("ivf", 10, 5, nprobe=1),
)
ASKED = random_rows(3, seed=1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with a part in lists, two that are scanned, and deleted rows."""
    folder = tmp_path_factory.mktemp("damage") / "index"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        built(folder, random_rows(150), dim=10, lists=4)
        with Writer(folder, 1) as writer:
            writer.add(batch(random_rows(77, seed=2), path="more"))
            writer.add(batch(random_rows(77, seed=3), path="lots"))
            writer.delete(["photos/3", "more/7"])
    return folder


def use(index, settings=SETTINGS):
    """Asks for all that an index says."""
    for setting in settings:
        hits = index.search(ASKED, setting, k=5)
        assert hits.ids.max() < index.total, "ids out of range"
    index.find(["photos/1", "more/70", "none"])
    for row in range(0, index.total, 5):
        index.name(row)
        index.class_name(row)
        index.origin(row)
    return index


def files_of(folder):
    return sorted(
        str(f.relative_to(folder))
        for f in folder.rglob("*")
        if f.is_file() and f.name != "writer.lock"
    )


def is_small(file):
    return os.path.basename(file) not in MAYBE_LARGE


def check_error(error, folder, file):
    message = str(error)
    assert "\n" not in message
    assert str(folder) in message
    named = {os.path.basename(name) for name in files_of(folder)} | {
        os.path.basename(file),
        os.path.basename(folder),
    }
    assert any(name in message for name in named), message


def check(folder, file, content):
    """With `content` as `file` (None: removed), and back. True where opening or a search found it
    out.
    """
    path, good = folder / file, (folder / file).read_bytes()
    try:
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        before = None
        try:
            before = Index(folder, 1)
            use(before, [SETTINGS[zlib.crc32(content or b"") % len(SETTINGS)]])
            found = False
        except RetrievalError as error:
            check_error(error, folder, file)
            found = True
        assert before is None or not is_small(file), f"{file}: opened"
        if before is not None:
            with pytest.raises(
                RetrievalError, match=os.path.basename(file).replace(".", r"\.")
            ) as caught:
                before.verify()
            check_error(caught.value, folder, file)
        return found
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(("mapped", "times"), [(1, 1), (1 << 20, 3)])
def test_every_file_damaged_anywhere(sound, monkeypatch, mapped, times):
    monkeypatch.setattr(store_part, "MMAP_MIN_BYTES", mapped)
    rng, tried = np.random.default_rng(mapped), 0
    for file in files_of(sound):
        good = (sound / file).read_bytes()
        for _ in range(times):
            content = bytearray(good)
            for _ in range(rng.integers(1, 4)):
                content[rng.integers(len(content))] ^= int(rng.integers(1, 256))
            if content == good:
                continue
            check(sound, file, bytes(content))
            tried += 1
        sizes = [
            None,
            b"",
            good[:-1],
            good[: rng.integers(len(good))],
            good + b"\0",
            good + b"\n" * 64,
        ]
        for content in sizes[: times + 1]:
            assert check(sound, file, content)  # a wrong size is always found
            tried += 1
    assert tried > (200 if times > 1 else 100), f"only {tried} damages were tried"
    use(Index(sound)).verify()


def test_files_of_another_part(sound):
    """The second and the third part have files of the same sizes."""
    index = Index(sound)
    _, second, third = index.manifest["parts"]
    for file in sorted(os.listdir(sound / second)):
        other = (sound / third / file).read_bytes()
        if other != (sound / second / file).read_bytes():
            check(sound, f"{second}/{file}", other)
    assert check(sound, f"{second}/rows.f16", (sound / third / "rows.f16").read_bytes())
    first = index.manifest["parts"][0]
    for file in sorted(os.listdir(sound / second)):
        assert check(sound, f"{second}/{file}", (sound / first / file).read_bytes())


def test_bits_of_the_small_files(sound):
    for file in filter(is_small, files_of(sound)):
        path, good = sound / file, (sound / file).read_bytes()
        places = np.random.default_rng(0).permutation(8 * len(good))[:20]
        for bit in places.tolist():
            content = bytearray(good)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            with pytest.raises(RetrievalError, match=os.path.basename(file).replace(".", r"\.")):
                Index(sound, 1)
        path.write_bytes(good)
    use(Index(sound))


WRONG = (None, -1, 0, 1, 3, 10**12, 0.5, "", "x", "../x", [], ["x"], {}, {"x": 1}, True)


def changed(tree):
    """(path, tree with another value there) for every value of a JSON tree."""
    for key, value in list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)):
        for wrong in WRONG:
            if wrong != value:
                copy = json.loads(json.dumps(tree))
                copy[key] = wrong
                yield copy
        if isinstance(value, dict | list) and value:
            for below in changed(value):
                copy = json.loads(json.dumps(tree))
                copy[key] = below
                yield copy
        if isinstance(tree, dict):
            copy = json.loads(json.dumps(tree))
            del copy[key]
            yield copy


def test_json_that_is_whole_but_wrong(sound):
    """Checksums fit: what somebody else wrote, or a later version."""
    index, refused = Index(sound), 0
    for file in ("index.json", f"{index.manifest['parts'][0]}/part.json"):
        path, good = sound / file, (sound / file).read_bytes()
        about = json.loads(good)
        del about["crc32"]
        try:
            for wrong in itertools.islice(changed(about), 0, None, 7):
                path.write_bytes(with_checksum(wrong))
                try:
                    opened = Index(sound, 1)
                    opened.search(ASKED, SETTINGS[1], k=5)
                    assert opened.name(opened.total - 1) == "lots/76"
                except RetrievalError as error:
                    check_error(error, sound, file)
                    refused += 1
        finally:
            path.write_bytes(good)
    assert refused > 50, f"only {refused} damages were refused"
    use(Index(sound))


# ---------------------------------------------------------------- what to do then


@pytest.mark.parametrize("file", ["index.json", "part.json", "codec.f32", "rows.f16"])
def test_a_damaged_index_can_be_built_again(sound, tmp_path, monkeypatch, file):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    folder = tmp_path / "index"
    shutil.copytree(sound, folder)
    path = next(folder.rglob(file))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = files_of(folder)
    with Writer(folder, 1) as writer:
        with pytest.raises(RetrievalError, match="damaged"):
            writer.compact()  # a new part would hide it
        assert files_of(folder) == before
        with pytest.raises(RetrievalError, match="--overwrite"):
            writer.build(batch(random_rows(5)))
        assert files_of(folder) == before
        assert len(writer.build(batch(random_rows(5)), overwrite=True)) == 5
    assert len({file.split("/")[0] for file in files_of(folder)}) == 2  # index.json and one part
    Index(folder).verify()


def test_the_program_names_what_is_damaged(sound, capsys):
    for file in files_of(sound):
        path, good = sound / file, (sound / file).read_bytes()
        path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        for options in ([], ["--verify"]):
            if is_small(file) or options:
                with pytest.raises(SystemExit) as stopped:
                    program.main(["info", str(sound), *options])
                assert stopped.value.code == 2
                (line,) = capsys.readouterr().err.splitlines()
                assert line.startswith(f"error: {path}: ")
        path.write_bytes(good)
    assert program.main(["info", str(sound), "--verify"]) == 0
    assert "302 x 24" in capsys.readouterr().out
