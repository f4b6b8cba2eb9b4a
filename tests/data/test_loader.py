"""Order, rank slices, pixels against Pillow and NumPy, threads, errors of the Loader."""

import gc
import io
import os
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import area_weights
from PIL import Image

from matryoshka.data import (
    BetonError,
    BetonFile,
    CenterCrop,
    ImageFolder,
    Loader,
    RandomResizedCrop,
    write_beton,
)
from matryoshka.data.augment import IMAGENET_MEAN, IMAGENET_STD, normalise
from matryoshka.data.order import batches, epoch_order, rank_slice
from matryoshka.data.pages import MapFeed


@pytest.fixture(scope="module")
def beton(tmp_path_factory, folder):
    path = tmp_path_factory.mktemp("loader") / "train.beton"
    write_beton(
        ImageFolder(folder / "train"), path, max_resolution=500, write_mode="jpg", jpeg_quality=95
    )
    return path


# ---------------------------------------------------------------- order


@settings(max_examples=100)
@given(
    n=st.integers(0, 200),
    batch=st.integers(1, 50),
    world=st.integers(1, 8),
    drop=st.booleans(),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
)
def test_global_batches_do_not_depend_on_the_world(*, n, batch, world, drop, seed, epoch):
    order = epoch_order(n, "random", seed, epoch)
    assert sorted(order) == list(range(n))
    alone = list(batches(order, batch, drop))
    ranks = [list(batches(order, batch, drop, rank=rank, world=world)) for rank in range(world)]
    for k, whole in enumerate(alone):
        shares = [rank[k] for rank in ranks]
        assert np.concatenate(shares).tolist() == whole.tolist()
        sizes = [len(s) for s in shares]
        assert max(sizes) - min(sizes) <= 1, f"slices of {sizes} samples"
        assert sizes == sorted(sizes, reverse=True)
    covered = sum(len(b) for b in alone)
    assert covered == (n - n % batch if drop else n)


def test_order_is_pinned():
    """The order of a seed and epoch must never change: resumed runs rely on it."""
    assert epoch_order(8, "random", 0, 0).tolist() == list(
        np.argsort(np.random.Philox(key=[0, 0]).random_raw(8))
    )
    assert epoch_order(8, "random", 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(100, "random", 0, 0).tolist() != epoch_order(100, "random", 0, 1).tolist()
    assert epoch_order(100, "random", 0, 1).tolist() != epoch_order(100, "random", 1, 0).tolist()
    assert epoch_order(4, "sequential", 9, 9).tolist() == [0, 1, 2, 3]
    assert [rank_slice(7, r, 3) for r in range(3)] == [slice(0, 3), slice(3, 5), slice(5, 7)]
    with pytest.raises(ValueError, match="order='shuffled'"):
        epoch_order(4, "shuffled", 0, 0)


# ---------------------------------------------------------------- pixels


def test_center_crops_equal_pillow_and_area_averaging(beton):
    data = BetonFile(beton)
    raw = beton.read_bytes()
    loader = Loader(beton, 6, order="sequential", crop=CenterCrop(24), num_workers=2)
    seen = []
    for batch in loader:
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape[1:] == (24, 24, 3)
        for image, label, i in zip(
            batch.images.numpy(), batch.labels.tolist(), batch.index.tolist(), strict=True
        ):
            start, size = int(data.offset[i]), int(data.size[i])
            whole = np.asarray(
                Image.open(io.BytesIO(raw[start : start + size])).convert("RGB"), np.float64
            )
            h, w = whole.shape[:2]
            c = int(224 / 256 * min(h, w))
            y, x = (h - c) // 2, (w - c) // 2
            weights = area_weights(c, 24)
            expected = np.einsum("oh,hwc,pw->opc", weights, whole[y : y + c, x : x + c], weights)
            assert np.abs(image - expected).max() <= 1, f"sample {i} differs by more than one level"
            assert label == data.labels[i]
            seen.append(i)
    assert seen == list(range(20))


def test_folder_and_beton_give_the_same_labels_and_nearly_the_same_pixels(beton, folder):
    options = {"order": "random", "crop": RandomResizedCrop(32), "seed": 5, "num_workers": 2}
    for a, b in zip(
        Loader(beton, 7, **options), Loader(folder / "train", 7, **options), strict=True
    ):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.labels, b.labels)
        assert (a.images.float() - b.images.float()).abs().mean() < 8, (
            "mean difference between folder and .beton"
        )  # one more JPEG generation


