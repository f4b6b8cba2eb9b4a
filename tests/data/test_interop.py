"""The real FFCV: its files in our reader, ours in its loader. Needs `make interop`."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ffcv_child as child
import numpy as np
import pytest
from beton_files import Files, build, encoded, photo
from ffcv_child import FILES, SIDE, N, picture, values
from PIL import Image

from matryoshka.data import BetonFile, CenterCrop, Loader, layout, write_beton
from matryoshka.environment import is_installed

pytestmark = pytest.mark.skipif(
    not is_installed("ffcv"), reason="FFCV is not installed: make interop"
)
SECONDS = 300  # FFCV compiles each pipeline anew, and takes long to import; a hang lasts longer


def python(*arguments, status=0):
    """Run Python in a process group of its own; its stdout, or for another status its stderr."""
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # also FFCV's workers
            pytest.fail(
                f"{arguments} did not end in {SECONDS} s: {process.communicate()[1][-3000:]}"
            )
    assert process.returncode == status, err[-3000:]
    return err if status else out


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder of files by FFCV's writer, see ffcv_child.FILES."""
    folder = tmp_path_factory.mktemp("theirs")
    python(child.__file__, "write", folder)
    return folder


def pillow(stored):
    return np.asarray(Image.open(io.BytesIO(stored.tobytes())).convert("RGB")).astype(int)


# ---------------------------------------------------------------- their writer, our reader


@pytest.mark.parametrize("name", FILES)
def test_our_reader_takes_their_files(theirs, name):
    names, options = FILES[name]
    reduced = name == "reduced"
    with BetonFile(theirs / name) as data:
        assert [field for field, _ in data.fields] == list(names)
        assert data.labels.tolist() == [values(i)["label"] for i in range(N)]
        (samples,) = data.fetch(np.arange(N))
        jpg = {"jpg": N, "raw": 0, "smart": N if "smart_threshold" in options else 0}.get(
            options["write_mode"]
        )
        assert jpg is None or (samples.mode == layout.JPG).sum() == jpg, "images stored as JPEG"
        for i in range(N):
            stored = samples.data[samples.offset[i] :][: samples.size[i]]
            assert (samples.width[i], samples.height[i]) == ((101, 67) if reduced else (SIDE, SIDE))
            if samples.mode[i] == layout.JPG:
                assert np.abs(pillow(stored) - picture(i)).mean() < 4, (
                    "mean difference to the source picture"
                )
            elif not reduced:
                assert stored.tobytes() == picture(i).tobytes()


@pytest.mark.parametrize(
    "name", ["jpg", "raw", "proportion", "label_first_jpg", "fields", "fields_jpg"]
)
def test_our_loader_takes_their_files(theirs, name):
    with BetonFile(theirs / name) as data:
        (samples,) = data.fetch(np.arange(N))
        (batch,) = Loader(data, N, order="sequential", crop=CenterCrop(SIDE, 1.0), num_workers=2)
        assert batch.labels.tolist() == data.labels.tolist()
        for i in range(N):
            stored = samples.data[samples.offset[i] :][: samples.size[i]]
            want = pillow(stored) if samples.mode[i] == layout.JPG else picture(i).astype(int)
            assert np.abs(batch.images[i].numpy() - want).max() <= (
                samples.mode[i] == layout.JPG
            ), f"sample {i}: pixels differ"


@pytest.mark.parametrize("name", ["fields", "fields_jpg"])
def test_our_reader_returns_their_other_fields(theirs, name):
    indices = np.array([5, 0, N - 1])
    with BetonFile(theirs / name) as data:
        wanted = [values(i) for i in indices]
        for field in ("weight", "label", "array", "tensor"):
            found = data.field(field, indices)
            want = np.array([sample[field] for sample in wanted])
            assert (found.dtype.str, found.tolist()) == (want.dtype.str, want.tolist())
        assert [bytes(blob) for blob in data.field("blob", indices)] == [
            bytes(sample["blob"]) for sample in wanted
        ]
        assert data.field("about", indices) == [sample["about"] for sample in wanted]


