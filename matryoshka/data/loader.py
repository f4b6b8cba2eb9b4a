"""Batches of uint8 images, decoded ahead of use by a native thread pool.

    loader = Loader("train.beton", 256, order="random", crop=RandomResizedCrop(224), device="cuda")
    for batch in loader:          # every iteration is the next epoch
        batch.images              # uint8 [B, 224, 224, 3] on the device

There are no worker processes: one Python thread per running epoch fills the next batches, each by
one native call that uses all threads without the GIL.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from matryoshka.data import _native
from matryoshka.data.budget import check_batches
from matryoshka.data.crops import (
    EVALUATION_CROP,
    CenterCrop,
    Crop,
    PadCrop,
    RandomResizedCrop,
    Views,
    as_crop,
    crop_rows,
    sizes_of,
)
from matryoshka.data.dataset import Dataset
from matryoshka.data.fingerprint import Content
from matryoshka.data.layout import BetonError, Samples
from matryoshka.data.options import ON_ERROR, ORDERS
from matryoshka.data.order import batches, epoch_order, num_batches
from matryoshka.data.pages import Feed
from matryoshka.data.slots import Batch, HostSlots, PinnedSlots, pixel_bytes
from matryoshka.data.sources import open_dataset
from matryoshka.data.state import check_state, content_state, expected_content
from matryoshka.environment import available_cores, count_in

__all__ = ["Batch", "CenterCrop", "Loader", "PadCrop", "RandomResizedCrop", "Skipped"]


class Skipped(NamedTuple):
    """A sample that was left out of a batch."""

    index: int
    name: str
    reason: str


class LoadedBatch(NamedTuple):
    """A batch as an epoch produces it. number: of the global batch in the epoch."""

    number: int
    batch: Batch
    skipped: list[Skipped]


class _Position:
    """How far one iterator has been consumed: the next batch that it hands out."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.epoch = epoch
        self.batch = batch


