"""Data sets that are replaced or damaged between the two halves of a run."""

import contextlib
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import xxhash
from attacks.scale import scaled
from matryoshka.train import check_data, train_imagenet
from training_commands import options, refused

from matryoshka.data import BetonError, BetonFile, ImageFolder, Loader, StateError, write_beton
from matryoshka.data.fingerprint import evenly, hash_file
from matryoshka.data.subset import Subset
from matryoshka.training.guard import NonFiniteGuard

SIDE = 16


class Noise:
    """Images of noise, all of one size, as a source of the writer."""

    classes = ("ant", "bee", "cat")

    def __init__(self, count, seed=0, changed=()):
        rng = np.random.default_rng(seed)
        self.pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
        self.labels = rng.integers(0, 3, count)
        for index in changed:
            self.pixels[index] ^= 255

    def __len__(self):
        return len(self.pixels)

    def name(self, index):
        return f"{index}.ppm"

    def read(self, index):
        return b"P6 %d %d 255\n" % (SIDE, SIDE) + self.pixels[index].tobytes()


def write(source, path, **more):
    write_beton(source, path, max_resolution=SIDE, write_mode="raw", **more)
    return path


def state_of(path):
    return Loader(path, 8, seed=3).state_dict()


# ---------------------------------------------------------------- a loader's state


def not_sampled(count):
    return int(np.setdiff1d(np.arange(count), evenly(count))[0])


def in_place(path, at, change):
    """Change bytes of a file, which then is newer than its side file."""
    with open(path, "r+b") as file:
        file.seek(at)
        content = bytearray(file.read(len(change)))
        file.seek(at)
        file.write(bytes(a ^ b for a, b in zip(content, change, strict=True)))
    os.utime(path, ns=(0, os.stat(f"{path}.json").st_mtime_ns + 1))


@pytest.mark.parametrize("sidecar", [True, False])
@pytest.mark.parametrize("change", ["all", "one", "labels", "order", "fewer"])
def test_other_images_of_the_same_size(tmp_path, change, sidecar):
    """Under the same name. `one`: of 700, and not one of those whose bytes are looked at."""
    count = 700
    path = write(Noise(count), tmp_path / "train.beton")
    state = json.loads(json.dumps(state_of(path)))
    Loader(path, 8, seed=3).load_state_dict(state)
    other = Noise(count)
    if change == "all":
        other = Noise(count, seed=1)
        other.labels = Noise(count).labels
    elif change == "one":
        other = Noise(count, changed=[not_sampled(count)])
    elif change == "labels":
        other.labels[5] = (other.labels[5] + 1) % 3
    elif change == "order":
        other.pixels = other.pixels[::-1]
    else:
        other = Noise(count - 1)
    write(other, path)
    if not sidecar:
        Path(f"{path}.json").unlink()
    loader = Loader(path, 8, seed=3)
    if change == "one" and not sidecar:  # what cannot be seen is printed
        loader.load_state_dict(state)
        assert ["a sample of the images was compared, not all" in n for n in loader.notes] == [True]
        return
    with pytest.raises(StateError, match=r"train\.beton: the state is of another run: ") as refusal:
        loader.load_state_dict(state)
    assert "\n" not in str(refusal.value)
    if change != "fewer":
        assert str(refusal.value).endswith("(other images than those that the run was trained on)")


def test_the_side_files_checksum_counts_while_the_file_is_its_own(tmp_path):
    count = 700
    path = write(Noise(count), tmp_path / "train.beton")
    with BetonFile(path) as data:
        before = data.content()
        assert before.whole is not None
        offset = int(data.offset[not_sampled(count)])
    in_place(path, offset, b"\x01")
    with BetonFile(path) as data:
        assert data.content() == (before.sampled, None)
    in_place(path, offset, b"\x01")
    os.utime(path, ns=(0, 0))  # older than the side file, and of its sampled bytes
    with BetonFile(path) as data:
        assert data.content() == before
        offset = int(data.offset[evenly(count)[7]])
    in_place(path, offset, b"\xff" * 3 * SIDE * SIDE)
    os.utime(path, ns=(0, 0))
    with BetonFile(path) as data:
        assert data.content().whole is None
        assert data.content().sampled != before.sampled


