"""Files and folders whose names are no text: bytes that are not UTF-8, line ends, surrogates."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from jpeg_files import sampled

from matryoshka.data import BetonError, BetonFile, CenterCrop, ImageFolder, Loader, write_beton
from matryoshka.data.photos import PhotoError, find_photos
from matryoshka.files import as_text

NAMES = [b"caf\xe9", b"\xff\xfe", "schön".encode(), b"two\nlines", b"\xed\xa0\x80"]
TEXTS = ["caf\\xe9", "\\xff\\xfe", "schön", "two\nlines", "\\xed\\xa0\\x80"]


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        path = os.fsencode(tmp_path / "photos") + b"/" + name
        os.makedirs(path)
        with open(path + b"/" + name + b".jpg", "wb") as file:
            file.write(sampled(40, 32))
        with open(path + b"/bad" + name + b".jpg", "wb") as file:
            file.write(b"\xff\xd8 no image")
        with open(path + b"/other." + name, "wb") as file:
            file.write(b"text")
    return tmp_path / "photos"


def test_names_as_text():
    for name, text in zip(NAMES, TEXTS, strict=True):
        assert as_text(os.fsdecode(name)) == text
        assert as_text(text) == text
    assert as_text("\ud800") == "\\ud800"  # no file name


def test_class_names_survive(folder, tmp_path):
    data = ImageFolder(folder)
    assert sorted(data.classes) == sorted(TEXTS)
    for index in range(len(data)):
        raw = os.path.basename(os.path.dirname(data.name(index)))
        assert data.classes[data.labels[index]] == as_text(raw)
        assert data.read(index)
    manifest = write_beton(data, tmp_path / "x.beton", names=1, max_resolution=64)
    assert len(manifest["broken"]) == len(NAMES)
    with BetonFile(tmp_path / "x.beton") as written:
        assert written.classes == data.classes
        names = [os.path.dirname(name) for name in written.manifest["names"]]
        assert [written.classes[label] for label in written.labels] == names
    loader = Loader(folder, 4, order="sequential", crop=CenterCrop(32), on_error="skip")
    labels = np.concatenate([batch.labels.numpy() for batch in loader])
    assert sorted(labels) == list(range(len(NAMES)))
    assert sorted(find_photos(folder).train.classes) == sorted(TEXTS)


def test_two_classes_of_one_name(folder):
    (folder / "caf\\xe9").mkdir()
    (folder / "caf\\xe9" / "a.jpg").write_bytes(sampled(40, 32))
    with pytest.raises(BetonError, match=r"2 class folders have the name caf\\xe9 .*rename one"):
        ImageFolder(folder)
    with pytest.raises(PhotoError, match=r"2 class folders have the name caf\\xe9 .*rename one"):
        find_photos(folder)


def test_classes_of_other_sources_are_looked_at_before_the_work(tmp_path):
    class Source:
        classes = ("a", "\udce9")
        labels = np.zeros(1, np.int64)

        def __len__(self):
            return 1

        def read(self, index):
            raise AssertionError("the work has begun")

        def name(self, index):
            return "x"

    with pytest.raises(BetonError, match=r"the class name \\xe9 is not text"):
        write_beton(Source(), tmp_path / "x", max_resolution=64)
    assert not list(tmp_path.iterdir())


def test_labels_that_are_no_text(tmp_path):
    (tmp_path / "a.jpg").write_bytes(sampled(40, 32))
    table = tmp_path / "labels.jsonl"
    table.write_text(json.dumps({"path": "a.jpg", "label": "\ud800"}))
    with pytest.raises(PhotoError, match=r"labels\.jsonl, line 1: label .* is not text"):
        find_photos(tmp_path, table)


def test_programs_list_these_names(folder, tmp_path):
    """Writing, info and verify."""
    program = (
        "import sys\n"
        "from matryoshka.cli import main\n"
        "source, path = sys.argv[1:]\n"
        "write = ['write', f'--cfg.data_dir={source}', f'--cfg.write_path={path}']\n"
        "write += ['--cfg.names=1', '--cfg.max_resolution=64', '--cfg.write_mode=jpg']\n"
        "assert main(write) == 0\n"
        "assert main(['data', 'info', path]) == 0\n"
        "assert main(['data', 'verify', source]) == 1\n"
        "assert main(['data', 'verify', source, '--json']) == 1\n"
    )
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "x.beton")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