class Loader:
    """Iterates over a .beton file or an image folder in batches.

    path: a .beton file, an image folder, or an opened dataset (see dataset.py).
    batch_size: images of the GLOBAL batch; each of `world` ranks gets its slice of it. A batch in
        which a rank's slice is empty is not yielded on that rank.
    order: random, quasi_random (random inside a moving window of `window_pages` pages; .beton only)
        or sequential.
    crop: RandomResizedCrop, CenterCrop or PadCrop; or a list of RandomResizedCrop, which gives
        several views of every image (see `Batch`). May be replaced between epochs (progressive
        resolution).
    num_workers: native threads, 0 for all cores.
    device: where the batches are handed out.
    drop_last: leave out a last batch that is not full.
    prefetch: batches decoded ahead.
    in_memory: True maps a .beton file, and the system caches as much of it as fits into memory.
        False reads ahead into a buffer: about `window_pages` pages with quasi_random, a few pages
        with sequential, a few batches with random. When `path` is a file name, `loader.dataset` is
        then closed: it has the metadata, but its `fetch` fails.
    on_error: "error" raises at the first image that cannot be decoded. "skip" leaves it out of its
        batch, which gets smaller, and adds it to `skipped`. A slice without any readable image is
        not yielded; with drop_last, where every rank counts on every batch, it is an error.
    epoch: the next epoch's number; every `iter` adds one; may be set.
    wait: seconds for which the consumer has waited for data, so far.
    skipped: list of Skipped, in the order in which batches were handed out; the owner may clear it.

    A batch that was handed out is never overwritten. Leaving an epoch half-way stops its threads.
    Errors: ValueError for a bad argument, BetonError for an unreadable dataset or sample, raised by
    the constructor or by `next`; BatchMemoryError, see `check_memory`.
    """

    def __init__(
        self,
        path: str | os.PathLike | Dataset,
        batch_size: int,
        *,
        order: str = "random",
        crop: Crop | Sequence[RandomResizedCrop] = EVALUATION_CROP,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
        in_memory: bool = True,
        window_pages: int = 128,
        on_error: str = "error",
    ) -> None:
        for name, choice, choices in (("order", order, ORDERS), ("on_error", on_error, ON_ERROR)):
            if choice not in choices:
                raise ValueError(f"{name}={choice!r}: expected one of {', '.join(choices)}")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("world", world, 1),
            ("seed", seed, 0),
            ("prefetch", prefetch, 1),
            ("window_pages", window_pages, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value}: expected {least} or more")
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank}: expected 0 to {world - 1}, because world={world}")

        opened_here = isinstance(path, (str, os.PathLike))
        self.dataset: Dataset = open_dataset(path) if opened_here else path
        if drop_last and batch_size > len(self.dataset):
            raise BetonError(
                f"{self.dataset.path}: has {len(self.dataset)} images, fewer than one global "
                f"batch of {batch_size}; lower the batch size"
            )
        if order == "quasi_random" and self.dataset.pages() is None:
            raise BetonError(
                f"{self.dataset.path}: has no pages for order=quasi_random; use random, or write "
                "a .beton"
            )
        # None also for a folder: its images are read batch by batch anyway
        self._paged = None if in_memory else self.dataset.paged()
        if self._paged is not None and opened_here:
            self.dataset.close()  # the map, which nothing needs then

        self.notes: list[str] = []
        self.batch_size = batch_size
        self.order = order
        self.crop = crop
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            # The current device is a property of the thread; the loading thread may have another.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world = world
        self.prefetch = prefetch
        self.window_pages = window_pages
        self.on_error = on_error
        self.wait = 0.0
        self.skipped: list[Skipped] = []
        self.epoch = 0  # the setter: also sets `_next` and `_position`
        self._pool = _native.Pool(num_workers or available_cores())
        # Copies on the default stream would wait for the training step that is running there.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._fitting = 0  # bytes of the largest batch that `check_memory` has found to fit
        self.check_memory(self.crop)

    def __len__(self) -> int:
        """Global batches in an epoch."""
        return num_batches(len(self.dataset), self.batch_size, self.drop_last)

    @property
    def crop(self) -> Crop | Views:
        return self._crop

    @crop.setter
    def crop(self, value: Crop | Sequence[RandomResizedCrop]) -> None:
        self._crop = as_crop(value)

    def check_memory(self, crop: Crop | Views) -> None:
        """BatchMemoryError if the batches of `crop` do not fit into the free memory.

        Counted are those that an epoch holds at once and, on a CPU, one as float32, which models
        take. The constructor asks for its crop, and an epoch for one that needs more.
        """
        count = -(-min(self.batch_size, len(self.dataset)) // self.world)
        needed = pixel_bytes(count, sizes_of(crop))
        if needed <= self._fitting:
            return
        check_batches(
            self.dataset.path,
            count,
            sizes_of(crop),
            batches=min(self._held_batches, -(-len(self.dataset) // self.batch_size)),
            as_floats=self.device.type == "cpu",
            processes=min(self.world, count_in("LOCAL_WORLD_SIZE", 1)) or 1,
        )
        self._fitting = needed

    @property
    def _held_batches(self) -> int:
        """Batches in the host's memory at once: decoded ahead, and in the consumer's hands."""
        return self.prefetch + 2 if self._stream is None else PinnedSlots.COUNT

    @property
    def epoch(self) -> int:
        return self._next[0]

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._next = value, 0
        self._position = _Position(value, 0)

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The position of the latest iteration, under 1 kB of JSON.

        It counts batches that were handed out, not those decoded ahead. The state is that of all
        ranks: it fits a loader with another number of workers or ranks.
        """
        position = {"epoch": self._position.epoch, "batch": self._position.batch}
        return position | self._order_identity | content_state(self._content)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at `state`: the next `iter` yields the rest of its epoch, later ones the epochs
        after it.

        StateError naming the differences, when the state is of other images, or of another seed,
        order or global batch size. What cannot be compared, because an older version wrote the
        state, is added to `notes`.
        """
        content, note = expected_content(state, self.dataset, self._content)
        expected = self._order_identity | content
        self.epoch, batch = check_state(state, expected, len(self), self.dataset.path)
        if note:
            self.notes.append(note)
        self._next = self.epoch, batch
        self._position.batch = batch

    @property
    def _order_identity(self) -> dict[str, Any]:
        """Everything but the images that decides which sample is in which batch."""
        # With another window, quasi_random has another order; the other orders ignore it.
        window = {"window_pages": self.window_pages} if self.order == "quasi_random" else {}
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "order": self.order,
            **window,
            "drop_last": self.drop_last,
            "samples": len(self.dataset),
        }

    @cached_property
    def _content(self) -> Content:
        return self.dataset.content()

    # ---------------------------------------------------------------- batches

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self._next
        # Set at once, not at the end: an abandoned epoch must not repeat.
        self._next = epoch + 1, 0
        self._position = _Position(epoch, first)
        return self._run(self._position, self.crop)

    def _run(self, position: _Position, crop: Crop | Views) -> Iterator[Batch]:
        """Yield the rest of an epoch from `position` on, and advance `position`.

        This is a generator because Python closes abandoned generators: that ends the threads.
        """
        self.check_memory(crop)
        epoch = position.epoch
        slices = self._rank_batches(epoch, position.batch)
        start = time.perf_counter()
        with closing(self._start_epoch(slices, epoch, crop)) as loading:
            while loaded := next(loading, None):
                self.wait += time.perf_counter() - start
                # Advanced before the batch is handed out: a state that is saved while the consumer
                # works on this batch continues after it.
                position.batch = loaded.number + 1
                self.skipped += loaded.skipped
                if len(loaded.batch.labels):
                    yield loaded.batch
                elif self.drop_last:
                    # Training: a rank with fewer batches would leave the others waiting for it.
                    first = loaded.skipped[0]
                    raise BetonError(
                        f"{self.dataset.path}: none of the {len(loaded.skipped)} images of a batch "
                        f"could be decoded; the first: {first.name}: {first.reason}"
                    )
                start = time.perf_counter()
            self.wait += time.perf_counter() - start
        position.epoch = epoch + 1
        position.batch = 0

    def _rank_batches(self, epoch: int, first: int) -> list[tuple[int, np.ndarray]]:
        """(number of the global batch, this rank's sample indices), from batch `first` on."""
        pages = self.dataset.pages() if self.order == "quasi_random" else None
        order = epoch_order(
            len(self.dataset),
            self.order,
            self.seed,
            epoch,
            pages=pages,
            window_pages=self.window_pages,
        )
        slices = batches(
            order,
            self.batch_size,
            self.drop_last,
            rank=self.rank,
            world=self.world,
            first=first,
        )
        # Where ranks outnumber the samples of the last batch, the slices of some are empty.
        return [(number, indices) for number, indices in enumerate(slices, first) if len(indices)]

    def _start_epoch(
        self, slices: list[tuple[int, np.ndarray]], epoch: int, crop: Crop | Views
    ) -> _Epoch | Generator[LoadedBatch]:
        """An iterator over the loaded batches, with `close`."""
        return _Epoch(self, slices, epoch, crop)

    def _feed(self, slices: list[np.ndarray]) -> tuple[Feed, dict[int, str]]:
        """The stored bytes of these batches; and the reasons, by index, why images could not be
        read, which the feed fills in.
        """
        unreadable: dict[int, str] = {}
        if self._paged is not None:
            # FFCV's files may have neighbours in distant pages: then even sequential order would
            # hold many pages, and reading single images needs less memory
            most = self.window_pages if self.order == "sequential" else None
            feed = self._paged.feed(slices, whole_pages=self.order != "random", most_pages=most)
        elif self.on_error == "skip":
            feed = self.dataset.feed(slices, unreadable)
        else:
            feed = self.dataset.feed(slices)
        return feed, unreadable

    def _decode_parts(
        self,
        parts: list[Samples],
        crops_of: Callable[[Samples], np.ndarray],
        views: list[np.ndarray],
        exact: bool,
    ) -> np.ndarray:
        """Fill `views`, uint8 [B, H, W, 3] each, with the crops of a batch's samples; status uint8
        [B], 0 where it worked.

        parts: the batch, one Samples per file. crops_of: int32 [V, n, 5] for the samples of a part.
        """
        status = np.empty(len(views[0]), np.uint8)
        for samples in parts:
            rows = samples.rows
            crops = crops_of(samples)
            if isinstance(rows, slice):  # of a view: decoded in place
                status[rows] = self._decode(samples, crops, [view[rows] for view in views], exact)
                continue
            # Indexing with an array makes a copy, into which decoding would be lost.
            scattered = [np.empty((len(rows), *view.shape[1:]), np.uint8) for view in views]
            status[rows] = self._decode(samples, crops, scattered, exact)
            for view, decoded in zip(views, scattered, strict=True):
                view[rows] = decoded
        return status

    def _decode(
        self, samples: Samples, crops: np.ndarray, views: list[np.ndarray], exact: bool
    ) -> np.ndarray:
        """Fill `views` with the samples' crops; status uint8 [n], 0 where it worked."""
        return _native.decode_views(
            self._pool,
            data=samples.data,
            offset=samples.offset,
            size=samples.size,
            mode=samples.mode,
            width=samples.width,
            height=samples.height,
            crops=crops,
            out=views,
            exact=exact,
        )

    def _failed(
        self, indices: np.ndarray, status: np.ndarray, unreadable: dict[int, str]
    ) -> list[Skipped]:
        """The samples whose status is not 0. BetonError for the first if on_error is "error"."""
        failed = []
        for b in np.flatnonzero(status).tolist():
            index = int(indices[b])
            reason = unreadable.get(index) or _native.status_message(int(status[b]))
            failed.append(Skipped(index, self.dataset.name(index), reason))
            if self.on_error == "error":
                raise BetonError(f"{self.dataset.path}: {failed[0].name}: {reason}")
        return failed


class _Epoch:
    """The running part of one epoch: batches in order, decoded ahead on a separate thread.

    `next` gives the next LoadedBatch, `close` ends the threads. slices: (number of the global
    batch, sample indices).
    """

    def __init__(
        self, loader: Loader, slices: list[tuple[int, np.ndarray]], epoch: int, crop: Crop | Views
    ) -> None:
        self._loader = loader
        self._epoch = epoch
        self._crop = crop
        if loader._stream is None:
            self._slots = HostSlots(loader.device)
        else:
            self._slots = PinnedSlots(loader.device, loader._stream)
        self._feed, self._unreadable = loader._feed([indices for _, indices in slices])
        self._slices = slices
        self._next = 0  # the next of them to load
        self._ahead: deque[tuple[int, Future]] = deque()
        # one thread: slots and feed belong to it, and the native pool has the parallelism
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="matryoshka-loader")

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> LoadedBatch:
        # One more than `prefetch`: the batch that is returned below is among them.
        while len(self._ahead) <= self._loader.prefetch and self._next < len(self._slices):
            number, indices = self._slices[self._next]
            self._ahead.append((number, self._executor.submit(self._load, self._next, indices)))
            self._next += 1
        if not self._ahead:
            raise StopIteration
        number, future = self._ahead.popleft()
        batch, sent, skipped = future.result()
        return LoadedBatch(number, self._slots.receive(batch, sent), skipped)

    def close(self) -> None:
        """Stop; waits for the batch that is being decoded."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._feed.close()

    def _load(self, position: int, indices: np.ndarray) -> tuple[Batch, Any, list[Skipped]]:
        """One batch, on the epoch's thread: read, crop, decode, start the copy to the device."""
        loader = self._loader
        crop = self._crop

        def crops_of(samples: Samples) -> np.ndarray:
            return crop_rows(
                crop,
                samples.width,
                samples.height,
                index=indices[samples.rows],
                seed=loader.seed,
                epoch=self._epoch,
            )

        several = isinstance(crop, tuple)
        size = sizes_of(crop)
        images = self._slots.take(len(indices), size)
        views = list(images) if several else [images]  # uint8 [B, size, size, 3] each
        exact = not several and crop.exact
        parts = self._feed.fetch(position)
        status = loader._decode_parts(parts, crops_of, views, exact)
        self._feed.release(position)
        if isinstance(crop, PadCrop):
            crop.shift(images, crop.windows(indices, loader.seed, self._epoch))

        skipped = []
        if status.any():
            skipped = loader._failed(indices, status, self._unreadable)
            good = np.flatnonzero(status == 0)
            # Moved into slots of their number: a batch is one contiguous piece.
            images = self._slots.take(len(good), size)
            for view, old in zip(images if several else [images], views, strict=True):
                view[...] = old[good]
            indices = indices[good]
        # A copy: on a CPU the tensor shares the array's memory, which is a view of the epoch's
        # order.
        batch, sent = self._slots.send(images, loader.dataset.labels[indices], indices.copy())
        return batch, sent, skipped
