"""The bytes that the batches of an epoch need: from a memory map, or read ahead into bounded,
reused buffers.

    with PagedFile(data).feed(batches, ...) as feed:
        samples = feed.fetch(0)     # waits for the reads of batch 0; those of the next ones go on
        feed.release(0)             # its bytes may be overwritten

A feed belongs to one thread, which takes the batches in order. Whole pages are read where the order
stays within a window of them, single images where it does not. Reads that fail are a BetonError: a
file that is cut while it is read is no signal from the system, as it would be with a memory map.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from matryoshka.data.layout import BetonError, Samples
from matryoshka.data.reader import BetonFile

READERS = 8  # threads: enough requests at a time for network volumes and solid-state disks
PAGES_AHEAD = 4
BATCHES_AHEAD = 2


class MapFeed:
    """Samples of a dataset that hands out all of its bytes at once: a mapped file, an image folder.

    fetch: indices int64 [B] -> Samples.
    """

    def __init__(self, fetch: Callable[[np.ndarray], Samples], batches: list[np.ndarray]) -> None:
        self._fetch, self._batches = fetch, batches

    def fetch(self, k: int) -> Samples:
        return self._fetch(self._batches[k])

    def release(self, k: int) -> None:
        pass

    def close(self) -> None:
        pass


def page_numbers(data: BetonFile) -> np.ndarray:
    """int64 [N], the page that holds each sample's image."""
    return (data.offset >> np.uint64(data.page_size.bit_length() - 1)).astype(np.int64)


