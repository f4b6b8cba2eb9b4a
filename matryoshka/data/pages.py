"""Feeds: the stored bytes of an epoch's batches, from a memory map or read ahead into buffers.

    feed = PagedFile(data).feed(batches, whole_pages=True)
    parts = feed.fetch(0)       # waits for the reads of batch 0; those of the next ones continue
    feed.release(0)             # its bytes may be overwritten
    feed.close()

A feed belongs to one thread, which takes the batches in order. `PageFeed` reads whole pages, for
orders that stay inside a window of them; `ImageFeed` reads single images, for random order. A file
that is truncated while it is read is a BetonError here; with a memory map it would be a SIGBUS,
which ends the process.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from matryoshka.data.layout import BetonError, Samples

if TYPE_CHECKING:
    from matryoshka.data.reader import BetonFile

READERS = 8  # threads: enough requests in flight for network volumes and solid-state disks
PAGES_AHEAD = 4  # beyond the pages that the batches need at a time
BATCHES_AHEAD = 2


class Feed(Protocol):
    """The stored bytes of batches 0, 1, ..., which are fetched and released in this order."""

    def fetch(self, k: int) -> list[Samples]:
        """The images of batch k, one Samples per file, valid until `release(k)`."""
        ...

    def release(self, k: int) -> None:
        """Allow the bytes of batch k to be overwritten. BetonError if the file has lost some while
        they were in use: what was decoded from them must not be used.
        """
        ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...


class MapFeed:
    """A feed of a dataset that can be read at any time: a mapped file, an image folder.

    fetch: indices int64 [B] -> list of Samples.
    """

    def __init__(
        self, fetch: Callable[[np.ndarray], list[Samples]], batches: list[np.ndarray]
    ) -> None:
        self._fetch = fetch
        self._batches = batches
        self._fetched: dict[int, list[Samples]] = {}

    def fetch(self, k: int) -> list[Samples]:
        self._fetched[k] = self._fetch(self._batches[k])
        return self._fetched[k]

    def release(self, k: int) -> None:
        for samples in self._fetched.pop(k):
            samples.check()

    def close(self) -> None:
        pass


class PagedFile:
    """A .beton file opened for reads by offset, with the metadata of `data`, which may be closed.

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
        self, batches: list[np.ndarray], *, whole_pages: bool, most_pages: int | None = None
    ) -> PageFeed | ImageFeed:
        """A feed of these batches of indices.

        whole_pages: read pages, unless more than `most_pages` of them would be held at a time.
        """
        if whole_pages:
            plan = PagePlan(self.data.pages(), batches)
            if most_pages is None or plan.most <= most_pages:
                return PageFeed(self, batches, plan)
        return ImageFeed(self, batches)

    def samples(self, indices: np.ndarray, buffer: np.ndarray, offset: np.ndarray) -> Samples:
        """The images of `indices` (int64 [B]) in `buffer`, at `offset` (uint64 [B])."""
        data = self.data
        return Samples(
            data=buffer,
            offset=offset,
            size=data.size[indices],
            mode=data.mode[indices],
            width=data.width[indices],
            height=data.height[indices],
        )

    def read(self, into: np.ndarray, offset: int) -> None:
        """Fill `into` with the bytes at `offset`. BetonError when they cannot be read."""
        view = into.data
        while view:  # a system call may read a part only
            try:
                count = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise BetonError(f"{self.data.path}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise BetonError(
                    f"{self.data.path}: was truncated while in use: nothing at byte {offset}"
                )
            view = view[count:]
            offset += count

    def expect(self, offset: int, size: int) -> None:
        """Announce to the system that these bytes will be read soon."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def take_buffer(self, size: int) -> np.ndarray:
        """Uninitialised uint8 [size or more]: the last epoch's buffer where it is large enough."""
        # Taken out of `_spare`: two feeds at a time must not share a buffer.
        spare = self._spare
        self._spare = np.empty(0, np.uint8)
        return spare if len(spare) >= size else np.empty(size, np.uint8)

    def give_buffer(self, buffer: np.ndarray) -> None:
        """Keep a buffer for the next epoch: fresh memory costs a page fault every 4 kB."""
        self._spare = buffer


class PagePlan:
    """The batches between which every page is needed.

    page: int64 [N], the page of each sample. first, last: int64 [P], the first and the last batch
    that needs a page, -1 for unused pages. most: the largest number of pages needed at a time.
    """

    def __init__(self, page: np.ndarray, batches: list[np.ndarray]) -> None:
        self.page = page
        order = np.concatenate(batches) if batches else np.empty(0, np.int64)
        batch = np.repeat(np.arange(len(batches)), [len(b) for b in batches])
        used = page[order]
        self.first = np.full(int(page.max()) + 1, -1, np.int64)
        self.last = self.first.copy()
        # NumPy keeps the last of several assignments to one place
        self.last[used] = batch
        self.first[used[::-1]] = batch[::-1]
        # +1 where a page comes into use, -1 after its last batch; their running sum is the number
        # of pages in use
        change = np.zeros(len(batches) + 1, np.int64)
        np.add.at(change, self.first[self.first >= 0], 1)
        np.add.at(change, self.last[self.last >= 0] + 1, -1)
        self.most = int(np.cumsum(change).max())


