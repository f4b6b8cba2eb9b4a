"""A user's photos: folders and tables of labels, files left out, and the validation part."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from matryoshka.data import photos as photos_module
from matryoshka.data.photos import (
    LeftOut,
    PhotoError,
    Photos,
    count_reasons,
    find_photos,
    split,
)


def touch(root, *names):
    """Files with their own name as content."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def labelled(photos):
    """{name: class}."""
    classes = [photos.classes[label] for label in photos.labels]
    return dict(zip(photos.names, classes, strict=True))


def refusal(root, labels=None):
    """The one line of a PhotoError."""
    with pytest.raises(PhotoError) as caught:
        find_photos(root, labels)
    text = str(caught.value)
    assert text.count("\n") == 0
    assert str(labels or root) in text
    return text


# ---------------------------------------------------------------- folders


def test_class_folders(tmp_path):
    touch(tmp_path, "cat/b.JPG", "cat/below/a.png", "ant/1.webp", "ant/2.jpeg")
    found = find_photos(tmp_path)
    assert labelled(found.train) == {
        "ant/1.webp": "ant",
        "ant/2.jpeg": "ant",
        "cat/b.JPG": "cat",
        "cat/below/a.png": "cat",
    }
    assert found.train.classes == ["ant", "cat"]
    assert found.train.counts().tolist() == [2, 2]
    assert found.train.labels.dtype == np.int64
    assert found.val is None
    assert found.test is None
    assert found.left_out == []
    row = found.train.names.index("cat/b.JPG")
    assert found.train.read(row) == b"cat/b.JPG"
    assert list(found.parts()) == ["train"]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_parts(tmp_path, val):
    touch(tmp_path, "train/ant/1.jpg", "train/bee/2.jpg", "train/cat/3.jpg")
    touch(tmp_path, f"{val}/cat/4.jpg", f"{val}/ant/5.jpg", "test/bee/6.jpg")
    parts = find_photos(tmp_path).parts()
    assert list(parts) == ["train", "val", "test"]
    # One numbering of the classes, that of train.
    assert all(part.classes == ["ant", "bee", "cat"] for part in parts.values())
    assert labelled(parts["val"]) == {f"{val}/ant/5.jpg": "ant", f"{val}/cat/4.jpg": "cat"}
    assert labelled(parts["test"]) == {"test/bee/6.jpg": "bee"}


@pytest.mark.parametrize("others", [[], ["test"]])
def test_train_without_val(tmp_path, others):
    for part in ("train", *others):
        touch(tmp_path, f"{part}/ant/1.jpg")
    found = find_photos(tmp_path)
    assert list(found.parts()) == ["train", *others]
    assert found.train.classes == ["ant"]


def test_a_class_may_be_called_test_or_train(tmp_path):
    touch(tmp_path, "test/1.jpg", "train/2.jpg", "wagon/3.jpg")
    assert find_photos(tmp_path).train.classes == ["test", "train", "wagon"]


def test_parts_beside_other_folders_are_refused(tmp_path):
    touch(tmp_path, "train/ant/1.jpg", "valid/ant/2.jpg", "extra/3.jpg")
    text = refusal(tmp_path)
    assert "(extra) beside train and valid" in text
    assert "--labels" in text


def test_hidden_folders_beside_parts_do_not_matter(tmp_path):
    touch(tmp_path, "train/ant/1.jpg", "val/ant/2.jpg", ".cache/3.jpg")
    assert list(find_photos(tmp_path).parts()) == ["train", "val"]


def test_two_folders_for_validation_are_refused(tmp_path):
    touch(tmp_path, "train/ant/1.jpg", "val/ant/2.jpg", "valid/ant/3.jpg")
    assert "several folders for validation" in refusal(tmp_path)


def test_classes_that_train_lacks_are_refused(tmp_path):
    touch(tmp_path, "train/ant/1.jpg", *(f"val/{name}/2.jpg" for name in "abcd"))
    assert "val: has classes that the training part lacks: a, b, c, ..." in refusal(tmp_path)


