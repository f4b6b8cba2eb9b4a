"""CIFAR, STL-10 and Tiny-ImageNet from archives of their formats; sets by name; normalisation."""

import json
from unittest import mock

import numpy as np
import pytest
from matryoshka.train import train_imagenet
from small_archives import (
    announce,
    cifar10_files,
    cifar100_files,
    stl10_files,
    tar_of,
    tiny_imagenet_zip,
)
from training_commands import options as program_options
from training_commands import refused

from matryoshka import cli
from matryoshka.data import BetonError, BetonFile, catalogue, named, named_dataset, normalisation
from matryoshka.data.augment import IMAGENET_MEAN, IMAGENET_STD
from matryoshka.data.small_sets import cifar10, stl10, tiny_imagenet

TARS = {
    "cifar10": ("cifar-10-binary.tar.gz", cifar10_files),
    "cifar100": ("cifar-100-binary.tar.gz", cifar100_files),
    "stl10": ("stl10_binary.tar.gz", stl10_files),
}


def stored(path):
    """(pixels [N, H, W, 3], labels, class names) of a raw .beton."""
    with BetonFile(path) as data:
        (samples,) = data.fetch(np.arange(len(data)))
        pixels = [
            samples.data[int(o) : int(o + s)].reshape(h, w, 3)
            for o, s, h, w in zip(
                samples.offset, samples.size, samples.height, samples.width, strict=True
            )
        ]
        return np.array(pixels), data.labels.copy(), data.classes


@pytest.mark.parametrize("name", TARS)
def test_every_part_of_a_tar_is_stored_bit_by_bit(name, tmp_path, monkeypatch):
    file, files_of = TARS[name]
    files, parts = files_of(np.random.default_rng(4))
    announce(monkeypatch, name, tar_of(tmp_path / file, files))
    assert set(parts) == set(catalogue.SETS[name].splits)
    names_file = next(f for f in files if "names" in f or "meta" in f)
    for split, (pixels, labels) in parts.items():
        path = named_dataset(name, split, tmp_path)
        assert path == tmp_path / f"{name}-{split}.beton"
        found, found_labels, classes = stored(path)
        assert np.array_equal(found, pixels)
        assert np.array_equal(found_labels, labels)
        assert classes == files[names_file].decode().split()


def test_tiny_imagenet_is_stored_as_pillow_reads_it(tmp_path, monkeypatch):
    archive = tmp_path / "tiny-imagenet-200.zip"
    parts = tiny_imagenet_zip(archive, np.random.default_rng(1))
    announce(monkeypatch, "tiny-imagenet", archive)
    for split in ("train", "val"):
        pixels, labels, classes = stored(named_dataset("tiny-imagenet", split, tmp_path))
        assert classes == sorted(classes)
        files = sorted(parts[split], key=lambda file: (parts[split][file][1], file))
        if split == "val":
            files = sorted(parts[split])
        assert len(labels) == len(files)
        for image, label, file in zip(pixels, labels, files, strict=True):
            expected, wnid = parts[split][file]
            assert classes[label] == wnid
            assert np.abs(image.astype(int) - expected).max() <= 2, "a decoder's rounding"


def test_a_set_is_written_once_and_then_found(tmp_path, monkeypatch):
    files, _ = cifar10_files(np.random.default_rng(0))
    announce(monkeypatch, "cifar10", tar_of(tmp_path / "cifar-10-binary.tar.gz", files))
    seen = []
    path = named_dataset("cifar10", "train", tmp_path, progress=lambda *step: seen.append(step))
    assert seen == [("write cifar10-train.beton", k, 15) for k in range(1, 16)]
    before = path.stat().st_mtime_ns
    with mock.patch.object(named, "named_source", side_effect=AssertionError("read again")):
        assert named_dataset("cifar10", "train", tmp_path) == path
    assert path.stat().st_mtime_ns == before
    assert named_dataset("cifar10", "val", tmp_path).name == "cifar10-test.beton"
    left = {p.name for p in tmp_path.iterdir()}
    betons = {f"cifar10-{split}.beton{end}" for split in ("train", "test") for end in ("", ".json")}
    assert left == betons | {"cifar-10-binary.tar.gz"}
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BetonError, match=r"cifar10-train\.beton: "):
        named_dataset("cifar10", "train", tmp_path)


