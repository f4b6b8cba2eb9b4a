"""Loader for small datasets: decoded once, kept on the device as uint8, cropped there in batches.

    loader = ResidentLoader("cifar.beton", 512, order="random", crop=PadCrop(32), device="cuda")

Batches are those of Loader: same order, crops, labels, state. Pixels may differ by one level
(augment.resized_crops), and by more where Loader decodes a JPEG inexactly for training (crops.py):
here every image is decoded exactly.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch

from matryoshka.data.augment import resized_crops, shifted
from matryoshka.data.crops import (
    CenterCrop,
    Crop,
    PadCrop,
    Views,
    crop_rows,
    sizes_of,
    whole_images,
)
from matryoshka.data.dataset import Dataset
from matryoshka.data.layout import BetonError, Samples
from matryoshka.data.loader import LoadedBatch, Loader, Skipped
from matryoshka.data.reader import BetonFile
from matryoshka.data.slots import Batch
from matryoshka.data.subset import Subset
from matryoshka.environment import free_memory

_CHUNK = 1024  # images decoded at a time

# What `suits_residence` calls small, and a part of the free memory that leaves room for a model.
MAX_SIDE = 96  # pixels
MEMORY_SHARE = 1 / 4
_LOOKED_AT = 64  # images of a folder, whose sizes are known only after reading its files


class NotResidentError(BetonError):
    """A dataset that cannot be resident: images of several sizes, or too little memory."""


def suits_residence(
    dataset: Dataset, device: torch.device, crop: Crop | Views, *, copies: int = 1
) -> bool:
    """Whether a ResidentLoader serves `dataset` better than a Loader: its images have one size, at
    most MAX_SIDE pixels a side, and take at most MEMORY_SHARE of the device's free memory.

    crop: an evaluation crop must not be larger than the images: only then are its pixels those of a
    Loader. copies: processes that share the host's memory. Of a folder only some images are looked
    at; ResidentLoader looks at all of them.
    """
    n = len(dataset)
    base = dataset.dataset if isinstance(dataset, Subset) else dataset
    looked_at = np.arange(n)
    if not isinstance(base, BetonFile):
        looked_at = np.unique(np.linspace(0, n - 1, min(n, _LOOKED_AT)).astype(np.int64))
    try:
        sides = _sides(dataset.fetch(looked_at), len(looked_at))
    except BetonError:
        return False  # an unreadable image: a Loader reports it
    height, width = sides[0].tolist()
    if (sides != sides[0]).any() or max(height, width) > MAX_SIDE:
        return False
    if isinstance(crop, CenterCrop) and crop.size**2 > height * width:
        return False
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = free_memory()
        copies = max(copies, 1)
        free = None if free is None else free // copies
    return free is not None and 3 * n * height * width <= MEMORY_SHARE * free


class ResidentLoader(Loader):
    """A Loader that keeps its images, all of one size, on its device. Arguments and use are those
    of Loader.

    Every rank holds the whole dataset: count x height x width x 3 bytes. With a CenterCrop that is
    not larger than the images, it holds the crops, whose pixels are exactly those of a Loader.

    NotResidentError when the images differ in size or do not fit into the device's memory. With
    on_error="error", an image that cannot be decoded is a BetonError of the constructor.
    """

    def __init__(self, path, batch_size: int, **options) -> None:
        super().__init__(path, batch_size, **options)
        self._broken: dict[int, Skipped] = {}
        self._kept: CenterCrop | None = None  # the crop of `_images`; None: they are whole
        self._decode_dataset(self.crop)
        self._labels = torch.from_numpy(self.dataset.labels).to(self.device)

    def _decode_dataset(self, crop: Crop | Views) -> None:
        n = len(self.dataset)
        # Chunk by chunk: the host never holds all decoded pixels.
        chunks = [np.arange(i, min(i + _CHUNK, n)) for i in range(0, n, _CHUNK)]
        feed, unreadable = self._feed(chunks)
        shape = None  # height, width
        try:
            for k, indices in enumerate(chunks):
                parts = feed.fetch(k)
                readable = np.array([int(i) not in unreadable for i in indices])
                sides = _sides(parts, len(indices))  # [n, 2]
                if shape is None:
                    if not readable.any():
                        raise BetonError(
                            f"{self.dataset.path}: none of the first {len(indices)} images can be "
                            "read"
                        )
                    # The first image that can be read decides the size of all of them.
                    height, width = sides[int(readable.argmax())].tolist()
                    shape = height, width
                    self._kept = None
                    if isinstance(crop, CenterCrop) and crop.size**2 <= height * width:
                        self._kept = crop
                        height = width = crop.size
                    self._images = self._allocate(n, height, width)
                self._check_sides(indices, sides, readable, shape)

                pixels = np.empty((len(indices), *self._images.shape[1:]), np.uint8)
                status = self._decode_parts(parts, self._kept_part, [pixels], exact=True)
                feed.release(k)
                for skipped in self._failed(indices, status, unreadable):
                    self._broken[skipped.index] = skipped
                chunk = slice(indices[0], indices[-1] + 1)
                self._images[chunk] = torch.from_numpy(pixels).to(self.device)
        finally:
            feed.close()

    def _kept_part(self, samples: Samples) -> np.ndarray:
        """The crops that `_images` holds, int32 [1, n, 5]."""
        if self._kept is None:
            return whole_images(samples.width, samples.height)[None]
        return self._kept.crops(samples.width, samples.height, samples.offset, self.seed, 0)[None]

    def _check_sides(
        self, indices: np.ndarray, sides: np.ndarray, readable: np.ndarray, shape: tuple[int, int]
    ) -> None:
        different = readable & (sides != shape).any(axis=1)
        if different.any():
            b = int(different.argmax())
            height, width = sides[b].tolist()
            raise NotResidentError(
                f"{self.dataset.path}: {self.dataset.name(int(indices[b]))} has "
                f"{width}x{height} pixels, others have {shape[1]}x{shape[0]}: a resident set needs "
                "images of one size; write them so, or leave out data.resident=1"
            )

    def _allocate(self, n: int, height: int, width: int) -> torch.Tensor:
        free = free_memory() if self.device.type == "cpu" else None
        # Beside the images those of a chunk. The system promises more memory than it has.
        fits = free is None or 3 * (n + min(n, _CHUNK)) * height * width <= free
        try:
            if fits:
                return torch.empty(n, height, width, 3, dtype=torch.uint8, device=self.device)
        except RuntimeError:  # torch.OutOfMemoryError is a subclass
            pass
        size = 3 * n * height * width / 2**30
        raise NotResidentError(
            f"{self.dataset.path}: its {n} images of {width}x{height} need {size:.1f} GiB on "
            f"{self.device}, which has less; leave out data.resident=1"
        )

    @property
    def _held_batches(self) -> int:
        # Of the host: one is made of the resident images while the consumer has another.
        return 2 if self.device.type == "cpu" else 0

    def _start_epoch(
        self, slices: list[tuple[int, np.ndarray]], epoch: int, crop: Crop | Views
    ) -> Generator[LoadedBatch]:
        if self._kept is not None and crop != self._kept:
            self._broken = {}
            self._decode_dataset(crop)
        for number, rank_indices in slices:
            indices, skipped = self._without_broken(rank_indices)
            index = torch.from_numpy(indices).to(self.device, non_blocking=True)
            images = self._images[index]  # uint8 [B, H, W, 3]
            if self._kept is None:
                images = self._cropped(images, indices, epoch, crop)
            batch = Batch(images, self._labels[index], index).with_host_index(indices)
            yield LoadedBatch(number, batch, skipped)

    def _without_broken(self, indices: np.ndarray) -> tuple[np.ndarray, list[Skipped]]:
        """The indices of readable images, and the records of the others."""
        if not self._broken:
            return indices.copy(), []  # on a CPU the tensor shares its memory
        broken = np.array([i in self._broken for i in indices.tolist()])
        return indices[~broken], [self._broken[i] for i in indices[broken].tolist()]

    def _cropped(
        self, images: torch.Tensor, indices: np.ndarray, epoch: int, crop: Crop | Views
    ) -> torch.Tensor | list[torch.Tensor]:
        height, width = images.shape[1:3]
        widths = np.full(len(indices), width, np.int32)
        heights = np.full(len(indices), height, np.int32)
        where = {"index": indices, "seed": self.seed, "epoch": epoch}
        size = sizes_of(crop)
        if isinstance(size, tuple):
            crops = self._on_device(crop_rows(crop, widths, heights, **where))  # [V, B, 5]
            views = [resized_crops(images, crops[v], side) for v, side in enumerate(size)]
            return torch.stack(views) if len(set(size)) == 1 else views
        # PadCrop shifts images that already have its size; any other image is resized first.
        if not isinstance(crop, PadCrop) or (height, width) != (size, size):
            (crops,) = crop_rows(crop, widths, heights, **where)
            images = resized_crops(images, self._on_device(crops), size)
        if isinstance(crop, PadCrop):
            windows = crop.windows(indices, self.seed, epoch)
            images = shifted(images, self._on_device(windows), crop.padding)
        return images

    def _on_device(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(rows).to(self.device, non_blocking=True)


def _sides(parts: list[Samples], count: int) -> np.ndarray:
    """(height, width) of every image of a batch, int32 [count, 2]."""
    sides = np.empty((count, 2), np.int32)
    for part in parts:
        sides[part.rows, 0] = part.height
        sides[part.rows, 1] = part.width
    return sides