def test_every_file_left_out_has_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(photos_module, "EXTENSIONS", (".jpg", ".png"))  # without pillow-heif
    taken = {"ant/1.jpg", "ant/deep/2.PNG"}
    reasons = {
        "loose.jpg": "in no class folder",
        "readme.txt": "not an image (.txt)",
        "ant/.3.jpg": "hidden file",
        "ant/deep/.DS_Store": "hidden file",
        "ant/4.HEIC": "HEIC (pip install pillow-heif)",
        "ant/5.heif": "HEIC (pip install pillow-heif)",
        "ant/notes.TXT": "not an image (.txt)",
        "ant/README": "not an image (no extension)",
        "empty/clip.mp4": "not an image (.mp4)",
    }
    touch(tmp_path, *taken, *reasons)
    found = find_photos(tmp_path)
    assert set(found.train.names) == taken
    assert found.train.classes == ["ant"]
    assert dict(found.left_out) == reasons
    assert len(found.left_out) == len(reasons)


def test_files_left_out_of_parts(tmp_path):
    touch(tmp_path, "train/ant/1.jpg", "val/ant/2.jpg")
    reasons = {"a.jpg": "in no class folder", "val/b.jpg": "in no class folder"}
    touch(tmp_path, *reasons)
    assert dict(find_photos(tmp_path).left_out) == reasons


def test_count_reasons():
    files = [LeftOut("1", "rare"), LeftOut("2", "frequent"), LeftOut("3", "frequent")]
    assert list(count_reasons(files).items()) == [("frequent", 2), ("rare", 1)]


def test_names_with_spaces_and_of_all_scripts(tmp_path):
    names = {"größe 1/ä b.jpg", "猫/白 猫.png", "a,b/c'd\".jpg"}
    touch(tmp_path, *names)
    found = find_photos(tmp_path)
    assert set(found.train.names) == names
    assert found.train.classes == sorted(name.split("/")[0] for name in names)


def test_links_are_followed_but_no_cycles(tmp_path):
    root = tmp_path / "root"
    touch(root, "ant/1.jpg")
    touch(tmp_path, "elsewhere/2.jpg")
    (root / "ant/up").symlink_to(root)
    (root / "ant/self").symlink_to(root / "ant")
    (root / "bee").symlink_to(tmp_path / "elsewhere")
    found = find_photos(root)
    names = set(found.train.names)
    assert {"ant/1.jpg", "bee/2.jpg"} <= names
    assert len(names) < 10
    assert found.train.classes == ["ant", "bee"]


def test_folders_that_cannot_be_used(tmp_path):
    assert "no such folder" in refusal(tmp_path / "missing")
    touch(tmp_path, "file.jpg")
    assert "is not a folder" in refusal(tmp_path / "file.jpg")
    assert "has 1 images but no class folders" in refusal(tmp_path)
    touch(tmp_path, "texts/ant/1.txt")
    assert "left out: 1 not an image (.txt)" in refusal(tmp_path / "texts")
    (tmp_path / "empty").mkdir()
    assert "has no images" in refusal(tmp_path / "empty")
    touch(tmp_path, "mac/._1.jpg")
    assert "1 hidden file" in refusal(tmp_path / "mac")


# ---------------------------------------------------------------- tables of labels


@pytest.fixture
def tree(tmp_path):
    """A folder root with a.jpg, b.jpg, c/d.jpg, and a place for tables beside it."""
    touch(tmp_path / "root", "a.jpg", "b.jpg", "c/d.jpg")
    return tmp_path / "root"


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


ROWS = [("a.jpg", "ant", "train"), ("b.jpg", "bee", ""), ("c/d.jpg", "ant", "valid")]


@pytest.mark.parametrize("kind", ["csv", "windows.csv", "jsonl"])
def test_tables_in_each_format(tree, kind):
    if kind == "jsonl":
        rows = [dict(zip(("path", "label", "split"), row, strict=True)) for row in ROWS]
        text = "\n\n".join(json.dumps(row) for row in rows)
    else:
        text = "\n".join(",".join(row) for row in [("path", "label", "split"), *ROWS])
    if kind == "windows.csv":
        text = "\ufeff" + text.replace("\n", "\r\n")
    found = find_photos(tree, write(tree.parent / f"labels.{kind}", text))
    assert labelled(found.train) == {"a.jpg": "ant", "b.jpg": "bee"}
    val = found.parts()["val"]
    assert labelled(val) == {"c/d.jpg": "ant"}
    assert val.classes == found.train.classes == ["ant", "bee"]
    assert found.left_out == []