def test_both_writers_reduce_to_the_same_pixels(theirs, tmp_path):
    source = Files(
        [(f"{i}.png", encoded(Image.fromarray(picture(i, 301, 200))), 0) for i in range(N)]
    )
    write_beton(source, tmp_path / "x", max_resolution=101, write_mode="raw")
    with BetonFile(theirs / "reduced") as a, BetonFile(tmp_path / "x") as b:
        assert (a.width.tolist(), a.height.tolist()) == (b.width.tolist(), b.height.tolist())
        for i in range(N):
            one, other = (d.fetch(np.arange(N))[0] for d in (a, b))
            one, other = (s.data[s.offset[i] :][: s.size[i]].astype(int) for s in (one, other))
            assert np.abs(one - other).max() <= 1, "pixels differ by more than one level"


# ---------------------------------------------------------------- our writer, their loader


def restart_markers(stored):
    """How many restart markers a JPEG stream has."""
    data = stored.tobytes()
    return sum(data.count(bytes((0xFF, 0xD0 + k))) for k in range(8))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """(the folder of our files, FFCV's arrays by file name)."""
    folder = tmp_path_factory.mktemp("ours")
    files = [
        (f"{i}.png", encoded(Image.fromarray(picture(i))), values(i)["label"]) for i in range(N)
    ]
    source = Files(files, classes="abcde")
    modes = {
        "jpg": {"write_mode": "jpg", "jpeg_quality": 95},
        "raw": {"write_mode": "raw"},
        "proportion": {"write_mode": "proportion", "compress_probability": 0.5},
        "smart": {"write_mode": "smart", "smart_threshold": 1000},
    }
    for name, options in modes.items():
        write_beton(source, folder / name, max_resolution=SIDE, chunk_size=5, **options)
    photos = [
        (f"{i}.jpg", encoded(Image.fromarray(picture(i)), "JPEG"), values(i)["label"])
        for i in range(N)
    ]
    kept = {"write_mode": "jpg", "transcode": "fit"}
    write_beton(Files(photos, classes="abcde"), folder / "transcoded", max_resolution=SIDE, **kept)
    # the same coefficients with and without markers, by Pillow; and the label in front
    for name, markers in (
        ("plain", {}),
        ("tiles", {"restart_marker_blocks": 4}),
        ("rows", {"restart_marker_rows": 1}),
    ):
        samples = []
        for i in range(N):
            stored = encoded(Image.fromarray(picture(i)), "JPEG", quality=90, **markers)
            assert (restart_markers(np.frombuffer(stored, np.uint8)) > 0) == bool(markers), (
                "restart markers"
            )
            samples.append((values(i)["label"], 0, SIDE, SIDE, stored))
        build(folder / name, [(1, b"label"), (2, b"image")], "<qBHHQ3x", samples)
    names = (*modes, "transcoded", "plain", "tiles", "rows")
    python(child.__file__, "load", folder, *(folder / name for name in names))
    return folder, {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}


@pytest.mark.parametrize(
    "name", ["jpg", "raw", "proportion", "smart", "transcoded", "plain", "tiles", "rows"]
)
def test_their_loader_takes_our_files(ours, name):
    folder, arrays = ours
    with BetonFile(folder / name) as data:
        (samples,) = data.fetch(np.arange(N))
        images, labels = arrays[name]["images"], arrays[name]["labels"]
        assert labels.tolist() == [values(i)["label"] for i in range(N)] == data.labels.tolist()
        if name == "proportion":
            assert set(samples.mode.tolist()) == {layout.JPG, layout.RAW}
        for i in range(N):
            stored = samples.data[samples.offset[i] :][: samples.size[i]]
            if samples.mode[i] == layout.RAW:
                assert (images[i] == picture(i)).all()
            else:
                # FFCV asks libjpeg-turbo for its fast, coarse DCT, which is a level darker on
                # average
                difference = np.abs(images[i] - pillow(stored))
                assert (difference.mean() < 1.5, difference.max() < 16) == (True, True), (
                    f"mean {difference.mean()}, max {difference.max()}"
                )