@pytest.mark.parametrize("image", [RandomResizedCrop(20), CenterCrop(20)])
def test_same_batches_for_any_number_of_threads_and_ranks(beton, image):
    def run(threads, world):
        parts = []
        for rank in range(world):
            loader = Loader(
                beton,
                8,
                order="random",
                crop=image,
                num_workers=threads,
                rank=rank,
                world=world,
                seed=3,
                drop_last=True,
            )
            loader.epoch = 4
            parts.append(list(loader))
        count = len(parts[0])
        return [tuple(torch.cat([p[k][j] for p in parts]) for j in range(3)) for k in range(count)]

    expected = run(1, 1)
    assert len(expected) == 2, f"{len(expected)} batches"
    for threads, world in ((3, 1), (1, 2), (2, 3)):
        for a, b in zip(run(threads, world), expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_epochs_differ_and_repeat(beton):
    loader = Loader(beton, 20, order="random", crop=RandomResizedCrop(16), seed=1)
    first, second = next(iter(loader)), next(iter(loader))
    assert loader.epoch == 2
    assert not torch.equal(first.index, second.index)
    loader.epoch = 0
    again = next(iter(loader))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_shards_of_an_evaluation_cover_every_sample_once(beton):
    for world in (1, 2, 3, 7, 23):
        seen = [
            i
            for r in range(world)
            for b in Loader(beton, 6, rank=r, world=world)
            for i in b.index.tolist()
        ]
        assert sorted(seen) == list(range(20))


def test_batches_that_are_kept_are_never_overwritten(beton):
    loader = Loader(beton, 3, crop=CenterCrop(16), prefetch=1)
    kept = list(loader)
    copies = [b.images.clone() for b in kept]
    for _ in range(3):
        for _batch in loader:
            pass
    assert all(torch.equal(b.images, c) for b, c in zip(kept, copies, strict=True))


# ---------------------------------------------------------------- threads, errors


def threads_of_a_loader() -> int:
    return sum(t.name.startswith("matryoshka-loader") for t in threading.enumerate())


def resident_memory() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_abandoned_epoch_leaves_nothing_behind(beton, in_memory):
    loader = Loader(
        beton, 2, order="random", crop=RandomResizedCrop(64), num_workers=2, in_memory=in_memory
    )
    memory = []
    for epoch in range(200):
        for _batch in loader:
            break
        assert threads_of_a_loader() == 0
        if (
            os.path.exists("/proc/self/statm") and epoch >= 50
        ):  # what is kept for reuse is there by then
            memory.append(resident_memory())
    assert not memory or max(memory) - memory[0] < 8 << 20, "abandoned epochs leak memory"
    iterator = iter(loader)
    next(iterator)
    assert threads_of_a_loader() >= 1, "the epoch has no thread"
    del iterator
    gc.collect()
    deadline = time.time() + 5
    while threads_of_a_loader() and time.time() < deadline:
        time.sleep(0.01)
    assert threads_of_a_loader() == 0


def test_an_error_on_the_loading_thread_reaches_next(beton):
    """An error of any class ends the epoch; the next epoch works."""

    class Broken(CenterCrop):
        def crops(self, *_):
            raise ZeroDivisionError("in the thread")

    loader = Loader(beton, 4, crop=Broken(8))
    iterator = iter(loader)
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        next(iterator)
    assert next(iterator, None) is None
    assert threads_of_a_loader() == 0
    loader.crop = CenterCrop(8)
    assert len(list(loader)) == 5, "batches after an error"


def test_a_broken_sample_is_an_error_in_next_that_names_it(tmp_path, beton):
    data = BetonFile(beton)
    content = bytearray(beton.read_bytes())
    start = int(data.offset[13])
    content[start + 300 : start + int(data.size[13])] = bytes(int(data.size[13]) - 300)
    broken = tmp_path / "broken.beton"
    broken.write_bytes(content)
    loader = Loader(broken, 4, order="sequential")
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    with pytest.raises(BetonError, match=r"broken.beton: sample 13.*corrupt"):
        next(iterator)
    assert threads_of_a_loader() == 0


def test_arguments(beton, tmp_path):
    with pytest.raises(BetonError, match="fewer than one global batch of 21"):
        Loader(beton, 21, drop_last=True)
    with pytest.raises(BetonError, match=r"nothing.beton"):
        Loader(tmp_path / "nothing.beton", 4)
    bad_ones = (
        {"order": "shuffled"},
        {"rank": 2, "world": 2},
        {"seed": -1},
        {"prefetch": 0},
        {"window_pages": 0},
    )
    for bad in bad_ones:
        with pytest.raises(ValueError, match=next(iter(bad))):
            Loader(beton, 4, **bad)
    for make in (
        lambda: RandomResizedCrop(0),
        lambda: RandomResizedCrop(8, scale=(0.5, 0.1)),
        lambda: RandomResizedCrop(8, flip=2),
        lambda: RandomResizedCrop(8, ratio=(0, 1)),
        lambda: CenterCrop(8, ratio=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()
    assert len(Loader(beton, 6)) == 4, "a last batch that is not full counts"
    assert len(Loader(beton, 6, drop_last=True)) == 3, "drop_last drops the last batch"


def test_normalise():
    images = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    expected = (images.double() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    result = normalise(images)
    assert result.shape == (2, 3, 5, 4)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        result.double(), expected.permute(0, 3, 1, 2), atol=1e-6, rtol=1e-6, check_dtype=False
    )


class TwoFiles:
    """A dataset of two .beton files, whose samples take turns."""

    def __init__(self, first, second):
        self.files = BetonFile(first), BetonFile(second)
        self.path = self.files[0].path
        self.classes, self.num_classes = self.files[0].classes, self.files[0].num_classes
        self.labels = np.stack([file.labels for file in self.files], 1).ravel()

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return self.files[index % 2].name(index // 2)

    def fetch(self, indices):
        parts = []
        for k, file in enumerate(self.files):
            rows = np.flatnonzero(indices % 2 == k)
            if len(rows):
                (samples,) = file.fetch(indices[rows] // 2)
                parts.append(samples._replace(rows=rows))
        return parts

    def feed(self, batches, unreadable=None):
        return MapFeed(self.fetch, batches)

    def pages(self):
        return None

    def paged(self):
        return None

    def fingerprint(self):
        return self.files[0].fingerprint() ^ self.files[1].fingerprint()

    def preload(self):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_a_dataset_may_consist_of_several_files(beton, tmp_path, folder, order):
    second = tmp_path / "second.beton"
    write_beton(ImageFolder(folder / "train"), second, max_resolution=40, write_mode="raw")
    data = TwoFiles(beton, second)
    crop = CenterCrop(24)
    alone = [
        list(Loader(file, 1, order="sequential", crop=crop, num_workers=1)) for file in data.files
    ]
    seen = []
    for batch in Loader(data, 7, order=order, crop=crop, num_workers=2, seed=3):
        for image, label, index in zip(*batch, strict=True):
            expected = alone[int(index) % 2][int(index) // 2]
            assert torch.equal(image, expected.images[0])
            assert label == expected.labels[0]
            seen.append(int(index))
    assert sorted(seen) == list(range(40))
