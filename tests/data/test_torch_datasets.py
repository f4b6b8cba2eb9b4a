"""The adapters for torch's DataLoader: pixels, order, workers that are forked or spawned."""

import pickle

import numpy as np
import pytest
import torch
from beton_files import raw_beton
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from matryoshka.data import (
    BetonError,
    BetonFile,
    CenterCrop,
    ImageFolder,
    IterableDataset,
    Loader,
    RandomResizedCrop,
    TorchDataset,
    write_beton,
)

TWO = [RandomResizedCrop(16), RandomResizedCrop(12)]


@pytest.fixture(scope="module")
def jpg(tmp_path_factory, folder):
    path = tmp_path_factory.mktemp("torch") / "jpg.beton"
    write_beton(ImageFolder(folder / "train"), path, max_resolution=500, write_mode="jpg")
    return path


def equal(a, b):
    """Whether nested lists and tuples of tensors are equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ---------------------------------------------------------------- image by image


def test_images_of_a_folder_are_those_of_pillow(folder):
    data = TorchDataset(folder / "train")
    files = sorted((folder / "train").rglob("*.jpg"))
    assert len(data) == len(files) == 20
    assert data.classes == ["ant", "bee", "cat"]
    assert data.targets == [0] * 8 + [1] * 7 + [2] * 5
    pil = TorchDataset(folder / "train", pil=True)
    for i, file in enumerate(files):
        expected = np.asarray(Image.open(file).convert("RGB"))
        image, label = data[i]
        assert image.dtype == torch.uint8
        assert image.is_contiguous()
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
        assert label == data.targets[i]
        assert np.array_equal(np.asarray(pil[i][0]), expected)


def test_images_of_a_beton(jpg, tmp_path):
    data, stored = TorchDataset(jpg), BetonFile(jpg)
    for i in (0, 7, 19):
        (sample,) = stored.fetch(np.array([i]))
        start = int(sample.offset[0])
        file = tmp_path / "stored.jpg"
        file.write_bytes(sample.data[start : start + int(sample.size[0])].tobytes())
        expected = np.asarray(Image.open(file).convert("RGB"))
        assert np.array_equal(data[i][0].permute(1, 2, 0).numpy(), expected)
    raw = raw_beton(tmp_path / "raw.beton", [(9, 7)] * 3)
    (whole,) = Loader(raw, 3, order="sequential", crop=CenterCrop(7, 1.0))
    for i in range(3):
        image, label = TorchDataset(raw)[i]
        assert image.shape == (3, 7, 9)
        assert np.array_equal(image[:, :, 1:8].permute(1, 2, 0).numpy(), whole.images[i].numpy())
        assert label == whole.labels[i]
    for bad in (3, -1):
        with pytest.raises(IndexError, match="expected 0 to 2"):
            TorchDataset(raw)[bad]


def test_a_broken_image_is_named(jpg, tmp_path):
    stored = BetonFile(jpg)
    content = bytearray(jpg.read_bytes())
    start, size = int(stored.offset[4]), int(stored.size[4])
    content[start : start + size] = bytes(size)
    damaged = tmp_path / "damaged.beton"
    damaged.write_bytes(content)
    data = TorchDataset(damaged)
    assert data[3][0].dtype == torch.uint8
    with pytest.raises(BetonError, match=r"damaged\.beton: sample 4: not a JPEG"):
        data[4]


@pytest.mark.parametrize(("start", "workers"), [(None, 0), ("fork", 2), ("spawn", 1)])
def test_a_dataloader_of_images(jpg, start, workers):
    data = TorchDataset(jpg, transform=v2.Resize((20, 20)))
    expected = [data[i] for i in range(20)]
    loader = DataLoader(data, 8, num_workers=workers, multiprocessing_context=start)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    assert equal(
        torch.cat([images for images, _ in batches]), torch.stack([i for i, _ in expected])
    )
    assert torch.cat([labels for _, labels in batches]).tolist() == data.targets
    again = pickle.loads(pickle.dumps(data))
    assert equal(again[5], data[5])


# ---------------------------------------------------------------- batches of the loader


def expected_batches(path, crop, epoch, **options):
    """From the loader itself."""
    loader = Loader(path, 6, crop=crop, order="random", **options)
    loader.epoch = epoch
    found = []
    for batch in loader:
        if isinstance(crop, list):
            images = [view.permute(0, 3, 1, 2) for view in batch.images]
        else:
            images = batch.images.permute(0, 3, 1, 2)
        found.append([images, batch.labels])
    return found


@pytest.mark.parametrize("crop", [RandomResizedCrop(16), TWO], ids=["one", "two"])
@pytest.mark.parametrize(("start", "workers"), [(None, 0), ("fork", 1), ("fork", 2)])
def test_batches_do_not_depend_on_workers(jpg, crop, start, workers):
    for world in (1, 2):
        for rank in range(world):
            place = {"rank": rank, "world": world, "seed": 3}
            data = IterableDataset(jpg, 6, crop=crop, **place)
            loader = DataLoader(
                data, batch_size=None, num_workers=workers, multiprocessing_context=start
            )
            assert len(loader) == 4
            for epoch in (0, 5):
                data.set_epoch(epoch)
                assert equal(list(loader), expected_batches(jpg, crop, epoch, **place))
            if not workers:  # then it counts
                assert equal(list(loader), expected_batches(jpg, crop, 6, **place))


@pytest.mark.parametrize("crop", [RandomResizedCrop(16), TWO], ids=["one", "two"])
def test_samples(jpg, crop):
    """A DataLoader that makes the same batches again from the samples."""
    data = IterableDataset(jpg, 6, crop=crop, samples=True)
    assert len(data) == 20
    image, label = next(iter(data))
    assert (image if crop is not TWO else image[0]).shape == (3, 16, 16)
    assert isinstance(label, int)
    data.set_epoch(2)
    loader = DataLoader(data, batch_size=6, num_workers=2, multiprocessing_context="fork")
    assert equal(list(loader), expected_batches(jpg, crop, 2))


def test_a_spawned_worker_that_persists_sees_the_epoch(jpg):
    crop = RandomResizedCrop(16)
    data = IterableDataset(jpg, 6, crop=crop, threads=1)
    loader = DataLoader(
        data,
        batch_size=None,
        num_workers=1,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
    first, second = list(loader), list(loader)  # without a number: each time another one
    assert not equal(first, second)
    for epoch in (4, 1):
        data.set_epoch(epoch)
        assert equal(list(loader), expected_batches(jpg, crop, epoch))


def test_every_sample_once_without_an_epoch(jpg):
    data = IterableDataset(jpg, 6, crop=CenterCrop(8), transform=v2.ToDtype(torch.float32))
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    torch.manual_seed(7)
    runs = [list(loader), list(loader)]
    torch.manual_seed(7)
    assert equal(list(loader), runs[0])
    assert not equal(runs[0], runs[1])
    for run in runs:
        assert sum(len(labels) for _, labels in run) == 20
        assert len({image.numpy().tobytes() for images, _ in run for image in images}) == 20
        assert run[0][0].dtype == torch.float32
    ranks = IterableDataset(jpg, 6, crop=CenterCrop(8), rank=1, world=2)
    loader = DataLoader(ranks, batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match=r"jpg\.beton: set_epoch was not called"):
        list(loader)


def test_arguments(jpg, tmp_path):
    with pytest.raises(BetonError, match=r"nothing\.beton"):
        TorchDataset(tmp_path / "nothing.beton")
    with pytest.raises(BetonError, match=r"nothing\.beton"):
        IterableDataset(tmp_path / "nothing.beton", 4)
    with pytest.raises(ValueError, match="rank=2"):
        IterableDataset(jpg, 4, rank=2, world=2)
    with pytest.raises(BetonError, match="fewer than one global batch of 21"):
        IterableDataset(jpg, 21, drop_last=True)
    # the global batches of 6, 6, 6 and 2 samples have 4 slices of at most 2
    data = IterableDataset(jpg, 6, rank=3, world=4, samples=True)
    assert len(data) == len(list(data)) == 3
