"""Resident sets and pad-crops against the streaming loader and slow NumPy."""

import json
import os

import numpy as np
import pytest
import torch
from beton_files import raw_beton
from hypothesis import given, settings
from hypothesis import strategies as st
from matryoshka.train import train_imagenet
from oracles import area_weights
from training_commands import options as program_options

from matryoshka.config import ConfigError
from matryoshka.data import (
    BetonError,
    BetonFile,
    CenterCrop,
    ImageFolder,
    Loader,
    PadCrop,
    RandomResizedCrop,
    ResidentLoader,
    Subset,
)
from matryoshka.data.augment import resized_crops
from matryoshka.data.resident import suits_residence
from matryoshka.distributed import World
from matryoshka.environment import free_memory
from matryoshka.training import supervised
from matryoshka.training.loaders import is_resident, make_loaders
from matryoshka.training.options import parser as options_parser


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A .beton of 90 raw images of 37 x 29 pixels: noise, the hardest case for a resampler."""
    return raw_beton(tmp_path_factory.mktemp("noise") / "noise.beton", [(37, 29)] * 90)


CROPS = [
    RandomResizedCrop(16),
    RandomResizedCrop(64),
    RandomResizedCrop(24, scale=(0.3, 1), flip=1),
    CenterCrop(13),
    CenterCrop(29, 1.0),
    CenterCrop(40),
    PadCrop(37, 5),
    PadCrop(20),
]


@pytest.mark.parametrize("image", CROPS, ids=str)
@pytest.mark.parametrize("order", ["random", "sequential"])
def test_the_same_batches_as_the_streaming_loader(noise, image, order):
    options = {"order": order, "crop": image, "seed": 9, "num_workers": 2}
    streaming, resident = Loader(noise, 16, **options), ResidentLoader(noise, 16, **options)
    for _ in range(2):
        for a, b in zip(streaming, resident, strict=True):
            assert b.images.dtype == torch.uint8
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.labels, b.labels)
            difference = (a.images.int() - b.images.int()).abs()
            assert difference.max() <= 1, f"pixels differ by {difference.max()}"
            assert difference.float().mean() < 0.05, f"mean difference {difference.float().mean()}"


@pytest.mark.parametrize("in_memory", [True, False])
def test_ranks_and_bounded_reading(noise, in_memory):
    options = {"order": "random", "crop": PadCrop(32), "seed": 1, "drop_last": True}
    whole = list(Loader(noise, 16, **options))
    ranks = [
        list(ResidentLoader(noise, 16, rank=r, world=3, in_memory=in_memory, **options))
        for r in range(3)
    ]
    for k, batch in enumerate(whole):
        images, labels, index = (torch.cat([rank[k][j] for rank in ranks]) for j in range(3))
        assert (images.int() - batch.images.int()).abs().max() <= 1, (
            "pixels differ by more than one level"
        )
        assert torch.equal(labels, batch.labels)
        assert torch.equal(index, batch.index)


@settings(max_examples=60)
@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    size=st.integers(1, 40),
    seed=st.integers(0, 1000),
    flip=st.booleans(),
)
def test_resized_crops_against_weights_in_float64(height, width, size, seed, flip):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    w, h = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
    x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))

    def weights(n):
        if size <= n:
            return area_weights(n, size)
        centre = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        return np.maximum(1 - np.abs(np.arange(n)[None] - centre[:, None]), 0)

    expected = np.einsum(
        "ph,hwc,qw->pqc", weights(h), image[y : y + h, x : x + w].astype(float), weights(w)
    )
    if flip:
        expected = expected[:, ::-1]
    crops = torch.tensor([[x, y, w, h, flip]])
    result = resized_crops(torch.from_numpy(image)[None], crops, size)[0].numpy()
    assert np.abs(result - expected).max() < 0.5 + 1e-3, (
        f"largest difference {np.abs(result - expected).max()}"
    )


def test_pad_crops_are_windows_of_the_padded_image(noise):
    """One image at a time: some window of it, every place and both directions are drawn, black
    outside.
    """
    data = BetonFile(noise)
    image = PadCrop(8, 2)
    stored = {i: data.fetch(np.array([i]))[0] for i in range(90)}
    places = set()
    whole = Loader(noise, 90, order="sequential", crop=CenterCrop(8, 1.0))
    assert len(stored) == len(whole.dataset), "images of the whole set"
    loader = Loader(noise, 90, order="sequential", crop=image, seed=2)
    full = np.stack([np.asarray(resize(data, i, 8)) for i in range(90)])
    for epoch in range(12):
        batch = next(iter(loader))
        windows = image.windows(np.arange(90), 2, epoch)
        for i, (x, y, w, h, flip) in enumerate(windows.tolist()):
            assert (w, h) == (8, 8)
            padded = np.pad(full[i], ((2, 2), (2, 2), (0, 0)))
            expected = padded[y : y + 8, x : x + 8]
            assert np.array_equal(batch.images[i].numpy(), expected[:, ::-1] if flip else expected)
            places.add((x, y, flip))
    assert places == {(x, y, f) for x in range(5) for y in range(5) for f in (0, 1)}


def resize(data, index, size):
    from matryoshka.data import _native

    (sample,) = data.fetch(np.array([index]))
    start, end = int(sample.offset[0]), int(sample.offset[0] + sample.size[0])
    pixels = sample.data[start:end].reshape(int(sample.height[0]), int(sample.width[0]), 3)
    return _native.resize(np.ascontiguousarray(pixels), size, size)


def test_pad_crop_sizes_draw_uniformly():
    for size, padding in ((32, 4), (96, 12), (7, 7), (5, 0), (1, 1)):
        windows = PadCrop(size, padding).windows(np.arange(4000), 0, 0)
        assert (windows[:, 2:4] == size).all()
        for column in (0, 1):
            counts = np.bincount(windows[:, column], minlength=2 * padding + 1)
            assert len(counts) == 2 * padding + 1, f"{len(counts)} offsets"
            assert counts.min() > 0.6 * 4000 / len(counts), f"offsets are not uniform: {counts}"
        assert abs(windows[:, 4].mean() - 0.5) < 0.04, (
            f"{windows[:, 4].mean()} of the windows are flipped"
        )
    for bad in (
        {"size": 0},
        {"size": 4, "padding": 5},
        {"size": 4, "padding": -1},
        {"size": 4, "flip": 2},
    ):
        with pytest.raises(ValueError, match="expected"):
            PadCrop(**bad)


def test_images_of_several_sizes_are_refused(tmp_path, folder):
    path = raw_beton(tmp_path / "mixed.beton", [(20, 20)] * 5 + [(20, 21)])
    with pytest.raises(
        BetonError,
        match=r"mixed\.beton: sample 5 has 20x21 pixels, others have 20x20.*data\.resident",
    ):
        ResidentLoader(path, 2)
    with pytest.raises(BetonError, match=r"ant/1\.jpg has"):
        ResidentLoader(folder / "train", 2)


def test_a_set_that_does_not_fit(noise, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(
        BetonError, match=r"noise\.beton: its 90 images of 37x29 need 0\.0 GiB on cpu"
    ):
        ResidentLoader(noise, 4)


@pytest.mark.parametrize("crop", [CenterCrop(29, 1.0), CenterCrop(13), CenterCrop(32, 0.9)])
def test_evaluation_crops_are_exact(noise, crop):
    """Unless they are larger than the images: those are kept whole."""
    options = {"order": "sequential", "num_workers": 2, "crop": crop}
    streaming, resident = Loader(noise, 16, **options), ResidentLoader(noise, 16, **options)
    assert resident._images.shape[1:3] == (crop.size, crop.size)
    for a, b in zip(streaming, resident, strict=True):
        assert torch.equal(a.images, b.images)
    for other in (CenterCrop(20), RandomResizedCrop(20), CenterCrop(40)):
        streaming.crop = resident.crop = other
        for a, b in zip(streaming, resident, strict=True):
            difference = (a.images.int() - b.images.int()).abs().max()
            assert difference <= (0 if other == CenterCrop(20) else 1)


CPU = torch.device("cpu")


def test_which_sets_suit_residence(tmp_path, noise, folder, digits, monkeypatch):
    train = RandomResizedCrop(224)
    assert suits_residence(BetonFile(noise), CPU, train)
    assert suits_residence(Subset(BetonFile(noise), np.array([3, 5])), CPU, CenterCrop(32))
    assert not suits_residence(BetonFile(noise), CPU, CenterCrop(33))  # 33 x 33 > 37 x 29
    assert not suits_residence(ImageFolder(folder / "train"), CPU, train)
    for sizes, expected in (
        ([(96, 96)] * 3, True),
        ([(97, 96)] * 3, False),
        ([(20, 20)] * 99 + [(20, 21)], False),
    ):
        path = raw_beton(tmp_path / "sizes.beton", sizes)
        assert suits_residence(BetonFile(path), CPU, train) is expected
    need = 3 * 90 * 37 * 29
    for free, copies, expected in (
        (4 * need, 1, True),
        (4 * need - 4, 1, False),
        (8 * need, 2, True),
        (8 * need - 8, 2, False),
        (None, 1, False),
    ):
        monkeypatch.setattr("matryoshka.data.resident.free_memory", lambda free=free: free)
        assert suits_residence(BetonFile(noise), CPU, train, copies=copies) is expected


def test_free_memory_is_a_part_of_the_machines():
    free = free_memory()
    assert free is not None
    assert 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("option", "expected"),
    [("auto", True), ("1", True), ("true", True), ("0", False), ("false", False)],
)
def test_the_option_selects_the_loaders(option, expected, digits, tmp_path):
    cfg = options_parser().parse_args(
        program_options(digits, tmp_path, "run", f"--data.resident={option}")
    )
    for loader in make_loaders(cfg, World(CPU), 50):
        assert is_resident(loader) is expected


def test_yaml_words_of_the_option(tmp_path):
    for text, expected in (("true", "1"), ("1", "1"), ("false", "0"), ("auto", "auto")):
        file = tmp_path / "a.yaml"
        file.write_text(f"data: {{resident: {text}}}\n")
        assert options_parser().parse_args(["-C", str(file)]).data.resident == expected
    with pytest.raises(ConfigError, match="expected one of auto, 1, 0"):
        options_parser().parse_args(["--data.resident=maybe"])


def test_auto_streams_what_does_not_suit(folder, digits, tmp_path, monkeypatch):
    def loaders(data, *more, **options):
        argv = program_options(data, tmp_path, "run", *more)
        return make_loaders(options_parser().parse_args(argv), World(CPU), 9, **options)

    photos = {split: folder / split for split in ("train", "val")}
    assert not any(map(is_resident, loaders(photos)))
    assert not any(map(is_resident, loaders(digits, "--data.in_memory=0")))
    # 32 px are enlarged to 64: those of a Loader are exact
    train, val = loaders(digits, "--validation.resolution=64")
    assert (is_resident(train), is_resident(val)) == (True, False)
    # as it was decided when the run started
    assert not is_resident(loaders(digits, resident=False)[0])
    assert is_resident(loaders(digits, resident=True)[0])
    # opened sets, such as the parts of one
    data = BetonFile(digits["train"])
    parts = Subset(data, np.arange(0, 400, 2)), Subset(data, np.arange(1, 400, 2))
    train, val = loaders(digits, datasets=parts)
    assert is_resident(train)
    assert len(next(iter(val)).labels) == 200
    # images that were not looked at differ
    monkeypatch.setattr("matryoshka.data.resident._LOOKED_AT", 1)
    first = {split: folder / split for split in ("train", "val")}
    assert not any(map(is_resident, loaders(first)))


class Reached(Exception):
    pass


def test_training_on_a_resident_set(digits, tmp_path, monkeypatch):
    """The same order as with the streaming loader, and a loss like its: crops are decoded a little
    differently. A resumed run keeps what `auto` decided: free memory may change, pixels must not.
    """
    lines, argv = {}, []
    for resident, option in enumerate(("0", "auto")):
        more = ["--training.epochs=1", f"--data.resident={option}", "--data.order=quasi_random"]
        argv = program_options(digits, tmp_path, f"run{resident}", *more)
        assert train_imagenet.main(argv) == 0
        lines[resident] = json.loads((tmp_path / f"run{resident}" / "log").read_text())
    assert lines[1]["train_loss"] == pytest.approx(lines[0]["train_loss"], rel=0.1), (
        "train_loss of the resident and the streaming run"
    )
    assert lines[1]["data_wait"] < 0.5, f"waited {lines[1]['data_wait']} for data"

    def reached(*_, resident=None, **__):
        raise Reached(resident)

    monkeypatch.setattr(supervised, "make_loaders", reached)
    (tmp_path / "run1" / "model.safetensors").unlink()  # as if it had been killed before its end
    with pytest.raises(Reached, match="True"):
        train_imagenet.main([*argv, "--training.resume=auto"])
