"""`hf:` data sets from local parquet files: columns, labels, damage; no network."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from matryoshka import cli
from matryoshka.data import BetonError, BetonFile, named_dataset
from matryoshka.data.hugging_face import HuggingFaceImages

datasets = pytest.importorskip("datasets", reason="datasets is not installed (the extra [hf])")
NAMES = ["ant", "bee", "cat"]
KIND = datasets.ClassLabel(names=NAMES)


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (12, 10, 14, 3), dtype=np.uint8)


@pytest.fixture
def write(tmp_path, pixels):
    """A function that writes columns to parquet: write(path, features, **columns)."""

    def make(name="a.parquet", features=None, **columns):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        images = [{"bytes": png(image), "path": None} for image in pixels]
        features = {"picture": datasets.Image(), **(features or {"kind": KIND})}
        columns = {"picture": images, **(columns or {"kind": [i % 3 for i in range(12)]})}
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(str(path))
        return path

    return make


def opened(path, tmp_path, split="train", **columns):
    return HuggingFaceImages(str(path), split, cache=tmp_path / "cache", **columns)


def stored(path):
    with BetonFile(path) as data:
        (samples,) = data.fetch(np.arange(len(data)))
        pixels = [
            samples.data[int(o) : int(o) + int(s)].reshape(10, 14, 3)
            for o, s in zip(samples.offset, samples.size, strict=True)
        ]
        return np.array(pixels), data.labels.tolist(), data.classes


@pytest.mark.parametrize("form", ["file", "folder"])
def test_columns_are_found_by_their_types(form, write, tmp_path, pixels):
    path = write("set/test-00000-of-00001.parquet")
    name = f"hf:{path if form == 'file' else path.parent}"
    beton = named_dataset(name, "test", tmp_path / "cache")
    found, labels, classes = stored(beton)
    assert np.array_equal(found, pixels)
    assert labels == [i % 3 for i in range(12)]
    assert classes == NAMES
    assert named_dataset(name, "test", tmp_path / "cache") == beton
    assert named_dataset(name, "test", tmp_path / "cache", max_resolution=9) != beton


def test_a_changed_file_is_written_again(write, tmp_path):
    path = write()
    before = named_dataset(f"hf:{path}", "train", tmp_path / "cache")
    write(kind=[2] * 12)
    after = named_dataset(f"hf:{path}", "train", tmp_path / "cache")
    assert stored(before)[1] != stored(after)[1] == [2] * 12


def test_writing_with_the_program(write, tmp_path, pixels, capsys):
    features = {"kind": KIND, "second": KIND}
    path = write(features=features, kind=[0] * 12, second=[1] * 12)
    argv = [f"--cfg.dataset=hf:{path}", "--cfg.split=train", f"--cfg.cache_dir={tmp_path}"]
    argv += ["--cfg.max_resolution=64", f"--cfg.write_path={tmp_path / 'a.beton'}"]
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["write", *argv])
    (line,) = capsys.readouterr().err.splitlines()
    assert "columns kind, second hold labels; give label_column, one of kind, second" in line
    assert not (tmp_path / "a.beton").exists()
    assert cli.main(["write", *argv, "--cfg.label_column=second"]) == 0
    assert "12 images of 3 classes: 0 jpg, 12 raw" in capsys.readouterr().out
    assert stored(tmp_path / "a.beton")[1] == [1] * 12


def test_labels_without_names_are_numbers(write, tmp_path, capsys):
    path = write(features={"y": datasets.Value("int32")}, y=[5, 0, None] * 4)
    source = opened(path, tmp_path)
    assert source.classes is None
    assert source.labels.tolist() == [5, 0, -1] * 4
    argv = [f"--cfg.dataset=hf:{path}", "--cfg.split=train", f"--cfg.cache_dir={tmp_path}"]
    argv += ["--cfg.max_resolution=64", f"--cfg.write_path={tmp_path / 'a.beton'}"]
    assert cli.main(["write", *argv]) == 0
    assert "12 images of labels without names" in capsys.readouterr().out
    with BetonFile(tmp_path / "a.beton") as data:
        assert data.classes is None
        assert data.num_classes == 6


def test_texts_are_names(write, tmp_path):
    text = datasets.Value("string")
    path = write(features={"species": text}, species=["dog", "cat", None] * 4)
    source = opened(path, tmp_path, label_column="species")
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [1, 0, -1] * 4


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_column": "img"}, "image_column=img: no such column; it has picture, kind"),
        ({"label_column": "label"}, "label_column=label: no such column; it has picture, kind"),
        ({"label_column": "picture"}, "label_column=picture: has struct"),
    ],
)
def test_columns_that_are_not_there(columns, message, write, tmp_path):
    with pytest.raises(BetonError, match=message) as error:
        opened(write(), tmp_path, **columns)
    assert "\n" not in str(error.value)


def test_sets_without_images_or_labels(write, tmp_path):
    number = datasets.Value("float32")
    path = write(features={"x": number}, x=[0.5] * 12)
    with pytest.raises(BetonError, match="no column of labels; give label_column, one of picture"):
        opened(path, tmp_path)
    with pytest.raises(BetonError, match="label_column=x: has float, expected integers or text"):
        opened(path, tmp_path, label_column="x")
    table = datasets.Dataset.from_dict({"a": [1], "b": [b"-"]})
    table.to_parquet(str(tmp_path / "b.parquet"))
    with pytest.raises(BetonError, match="no column of images; give image_column, one of a, b"):
        opened(tmp_path / "b.parquet", tmp_path)


def test_bytes_that_are_no_image_are_listed(write, tmp_path, pixels):
    images = [{"bytes": png(image), "path": None} for image in pixels]
    images[3] = {"bytes": b"no image", "path": None}
    gone = tmp_path / "gone.png"
    gone.touch()
    images[7] = {"bytes": None, "path": str(gone)}
    images[8] = None
    path = write(picture=images, kind=[i % 3 for i in range(12)])
    gone.unlink()
    beton = named_dataset(f"hf:{path}", "train", tmp_path)
    kept = [i for i in range(12) if i not in (3, 7, 8)]
    found, labels, _ = stored(beton)
    assert np.array_equal(found, pixels[kept])
    assert labels == [i % 3 for i in kept]
    broken = json.loads(beton.with_name(f"{beton.name}.json").read_text())["broken"]
    assert [entry["name"] for entry in broken] == ["train/3", "train/7", "train/8"]
    assert all(entry["reason"] for entry in broken)


def test_a_column_of_bytes_without_a_type(tmp_path, pixels):
    table = datasets.Dataset.from_dict({"data": [png(p) for p in pixels], "label": [1] * 12})
    table.to_parquet(str(tmp_path / "a.parquet"))
    source = opened(tmp_path / "a.parquet", tmp_path, image_column="data")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(source.read(4)))), pixels[4])
    assert source.labels.tolist() == [1] * 12


def test_missing_sets_and_splits(write, tmp_path, monkeypatch):
    path = write("set/train-00000-of-00001.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"no parquet file")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for name, split, message in (
        (path.parent, "test", "split test cannot be read: "),
        (tmp_path / "damaged.parquet", "train", "split train cannot be read: "),
        ("no/such", "train", "cannot be read: .*; without a network, give hf: and a local parquet"),
        (path, None, "give the split to read"),
    ):
        with pytest.raises(BetonError, match=message) as error:
            opened(name, tmp_path, split)
        assert str(error.value).startswith(f"hf:{name}: ")
        assert "\n" not in str(error.value)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BetonError, match=r"pip install 'matryoshka-vision\[hf\]'"):
        opened("a/b", tmp_path)


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_the_part_to_evaluate_on_is_found_under_its_name(held_out, write, tmp_path):
    write("set/train-00000-of-00001.parquet")
    folder = write(f"set/{held_out}-00000-of-00001.parquet", kind=[1] * 12).parent
    for wanted in ("test", "val"):
        beton = named_dataset(f"hf:{folder}", wanted, tmp_path / "cache")
        assert stored(beton)[1] == [1] * 12
    assert stored(named_dataset(f"hf:{folder}", "train", tmp_path / "cache"))[1] != [1] * 12


def test_a_set_without_a_part_to_evaluate_on_says_what_it_has(write, tmp_path):
    folder = write("set/train-00000-of-00001.parquet").parent
    with pytest.raises(BetonError, match="its splits are train"):
        named_dataset(f"hf:{folder}", "test", tmp_path / "cache")
