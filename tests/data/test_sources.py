"""Image folders, digits, and the program that writes them."""

import io
import os
import subprocess
import sys
import tracemalloc
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from beton_files import photo
from PIL import Image

from matryoshka.data import (
    BetonError,
    BetonFile,
    Digits,
    ImageFolder,
    layout,
    open_dataset,
    sources,
)
from matryoshka.data.sources import decode_image, write_digits_folder
from matryoshka.environment import is_installed

ROOT = Path(__file__).resolve().parents[2]


def test_image_folder(tmp_path):
    root = tmp_path / "images"
    for place in (root / "ant", root / "bee", root / "zoo" / "x"):
        place.mkdir(parents=True)
        for i in range(3):
            photo(30 + i, 20).save(place / f"{i}.JPEG")
    photo(9, 9).save(root / "ant" / "last.png")
    (root / "ant" / ".hidden.jpg").touch()
    (root / "ant" / "notes.txt").touch()
    data = open_dataset(root)
    assert (data.classes, data.labels.tolist()) == (
        ["ant", "bee", "zoo"],
        [0, 0, 0, 0, 1, 1, 1, 2, 2, 2],
    )
    assert [data.name(i) for i in (0, 3, 7)] == ["ant/0.JPEG", "ant/last.png", "zoo/x/0.JPEG"]
    (batch,) = data.fetch(np.array([3, 8]))
    assert (batch.mode.tolist(), batch.width.tolist(), batch.height.tolist()) == (
        [1, 0],
        [9, 31],
        [9, 20],
    )
    assert batch.data.tobytes() == photo(9, 9).tobytes() + data.read(8)
    (root / "ant" / "0.JPEG").write_bytes(b"\xff\xd8broken")
    with pytest.raises(BetonError, match=r"ant/0\.JPEG"):
        data.fetch(np.array([0]))
    (root / "zoo" / "again").symlink_to(root / "zoo")
    assert len(ImageFolder(root)) == 10, "images in the folder"
    (tmp_path / "empty" / "class").mkdir(parents=True)
    for path, message in (
        ("no", "no such file"),
        ("empty", "no images"),
        ("empty/class", "no class folders"),
    ):
        with pytest.raises(BetonError, match=message):
            open_dataset(tmp_path / path)


def stored(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_samples_of_16_bits_are_scaled_to_8(monkeypatch):
    """All values against the formula in 64 bits, in strips of any height."""
    values = np.random.default_rng(0).permutation(65536).reshape(512, 128)
    expected = np.repeat((values.astype(np.int64) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    big = Image.frombytes("I;16B", (128, 512), values.astype(">u2").tobytes())
    native = Image.fromarray(values.astype(np.uint16))
    for pixels in (1, 128 * 100, 1 << 20):
        monkeypatch.setattr(sources, "_STRIP", pixels)
        for image, kind in ((native, "PNG"), (native, "TIFF"), (big, "TIFF"), (native, "PPM")):
            found = decode_image(stored(image, kind))
            assert found.grayscale
            assert (found.pixels.dtype, found.pixels.flags.c_contiguous) == (np.uint8, True)
            np.testing.assert_array_equal(found.pixels, expected)
        for value in (-1, 65536):
            wide = values.astype(np.int32)
            np.testing.assert_array_equal(
                decode_image(stored(Image.fromarray(wide), "TIFF")).pixels, expected
            )
            wide[400, 7] = value
            with pytest.raises(ValueError, match="32-bit pixels have no defined range"):
                decode_image(stored(Image.fromarray(wide), "TIFF"))


def test_a_small_file_of_many_samples_takes_little_memory():
    data = stored(Image.new("I;16", (3000, 2000)), "PNG")
    tracemalloc.start()
    try:
        pixels = decode_image(data).pixels
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(data) < 100_000, f"a bomb of {len(data)} bytes"
    # Pillow's own 2 bytes a pixel are not seen here
    limit = pixels.nbytes + 2 * pixels.size // 3 + (1 << 20)
    assert peak < limit, f"{peak} bytes of memory, expected less than {limit}"


def test_digits(tmp_path):
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val), np.bincount(val.labels).min()) == (1437, 360, 35)
    assert not {train.name(i) for i in range(1437)} & {val.name(i) for i in range(360)}
    assert decode_image(train.read(0)).pixels.shape == (32, 32, 3)
    write_digits_folder(tmp_path)
    assert ImageFolder(tmp_path / "train").labels.tolist() == sorted(train.labels)


def test_the_program(folder, tmp_path, capsys):
    spec = spec_from_file_location("write_imagenet", ROOT / "train" / "write_imagenet.py")
    module, path, images = module_from_spec(spec), tmp_path / "x.beton", tmp_path / "images"
    spec.loader.exec_module(module)
    copytree(folder / "train", images)
    (images / "bee" / "0.jpg").write_bytes(b"")
    arguments = [f"--cfg.write_path={path}", "--cfg.max_resolution=68", "--cfg.write_mode=jpg"]
    module.main(
        [*arguments, f"--cfg.data_dir={images}", "--cfg.split=train", "--cfg.jpeg_quality=90"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("19 images of 3 classes: 19 jpg, 0 raw, ")
    assert "  bee/0.jpg: the file is empty" in lines
    assert (lines[-1], len(BetonFile(path))) == (f"written: {path}", 19)
    for wrong in ("data_dir=/nowhere", "dataset=digits", "seed=1", "compress_probability=1"):
        with pytest.raises(SystemExit) as caught:
            module.main([*arguments, f"--cfg.{wrong}"])
        assert (caught.value.code, capsys.readouterr().err[:7]) == (2, "error: ")


def test_the_shell_script(folder, tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    environment |= {"IMAGENET_DIR": str(folder), "WRITE_DIR": str(tmp_path)}

    def run(*arguments, where=ROOT, without=None):
        env = {k: v for k, v in environment.items() if k != without}
        command = ["./write_imagenet.sh", *arguments]
        return subprocess.run(
            command, cwd=where, env=env, capture_output=True, text=True, check=False
        )

    done = run("24", "0.50", "90", where=ROOT / "train")
    assert done.returncode == 0, done.stderr
    train, val = (
        BetonFile(tmp_path / name) for name in ("train_24_0.50_90.ffcv", "val_24_uncompressed.ffcv")
    )
    assert (len(train), len(val), set(val.mode)) == (20, 9, {layout.RAW})
    assert train.manifest["options"]["compress_probability"] == 0.5
    for done in (run("24", "0.50"), run("24", "0.50", "90", without="WRITE_DIR")):
        assert (done.returncode, "usage:" in done.stderr) == (2, True)


def test_a_folder_is_no_installed_package(tmp_path, monkeypatch):
    (tmp_path / "folder_of_this_name" / "inner").mkdir(parents=True)
    (tmp_path / "package_of_this_name").mkdir()
    (tmp_path / "package_of_this_name" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("folder_of_this_name")
    assert not is_installed("nothing_of_this_name")
    assert is_installed("package_of_this_name")