def test_quoted_labels_and_absolute_and_unclean_paths(tree):
    text = f'label, path\n"ant, red",{tree / "a.jpg"}\nbee,./c/../b.jpg\n'
    found = find_photos(tree, write(tree.parent / "labels.csv", text))
    assert labelled(found.train) == {"a.jpg": "ant, red", "b.jpg": "bee"}
    assert found.left_out == [LeftOut("c/d.jpg", "not in the labels file")]


def test_absolute_paths_with_a_relative_root(tree, monkeypatch):
    monkeypatch.chdir(tree.parent)
    table = write(tree.parent / "labels.csv", f"path,label\n{tree / 'a.jpg'},ant\n")
    assert labelled(find_photos("root", table).train) == {"a.jpg": "ant"}


def test_table_inside_the_folder_and_files_it_does_not_name(tree):
    touch(tree, "c/notes.txt", ".hidden.jpg")
    (tree / "broken.jpg").symlink_to(tree / "nowhere.jpg")
    table = write(tree / "labels.csv", "path,label\na.jpg,ant\nc/notes.txt,ant\n")
    found = find_photos(tree, table)
    assert found.train.names == ["a.jpg"]
    assert dict(found.left_out) == {
        "b.jpg": "not in the labels file",
        "broken.jpg": "not in the labels file",
        "c/d.jpg": "not in the labels file",
        "c/notes.txt": "not an image (.txt)",
        ".hidden.jpg": "hidden file",
    }


def test_labels_in_json_may_hold_line_separators_and_numbers(tree):
    rows = [{"path": "a.jpg", "label": "one\u2028two"}, {"path": "b.jpg", "label": 0}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    found = find_photos(tree, write(tree.parent / "labels.jsonl", text))
    assert labelled(found.train) == {"a.jpg": "one\u2028two", "b.jpg": "0"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,label\na.jpg,ant\nx.jpg,ant\ny.jpg,ant\n", "line 3: {root}/x.jpg does not exist"),
        ("path,label\na.jpg,ant\nx.jpg,ant\ny.jpg,ant\n", "(and 1 more)"),
        ("path,label\na.jpg,\n", "line 2: label is empty"),
        ("path,label\na.jpg\n", "line 2: label is empty"),
        ("path,label\n,ant\n", "line 2: path is empty"),
        ("path,label\na.jpg,ant\n./a.jpg,bee\n", "line 3: a.jpg has two labels, 'ant' and 'bee'"),
        ("path,label,split\na.jpg,ant,dev\n", "line 2: split 'dev': expected train, val or test"),
        ("path,label,split\na.jpg,ant,val\n", "no row has split train"),
        ("path,label,split\na.jpg,ant,\nb.jpg,bee,val\n", "classes that the training part lacks"),
        ("path,label,extra\na.jpg,ant,1\n", "columns path,label,extra: expected path,label"),
        ("a.jpg,ant\n", "columns a.jpg,ant: expected path,label"),
        ("", "columns none: expected path,label"),
        ("path,label\n", "has no rows"),
        ("path,label\nc,ant\n", "line 2: {root}/c does not exist"),
        (f"path,label\n{'x' * 300}.jpg,ant\n", "does not exist"),
        (f"path,label\na.jpg,{'x' * 200_000}\n", "is not valid CSV"),
    ],
)
def test_tables_that_cannot_be_used(tree, text, expected):
    table = write(tree.parent / "labels.csv", text)
    assert expected.format(root=tree) in refusal(tree, table)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"path": "a.jpg", "label": "ant"}\n{', "line 2: is not valid JSON"),
        ('["a.jpg", "ant"]', "line 1: expected an object"),
        ('{"path": "a.jpg"}', "line 1: expected an object"),
        ('{"path": "a.jpg", "label": "ant", "x": 1}', "line 1: expected an object"),
        ('{"path": "a.jpg", "label": null}', "line 1: label is empty"),
        ("[" * 100_000, "line 1: is not valid JSON"),
    ],
)
def test_json_that_cannot_be_used(tree, text, expected):
    assert expected in refusal(tree, write(tree.parent / "labels.jsonl", text))


