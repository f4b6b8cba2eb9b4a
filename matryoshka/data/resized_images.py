"""Upstream's evaluation images: shorter side resized to 256 pixels (Pillow, bilinear), central 224
pixels cut out.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from matryoshka.data import CenterCrop, Loader
from matryoshka.data.layout import JPG, Samples
from matryoshka.environment import available_cores

RESIZE, CROP = 256, 224
_CORRUPT = 1  # the native decoder's status for damaged bytes


class ResizedImages(Loader):
    """A Loader whose batches are decoded and resized by Pillow, with the numbers of torchvision's
    transforms.
    """

    def __init__(self, path, batch_size: int, **options) -> None:
        super().__init__(path, batch_size, image=CenterCrop(CROP), **options)
        self._threads = ThreadPoolExecutor(
            options.get("num_workers") or available_cores(), "matryoshka-pillow"
        )

    def _decode(
        self, samples: Samples, crops: np.ndarray, images: np.ndarray, exact: bool = True
    ) -> np.ndarray:
        def fill(b: int) -> int:
            start, size = int(samples.offset[b]), int(samples.size[b])
            stored = np.asarray(samples.data)[start : start + size]
            try:
                if samples.mode[b] == JPG:
                    picture = Image.open(
                        io.BytesIO(stored.tobytes()), formats=("JPEG", "MPO")
                    ).convert("RGB")
                else:
                    picture = Image.fromarray(
                        stored.reshape(int(samples.height[b]), int(samples.width[b]), 3)
                    )
                images[b] = resize_and_crop(picture)
            except Exception:  # a hostile file makes Pillow raise nearly anything
                return _CORRUPT
            return 0

        return np.fromiter(self._threads.map(fill, range(len(images))), np.uint8, len(images))


def resize_and_crop(picture: Image.Image) -> np.ndarray:
    """uint8 [224, 224, 3] of an RGB picture: torchvision's Resize(256), CenterCrop(224)."""
    short = min(picture.size)
    width, height = (
        RESIZE if side == short else int(RESIZE * side / short) for side in picture.size
    )
    left, top = round((width - CROP) / 2), round((height - CROP) / 2)
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + CROP, top + CROP)))
