"""Datasets for torch's DataLoader and the trainers that are built on it.

    data = TorchDataset("train.beton", transform=augment)           # decodes image by image
    for images, labels in DataLoader(data, 256, shuffle=True, num_workers=8): ...

    data = IterableDataset("train.beton", 256, crop=RandomResizedCrop(224))    # batches of a Loader
    for images, labels in DataLoader(data, batch_size=None): ...

Both read .beton files, FFCV's among them, and image folders; both can be pickled, and work in the
worker processes of a DataLoader, forked or spawned.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.data
from PIL import Image

from matryoshka.data import _native, layout
from matryoshka.data.crops import EVALUATION_CROP, Crop, RandomResizedCrop
from matryoshka.data.layout import BetonError
from matryoshka.data.loader import Loader
from matryoshka.data.sources import open_dataset
from matryoshka.environment import available_cores


class TorchDataset(torch.utils.data.Dataset):
    """dataset[i] -> (image, label): whole images, decoded one by one.

    path: a .beton file or an image folder. transform: function of the image. pil: images are PIL
    images, else tensors, uint8 [3, H, W].

    Attributes: transform, which may be replaced; classes, names by label or None; targets, the
    labels as a list, as torchvision's datasets have them.

    BetonError for an unreadable dataset or image.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        transform: Callable[[Any], Any] | None = None,
        *,
        pil: bool = False,
    ) -> None:
        self.path = os.fspath(path)
        self.transform = transform
        self.pil = pil
        self._open()

    def _open(self) -> None:
        self._data = open_dataset(self.path)
        self.classes = self._data.classes

    @property
    def targets(self) -> list[int]:
        return self._data.labels.tolist()

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index}: expected 0 to {len(self) - 1}")
        pixels = self._pixels(index)
        image: Any
        if self.pil:
            image = Image.fromarray(pixels)
        else:
            image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self._data.labels[index])

    def _pixels(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3], a new array."""
        (sample,) = self._data.fetch(np.array([index]))
        start = int(sample.offset[0])
        stored = sample.data[start : start + int(sample.size[0])]
        shape = int(sample.height[0]), int(sample.width[0]), 3
        try:
            if sample.mode[0] == layout.RAW:
                pixels = stored.reshape(shape).copy()
            else:
                pixels = _native.decode(np.ascontiguousarray(stored))
        except ValueError as error:
            sample.check()  # names the cause
            raise BetonError(f"{self.path}: {self._data.name(index)}: {error}") from error
        sample.check()
        if pixels.shape != shape:
            raise BetonError(
                f"{self.path}: {self._data.name(index)}: JPEG dimensions differ from the metadata"
            )
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the file for itself: a memory map cannot be sent.
        return {name: value for name, value in self.__dict__.items() if name != "_data"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class IterableDataset(torch.utils.data.IterableDataset):
    """The batches of a Loader, or their samples: (images, labels), with channels first.

    A batch is uint8 [B, 3, H, W] and int64 [B]; of a list of crops, the images are a list of V such
    tensors. Give it to `DataLoader(..., batch_size=None)`. With samples=True: uint8 [3, H, W], or a
    list of V, and the label as an int, for a DataLoader that makes batches of `batch_size` itself.

    path, batch_size, crop, order, seed, drop_last: as for Loader; batch_size is that of the global
        batch.
    transform: function of the images, of every view by itself.
    threads: native threads, 0 for all cores; the worker processes of a DataLoader share them.
    rank, world: those of torch.distributed by default. Give 0 and 1 where the trainer itself
        divides the samples among the processes.
    options: further ones of Loader.

    The workers of a DataLoader take turns, batch by batch: order and pixels do not depend on their
    number. Without workers, every iteration is the next epoch. Workers are copies, which cannot
    count: call `set_epoch` before every iteration, as with torch's DistributedSampler; without it,
    their epochs are random numbers of torch's generator.

    ValueError, BetonError as of Loader; RuntimeError for workers in several ranks without an epoch.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        batch_size: int,
        *,
        crop: Crop | Sequence[RandomResizedCrop] = EVALUATION_CROP,
        order: str = "random",
        seed: int = 0,
        drop_last: bool = False,
        samples: bool = False,
        transform: Callable[[Any], Any] | None = None,
        threads: int = 0,
        rank: int | None = None,
        world: int | None = None,
        **options: Any,
    ) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if rank is None:
            rank = torch.distributed.get_rank() if distributed else 0
        if world is None:
            world = torch.distributed.get_world_size() if distributed else 1
        self.path = os.fspath(path)
        self.samples = samples
        self.transform = transform
        self.threads = threads
        self._options = {"batch_size": batch_size, "crop": crop, "order": order, "seed": seed}
        self._options |= {"drop_last": drop_last, "rank": rank, "world": world, **options}
        loader = _Turns(self.path, num_workers=1, **self._options)  # checks the arguments
        self.classes = loader.dataset.classes
        sizes = [len(indices) for _, indices in loader._rank_batches(0, 0)]
        self._len = sum(sizes) if samples else len(sizes)
        # -1 until it is set; in shared memory, because workers that persist must see it.
        self._epoch = torch.full((), -1, dtype=torch.int64).share_memory_()
        self._begun = 0  # iterations of this process since then

    def __len__(self) -> int:
        """Batches, or samples, of this rank in an epoch."""
        return self._len

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next iteration's epoch."""
        self._epoch.fill_(epoch)
        self._begun = 0

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        worker = torch.utils.data.get_worker_info()
        epoch = self._next_epoch(worker)
        self._begun += 1
        turn = (worker.id, worker.num_workers) if worker else (0, 1)
        return self._run(epoch, turn)

    def _next_epoch(self, worker: Any) -> int:
        epoch = int(self._epoch)
        if worker is None:
            return max(epoch, 0) + self._begun
        if epoch >= 0:
            return epoch
        if self._options["world"] > 1:
            raise RuntimeError(
                f"{self.path}: set_epoch was not called: ranks whose DataLoader has workers need "
                "it before every iteration, or their batches overlap"
            )
        # What all workers of one iteration have in common; another number in the next one.
        return (worker.seed - worker.id + self._begun) % 2**63

    def _run(self, epoch: int, turn: tuple[int, int]) -> Iterator[tuple[Any, Any]]:
        threads = self.threads or max(1, available_cores() // turn[1])
        loader = _Turns(self.path, num_workers=threads, **self._options)
        loader.turn = turn
        loader.epoch = epoch
        several = isinstance(loader.crop, tuple)
        for images, labels, _ in loader:
            if several:
                views = [view.permute(0, 3, 1, 2) for view in images]
            else:
                views = [images.permute(0, 3, 1, 2)]
            if not self.samples:
                yield self._transformed(views, several), labels
                continue
            for row, label in enumerate(labels.tolist()):
                yield self._transformed([view[row] for view in views], several), label

    def _transformed(self, views: list[Any], several: bool) -> Any:
        if self.transform is not None:
            views = [self.transform(view) for view in views]
        return views if several else views[0]


class _Turns(Loader):
    """A Loader that loads every `turn[1]`-th batch of its rank, from the `turn[0]`-th on."""

    turn: tuple[int, int] = (0, 1)

    def _rank_batches(self, epoch: int, first: int) -> list[tuple[int, np.ndarray]]:
        position, count = self.turn
        return super()._rank_batches(epoch, first)[position::count]