def test_writing_a_named_set_with_the_program(tmp_path, monkeypatch, capsys):
    files, parts = stl10_files(np.random.default_rng(0))
    announce(monkeypatch, "stl10", tar_of(tmp_path / "stl10_binary.tar.gz", files))
    output = tmp_path / "fold3.beton"
    argv = ["--cfg.dataset=stl10", "--cfg.split=fold3", f"--cfg.cache_dir={tmp_path}"]
    assert cli.main(["write", *argv, f"--cfg.write_path={output}"]) == 0
    assert "6 images of 3 classes: 0 jpg, 6 raw" in capsys.readouterr().out
    assert np.array_equal(stored(output)[0], parts["fold3"][0])
    manifest = json.loads((tmp_path / "fold3.beton.json").read_text())
    assert manifest["classes"] == ["airplane", "bird", "car"]
    assert manifest["options"]["max_resolution"] == 96


def test_training_on_unlabeled_images_is_refused(tmp_path, monkeypatch, digits, capsys):
    files, _ = stl10_files(np.random.default_rng(0))
    announce(monkeypatch, "stl10", tar_of(tmp_path / "stl10_binary.tar.gz", files))
    unlabeled = named_dataset("stl10", "unlabeled", tmp_path)
    argv = program_options({"train": unlabeled, "val": digits["val"]}, tmp_path)
    line = refused(train_imagenet.main, argv, capsys)
    assert "stl10-unlabeled.beton: 2 of its 2 images have no label (-1)" in line


def test_a_destination_is_checked_before_a_download(tmp_path, capsys):
    argv = ["--cfg.dataset=cifar10", "--cfg.split=train", f"--cfg.cache_dir={tmp_path / 'data'}"]
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["write", *argv, f"--cfg.write_path={tmp_path / 'no' / 'such' / 'a.beton'}"])
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_folder_in_place_of_a_name(folder, tmp_path, capsys):
    """`folder` has train/ and val/ with three classes each."""
    words = ["write", f"--cfg.dataset={folder}", f"--cfg.write_path={tmp_path / 'a.beton'}"]
    words += ["--cfg.max_resolution=64"]
    assert cli.main([*words, "--cfg.split=test"]) == 0
    with BetonFile(tmp_path / "a.beton") as data:
        assert (len(data), data.classes) == (9, ["ant", "bee", "cat"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(words)
    assert "are parts of a data set, not classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cfg.dataset=cifar11"], "(did you mean 'cifar10'?)"),
        (["--cfg.dataset=cifar10"], "cfg.dataset=cifar10: no split given; it has train, test"),
        (["--cfg.dataset=stl10", "--cfg.split=fold10"], "has no split fold10; it has train, test"),
        (
            ["--cfg.dataset=cifar10", "--cfg.split=train", "--cfg.data_dir=x"],
            "cfg.data_dir=x is not used with cfg.dataset=cifar10",
        ),
        (
            ["--cfg.dataset=cifar10", "--cfg.split=train", "--cfg.label_column=x"],
            "cfg.label_column=x is not used with cfg.dataset=cifar10",
        ),
        (["--cfg.dataset=hf:a/b", "--cfg.split=train"], "cfg.max_resolution is required"),
    ],
)
def test_mistakes_of_the_program_are_one_line(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["write", *argv, f"--cfg.write_path={tmp_path / 'a.beton'}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"cifar-10-batches-bin/test_batch.bin": None}, "has no file .*test_batch.bin"),
        ({"cifar-10-batches-bin/test_batch.bin": b"x" * 3074}, "3074 bytes, not a multiple"),
        ({"cifar-10-batches-bin/test_batch.bin": b""}, "0 bytes, not a multiple"),
        ({"cifar-10-batches-bin/test_batch.bin": b"\x09" * 3073}, "labels 9 to 9 of 2 names"),
    ],
)
def test_archives_with_other_contents(damage, message, tmp_path):
    files, _ = cifar10_files(np.random.default_rng(0))
    files = {name: content for name, content in (files | damage).items() if content is not None}
    with pytest.raises(BetonError, match=message):
        cifar10(tar_of(tmp_path / "a.tar.gz", files), "test")


