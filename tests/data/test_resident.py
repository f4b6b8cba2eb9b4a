"""Resident sets and pad-crops against the streaming loader and slow NumPy."""

import json

import numpy as np
import pytest
import torch
from beton_files import raw_beton
from hypothesis import given, settings
from hypothesis import strategies as st
from matryoshka.train import train_imagenet
from oracles import area_weights
from training_commands import options as program_options

from matryoshka.data import (
    BetonError,
    BetonFile,
    CenterCrop,
    Loader,
    PadCrop,
    RandomResizedCrop,
    ResidentLoader,
)
from matryoshka.data.augment import resized_crops


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


@settings(max_examples=60, deadline=None)
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


def test_training_on_a_resident_set(digits, tmp_path):
    """The same order as with the streaming loader, and a loss like its: crops are decoded a little
    differently.
    """
    lines = {}
    for resident in (0, 1):
        more = ["--training.epochs=1", f"--data.resident={resident}", "--data.order=quasi_random"]
        assert train_imagenet.main(program_options(digits, tmp_path, f"run{resident}", *more)) == 0
        lines[resident] = json.loads((tmp_path / f"run{resident}" / "log").read_text())
    assert lines[1]["train_loss"] == pytest.approx(lines[0]["train_loss"], rel=0.1), (
        "train_loss of the resident and the streaming run"
    )
    assert lines[1]["data_wait"] < 0.5, f"waited {lines[1]['data_wait']} for data"
