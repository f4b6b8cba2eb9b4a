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


class Batch(NamedTuple):
    """One batch of a Loader, on its device."""

    images: Tensor  # uint8 [B, H, W, 3]
    labels: Tensor  # int64 [B]
    index: Tensor  # int64 [B], position of each sample in the dataset


class HostSlots:
    """Output arrays that are reused once no tensor refers to them.

    A fresh 38 MB allocation per batch would cost 9,000 page faults. `torch.from_numpy` keeps a
    reference to its array for as long as any view of the tensor lives, so an array whose only
    reference is in this list is free.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.arrays: list[np.ndarray] = []

    def take(self, count: int, size: int) -> np.ndarray:
        """An uninitialised array, uint8 [count, size, size, 3]."""
        shape = (count, size, size, 3)
        # Arrays of another crop size are dropped: after a change of resolution nobody takes them.
        self.arrays = [a for a in self.arrays if a.shape[1:] == shape[1:] and len(a) >= count]
        for i in range(len(self.arrays)):
            if sys.getrefcount(self.arrays[i]) == 2:  # the list's and getrefcount's own
                return self.arrays[i][:count]
        array = np.empty(shape, np.uint8)
        self.arrays.append(array)
        return array[:]

    def send(self, images: np.ndarray, labels: np.ndarray, index: np.ndarray) -> tuple[Batch, None]:
        """A batch of the first len(labels) images of the array that `take` returned."""
        tensors = (images[: len(labels)], labels, index)
        return Batch(*(torch.from_numpy(t).to(self._device) for t in tensors)), None

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


def batch_bytes(count: int, size: int) -> int:
    """Size of a batch in one piece: images, then labels and indices, aligned to 8 bytes."""
    return -(-3 * count * size * size // 8) * 8 + 16 * count


def batch_views(piece: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Views into a uint8 tensor: images uint8 [count, size, size, 3], labels and indices int64
    [2, count].
    """
    pixel_bytes = 3 * count * size * size
    whole = batch_bytes(count, size)
    images = piece[:pixel_bytes].view(count, size, size, 3)
    numbers = piece[whole - 16 * count : whole].view(torch.int64).view(2, count)
    return images, numbers


class PinnedSlots:
    """Pinned host buffers; each batch is copied to a CUDA device in one piece, on a side stream.

    count: 3 buffers, so that one is filled while another is copied and a third waits.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream, count: int = 3) -> None:
        self._device = device
        self._stream = stream
        self._ring = Ring(count, self._allocate)

    def _allocate(self, num_bytes: int) -> Tensor:
        # the current device of a new thread is GPU 0, which may belong to another process
        with torch.cuda.device(self._device):
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def take(self, count: int, size: int) -> np.ndarray:
        """An uninitialised array, uint8 [count, size, size, 3]."""
        self._count = count
        self._size = size
        self._entry = self._ring.take(batch_bytes(count, size))
        return batch_views(self._entry.buffer, count, size)[0].numpy()

    def send(
        self, images: np.ndarray, labels: np.ndarray, index: np.ndarray
    ) -> tuple[Batch, torch.cuda.Event]:
        """Start to copy the first len(labels) images to the device; the event marks the end of the
        copy.
        """
        n = len(labels)
        num_bytes = batch_bytes(self._count, self._size)
        numbers = batch_views(self._entry.buffer, self._count, self._size)[1]
        numbers[0, :n] = torch.from_numpy(labels)
        numbers[1, :n] = torch.from_numpy(index)
        copied = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            # Images, labels and indices in one transfer; every transfer has a fixed cost.
            piece = self._entry.buffer[:num_bytes].to(self._device, non_blocking=True)
            copied.record(self._stream)
        self._entry.copied = copied
        on_device, numbers = batch_views(piece, self._count, self._size)
        return Batch(on_device[:n], numbers[0, :n], numbers[1, :n]), copied

    def receive(self, batch: Batch, sent: torch.cuda.Event) -> Batch:
        """Make the consumer's stream wait for the copy."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(sent)
        for tensor in batch:  # the allocator must know the second stream that uses its memory
            tensor.record_stream(stream)
        return batch
