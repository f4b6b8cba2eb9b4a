"""Output buffers: memory that may still be read is never overwritten."""

import numpy as np
import pytest
import torch

from matryoshka.data import CenterCrop, Loader, PadCrop, RandomResizedCrop, ResidentLoader
from matryoshka.data.slots import HostSlots, Ring, batch_bytes, batch_views

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Copy:
    """A CUDA event, as far as the ring knows."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def synchronize(self):
        self.log.append(self.name)


def test_the_ring_waits_for_the_copy_out_of_a_buffer_and_for_no_other():
    log, allocated = [], []

    def allocate(n):
        allocated.append(n)
        return torch.empty(n, dtype=torch.uint8)

    ring = Ring(3, allocate)
    entries = []
    for turn in range(7):
        entry = ring.take(100)
        assert log == list(range(max(turn - 2, 0)))  # just before buffer turn % 3 is written again
        assert entry.copied is None
        entry.copied = Copy(log, turn)
        entries.append(entry)
    assert entries[0] is entries[3] is entries[6]
    assert len({id(e) for e in entries}) == 3, "entries of the ring"
    assert allocated == [100] * 3
    entry = ring.take(50)  # a smaller batch uses what there is
    assert len(entry.buffer) == 100, "an entry was reallocated without need"
    assert log == [0, 1, 2, 3, 4]
    # a larger one gets a new buffer, after its old one was copied
    assert len(ring.take(200).buffer) == 200, "the buffer did not grow"
    assert log == [0, 1, 2, 3, 4, 5]
    assert allocated == [100] * 3 + [200]
    ring.take(1)
    ring.take(1)  # a buffer that was never sent is not waited for
    assert log == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("sizes", [(5, 5), (4,), (7, 3, 3), (1, 2)])
def test_views_in_one_piece(sizes):
    piece = torch.zeros(batch_bytes(3, sizes) + 5, dtype=torch.uint8)
    images, numbers = batch_views(piece, 3, sizes)
    assert [tuple(view.shape) for view in images] == [(3, side, side, 3) for side in sizes]
    if len(set(sizes)) == 1:
        assert images.is_contiguous()
    for number, view in enumerate(images, 1):
        view.fill_(number)
    numbers.fill_(-1)
    for number, side in enumerate(sizes, 1):
        assert int((piece == number).sum()) == 9 * side * side, "views overlap"
    gap = batch_bytes(3, sizes) - int((piece > 0).sum())
    assert gap < 8, f"{gap} bytes are not used: parts overlap, or are not adjacent"
    assert not piece[batch_bytes(3, sizes) :].any()


@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 5), (0, 7), (8, 4)])
def test_a_batch_in_one_piece(count, size):
    piece = torch.zeros(batch_bytes(count, size) + 5, dtype=torch.uint8)
    images, numbers = batch_views(piece, count, size)
    assert images.shape == (count, size, size, 3)
    assert numbers.shape == (2, count)
    images.fill_(255)
    numbers.fill_(-1)
    gap = batch_bytes(count, size) - int((piece == 255).sum())
    assert gap < 8, f"{gap} bytes are not used: parts overlap, or are not adjacent"
    assert not piece[batch_bytes(count, size) :].any()


def test_host_slots_are_used_again_when_nobody_looks():
    slots = HostSlots(torch.device("cpu"))
    numbers = np.zeros(4, np.int64)
    batch, _ = slots.send(slots.take(4, 8), numbers, numbers)
    place = batch.images.data_ptr()
    view = batch.images[2]
    del batch
    assert slots.take(4, 8).__array_interface__["data"][0] != place  # a view is somebody
    del view
    assert {slots.take(4, 8).__array_interface__["data"][0] for _ in range(5)} == {place}
    assert len(slots.arrays) == 2, "an array in use was handed out"
    assert slots.take(3, 8).shape == (3, 8, 8, 3)
    slots.take(4, 9)
    assert len(slots.arrays) == 1, (
        "arrays of another size are kept"
    )  # buffers of another size are let go


TWO = [RandomResizedCrop(32), RandomResizedCrop(32)]
SEVERAL = [*TWO, RandomResizedCrop(17)]


@needs_cuda
@pytest.mark.parametrize(
    "image", [RandomResizedCrop(32), CenterCrop(20), PadCrop(32), TWO, SEVERAL]
)
def test_batches_on_a_gpu_equal_those_on_the_cpu(digits, image):
    options = {"order": "random", "crop": image, "seed": 3}
    host, device = (
        Loader(digits["train"], 24, **options),
        Loader(digits["train"], 24, device="cuda", **options),
    )
    kept = []
    for _ in range(2):
        for a, b in zip(host, device, strict=True):
            torch.cuda._sleep(2_000_000)  # a consumer that lags behind
            assert b.images.is_cuda
            kept.append((a, b))
    for a, b in kept:  # nothing that was handed out was overwritten
        assert torch.equal(a.index, b.index.cpu())
        assert torch.equal(a.labels, b.labels.cpu())
        assert len(a.images) == len(b.images)
        assert all(torch.equal(x, y.cpu()) for x, y in zip(a.images, b.images, strict=True))


@needs_cuda
@pytest.mark.parametrize("image", [RandomResizedCrop(32), PadCrop(32), TWO, SEVERAL])
def test_resident_batches_on_a_gpu(digits, image):
    options = {"order": "random", "crop": image, "seed": 3}
    host = ResidentLoader(digits["train"], 24, **options)
    for a, b in zip(
        host, ResidentLoader(digits["train"], 24, device="cuda", **options), strict=True
    ):
        assert torch.equal(a.index, b.index.cpu())
        assert torch.equal(a.labels, b.labels.cpu())
        for x, y in zip(a.images, b.images, strict=True):
            assert (x.int() - y.cpu().int()).abs().max() <= 1, (
                "pixels differ by more than one level"
            )