def test_restart_markers_change_nothing_for_their_decoder(ours):
    _, arrays = ours
    for name in ("tiles", "rows"):
        assert (arrays[name]["images"] == arrays["plain"]["images"]).all()


@pytest.mark.parametrize("name", ["jpg", "transcoded"])
def test_our_writer_places_markers_that_they_read(ours, name):
    folder, _ = ours  # test_their_loader_takes_our_files compares the pixels
    with BetonFile(folder / name) as data:
        (samples,) = data.fetch(np.arange(N))
        for i in range(N):
            assert restart_markers(samples.data[samples.offset[i] :][: samples.size[i]]) > 0, (
                f"sample {i} has no restart marker"
            )


# ---------------------------------------------------------------- writer=ffcv, loader=ffcv


def test_the_loader_behind_our_interface(ours):
    folder, _ = ours
    found = json.loads(python(child.__file__, "loader", folder / "raw"))
    everything = list(range(N))
    assert [sorted(epoch) for epoch in found["epochs"]] == [everything, everything]
    assert found["epochs"][0] != found["epochs"][1]
    assert found["again"] == found["epochs"][0]
    assert found["shapes"] == [[5, 32, 32, 3], [5, 32, 32, 3], [2, 32, 32, 3]]
    assert found["lengths"] == [3, 3]
    assert found["ranks"] == [everything[::2], everything[1::2]]
    assert found["first"] == picture(2)[:2, :2].tolist()
    assert found["wait"] > 0, "the wait for data was not measured"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """{train,val}/{a,b}/*.jpg, 16 and 8 images."""
    root = tmp_path_factory.mktemp("photos")
    for split, n in (("train", 16), ("val", 8)):
        for i in range(n):
            path = root / split / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(60 + i, 50, seed=i).save(path, quality=95)
    return root


def test_the_programs_write_and_train_with_ffcv(photos, tmp_path):
    for split in ("train", "val"):
        said = python(
            "-m",
            "matryoshka.train.write_imagenet",
            f"--cfg.data_dir={photos / split}",
            "--cfg.writer=ffcv",
            f"--cfg.write_path={tmp_path / split}",
            "--cfg.max_resolution=64",
            "--cfg.write_mode=jpg",
            "--cfg.num_workers=2",
            "--cfg.chunk_size=3",
            "--cfg.names=1",
        )
        assert "2 classes" in said
        with BetonFile(tmp_path / split) as data:
            assert (data.classes, data.width.max()) == (["a", "b"], 64)
            names = data.manifest["names"]
            assert data.labels.tolist() == ["ab".index(name[0]) for name in names]
            assert len(names) == {"train": 16, "val": 8}[split], f"{len(names)} names in {split}"
    said = python(
        "-m",
        "matryoshka.train.train_imagenet",
        f"--data.train_dataset={tmp_path / 'train'}",
        "--data.loader=ffcv",
        f"--data.val_dataset={tmp_path / 'val'}",
        "--data.num_workers=1",
        "--training.epochs=1",
        "--training.batch_size=8",
        "--validation.batch_size=5",
        "--validation.resolution=32",
        "--resolution.min_res=32",
        "--resolution.max_res=32",
        "--model.arch=resnet18",
        "--model.mrl=1",
        f"--logging.folder={tmp_path}",
        "--logging.run_id=run",
        "--training.device=cpu",
    )
    assert "epoch   0" in said
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_an_image_that_their_writer_cannot_take(photos, tmp_path):
    broken = photos / "train" / "b" / "broken.jpg"
    broken.write_bytes(b"no image")
    try:
        said = python(
            "-m",
            "matryoshka.train.write_imagenet",
            f"--cfg.data_dir={photos / 'train'}",
            "--cfg.writer=ffcv",
            f"--cfg.write_path={tmp_path / 'x'}",
            "--cfg.max_resolution=64",
            "--cfg.num_workers=2",
            status=2,
        )
    finally:
        broken.unlink()
    assert "b/broken.jpg" in said
    assert "writer=native" in said
    assert list(Path(tmp_path).iterdir()) == []