def test_a_copy_is_the_same_data(tmp_path):
    """Copied with its side file, or alone: a checksum that does not count makes none."""
    path = write(Noise(30), tmp_path / "train.beton")
    state = state_of(path)
    copy = tmp_path / "copy.beton"
    shutil.copyfile(path, copy)
    loader = Loader(copy, 8, seed=3)
    loader.load_state_dict(state)
    assert len(loader.notes) == 1
    shutil.copyfile(f"{path}.json", f"{copy}.json")
    loader = Loader(copy, 8, seed=3)
    loader.load_state_dict(state)
    assert loader.notes == []
    assert loader.state_dict() == state


def test_a_selection_of_other_images(tmp_path):
    path = write(Noise(40), tmp_path / "train.beton")
    chosen = np.arange(20)
    state = Loader(Subset(BetonFile(path), chosen), 4).state_dict()
    Loader(Subset(BetonFile(path), chosen), 4).load_state_dict(state)
    with pytest.raises(StateError, match="dataset was"):
        Loader(Subset(BetonFile(path), chosen + 1), 4).load_state_dict(state)
    write(Noise(40, seed=2), path)
    with pytest.raises(StateError, match="dataset was"):
        Loader(Subset(BetonFile(path), chosen), 4).load_state_dict(state)


@pytest.mark.parametrize("change", ["bytes", "size", "name", "exchanged"])
def test_a_folder_whose_files_are_replaced(tmp_path, folder, change):
    copy = tmp_path / "train"
    shutil.copytree(folder / "train", copy)
    state = Loader(copy, 4).state_dict()
    file = copy / "bee" / "3.jpg"
    content = file.read_bytes()
    os.utime(file)
    Loader(copy, 4).load_state_dict(state)
    if change == "bytes":
        half = len(content) // 2
        file.write_bytes(content[:half] + bytes([content[half] ^ 4]) + content[half + 1 :])
    elif change == "size":
        file.write_bytes(content + b"\0")
    elif change == "name":
        file.rename(file.with_name("33.jpg"))
    else:
        other = copy / "bee" / "4.jpg"
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    with pytest.raises(StateError, match="other images than those"):
        Loader(copy, 4).load_state_dict(state)


def test_a_state_of_an_older_version_goes_on_once_with_a_note(tmp_path, folder):
    path = write(Noise(30), tmp_path / "train.beton")
    for where in (path, folder / "train"):
        loader = Loader(where, 8, seed=3)
        new = loader.state_dict()
        old = {key: value for key, value in new.items() if key != "dataset_whole"}
        old["dataset"] = f"{loader.dataset.fingerprint():08x}"
        loader.load_state_dict(old)
        assert len(loader.notes) == 1
        assert "the run began with an older version" in loader.notes[0]
        assert loader.state_dict() == new
        old["dataset"] = "00000000"
        with pytest.raises(StateError, match="dataset was '00000000'"):
            loader.load_state_dict(old)


@pytest.mark.parametrize("value", [None, 7, [], {}, "", "0" * 7, "x" * 8, "0" * 32, True])
def test_a_state_with_anything_in_it(tmp_path, value):
    path = write(Noise(30), tmp_path / "train.beton")
    for name in ("dataset", "dataset_whole"):
        state = state_of(path) | {name: value}
        if name == "dataset_whole" and value is None:
            continue
        with pytest.raises(StateError, match=f"{name} was"):
            Loader(path, 8, seed=3).load_state_dict(state)


# ---------------------------------------------------------------- a run


