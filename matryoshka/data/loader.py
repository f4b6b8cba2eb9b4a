"""Batches of uint8 images, decoded ahead of their use by the native thread pool.

    loader = Loader("train.beton", 256, order="random", image=RandomResizedCrop(224), device="cuda")
    for batch in loader:          # every iteration is the next epoch
        batch.images              # uint8 [B, 224, 224, 3] on the device

No worker processes: one Python thread per running epoch fills the next batches, each by one native call that
uses all threads without the GIL.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from matryoshka.data import _native
from matryoshka.data.layout import BetonError
from matryoshka.data.order import ORDERS, batches, epoch_order, num_batches
from matryoshka.data.sources import open_dataset


class Batch(NamedTuple):
    images: Tensor  # uint8 [B, H, W, 3]
    labels: Tensor  # int64 [B]
    index: Tensor  # int64 [B], position of each sample in the dataset


@dataclass(frozen=True)
class RandomResizedCrop:
    """Random area and aspect ratio as in Szegedy et al. 2014 (arXiv 1409.4842), then a flip with probability `flip`.

    The crop is a pure function of (seed, epoch, sample index): the same for any number of threads and ranks.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={self.scale}: expected 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio={self.ratio}: expected 0 < low <= high")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip={self.flip}: expected a probability")

    def crops(self, width: np.ndarray, height: np.ndarray, index: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """int32 [B, 5] rows (x, y, w, h, flip)."""
        return _native.random_crops(width, height, index, seed, epoch, self.scale, self.ratio, self.flip)


@dataclass(frozen=True)
class CenterCrop:
    """The central square of `ratio` x the shorter side (224/256 as in ImageNet evaluation), resized to `size`."""

    size: int
    ratio: float = 224 / 256

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: expected 0 < ratio <= 1")

    def crops(self, width: np.ndarray, height: np.ndarray, index: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """int32 [B, 5] rows (x, y, w, h, 0)."""
        return _native.center_crops(width, height, self.ratio)


def _check_size(size: int) -> None:
    if not 1 <= size <= 16384:
        raise ValueError(f"size={size}: expected 1 to 16384 pixels")


class _Slots:
    """Output arrays that are used again once nobody looks at them.

    `torch.from_numpy` keeps a reference to its array for as long as any view of the tensor lives, so an array
    whose only reference is this list is free. A fresh 38 MB allocation per batch costs 9,000 page faults.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        self._arrays = [a for a in self._arrays if a.shape[1:] == shape[1:] and len(a) >= shape[0]]
        for i in range(len(self._arrays)):
            if sys.getrefcount(self._arrays[i]) == 2:  # the list's and getrefcount's own
                return self._arrays[i][: shape[0]]
        array = np.empty(shape, np.uint8)
        self._arrays.append(array)
        return array[:]


class Loader:
    """Iterates over a .beton file or an image folder in batches.

    path: a .beton file, an image folder, or an opened dataset (BetonFile, ImageFolder).
    batch_size: images of the GLOBAL batch; each of `world` ranks gets its share (the first take one more).
        Batches of which a rank has no share are not yielded on that rank.
    image: RandomResizedCrop or CenterCrop; may be replaced between epochs (progressive resolution).
    num_workers: native threads, 0 for all cores. device: where the batches are handed out.
    drop_last: leave out a last batch that is not full. prefetch: batches decoded ahead.
    epoch: the next epoch's number; counts up with every `iter`, may be set.
    wait: seconds for which the consumer has waited for data, so far.

    A batch that was handed out is never overwritten. Leaving an epoch half-way stops its thread.
    Errors: BetonError for an unreadable dataset or sample, raised by the constructor or by `next`.
    """

    def __init__(
        self,
        path,
        batch_size: int,
        *,
        order: str = "random",
        image: RandomResizedCrop | CenterCrop = CenterCrop(224),
        num_workers: int = 0,
        device: str | torch.device = "cpu",
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
    ) -> None:
        self.dataset = open_dataset(path) if isinstance(path, (str, os.PathLike)) else path
        if order not in ORDERS:
            raise ValueError(f"order={order!r}: expected one of {', '.join(ORDERS)}")
        if batch_size < 1 or not 0 <= rank < world or seed < 0 or prefetch < 1:
            raise ValueError(f"{batch_size=}, {rank=}, {world=}, {seed=}, {prefetch=} do not make sense")
        if drop_last and batch_size > len(self.dataset):
            raise BetonError(
                f"{self.dataset.path}: has {len(self.dataset)} images, fewer than one global batch of {batch_size}; "
                "lower the batch size"
            )
        self.batch_size = batch_size
        self.order = order
        self.image = image
        self.device = torch.device(device)
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world = world
        self.prefetch = prefetch
        self.epoch = 0
        self.wait = 0.0
        self._pool = _native.Pool(num_workers or available_cores())
        self._slots = _Slots()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __len__(self) -> int:
        """Global batches in an epoch."""
        return num_batches(len(self.dataset), self.batch_size, self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._run(epoch, self.image)

    def _run(self, epoch: int, image: RandomResizedCrop | CenterCrop) -> Iterator[Batch]:
        order = epoch_order(len(self.dataset), self.order, self.seed, epoch)
        todo = (b for b in batches(order, self.batch_size, self.drop_last, self.rank, self.world) if len(b))
        ahead: deque[Future] = deque()
        executor = ThreadPoolExecutor(1, thread_name_prefix="matryoshka-loader")
        try:
            for indices in todo:
                ahead.append(executor.submit(self._load, indices, epoch, image))
                if len(ahead) > self.prefetch:
                    yield self._hand_out(ahead.popleft())
            while ahead:
                yield self._hand_out(ahead.popleft())
        finally:  # also when the consumer leaves the epoch half-way
            executor.shutdown(wait=True, cancel_futures=True)

    def _load(self, indices: np.ndarray, epoch: int, image: RandomResizedCrop | CenterCrop):
        """One batch, on the loader's thread: crops, decode, copy to the device on a side stream."""
        samples = self.dataset.fetch(indices)
        crops = image.crops(samples.width, samples.height, indices, self.seed, epoch)
        shape = (len(indices), image.size, image.size, 3)
        if self._stream is None:
            out = self._slots.take(shape)
            images = torch.from_numpy(out)
        else:
            images = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            out = images.numpy()
        status = _native.decode_batch(
            self._pool,
            samples.data,
            samples.offset,
            samples.size,
            samples.mode,
            samples.width,
            samples.height,
            crops,
            out,
        )
        if status.any():
            bad = int(np.flatnonzero(status)[0])
            name = self.dataset.name(int(indices[bad]))
            raise BetonError(f"{self.dataset.path}: {name}: {_native.status_message(int(status[bad]))}")
        labels = torch.from_numpy(self.dataset.labels[indices])
        batch = Batch(images, labels, torch.from_numpy(indices.copy()))
        if self._stream is None:
            return Batch(*(t.to(self.device) for t in batch)), None
        with torch.cuda.stream(self._stream):
            # pageable labels and indices are a few kB; the images go from pinned memory, asynchronously
            batch = Batch(*(t.to(self.device, non_blocking=True) for t in batch))
            done = torch.cuda.Event()
            done.record(self._stream)
        return batch, done

    def _hand_out(self, future: Future) -> Batch:
        start = time.perf_counter()
        batch, done = future.result()
        self.wait += time.perf_counter() - start
        if done is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(done)
            for tensor in batch:  # allocated on the side stream, used on this one
                tensor.record_stream(stream)
        return batch


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
