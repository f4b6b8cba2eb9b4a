"""Memory for decoded pictures, shared by all workers of the search page.

    with memory.taken(decoding_bytes(data)):
        pixels = decode_image(data).pixels

A file of 6 kB may hold 50 million pixels. What a picture takes is known from its header, before any
of it is decoded; one that would exceed the budget waits for the others, and is refused after WAIT.
"""

from __future__ import annotations

import ctypes
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from matryoshka.search_page.refusal import Refusal

BUDGET = 512 << 20  # bytes of pixels that are decoded at the same time
WAIT = 3.0  # seconds
LARGE = 4 << 20  # bytes; freed memory of smaller pictures is not returned at once
# Peak bytes for a pixel, measured. The result has 3, Pillow's own pixels up to 4, and the crop of a
# model's preprocessing a copy of them. libjpeg keeps the coefficients of a progressive file, 2
# bytes for each of its components.
PLAIN = 10
PROGRESSIVE_CMYK = 16
WEBP = 24  # libwebp holds three frames of 4 bytes, for animations


def decoding_bytes(data: bytes) -> int:
    """Bytes that decoding an image file takes, from its header; 0 if it has no valid one.

    Such files are refused by the decoder.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            each = PLAIN
            if image.format == "WEBP":
                each = WEBP
            elif image.mode == "CMYK" and image.info.get("progressive"):
                each = PROGRESSIVE_CMYK
            return width * height * each
    except Exception:  # hostile files make Pillow raise many types
        return 0


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps up to 32 MB for each thread that has decoded.

    Elsewhere nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PixelMemory:
    """A budget of bytes that threads take and return."""

    def __init__(self, budget: int = BUDGET, wait: float = WAIT) -> None:
        self.budget = budget
        self.wait = wait
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Hold `count` bytes. Refusal: 413 for more than the budget, 503 if others hold it."""
        if count > self.budget:
            raise Refusal(413, "the picture has too many pixels for this server; make it smaller")
        with self._changed:
            has_room = self._changed.wait_for(
                lambda: self._taken + count <= self.budget, timeout=self.wait
            )
            if not has_room:
                raise Refusal(503, "the server decodes other large pictures; try again in a moment")
            self._taken += count
        try:
            yield
        finally:
            if count >= LARGE:
                _give_back()
            with self._changed:
                self._taken -= count
                self._changed.notify_all()