class _Reads:
    """The reading threads of one feed; they end with `close`."""

    def __init__(self, file: PagedFile) -> None:
        self._file = file
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="matryoshka-loader-read")

    def close(self) -> None:
        """Stop reading; waits for reads that have begun."""
        self._threads.shutdown(wait=True, cancel_futures=True)


class PageFeed(_Reads):
    """Reads every page once, whole, into a slot of one buffer, where it stays until its last batch
    is released.

    num_bytes: the size of that buffer, which is all that this feed holds.
    """

    def __init__(self, file: PagedFile, batches: list[np.ndarray], plan: PagePlan) -> None:
        super().__init__(file)
        self._batches = batches
        self._page = plan.page
        self._last = plan.last
        pages = np.flatnonzero(plan.first >= 0)
        # stable sorts of ascending pages: those of one batch are read in the order of the file
        self._to_read = deque(pages[np.argsort(plan.first[pages], kind="stable")].tolist())
        self._to_drop = deque(pages[np.argsort(plan.last[pages], kind="stable")].tolist())
        self._reads: dict[int, Future] = {}
        # `most` slots are enough to make progress; the others let reads run ahead of the batches.
        slots = min(plan.most + PAGES_AHEAD, len(pages))
        self._slot = np.zeros(len(plan.first), np.uint64)  # of each page that is in the buffer
        self._free = list(range(slots))
        self.num_bytes = slots * file.data.page_size
        self._buffer = file.take_buffer(self.num_bytes)

    def fetch(self, k: int) -> list[Samples]:
        """The images of batch k. BetonError when they cannot be read."""
        self._read_ahead()
        indices = self._batches[k]
        page = self._page[indices]
        for number in np.unique(page).tolist():
            self._reads[number].result()
        page_size = np.uint64(self._file.data.page_size)
        offset = self._slot[page] * page_size + self._file.data.offset[indices] % page_size
        return [self._file.samples(indices, self._buffer, offset)]

    def release(self, k: int) -> None:
        """Free the slots of pages that no later batch needs."""
        while self._to_drop and self._last[self._to_drop[0]] <= k:
            page = self._to_drop.popleft()
            del self._reads[page]
            self._free.append(int(self._slot[page]))
        self._read_ahead()

    def _read_ahead(self) -> None:
        # Pages are taken in the order of their first use, and there are slots for all that one
        # batch needs: the pages of the batch that is waited for are always among those taken.
        page_size = self._file.data.page_size
        while self._free and self._to_read:
            page = self._to_read.popleft()
            slot = self._free.pop()
            self._slot[page] = slot
            start = page * page_size
            size = min(page_size, self._file.data.num_bytes - start)
            # The hint reaches the disk for all free slots at once, not only for READERS of them.
            self._file.expect(start, size)
            target = self._buffer[slot * page_size : slot * page_size + size]
            self._reads[page] = self._threads.submit(self._file.read, target, start)

    def close(self) -> None:
        super().close()
        self._file.give_buffer(self._buffer)


class ImageFeed(_Reads):
    """Reads the images of a batch one by one, in file order, BATCHES_AHEAD batches ahead.

    num_bytes: the size of this feed's buffers, at most that of the largest 1 + BATCHES_AHEAD
    batches.
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

    def fetch(self, k: int) -> list[Samples]:
        """The images of batch k. BetonError when they cannot be read."""
        while self._next <= min(k + BATCHES_AHEAD, len(self._batches) - 1):
            self._begin(self._next)
            self._next += 1
        buffer, offset, reads = self._begun[k]
        for read in reads:
            read.result()
        return [self._file.samples(self._batches[k], buffer, offset)]

    def release(self, k: int) -> None:
        """Make the buffer of batch k available to another batch."""
        self._free.append(self._begun.pop(k)[0])

    def _begin(self, k: int) -> None:
        indices = self._batches[k]
        order = np.argsort(self._file.data.offset[indices])
        at = self._file.data.offset[indices][order]
        size = self._file.data.size[indices][order]
        end = np.cumsum(size)
        buffer = self._free.pop() if self._free else np.empty(0, np.uint8)
        if len(buffer) < end[-1]:
            buffer = np.empty(int(end[-1]), np.uint8)
        # (start, end) in the buffer, position in the file
        spans = list(zip((end - size).tolist(), end.tolist(), at.tolist(), strict=True))
        # thread i reads images i, i + READERS, ...: neighbours in the file at the same time
        reads = [
            self._threads.submit(self._read_all, buffer, spans[i::READERS]) for i in range(READERS)
        ]
        offset = np.empty_like(end)
        offset[order] = end - size
        self._begun[k] = buffer, offset, reads

    def _read_all(self, buffer: np.ndarray, spans: list[tuple[int, int, int]]) -> None:
        for start, end, at in spans:
            self._file.read(buffer[start:end], at)