class PagedFile:
    """A .beton file for reading by offset; its metadata comes from `data`, which may be closed.

    BetonError when the file is not the one that `data` was opened from.
    """

    def __init__(self, data: BetonFile) -> None:
        self.data = data
        try:
            self._descriptor = os.open(data.path, os.O_RDONLY)
        except OSError as error:
            raise BetonError(f"{data.path}: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)
        if os.fstat(self._descriptor).st_size != data.num_bytes:
            raise BetonError(f"{data.path}: has changed since it was opened")
        self._spare = np.empty(0, np.uint8)

    def feed(
        self, batches: list[np.ndarray], whole_pages: bool, most_pages: int | None = None
    ) -> PageFeed | ImageFeed:
        """A feed of these batches of indices.

        whole_pages: read pages, unless that would need more than `most_pages` of them at a time.
        """
        if whole_pages:
            plan = PagePlan(page_numbers(self.data), batches)
            if most_pages is None or plan.most <= most_pages:
                return PageFeed(self, batches, plan)
        return ImageFeed(self, batches)

    def read(self, into: np.ndarray, offset: int) -> None:
        """Fill `into` with the bytes at `offset`. BetonError when they cannot be read."""
        view = into.data
        while view:
            try:
                count = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise BetonError(f"{self.data.path}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise BetonError(
                    f"{self.data.path}: was cut off while it was in use: nothing at byte {offset}"
                )
            view, offset = view[count:], offset + count

    def expect(self, offset: int, size: int) -> None:
        """Tell the system that these bytes will be read soon."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def take_buffer(self, size: int) -> np.ndarray:
        """Uninitialised uint8 [size or more]: the buffer of the last epoch, where it is large
        enough.
        """
        spare, self._spare = self._spare, np.empty(0, np.uint8)
        return spare if len(spare) >= size else np.empty(size, np.uint8)

    def give_buffer(self, buffer: np.ndarray) -> None:
        self._spare = buffer


class PagePlan:
    """When every page is needed.

    page: int64 [N] of each sample. first, last: int64 [P], the first and last batch that needs a
    page, -1 for pages that none does. most: pages that are needed at a time.
    """

    def __init__(self, page: np.ndarray, batches: list[np.ndarray]) -> None:
        self.page = page
        order = np.concatenate(batches) if batches else np.empty(0, np.int64)
        batch = np.repeat(np.arange(len(batches)), [len(b) for b in batches])
        used = page[order]
        self.first = np.full(int(page.max()) + 1, -1, np.int64)
        self.last = self.first.copy()
        self.last[used] = batch  # of several assignments the last one stays
        self.first[used[::-1]] = batch[::-1]
        change = np.zeros(len(batches) + 1, np.int64)
        np.add.at(change, self.first[self.first >= 0], 1)
        np.add.at(change, self.last[self.last >= 0] + 1, -1)
        self.most = int(np.cumsum(change).max())


class _Reads:
    """Threads that read for one feed; they end with `close`."""

    def __init__(self, file: PagedFile) -> None:
        self._file = file
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="matryoshka-loader-read")

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)


class PageFeed(_Reads):
    """Every page is read once, whole, and stays in its slot of one buffer until its last batch is
    released.

    num_bytes: the size of that buffer, all that this feed ever holds.
    """

    def __init__(self, file: PagedFile, batches: list[np.ndarray], plan: PagePlan) -> None:
        super().__init__(file)
        self._batches, self._page = batches, plan.page
        pages = np.flatnonzero(plan.first >= 0)
        # stable sorts of ascending pages: those of one batch are read in the order of the file
        self._to_read = deque(pages[np.argsort(plan.first[pages], kind="stable")].tolist())
        self._to_drop = deque(pages[np.argsort(plan.last[pages], kind="stable")].tolist())
        self._last = plan.last
        self._reads: dict[int, Future] = {}
        slots = min(plan.most + PAGES_AHEAD, len(pages))
        self._slot = np.zeros(len(plan.first), np.uint64)  # of each page that is in the buffer
        self._free = list(range(slots))
        self.num_bytes = slots * file.data.page_size
        self._buffer = file.take_buffer(self.num_bytes)

    def fetch(self, k: int) -> Samples:
        """The images of batch k. BetonError when they cannot be read."""
        self._read_ahead()
        data, indices = self._file.data, self._batches[k]
        page = self._page[indices]
        for number in np.unique(page).tolist():
            self._reads[number].result()
        size = np.uint64(data.page_size)
        offset = self._slot[page] * size + data.offset[indices] % size
        return Samples(
            self._buffer,
            offset,
            *(c[indices] for c in (data.size, data.mode, data.width, data.height)),
        )

    def release(self, k: int) -> None:
        """Batch k is done with: pages that no later batch needs make room."""
        while self._to_drop and self._last[self._to_drop[0]] <= k:
            page = self._to_drop.popleft()
            del self._reads[page]
            self._free.append(int(self._slot[page]))
        self._read_ahead()

    def _read_ahead(self) -> None:
        # Pages are taken in the order of their first use, and there are slots for all that one
        # batch needs: the pages of the batch that is waited for always are among those taken.
        page_size = self._file.data.page_size
        while self._free and self._to_read:
            page, slot = self._to_read.popleft(), self._free.pop()
            self._slot[page] = slot
            start = page * page_size
            size = min(page_size, self._file.data.num_bytes - start)
            self._file.expect(start, size)
            place = self._buffer[slot * page_size : slot * page_size + size]
            self._reads[page] = self._threads.submit(self._file.read, place, start)

    def close(self) -> None:
        """Stop reading; waits for reads that have begun."""
        super().close()
        self._file.give_buffer(self._buffer)


class ImageFeed(_Reads):
    """Every image of a batch is read by itself, in the order of the file; the next batches are read
    ahead.

    num_bytes: what the buffers of this feed hold; at most the largest 1 + BATCHES_AHEAD batches.
    """

    def __init__(self, file: PagedFile, batches: list[np.ndarray]) -> None:
        super().__init__(file)
        self._batches = batches
        self._free: list[np.ndarray] = []
        self._begun: dict[int, tuple[np.ndarray, np.ndarray, list[Future]]] = {}
        self._next = 0

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self._free)) + sum(len(buffer) for buffer, _, _ in self._begun.values())

    def fetch(self, k: int) -> Samples:
        """The images of batch k. BetonError when they cannot be read."""
        while self._next <= min(k + BATCHES_AHEAD, len(self._batches) - 1):
            self._begin(self._next)
            self._next += 1
        buffer, offset, reads = self._begun[k]
        for read in reads:
            read.result()
        data, indices = self._file.data, self._batches[k]
        return Samples(
            buffer, offset, *(c[indices] for c in (data.size, data.mode, data.width, data.height))
        )

    def release(self, k: int) -> None:
        """Batch k is done with: its buffer serves another one."""
        self._free.append(self._begun.pop(k)[0])

    def _begin(self, k: int) -> None:
        indices = self._batches[k]
        order = np.argsort(self._file.data.offset[indices])
        at, size = self._file.data.offset[indices][order], self._file.data.size[indices][order]
        end = np.cumsum(size)
        buffer = self._free.pop() if self._free else np.empty(0, np.uint8)
        if len(buffer) < end[-1]:
            buffer = np.empty(int(end[-1]), np.uint8)
        places = list(zip((end - size).tolist(), end.tolist(), at.tolist(), strict=True))
        parts = (
            places[i::READERS] for i in range(READERS)
        )  # neighbours in the file at the same time
        reads = [self._threads.submit(self._read_all, buffer, part) for part in parts]
        offset = np.empty_like(end)
        offset[order] = end - size
        self._begun[k] = buffer, offset, reads

    def _read_all(self, buffer: np.ndarray, places: list[tuple[int, int, int]]) -> None:
        for start, end, at in places:
            self._file.read(buffer[start:end], at)
