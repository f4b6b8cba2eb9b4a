"""ImageNet-4K on a small tree: the place of every image, kills, small classes, bad lists."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matryoshka.train import build_imagenet4k
from PIL import Image

from matryoshka.data import BetonFile, open_dataset

WNIDS = ("n00005787", "n00440941", "n15102455")
CLASSES = """\
15102455-n -> chipboard: a cheap hard material made from wood chips -> pressed
00005787-n -> benthos: organisms (plants and animals) at the bottom of a sea

00440941-n -> cross-country_skiing: the sport of skiing across the countryside
"""
FILES = ("imagenet4k_queries.beton", "imagenet4k_database.beton")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Three listed classes of 9, 8 and 12 images and one that is not listed; every image's first
    pixel is unlike.
    """
    root = tmp_path_factory.mktemp("imagenet21k")
    for c, (wnid, count) in enumerate(zip((*WNIDS, "n99999999"), (9, 8, 12, 3), strict=True)):
        (root / wnid).mkdir()
        for i in range(count):
            pixels = np.random.default_rng(100 * c + i).integers(
                0, 256, (20 + i, 24, 3), dtype=np.uint8
            )
            Image.fromarray(pixels).save(root / wnid / f"{wnid}_{i}.png")
    (root / WNIDS[0] / "notes.txt").write_text("no image")
    (root / WNIDS[0] / ".hidden.png").write_text("no image")
    (root / WNIDS[2] / f"{WNIDS[2]}_3.png").write_bytes(b"damaged")
    return root


@pytest.fixture
def options(tree, tmp_path):
    (tmp_path / "classes.txt").write_text(CLASSES)
    return [
        f"--data={tree}",
        f"--classes={tmp_path / 'classes.txt'}",
        "--write-mode=raw",
        "--workers=1",
        "--database-per-class=5",
        "--queries-per-class=2",
    ]


def build(options, output, *more):
    assert build_imagenet4k.main([*options, f"--output={output}", *more]) == 0
    with (output / "imagenet4k.jsonl").open() as file:
        plan, *classes = map(json.loads, file)
    return plan, classes


def pixels(beton):
    """[(label, pixels)] of raw images, through the documented offsets."""
    content = beton.path.read_bytes()
    return [
        (
            int(beton.labels[i]),
            np.frombuffer(content, np.uint8, int(beton.size[i]), int(beton.offset[i])).reshape(
                beton.height[i], beton.width[i], 3
            ),
        )
        for i in range(len(beton))
    ]


def hashes(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
    }


