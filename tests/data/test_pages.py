"""data.in_memory=0: the batches of a memory map, bounded buffers, errors instead of signals."""

import os
import threading

import numpy as np
import pytest
import torch
from beton_files import raw_beton

from matryoshka.data import (
    BetonError,
    BetonFile,
    CenterCrop,
    ImageFolder,
    Loader,
    RandomResizedCrop,
    layout,
    write_beton,
)
from matryoshka.data.pages import PAGES_AHEAD, ImageFeed, PagedFile, PageFeed

MB = 1 << 20
PAGE = layout.MIN_PAGE


@pytest.fixture(scope="module")
def paged(tmp_path_factory):
    """A .beton of 75 raw images in 15 pages."""
    sizes = [(300 + 10 * (i % 7), 340 + 10 * (i % 5)) for i in range(75)]
    path = raw_beton(tmp_path_factory.mktemp("pages") / "raw.beton", sizes)
    assert len(np.unique(BetonFile(path).offset // PAGE)) == 15, "pages of the test file"
    return path


def reading_threads():
    return sum(t.name.startswith("matryoshka-loader") for t in threading.enumerate())


@pytest.mark.parametrize("order", ["random", "quasi_random", "sequential"])
@pytest.mark.parametrize("world", [1, 3])
def test_the_same_batches_as_from_memory(paged, order, world):
    for rank in range(world):
        options = {"order": order, "crop": RandomResizedCrop(24), "seed": 4, "window_pages": 3}
        options |= {"rank": rank, "world": world, "num_workers": 2}
        mapped, read = Loader(paged, 8, **options), Loader(paged, 8, in_memory=False, **options)
        for _ in range(2):
            for a, b in zip(mapped, read, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert reading_threads() == 0


def test_a_folder_is_read_as_it_is_needed(folder):
    a = next(iter(Loader(folder / "train", 5, crop=CenterCrop(8), in_memory=False)))
    b = next(iter(Loader(folder / "train", 5, crop=CenterCrop(8))))
    assert torch.equal(a.images, b.images)
    with pytest.raises(BetonError, match="quasi_random"):
        Loader(folder / "train", 5, order="quasi_random")


def test_what_is_read_and_how_much_is_held(paged, monkeypatch):
    """Slow oracle: every page once, in the buffer from its first to its last batch; single images
    otherwise.
    """
    data = BetonFile(paged)
    page = (data.offset // PAGE).astype(int)
    read = []
    original = PagedFile.read
    monkeypatch.setattr(
        PagedFile,
        "read",
        lambda self, into, at: (read.append((at, len(into))), original(self, into, at)),
    )
    for order, window in (("quasi_random", 3), ("sequential", 3)):
        loader = Loader(paged, 8, order=order, window_pages=window, in_memory=False)
        shares = [share for _, share in loader._rank_batches(0, 0)]
        feed, _ = loader._feed(shares)
        assert isinstance(feed, PageFeed)
        assert feed.num_bytes <= (window + 8 + PAGES_AHEAD) * PAGE, (
            f"a buffer of {feed.num_bytes} bytes"
        )
        for k, share in enumerate(shares):
            (samples,) = feed.fetch(k)
            for b, i in enumerate(share.tolist()):
                start, size = int(samples.offset[b]), int(samples.size[b])
                stored = data._data[int(data.offset[i]) : int(data.offset[i]) + size]
                assert np.array_equal(samples.data[start : start + size], stored)
            begun = len(read)
            needed = len({int(p) for share in shares[: k + 1] for p in page[share]})
            assert needed <= begun <= needed + 3 + 8 + PAGES_AHEAD, (
                f"{begun} reads for {needed} pages"
            )
            feed.release(k)
        feed.close()
        assert sorted(at for at, _ in read) == [int(p) * PAGE for p in np.unique(page)]
        read.clear()

    loader = Loader(paged, 8, order="random", in_memory=False)
    shares = [share for _, share in loader._rank_batches(0, 0)]
    feed, _ = loader._feed(shares)
    assert isinstance(feed, ImageFeed)
    largest = max(int(data.size[share].sum()) for share in shares)
    for k in range(len(shares)):
        feed.fetch(k)
        assert feed.num_bytes <= 3 * largest, (
            f"buffers of {feed.num_bytes} bytes for batches of {largest}"
        )
        feed.release(k)
    feed.close()
    assert sorted(read) == sorted(zip(data.offset.tolist(), data.size.tolist(), strict=True))


def test_sequential_in_a_file_whose_pages_are_mixed(paged):
    """Where the order jumps between more pages than the window has, images are read one by one."""
    data = BetonFile(paged)
    jumping = np.argsort(np.arange(75) % 15, kind="stable")  # every page is needed until the end
    file = PagedFile(data)
    shares = [jumping[i : i + 8] for i in range(0, 75, 8)]
    assert isinstance(file.feed(shares, whole_pages=True, most_pages=3), ImageFeed)
    assert isinstance(file.feed(shares, whole_pages=True, most_pages=15), PageFeed)
    assert isinstance(
        file.feed([np.arange(i, i + 5) for i in range(0, 75, 5)], whole_pages=True, most_pages=3),
        PageFeed,
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file of 315 MB, which does not stay."""
    path = raw_beton(tmp_path_factory.mktemp("large") / "large.beton", [(512, 640)] * 320)
    yield path
    path.unlink()


def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@pytest.mark.parametrize("order", ["random", "quasi_random", "sequential"])
def test_memory_stays_bounded(large, order):
    """315 MB through a window of 4 pages of 2 MiB; with a memory map all of it becomes resident."""
    grown = {}
    for in_memory in (False, True):
        loader = Loader(
            large,
            8,
            order=order,
            crop=CenterCrop(16),
            window_pages=4,
            in_memory=in_memory,
            num_workers=2,
        )
        before, most = rss(), 0
        for _ in loader:
            most = max(most, rss() - before)
        grown[in_memory] = most
        del loader
    assert grown[False] < 60 * MB, f"{grown[False] >> 20} MB with in_memory=False"
    assert grown[True] > 200 * MB, f"{grown[True] >> 20} MB with in_memory=True"


@pytest.mark.parametrize("order", ["random", "quasi_random", "sequential"])
def test_a_file_that_is_cut_while_it_is_used(paged, tmp_path, order):
    path = tmp_path / "cut.beton"
    path.write_bytes(paged.read_bytes())
    loader = Loader(path, 8, order=order, crop=CenterCrop(16), window_pages=2, in_memory=False)
    iterator = iter(loader)
    next(iterator)
    os.truncate(path, PAGE)
    with pytest.raises(BetonError, match=r"cut\.beton: was truncated"):
        list(iterator)
    assert reading_threads() == 0
    with pytest.raises(BetonError, match=r"cut\.beton: was truncated"):
        next(iter(loader))
    with pytest.raises(BetonError, match="has changed since it was opened"):
        PagedFile(loader.dataset)
    os.unlink(path)
    with pytest.raises(BetonError, match="No such file"):
        PagedFile(loader.dataset)


def test_a_mapped_file_that_is_cut_while_it_is_used(paged, tmp_path):
    path = tmp_path / "cut.beton"
    path.write_bytes(paged.read_bytes())
    loader = Loader(path, 8, order="random", crop=CenterCrop(16), prefetch=1)
    os.truncate(path, PAGE)
    with pytest.raises(BetonError, match=rf"cut\.beton: was truncated while in use: {PAGE} of"):
        list(loader)


def test_a_read_error_names_the_file(paged, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    loader = Loader(paged, 8, order="sequential", crop=CenterCrop(16), in_memory=False)
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(BetonError, match=r"raw\.beton: cannot be read: Input/output error"):
        next(iter(loader))
    assert reading_threads() == 0


def test_short_reads_are_continued(paged, monkeypatch):
    original = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, views, at: original(fd, [v[:100_000] for v in views], at)
    )
    read = next(iter(Loader(paged, 8, order="sequential", crop=CenterCrop(16), in_memory=False)))
    assert torch.equal(
        read.images, next(iter(Loader(paged, 8, order="sequential", crop=CenterCrop(16)))).images
    )


def test_abandoned_epochs_leave_no_thread(paged):
    for order in ("random", "quasi_random"):
        loader = Loader(paged, 4, order=order, crop=CenterCrop(16), window_pages=2, in_memory=False)
        for _ in range(20):
            for _batch in loader:
                break
            assert reading_threads() == 0


def test_the_map_is_let_go(folder, tmp_path):
    path = tmp_path / "x.beton"
    write_beton(ImageFolder(folder / "train"), path, max_resolution=500, write_mode="jpg")
    loader = Loader(path, 4, crop=CenterCrop(16), in_memory=False)
    with open("/proc/self/maps") as maps:
        assert str(path) not in maps.read()
    assert sum(len(b.labels) for b in loader) == 20, "samples in an epoch"
    mine = BetonFile(path)  # a dataset that the caller opened stays open
    Loader(mine, 4, in_memory=False)
    assert len(mine.fetch(np.arange(2))[0].size) == 2, "samples of a batch"