def test_a_run_is_not_resumed_on_other_images(tmp_path, monkeypatch, capsys):
    """Stopped, all images replaced by others of the same size, resumed: refused in one line, and
    nothing of the run is changed. With the old images it continues.
    """
    paths = {name: tmp_path / f"{name}.beton" for name in ("train", "val")}
    for path in paths.values():
        write(Noise(96), path)
    small = [f"--{name}=16" for name in ("resolution.min_res", "resolution.max_res")]
    words = options(
        paths,
        tmp_path,
        "run",
        *small,
        "--validation.resolution=16",
        "--training.batch_size=32",
        "--training.epochs=1",
        "--lr.lr_peak_epoch=0",
        "--model.fixed_feature=8",
        "--data.num_workers=1",
    )
    before_step, steps = NonFiniteGuard.before_step, []

    def at_step(self):
        steps.append(0)
        if len(steps) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return before_step(self)

    monkeypatch.setattr(NonFiniteGuard, "before_step", at_step)
    monkeypatch.setattr(train_imagenet, "draw_chart", lambda *_: None)
    assert train_imagenet.main(words) == 75
    words.append("--training.resume=auto")
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write(Noise(96, seed=9), paths["train"])
    line = refused(train_imagenet.main, words, capsys)
    assert "train.beton: the state is of another run" in line
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write(Noise(96), paths["train"])
    assert train_imagenet.main(words) == 0


# ---------------------------------------------------------------- data verify


def test_the_writers_hashes_are_those_of_the_file(tmp_path, folder):
    path = tmp_path / "train.beton"
    source = ImageFolder(folder / "train")
    write_beton(source, path, max_resolution=64, write_mode="smart", smart_threshold=9000)
    written = json.loads(Path(f"{path}.json").read_text())["xxh3_128"]
    found = hash_file(path, written["first_page"])
    assert found == {"head": written["head"], "pages": written["pages"]}
    content = path.read_bytes()
    assert xxhash.xxh3_128_hexdigest(content[: written["first_page"]]) == found["head"]
    assert xxhash.xxh3_128_hexdigest(content[written["first_page"] :]) == found["pages"]


def test_verify_finds_every_flipped_bit(tmp_path, capsys):
    """In a header, in the table, in pixels, in what is empty; and in the side file."""
    path = write(Noise(9), tmp_path / "train.beton")
    side = Path(f"{path}.json")
    assert check_data.main(["verify", str(path)]) == 0
    assert "sound" in capsys.readouterr().out
    with BetonFile(path) as data:
        table = data.num_bytes - 24 * len(data)
        pixels = int(data.offset.max() + data.size.max())
        expected = data.manifest
    parts = [(0, 24), (24, 2500), (table, data.num_bytes), (int(data.offset[0]), pixels)]
    content = bytearray(path.read_bytes())
    rng = random.Random(11)
    with open(path, "r+b") as file:
        for number in range(scaled(80, 100_000)):
            at = rng.randrange(*rng.choice([*parts, (0, len(content))]))
            os.pwrite(file.fileno(), bytes([content[at] ^ 1 << rng.randrange(8)]), at)
            try:
                with BetonFile(path) as data:
                    verdict = check_data.compare_hashes(data)
            except BetonError:
                verdict = check_data.DIFFERS
            assert verdict == check_data.DIFFERS, (number, at)
            if number == 0:
                with contextlib.suppress(SystemExit):
                    assert check_data.main(["verify", str(path)]) == 1
                    assert "BROKEN" in capsys.readouterr().out
            os.pwrite(file.fileno(), bytes([content[at]]), at)
    text = side.read_bytes()
    for number in range(scaled(150, 100_000)):
        damaged = bytearray(text)
        damaged[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        side.write_bytes(damaged)
        try:
            with BetonFile(path) as data:
                assert data.manifest == expected, number
        except BetonError as error:
            assert "\n" not in str(error), number  # noqa: PT017 (most are refused, some are equal)
