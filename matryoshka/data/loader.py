"""Batches of uint8 images, decoded ahead of their use by the native thread pool.

    loader = Loader("train.beton", 256, order="random", image=RandomResizedCrop(224), device="cuda")
    for batch in loader:          # every iteration is the next epoch
        batch.images              # uint8 [B, 224, 224, 3] on the device

No worker processes: one Python thread per running epoch fills the next batches, each by one native
call that uses all threads without the GIL.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from matryoshka.data import _native
from matryoshka.data.crops import EVALUATION_CROP, CenterCrop, Crop, PadCrop, RandomResizedCrop
from matryoshka.data.layout import BetonError, Samples
from matryoshka.data.options import ON_ERROR, ORDERS
from matryoshka.data.order import batches, epoch_order, num_batches
from matryoshka.data.pages import ImageFeed, MapFeed, PagedFile, PageFeed, page_numbers
from matryoshka.data.reader import BetonFile
from matryoshka.data.slots import Batch, HostSlots, PinnedSlots
from matryoshka.data.sources import ImageFolder, open_dataset
from matryoshka.data.state import check_state
from matryoshka.environment import available_cores

__all__ = ["Batch", "CenterCrop", "Loader", "PadCrop", "RandomResizedCrop", "Skipped"]


class Skipped(NamedTuple):
    """A sample that was left out of a batch."""

    index: int
    name: str
    reason: str


# (number of the global batch, batch, what was left out of it)
Produced = Generator[tuple[int, Batch, list[Skipped]], None, None]


class _Position:
    """What one iterator has handed out."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch


