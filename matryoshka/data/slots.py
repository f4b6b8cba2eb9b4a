"""Output buffers for decoded batches, and their transfer to the device.

One thread calls `take`, fills the array, and calls `send`; the consumer calls `receive`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class _OnDevice(NamedTuple):
    images: Any
    labels: Tensor  # int64 [B]
    index: Tensor  # int64 [B], position of each sample in the dataset


class Batch(_OnDevice):
    """One batch of a Loader, on its device: a tuple (images, labels, index).

    images: uint8 [B, H, W, 3]; of a list of V crops [V, B, H, W, 3], and where their sizes differ a
    list of V tensors [B, h, w, 3].
    """

    _host_index: np.ndarray | None = None

    def with_host_index(self, index: np.ndarray) -> Batch:
        """The same batch, which knows its index, int64 [B], on the host as well."""
        batch = Batch(*self)
        batch._host_index = index
        return batch

    @property
    def host_index(self) -> np.ndarray:
        """`index` on the host; of a Loader's batch without waiting for the device."""
        if self._host_index is None:
            return self.index.cpu().numpy()
        return self._host_index


# The side of the images, or of those of every view.
Size = int | tuple[int, ...]


class HostSlots:
    """Output arrays that are reused once no tensor refers to them.

    A fresh 38 MB allocation per batch would cost 9,000 page faults. `torch.from_numpy` keeps a
    reference to its array for as long as any view of the tensor lives, so an array whose only
    reference is in this list is free.

    arrays: uint8 [n], a batch each.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._size: Size = 0
        self.arrays: list[np.ndarray] = []

    def take(self, count: int, size: Size) -> Any:
        """Uninitialised uint8 arrays for the images of a batch (see `images_in`)."""
        needed = pixel_bytes(count, size)
        # Arrays of another crop size are dropped: after a change of resolution nobody takes them.
        self.arrays = [a for a in self.arrays if size == self._size and len(a) >= needed]
        self._size = size
        for i in range(len(self.arrays)):
            if sys.getrefcount(self.arrays[i]) == 2:  # the list's and getrefcount's own
                return images_in(self.arrays[i], count, size)
        array = np.empty(needed, np.uint8)
        self.arrays.append(array)
        return images_in(array, count, size)

    def send(self, images: Any, labels: np.ndarray, index: np.ndarray) -> tuple[Batch, None]:
        """A batch of the images that `take` returned last."""
        if isinstance(images, list):
            pixels = [self._on_device(view) for view in images]
        else:
            pixels = self._on_device(images)
        batch = Batch(pixels, self._on_device(labels), self._on_device(index))
        return batch.with_host_index(index), None

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def receive(self, batch: Batch, sent: None) -> Batch:
        return batch


class Ring:
    """A ring of buffers: one is handed out again only when the last copy out of it is complete.

    allocate: bytes -> uint8 tensor. An entry's `copied` is anything with `synchronize()`, usually a
    CUDA event.
    """

    class Entry:
        def __init__(self) -> None:
            self.buffer = torch.empty(0, dtype=torch.uint8)
            self.copied: Any = None

    def __init__(self, count: int, allocate: Callable[[int], Tensor]) -> None:
        self._entries = [Ring.Entry() for _ in range(count)]
        self._allocate = allocate
        self._turn = 0

    def take(self, num_bytes: int) -> Entry:
        """The next entry, free and with at least `num_bytes` bytes."""
        entry = self._entries[self._turn]
        self._turn = (self._turn + 1) % len(self._entries)
        if entry.copied is not None:
            entry.copied.synchronize()
            entry.copied = None
        if len(entry.buffer) < num_bytes:
            entry.buffer = self._allocate(num_bytes)
        return entry


def pixel_bytes(count: int, size: Size) -> int:
    """Bytes of `count` images in every view."""
    sides = (size,) if isinstance(size, int) else size
    return sum(3 * count * side * side for side in sides)


def images_in(piece: Any, count: int, size: Size) -> Any:
    """The images of a batch at the start of `piece`, a uint8 array or tensor [n], without a copy.

    [count, size, size, 3] for one size; [V, count, side, side, 3] for V views of one side, else a
    list of V of [count, side, side, 3]. The views follow each other in memory.
    """
    if isinstance(size, int):
        return piece[: pixel_bytes(count, size)].reshape(count, size, size, 3)
    if len(set(size)) == 1:
        pixels = piece[: pixel_bytes(count, size)]
        return pixels.reshape(len(size), count, size[0], size[0], 3)
    views = []
    start = 0
    for side in size:
        end = start + pixel_bytes(count, side)
        views.append(piece[start:end].reshape(count, side, side, 3))
        start = end
    return views


def batch_bytes(count: int, size: Size) -> int:
    """Size of a batch in one piece: images, then labels and indices, aligned to 8 bytes."""
    return -(-pixel_bytes(count, size) // 8) * 8 + 16 * count


def batch_views(piece: Tensor, count: int, size: Size) -> tuple[Any, Tensor]:
    """Views into a uint8 tensor: images (see `images_in`), labels and indices int64 [2, count]."""
    whole = batch_bytes(count, size)
    numbers = piece[whole - 16 * count : whole].view(torch.int64).view(2, count)
    return images_in(piece, count, size), numbers


class PinnedSlots:
    """Pinned host buffers; each batch is copied to a CUDA device in one piece, on a side stream.

    COUNT buffers: one is filled while another is copied and a third waits.
    """

    COUNT = 3

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device = device
        self._stream = stream
        self._ring = Ring(self.COUNT, self._allocate)

    def _allocate(self, num_bytes: int) -> Tensor:
        # the current device of a new thread is GPU 0, which may belong to another process
        with torch.cuda.device(self._device):
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def take(self, count: int, size: Size) -> Any:
        """Uninitialised uint8 arrays for the images of a batch (see `images_in`)."""
        self._count = count
        self._size = size
        self._entry = self._ring.take(batch_bytes(count, size))
        return images_in(self._entry.buffer.numpy(), count, size)

    def send(
        self, images: Any, labels: np.ndarray, index: np.ndarray
    ) -> tuple[Batch, torch.cuda.Event]:
        """Start to copy the images that `take` returned last to the device; the event marks the end
        of the copy.
        """
        num_bytes = batch_bytes(self._count, self._size)
        numbers = batch_views(self._entry.buffer, self._count, self._size)[1]
        numbers[0] = torch.from_numpy(labels)
        numbers[1] = torch.from_numpy(index)
        # blocking: a spinning `synchronize` would take a core from decoding
        copied = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._stream):
            # Images, labels and indices in one transfer; every transfer has a fixed cost.
            piece = self._entry.buffer[:num_bytes].to(self._device, non_blocking=True)
            copied.record(self._stream)
        self._entry.copied = copied
        on_device, numbers = batch_views(piece, self._count, self._size)
        return Batch(on_device, numbers[0], numbers[1]).with_host_index(index), copied

    def receive(self, batch: Batch, sent: torch.cuda.Event) -> Batch:
        """Make the consumer's stream wait for the copy."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(sent)
        # The allocator must know the second stream that uses its memory, which is one piece.
        batch.labels.record_stream(stream)
        return batch
