"""Small real data for all tests: scikit-learn's digits as an image folder and as .beton files."""

import contextlib
import os
import shutil

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", ".hypothesis")

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from matryoshka.data import Digits, write_beton

settings.register_profile("shared machine", deadline=None)  # time is for bench/
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def photo():
    """A smooth 'photo' with detail, uint8 [H, W, 3], of any size."""

    def make(width: int, height: int, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        small = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.integers(-12, 13, (height, width, 3))
        return np.clip(np.asarray(image).astype(int) + noise, 0, 255).astype(np.uint8)

    return make


@pytest.fixture(scope="session")
def folder(tmp_path_factory, photo):
    """An image folder {train,val}/{ant,bee,cat}/*.jpg of photos of different sizes: 20 and 9
    images.
    """
    root = tmp_path_factory.mktemp("photos")
    for split, counts in (("train", (8, 7, 5)), ("val", (3, 3, 3))):
        for label, (name, count) in enumerate(zip(("ant", "bee", "cat"), counts, strict=True)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = photo(48 + 5 * i, 70 - 3 * i, seed=100 * label + i)
                Image.fromarray(image).save(root / split / name / f"{i}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """{split: path} of two .beton files with 10 classes: 400 training and 100 validation digits, 32
    px.
    """
    root = tmp_path_factory.mktemp("digits")
    for split, n in (("train", 400), ("val", 100)):
        write_beton(
            Digits(split),
            root / f"{split}.beton",
            max_resolution=64,
            write_mode="jpg",
            jpeg_quality=95,
            subset=n,
        )
    return {split: root / f"{split}.beton" for split in ("train", "val")}


@pytest.fixture(scope="session")
def small_nested(digits, tmp_path_factory):
    """A folder in which train_cifar10.py has trained two nested transformers on digits."""
    from matryoshka.train import train_cifar10

    root = tmp_path_factory.mktemp("small")
    data = f"{digits['train']},{digits['val']}"
    options = "--mrl_flag --nested_proj_mrl --mrl_dims 8,16 --patch 8 --lr 0.01 --bs 100 --noaug"
    with contextlib.chdir(root):
        words = [*options.split(), "--n_epochs", "1", "--data", data, "--nowandb", "--notb"]
        assert train_cifar10.main(words) == 0
    return root


@pytest.fixture(scope="session")
def imagenet_root(tmp_path_factory, photo):
    """A small tree of ImageNet's test sets."""
    from imagenet_small import write_tree

    root = tmp_path_factory.mktemp("imagenet")
    write_tree(root, photo)
    return root


@pytest.fixture(scope="session")
def imagenet_checkpoint(tmp_path_factory):
    """A model of ImageNet's 1000 classes."""
    from imagenet_small import write_checkpoint

    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def chromium():
    """Headless Chromium. Per module: Playwright's event loop must not run beside other tests'."""
    sync = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (requirements-dev.txt)"
    )
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    program = next(filter(None, found), None)
    if program is None:
        pytest.skip("no Chromium: sh system-deps.sh browser")
    with sync.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