def refused(argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        build_imagenet4k.main(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


def test_every_image_is_where_the_manifest_says(tree, options, tmp_path, capsys):
    plan, classes = build(options, tmp_path / "out", "--names")
    assert "3 classes: 6 queries, 15 images in the database" in capsys.readouterr().out
    assert (plan["seed"], plan["database_per_class"]) == (0, 5)
    assert [row["wnid"] for row in classes] == sorted(WNIDS)
    assert classes[2]["unreadable"] in ([], [f"{WNIDS[2]}_3.png"])
    for kind, name, count in (("queries", FILES[0], 2), ("database", FILES[1], 5)):
        with BetonFile(tmp_path / "out" / name) as beton:
            assert beton.classes == sorted(WNIDS)
            assert beton.labels.tolist() == np.repeat(range(3), count).tolist()
            wanted = [
                (label, row["wnid"], file)
                for label, row in enumerate(classes)
                for file in row[kind]
            ]
            assert beton.manifest["names"] == [f"{wnid}/{file}" for _, wnid, file in wanted]
            assert beton.manifest["counts"]["raw"] == 3 * count
            for (label, stored), (expected, wnid, file) in zip(pixels(beton), wanted, strict=True):
                assert label == expected
                assert np.array_equal(stored, np.asarray(Image.open(tree / wnid / file)))
    for row in classes:
        chosen = [*row["queries"], *row["database"]]
        assert len(set(chosen)) == 7, "an image was drawn twice"  # no query is in the database
        assert not set(chosen) & set(row["unreadable"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [*FILES, *(f"{name}.json" for name in FILES), "imagenet4k.jsonl"]
    )


def test_the_draw_is_the_seeds_and_a_classs_own(options, tmp_path):
    first = build(options, tmp_path / "a")[1]
    assert build(options, tmp_path / "b", "--workers=2")[1] == first
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert build(options, tmp_path / "c", "--seed=1")[1] != first
    (tmp_path / "fewer.txt").write_text(CLASSES.splitlines()[1])
    assert build([*options, f"--classes={tmp_path / 'fewer.txt'}"], tmp_path / "d")[1] == first[:1]
    assert len(open_dataset(tmp_path / "d" / FILES[1])) == 5, "images in the database"


@settings(max_examples=60)
@given(st.sets(st.text("abc0", min_size=1, max_size=5), max_size=30), st.integers(0, 2**64 - 1))
def test_a_draw_is_a_permutation_that_the_order_of_the_folder_does_not_change(names, seed):
    order = build_imagenet4k.drawn(sorted(names), WNIDS[0], seed)
    assert sorted(order) == sorted(names)
    keys = np.random.Philox(key=np.array([seed, 5787], np.uint64)).random_raw(len(names))
    assert order == [name for _, name in sorted(zip(keys.tolist(), sorted(names), strict=True))]


def test_unreadable_images_are_passed_over(tmp_path, options):
    """The only two readable images are chosen for every seed, also when the first draw holds only
    damaged ones.
    """
    folder = tmp_path / "tree" / WNIDS[1]
    folder.mkdir(parents=True)
    for i in range(9):
        (folder / f"{i}.jpg").write_bytes(b"\xff\xd8 nothing")
    for i in (3, 7):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.jpg")
    (tmp_path / "one.txt").write_text(f"{WNIDS[1]}\n")
    more = [
        f"--data={tmp_path / 'tree'}",
        f"--classes={tmp_path / 'one.txt'}",
        "--database-per-class=1",
    ]
    for seed in range(4):
        _, (row,) = build(
            [*options, *more, "--queries-per-class=1", f"--seed={seed}"], tmp_path / f"out{seed}"
        )
        assert sorted([*row["queries"], *row["database"]]) == ["3.jpg", "7.jpg"]
        assert set(row["unreadable"]) <= {f"{i}.jpg" for i in range(9)} - {"3.jpg", "7.jpg"}, (
            "a readable image is listed as unreadable"
        )


def test_classes_with_too_few_images_are_an_error_or_listed(tree, options, tmp_path, capsys):
    more = ["--database-per-class=7", f"--output={tmp_path / 'out'}"]
    line = refused([*options, *more], capsys)
    assert all(
        word in line
        for word in (str(tree), "1 of 3 classes", "fewer than 9", "n00440941 (8)", "--leave-out")
    )
    assert not (tmp_path / "out").exists()
    _, classes = build(options, tmp_path / "out", "--database-per-class=7", "--leave-out-small")
    assert "1 classes left out" in capsys.readouterr().out
    assert ["left_out" in row for row in classes] == [False, True, False]
    with BetonFile(tmp_path / "out" / FILES[1]) as beton:
        assert beton.classes == [WNIDS[0], WNIDS[2]]
        assert beton.labels.tolist() == [0] * 7 + [1] * 7
    # 12 images, one of them damaged: found out only when it is read
    (tmp_path / "last.txt").write_text(CLASSES.splitlines()[0])
    last = [*options, f"--classes={tmp_path / 'last.txt'}", "--database-per-class=10"]
    line = refused([*last, f"--output={tmp_path / 'last'}"], capsys)
    assert all(
        word in line
        for word in (WNIDS[2], "too few readable", f"{WNIDS[2]}_3.png", "--leave-out-small")
    )
    line = refused([*last, f"--output={tmp_path / 'none'}", "--leave-out-small"], capsys)
    assert "every one of the 1 classes" in line


KILLED = """
import os, signal, sys
from pathlib import Path
from matryoshka.train import build_imagenet4k

out, *argv = sys.argv[1:]
events = 0

def counted(function, last):
    def call(*args, **kwargs):
        global events
        events += 1
        if events == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def start(folder, last):
    child = os.fork()
    if not child:
        for name in ("pwrite", "fsync", "replace", "write", "unlink", "mkdir", "rmdir"):
            setattr(os, name, counted(getattr(os, name), last))
        code = 1
        try:
            code = build_imagenet4k.main([*argv, f"--output={folder}"])
            Path(out, "events").write_text(str(events))
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitpid(child, 0)[1]

assert start(Path(out, "whole"), 0) == 0
total = int(Path(out, "events").read_text())
for point in sorted({1, total, *range(2, total, max(1, total // 7))}):
    folder = Path(out, f"once-{point}")
    assert start(folder, point) == signal.SIGKILL, point
    assert start(folder, 0) == 0, point
folder, starts = Path(out, "often"), 0
while start(folder, total // 2) == signal.SIGKILL:  # resumes: one start does not finish
    starts += 1
    assert starts < 20
assert starts
"""


def test_killed_at_any_moment_it_ends_with_the_same_files(options, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, str(tmp_path / "killed.py"), str(out), *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumes, " in done.stdout
    whole = hashes(out / "whole")
    folders = [*out.glob("once-*"), out / "often"]
    assert len(folders) > 6, f"only {len(folders)} runs were killed"
    for folder in folders:
        assert hashes(folder) == whole, folder


def test_the_manifest_never_describes_other_files(options, tmp_path, monkeypatch):
    """Stopped before each of the renames that replace finished files; then, with the old options,
    all is built anew.
    """
    out = tmp_path / "out"
    build(options, out)
    before, replace = hashes(out), os.replace
    for step in range(1, 6):
        left = step

        def stopped(source, target):
            nonlocal left
            left -= Path(target).parent == out
            if not left:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopped)
            with pytest.raises(SystemExit) as end:
                build(options, out, "--seed=3", "--overwrite")
        assert end.value.code == 130
        assert not (out / "imagenet4k.jsonl").exists()
        assert build(options, out, "--overwrite")[0]["seed"] == 0
        assert hashes(out) == before


def test_finished_is_said_and_other_options_are_refused(options, tmp_path, capsys):
    out = tmp_path / "out"
    build(options, out)
    before = hashes(out)
    assert build_imagenet4k.main([*options, f"--output={out}"]) == 0
    assert "finished already" in capsys.readouterr().out
    line = refused([*options, f"--output={out}", "--seed=3"], capsys)
    assert all(word in line for word in ("imagenet4k.jsonl", "--seed 0, not 3", "--overwrite"))
    assert hashes(out) == before
    build(options, out, "--seed=3", "--overwrite")
    assert hashes(out) != before
    assert build(options, out, "--overwrite")[0]["seed"] == 0
    assert hashes(out) == before


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        ("benthos\n", [], ["line 1", "benthos"]),
        ("", [], ["names no class"]),
        (f"{WNIDS[0]}\n00005787-n -> benthos: again\n", [], [WNIDS[0], "twice"]),
        ("\x1b[2J\n", [], ["line 1"]),
        (b"\xff\xfe", [], ["not a text"]),
        (None, [], ["classes.txt"]),
        (CLASSES, ["--data=nothing"], ["nothing", "no such folder"]),
        (CLASSES, ["--database-per-class=100"], ["3 of 3 classes", "is it ImageNet-21K"]),
        (CLASSES, ["--queries-per-class=0"], ["--queries-per-class"]),
        (CLASSES, ["--jpeg-quality=0"], ["--jpeg-quality 0: expected 1 to 100"]),
        (CLASSES, ["--workers=-1"], ["--workers -1: expected 0 to 1024"]),
        (CLASSES, ["--seed=-1"], ["--seed -1", "0 to 18446744073709551615"]),
        (CLASSES, [f"--seed={2**64}"], [f"--seed {2**64}", "0 to 18446744073709551615"]),
    ],
)
def test_mistakes_are_one_line(*, options, tmp_path, capsys, text, more, words):
    file = tmp_path / "classes.txt"
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused([*options, f"--output={tmp_path / 'out'}", *more], capsys)
    assert all(word in line for word in words), line
    assert "\x1b" not in line
    assert not Path(tmp_path / "out").exists()