def test_tables_that_cannot_be_read(tree):
    table = tree.parent / "labels.csv"
    assert "No such file" in refusal(tree, table)
    table.write_bytes(b"path,label\na.jpg,\xff\n")
    assert "is not UTF-8" in refusal(tree, table)
    touch(tree, "1.txt")
    assert "names no image" in refusal(tree, write(table, "path,label\n1.txt,ant\n"))


@settings(max_examples=200)
@given(data=st.binary(max_size=60), suffix=st.sampled_from(["csv", "jsonl"]), head=st.booleans())
def test_any_bytes_are_a_table_or_a_photo_error(tmp_path_factory, data, suffix, head):
    root = tmp_path_factory.getbasetemp() / "any-bytes"
    touch(root, "a.jpg")
    table = root.parent / f"any-bytes.{suffix}"
    table.write_bytes((b"path,label\na.jpg,x\n" if head else b"") + data)
    try:
        names = find_photos(root, table).train.names
    except PhotoError as error:
        text = str(error)
        names = ["a.jpg"] if str(table) in text else [text]
    assert names == ["a.jpg"]


# ---------------------------------------------------------------- split


def make_photos(counts, seed=0):
    """Photos of classes of these sizes, in a random order."""
    labels = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(seed).shuffle(labels)
    names = [f"{label}/{position:04}.jpg" for position, label in enumerate(labels)]
    return Photos(
        Path(os.devnull),
        names=names,
        labels=labels,
        classes=[str(c) for c in range(len(counts))],
    )


COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
SHARES = st.floats(0.01, 0.9)
SEEDS = st.integers(0, 2**32 - 1)


def documented(count, share):
    """Images of a class on the validation side: at least one, at most half, none of a single."""
    if count == 1:
        return 0
    return max(1, min(round(share * count), count // 2))


@given(counts=COUNTS, share=SHARES, seed=SEEDS)
def test_split_is_stratified_disjoint_and_complete(counts, share, seed):
    photos = make_photos(counts)
    train, val = split(photos, share=share, seed=seed)
    assert sorted([*train, *val]) == list(range(len(photos)))
    assert list(train) == sorted(train)
    assert list(val) == sorted(val)
    expected = [documented(count, share) for count in counts]
    assert photos.take(val).counts().tolist() == expected


@given(counts=COUNTS, share=SHARES, seed=SEEDS, shuffled=SEEDS)
def test_split_depends_on_seed_and_names_alone(counts, share, seed, shuffled):
    photos = make_photos(counts)
    other = photos.take(np.random.default_rng(shuffled).permutation(len(photos)))
    chosen, again = (
        set(some.take(split(some, share=share, seed=seed)[1]).names) for some in (photos, other)
    )
    assert chosen == again


def test_other_seeds_choose_others():
    photos = make_photos([50, 50])
    chosen = {tuple(split(photos, share=0.2, seed=seed)[1]) for seed in range(20)}
    assert len(chosen) == 20


@given(counts=COUNTS, share=SHARES, seed=SEEDS, data=st.data())
def test_groups_stay_in_train(counts, share, seed, data):
    photos = make_photos(counts)
    n = len(photos)
    together = np.array(data.draw(st.lists(st.integers(0, n), min_size=n, max_size=n)))
    train, val = split(photos, share=share, seed=seed, together=together)
    assert sorted([*train, *val]) == list(range(n))
    members = together.tolist()
    assert all(members.count(together[row]) == 1 for row in val)
    for label, count in enumerate(counts):
        alone = sum(
            members.count(group) == 1
            for group, own in zip(members, photos.labels, strict=True)
            if own == label
        )
        assert (photos.labels[val] == label).sum() == min(documented(count, share), alone)


def test_a_class_of_unknown_formats_only_is_not_a_class(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "c.xyz").write_bytes(b"?")
    (tmp_path / "labels.csv").write_text("path,label\na.jpg,ant\nb.jpg,bee\nc.xyz,cat\n")
    found = find_photos(tmp_path, tmp_path / "labels.csv")
    assert found.train.classes == ["ant", "bee"]
    assert [file.name for file in found.left_out] == ["c.xyz"]