class Loader:
    """Iterates over a .beton file or an image folder in batches.

    path: a .beton file, an image folder, or an opened dataset (BetonFile, ImageFolder).
    batch_size: images of the GLOBAL batch; each of `world` ranks gets its share (the first take one
        more). Batches of which a rank has no share are not yielded on that rank.
    order: random, quasi_random (random inside a moving window of `window_pages` pages; .beton only)
        or sequential.
    image: RandomResizedCrop, CenterCrop or PadCrop; may be replaced between epochs (progressive
        resolution).
    num_workers: native threads, 0 for all cores. device: where the batches are handed out.
    drop_last: leave out a last batch that is not full. prefetch: batches decoded ahead.
    in_memory: True maps a .beton file, and the system keeps in memory what there is room for. False
        reads ahead into a buffer: about `window_pages` pages with quasi_random, a few pages with
        sequential, a few batches with random. A `path` that names a file is then open for batches
        alone, not for `loader.dataset.fetch`.
    on_error: "error" raises at the first image that cannot be decoded; "skip" leaves it out of its
        batch, which gets smaller, and adds it to `skipped`. With drop_last, where every rank counts
        on every batch, a share without a readable image is an error all the same; without, it is
        not yielded.
    epoch: the next epoch's number; counts up with every `iter`, may be set.
    wait: seconds for which the consumer has waited for data, so far.
    skipped: list of Skipped, in the order in which batches were handed out; the owner may clear it.

    A batch that was handed out is never overwritten. Leaving an epoch half-way stops its threads.
    Errors: BetonError for an unreadable dataset or sample, raised by the constructor or by `next`.
    """

    def __init__(
        self,
        path,
        batch_size: int,
        *,
        order: str = "random",
        image: Crop = EVALUATION_CROP,
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
        if order not in ORDERS:
            raise ValueError(f"order={order!r}: expected one of {', '.join(ORDERS)}")
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error={on_error!r}: expected one of {', '.join(ON_ERROR)}")
        if batch_size < 1 or not 0 <= rank < world or seed < 0 or prefetch < 1 or window_pages < 1:
            raise ValueError(
                f"{batch_size=}, {rank=}, {world=}, {seed=}, {prefetch=}, {window_pages=} do not "
                "make sense"
            )
        opened_here = isinstance(path, (str, os.PathLike))
        self.dataset = open_dataset(path) if opened_here else path
        if drop_last and batch_size > len(self.dataset):
            raise BetonError(
                f"{self.dataset.path}: has {len(self.dataset)} images, fewer than one global "
                f"batch of {batch_size}; "
                "lower the batch size"
            )
        if order == "quasi_random" and not isinstance(self.dataset, BetonFile):
            raise BetonError(
                f"{self.dataset.path}: has no pages for order=quasi_random; use random, or write "
                "a .beton"
            )
        self._file = (
            None  # for reading with bounded memory; a folder's images are read when they are wanted
        )
        if not in_memory and isinstance(self.dataset, BetonFile):
            self._file = PagedFile(self.dataset)
            if opened_here:
                self.dataset.close()  # the map; nothing needs it
        self.batch_size = batch_size
        self.order = order
        self.image = image
        self.device = torch.device(device)
        if (
            self.device.type == "cuda" and self.device.index is None
        ):  # threads have a current device of their own
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
        self.epoch = 0
        self._pool = _native.Pool(num_workers or available_cores())
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __len__(self) -> int:
        """Global batches in an epoch."""
        return num_batches(len(self.dataset), self.batch_size, self.drop_last)

    @property
    def epoch(self) -> int:
        return self._next[0]

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._next = value, 0
        self._position = _Position(value, 0)

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Where the latest iteration is: batches that were handed out, not those decoded ahead.
        Under 1 kB of JSON.

        The state is that of all ranks: it fits a loader with another number of workers or ranks.
        """
        return {"epoch": self._position.epoch, "batch": self._position.batch, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next `iter` yields what is left of the state's epoch, then come the epochs after it.

        StateError naming what differs, when the state is of another dataset, seed, order or global
        batch size.
        """
        self.epoch, batch = check_state(state, self._identity, len(self), self.dataset.path)
        self._next = self.epoch, batch
        self._position.batch = batch

    @property
    def _identity(self) -> dict[str, Any]:
        """Everything that decides which sample is in which batch."""
        window = {"window_pages": self.window_pages} if self.order == "quasi_random" else {}
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "order": self.order,
            **window,
            "drop_last": self.drop_last,
            "samples": len(self.dataset),
            "dataset": self._fingerprint,
        }

    @cached_property
    def _fingerprint(self) -> str:
        return f"{self.dataset.fingerprint():08x}"

    # ------------------------------------------------------------------------------------------ batches

    def __iter__(self) -> Iterator[Batch]:
        (epoch, first), self._next = self._next, (self.epoch + 1, 0)
        self._position = _Position(epoch, first)
        return self._run(self._position, self.image)

    def _run(self, position: _Position, image: Crop) -> Iterator[Batch]:
        epoch = position.epoch
        with closing(
            self._timed(self._produce(self._shares(epoch, position.batch), epoch, image))
        ) as produced:
            for k, batch, skipped in produced:
                position.batch = k + 1
                self.skipped += skipped
                if len(batch.labels):
                    yield batch
                elif self.drop_last:
                    raise BetonError(
                        f"{self.dataset.path}: none of the {len(skipped)} images of a batch "
                        "could be decoded; "
                        f"the first: {skipped[0].name}: {skipped[0].reason}"
                    )
        position.epoch, position.batch = epoch + 1, 0

    def _timed(self, produced: Produced) -> Produced:
        """The same items; `wait` grows by the time that each of them takes."""
        with closing(produced):
            while True:
                start = time.perf_counter()
                item = next(produced, None)
                self.wait += time.perf_counter() - start
                if item is None:
                    return
                yield item

    def _shares(self, epoch: int, first: int) -> list[tuple[int, np.ndarray]]:
        """(number of the global batch, this rank's sample indices), from batch `first` on."""
        pages = None
        if self.order == "quasi_random" and isinstance(self.dataset, BetonFile):
            pages = page_numbers(self.dataset)
        order = epoch_order(
            len(self.dataset), self.order, self.seed, epoch, pages, self.window_pages
        )
        shares = batches(order, self.batch_size, self.drop_last, self.rank, self.world, first)
        return [(k, share) for k, share in enumerate(shares, first) if len(share)]

    def _produce(self, shares: list[tuple[int, np.ndarray]], epoch: int, image: Crop) -> Produced:
        slots = (
            HostSlots(self.device)
            if self._stream is None
            else PinnedSlots(self.device, self._stream)
        )
        ahead: deque[tuple[int, Future]] = deque()
        feed, unreadable = self._feed([indices for _, indices in shares])
        executor = ThreadPoolExecutor(1, thread_name_prefix="matryoshka-loader")

        def load(j: int, indices: np.ndarray):
            """One batch, on the loader's thread: crops, decode, copy to the device."""
            images = slots.take(len(indices), image.size)
            samples = feed.fetch(j)
            crops = image.crops(samples.width, samples.height, indices, self.seed, epoch)
            status = self._decode(samples, crops, images, image.exact)
            feed.release(j)
            if isinstance(image, PadCrop):
                image.shift(images, image.windows(indices, self.seed, epoch))
            if not status.any():
                return *slots.send(images, self.dataset.labels[indices], indices.copy()), []
            skipped = self._failed(indices, status, unreadable)
            good = np.flatnonzero(status == 0)
            images[: len(good)] = images[good]
            return *slots.send(images, self.dataset.labels[indices[good]], indices[good]), skipped

        def hand_out(k: int, future: Future) -> tuple[int, Batch, list[Skipped]]:
            batch, sent, skipped = future.result()
            return k, slots.receive(batch, sent), skipped

        try:
            for j, (k, indices) in enumerate(shares):
                ahead.append((k, executor.submit(load, j, indices)))
                if len(ahead) > self.prefetch:
                    yield hand_out(*ahead.popleft())
            while ahead:
                yield hand_out(*ahead.popleft())
        finally:  # also when the consumer leaves the epoch half-way
            executor.shutdown(wait=True, cancel_futures=True)
            feed.close()

    def _feed(
        self, shares: list[np.ndarray]
    ) -> tuple[MapFeed | PageFeed | ImageFeed, dict[int, str]]:
        """Where the bytes of these batches come from; and the reasons, by index, for images that
        cannot be read.
        """
        unreadable: dict[int, str] = {}
        if self._file is not None:
            most = self.window_pages if self.order == "sequential" else None
            return self._file.feed(shares, self.order != "random", most), unreadable
        fetch = self.dataset.fetch
        if self.on_error == "skip" and isinstance(self.dataset, ImageFolder):
            fetch = partial(fetch, unreadable=unreadable)
        return MapFeed(fetch, shares), unreadable

    def _decode(
        self, samples: Samples, crops: np.ndarray, images: np.ndarray, exact: bool = True
    ) -> np.ndarray:
        """Fill `images` with the samples' crops; one status each, 0 where it went well."""
        where = (
            samples.data,
            samples.offset,
            samples.size,
            samples.mode,
            samples.width,
            samples.height,
        )
        return _native.decode_batch(self._pool, *where, crops, images, exact)

    def _failed(
        self, indices: np.ndarray, status: np.ndarray, unreadable: dict[int, str]
    ) -> list[Skipped]:
        """The samples whose status is not 0. BetonError for the first of them where on_error is
        "error".
        """
        failed = []
        for b in np.flatnonzero(status).tolist():
            index = int(indices[b])
            reason = unreadable.get(index) or _native.status_message(int(status[b]))
            failed.append(Skipped(index, self.dataset.name(index), reason))
            if self.on_error == "error":
                raise BetonError(f"{self.dataset.path}: {failed[0].name}: {reason}")
        return failed
