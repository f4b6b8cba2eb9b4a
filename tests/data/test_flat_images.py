"""Images without classes: folders, lists of files, and the choice between sources."""

import numpy as np
import pytest
from PIL import Image

from matryoshka.data import BetonError, ImageFolder
from matryoshka.data.sources import FlatImages, open_images


def picture(path, level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (level, 0, 0)).save(path)
    return path


def test_a_folder_with_its_subfolders_sorted_by_path(tmp_path):
    for level, name in enumerate(("z.png", "b/y.png", "a.png", "b/c/x.png", ".hidden.png")):
        picture(tmp_path / name, level)
    (tmp_path / "notes.txt").write_text("no image")
    found = open_images([tmp_path])
    assert isinstance(found, FlatImages)
    names = [found.name(i) for i in range(len(found))]
    assert names == ["a.png", "b/c/x.png", "b/y.png", "z.png"]
    assert (found.num_classes, found.classes, found.labels.tolist()) == (0, [], [-1] * 4)
    (samples,) = found.fetch(np.arange(4))
    reds = [int(samples.data[int(o)]) for o in samples.offset]
    assert reds == [2, 3, 1, 0], "pixels do not belong to the names"


def test_files_of_several_folders(tmp_path, monkeypatch):
    first, second = picture(tmp_path / "b" / "1.png", 7), picture(tmp_path / "a" / "2.png", 9)
    monkeypatch.chdir(tmp_path)
    found = open_images(["b/1.png", second])
    assert [found.name(i) for i in range(2)] == ["a/2.png", "b/1.png"]
    assert found.read(1) == first.read_bytes()


def test_class_folders_keep_their_classes(tmp_path):
    picture(tmp_path / "ant" / "1.png")
    found = open_images([tmp_path])
    assert type(found) is ImageFolder
    assert found.classes == ["ant"]


def test_mistakes_name_the_path(tmp_path):
    good = picture(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    for paths, words in (
        ([tmp_path / "no.png"], r"no\.png: no such file"),
        ([good, tmp_path / "no.png"], r"no\.png: no such file"),
        ([good, tmp_path], "give one folder"),
        ([tmp_path / "nowhere"], "nowhere: no such file or folder"),
        ([tmp_path / "empty"], "has no class folders"),
        ([], "no images given"),
    ):
        with pytest.raises(BetonError, match=words):
            open_images(paths)
