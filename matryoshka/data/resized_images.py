"""Upstream's evaluation images: shorter side resized to 256 pixels (Pillow, bilinear), central
224 x 224 pixels.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from matryoshka.data import CenterCrop, Loader
from matryoshka.data.layout import JPG, Samples
from matryoshka.environment import available_cores

RESIZE = 256
CROP = 224
_CORRUPT = 1  # the native decoder's status for damaged bytes


class ResizedImages(Loader):
    """A Loader that decodes and resizes with Pillow: the pixels of torchvision's transforms."""

    def __init__(self, path, batch_size: int, **options) -> None:
        super().__init__(path, batch_size, crop=CenterCrop(CROP), **options)
        threads = options.get("num_workers") or available_cores()
        self._threads = ThreadPoolExecutor(threads, "matryoshka-pillow")

    def _decode(
        self, samples: Samples, crops: np.ndarray, views: list[np.ndarray], exact: bool
    ) -> np.ndarray:
        (images,) = views  # the crop is one

        def fill(b: int) -> int:
            try:
                images[b] = resize_and_crop(_stored_picture(samples, b))
            except Exception:  # Pillow raises exceptions of nearly any type for hostile files
                return _CORRUPT
            return 0

        return np.fromiter(self._threads.map(fill, range(len(images))), np.uint8, len(images))


def _stored_picture(samples: Samples, b: int) -> Image.Image:
    start = int(samples.offset[b])
    size = int(samples.size[b])
    stored = np.asarray(samples.data)[start : start + size]
    if samples.mode[b] == JPG:
        file = io.BytesIO(stored.tobytes())
        # MPO: what Pillow calls the JPEGs of some cameras, with further pictures behind the first
        return Image.open(file, formats=("JPEG", "MPO")).convert("RGB")
    return Image.fromarray(stored.reshape(int(samples.height[b]), int(samples.width[b]), 3))


def resize_and_crop(picture: Image.Image) -> np.ndarray:
    """uint8 [224, 224, 3] of an RGB picture: torchvision's Resize(256), CenterCrop(224)."""
    short = min(picture.size)
    width, height = (
        RESIZE if side == short else int(RESIZE * side / short) for side in picture.size
    )
    # `round` here and `int` above, as in torchvision: other rounding moves the crop by a pixel.
    left = round((width - CROP) / 2)
    top = round((height - CROP) / 2)
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + CROP, top + CROP)))