def test_damaged_archives(tmp_path):
    files, _ = stl10_files(np.random.default_rng(0))
    whole = tar_of(tmp_path / "a.tar.gz", files).read_bytes()
    for number, content in enumerate((b"", b"no archive", whole[: len(whole) // 2])):
        path = tmp_path / f"{number}.tar.gz"
        path.write_bytes(content)
        with pytest.raises(BetonError, match=f"{number}.tar.gz: "):
            stl10(path, "test")
        with pytest.raises(BetonError, match=f"{number}.tar.gz: is not Tiny-ImageNet's"):
            tiny_imagenet(path, "val")
    files["stl10_binary/fold_indices.txt"] = b"1 2 99999\n"
    with pytest.raises(BetonError, match=r"fold_indices\.txt: "):
        stl10(tar_of(tmp_path / "b.tar.gz", files), "fold0")


def test_nothing_is_unpacked(tmp_path):
    files, _ = cifar10_files(np.random.default_rng(0))
    files = {"../outside.txt": b"-", "/tmp/outside.txt": b"-", **files}
    folder = tmp_path / "folder"
    folder.mkdir()
    cifar10(tar_of(folder / "a.tar.gz", files), "train")
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "a.tar.gz"]


# ---------------------------------------------------------------- names and paths


def test_normalisation_by_name():
    assert normalisation("cifar10") == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert normalisation("cifar100") == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert normalisation("my/photos") == (IMAGENET_MEAN, IMAGENET_STD)
    for known in catalogue.SETS.values():
        assert all(0.4 - 0.01 < value < 0.52 for value in known.mean)
        assert all(0.19 < value < 0.3 for value in known.std)


def test_folders_and_files_of_the_users_own(tmp_path, folder):
    """`folder` has train and val."""
    assert named_dataset(folder, "train") == folder / "train"
    assert named_dataset(folder, "val") == named_dataset(str(folder), "test") == folder / "val"
    assert named_dataset(folder / "train", "train") == folder / "train"
    assert named_dataset(folder / "train", "test") == folder / "train"
    for name in ("train", "test"):
        (tmp_path / f"{name}.beton").touch()
    assert named_dataset(tmp_path, "val") == tmp_path / "test.beton"
    assert named_dataset(tmp_path / "test.beton", "train") == tmp_path / "test.beton"
    (tmp_path / "test.beton").unlink()
    for name in ("train", "bus"):
        (tmp_path / "classes" / name).mkdir(parents=True)
    assert named_dataset(tmp_path / "classes", "train") == tmp_path / "classes"
    with pytest.raises(BetonError, match="has train, but no val or valid"):
        named_dataset(tmp_path, "val")


def test_unknown_names():
    with pytest.raises(BetonError, match=r"no such file.*hf:OWNER/NAME \(did you mean 'cifar10'"):
        named_dataset("cifar-10", "train")
    with pytest.raises(BetonError, match="cifar10: has no split fold1; it has train, test"):
        named_dataset("cifar10", "fold1")


def test_digits_by_name(tmp_path):
    path = named_dataset("digits", "test", tmp_path)
    assert path.name == "digits-val.beton"
    with BetonFile(path) as data:
        assert (len(data), data.num_classes) == (360, 10)
        assert set(data.mode.tolist()) == {1}
