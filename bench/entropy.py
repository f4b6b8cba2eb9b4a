"""Bytes of a JPEG stream that must be entropy-decoded for a crop: a lower bound for decoders."""

from __future__ import annotations

import re

import numpy as np

from matryoshka.data import BetonFile, RandomResizedCrop
from matryoshka.data.dataset import Dataset
from matryoshka.data.layout import Samples

MARGIN = 2  # pixels around the crop that chroma upsampling reads
_RESTART = re.compile(b"\xff[\xd0-\xd7]")


def needed_parts(stream: bytes, crop: tuple[int, int, int, int]) -> list[tuple[int, int]]:
    """(first byte, end) of the segments between restart markers that `crop` (x, y, w, h) touches.

    Without markers, everything down to the crop's last row is needed; all rows are assumed to have
    the same number of bytes.
    """
    width, height, unit_w, unit_h, interval, start = _layout(stream)
    x, y, w, h = crop
    columns = -(-width // unit_w)
    rows = -(-height // unit_h)
    # the MCUs that the crop touches, with its margin
    top = max(0, y - MARGIN) // unit_h
    bottom = min(height - 1, y + h - 1 + MARGIN) // unit_h
    left = max(0, x - MARGIN) // unit_w
    right = min(width - 1, x + w - 1 + MARGIN) // unit_w
    # Huffman codes have no index: without markers, decoding starts at the top left.
    if not interval:
        return [(start, start + round((len(stream) - start) * (bottom + 1) / rows))]
    edges = [start, *(match.start() for match in _RESTART.finditer(stream, start)), len(stream)]
    first = np.arange(len(edges) - 1) * interval  # unit number, row by row
    last = np.minimum(first + interval, columns * rows) - 1
    needed = np.zeros(len(first), bool)
    for row in range(top, bottom + 1):
        needed |= (last >= row * columns + left) & (first <= row * columns + right)
    return [(edges[k], edges[k + 1]) for k in np.flatnonzero(needed).tolist()]


def _layout(stream: bytes) -> tuple[int, int, int, int, int, int]:
    """(width, height, MCU width, MCU height, restart interval, first byte after the header)."""
    at = 2
    interval = 0
    width = height = unit_w = unit_h = 0
    while True:
        marker = stream[at + 1]
        size = int.from_bytes(stream[at + 2 : at + 4], "big")
        body = stream[at + 4 : at + 2 + size]
        if marker in (0xC0, 0xC1, 0xC2):  # SOF0 to SOF2
            height = int.from_bytes(body[1:3], "big")
            width = int.from_bytes(body[3:5], "big")
            factors = [body[7 + 3 * k] for k in range(body[5])] if body[5] > 1 else [0x11]
            unit_w = 8 * max(f >> 4 for f in factors)
            unit_h = 8 * max(f & 15 for f in factors)
        elif marker == 0xDD:  # DRI
            interval = int.from_bytes(body[:2], "big")
        at += 2 + size
        if marker == 0xDA:  # SOS
            return width, height, unit_w, unit_h, interval, at


def streams_of(samples: Samples) -> list[bytes]:
    """The stored bytes of every image."""
    places = zip(samples.offset.tolist(), samples.size.tolist(), strict=True)
    return [samples.data[at : at + n].tobytes() for at, n in places]


def needed_by_views(data: Dataset, size: int, views: int) -> tuple[float, float]:
    """Mean bytes needed of a JPEG image for that many RandomResizedCrop(size): (together, with a
    decode for each of them).
    """
    index = np.arange(len(data))
    (samples,) = data.fetch(index)
    streams = streams_of(samples)
    crop = RandomResizedCrop(size)
    rows = [crop.crops(samples.width, samples.height, index, 0, 0, view=v) for v in range(views)]
    together = 0
    apart = 0
    for i, stream in enumerate(streams):
        furthest: dict[int, int] = {}  # first byte of a segment: the end of what is needed of it
        for crops in rows:
            x, y, w, h, _ = crops[i].tolist()
            for start, end in needed_parts(stream, (x, y, w, h)):
                furthest[start] = max(end, furthest.get(start, 0))
                apart += end - start
        together += sum(end - start for start, end in furthest.items())
    return together / len(streams), apart / len(streams)


def mean_needed(data: BetonFile, size: int, epochs: int = 4) -> tuple[float, float]:
    """Mean (bytes needed, bytes stored) of a JPEG image of `data` for RandomResizedCrop(size)."""
    index = np.arange(len(data))
    (samples,) = data.fetch(index)
    streams = streams_of(samples)
    needed = []
    for epoch in range(epochs):
        crops = RandomResizedCrop(size).crops(samples.width, samples.height, index, 0, epoch)
        for stream, (x, y, w, h, _) in zip(streams, crops.tolist(), strict=True):
            parts = needed_parts(stream, (x, y, w, h))
            needed.append(sum(end - start for start, end in parts))
    return float(np.mean(needed)), float(samples.size.mean())
