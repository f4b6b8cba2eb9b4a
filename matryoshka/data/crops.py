"""Which part of every image a batch shows: pure functions of (seed, epoch, sample index).

A kind of crop has `size`, the side of its square output in pixels, `crops(...)`, what the native
decoder takes, and `exact`: whether pixels must be those of the whole decoded image, or may be a
little off where that is faster. The result is the same for any number of threads and ranks, and
after a resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from matryoshka.data import _native


@dataclass(frozen=True)
class RandomResizedCrop:
    """Random area and aspect ratio as in Szegedy et al. 2014 (arXiv 1409.4842), then a flip with
    probability `flip`.

    ValueError for a size, scale, ratio or probability that makes no sense.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={self.scale}: expected 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio={self.ratio}: expected 0 < low <= high")
        _check_flip(self.flip)

    def crops(
        self, width: np.ndarray, height: np.ndarray, index: np.ndarray, seed: int, epoch: int
    ) -> np.ndarray:
        """int32 [B, 5] rows (x, y, w, h, flip)."""
        return _native.random_crops(
            width, height, index, seed, epoch, self.scale, self.ratio, self.flip
        )


@dataclass(frozen=True)
class CenterCrop:
    """The central square of `ratio` x the shorter side (224/256 as in ImageNet evaluation), resized
    to `size`.
    """

    size: int
    ratio: float = 224 / 256
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: expected 0 < ratio <= 1")

    def crops(
        self, width: np.ndarray, height: np.ndarray, index: np.ndarray, seed: int, epoch: int
    ) -> np.ndarray:
        """int32 [B, 5] rows (x, y, w, h, 0)."""
        return _native.center_crops(width, height, self.ratio)


@dataclass(frozen=True)
class PadCrop:
    """The augmentation of CIFAR: `padding` black pixels around the image, a random window of
    `size`, a flip.

    An image of another size is resized to size x size first.
    """

    size: int
    padding: int = 4
    flip: float = 0.5
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_flip(self.flip)
        if not 0 <= self.padding <= self.size:
            raise ValueError(f"padding={self.padding}: expected 0 to {self.size} pixels")

    def crops(
        self, width: np.ndarray, height: np.ndarray, index: np.ndarray, seed: int, epoch: int
    ) -> np.ndarray:
        """int32 [B, 5] rows (0, 0, width, height, 0): the window moves when the image has its size."""
        return whole_images(width, height)

    def windows(self, index: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """int32 [B, 5] rows (x, y, size, size, flip) inside the padded images; x, y from 0 to 2 x
        padding.
        """
        side = np.full(len(index), self.size + 2 * self.padding, np.int32)
        area = (
            self.size / (self.size + 2 * self.padding)
        ) ** 2  # so that every drawn crop is size x size
        return _native.random_crops(
            side, side, index, seed, epoch, (area, area), (1.0, 1.0), self.flip
        )

    def shift(self, images: np.ndarray, windows: np.ndarray) -> None:
        """Cut `windows` out of the padded `images`, uint8 [B, size, size, 3], in place."""
        size, edge = self.size, self.padding
        padded = np.zeros((size + 2 * edge, size + 2 * edge, 3), np.uint8)
        for image, (x, y, _, _, flip) in zip(images, windows.tolist(), strict=True):
            padded[edge : edge + size, edge : edge + size] = image
            window = padded[y : y + size, x : x + size]
            image[...] = window[:, ::-1] if flip else window


Crop = RandomResizedCrop | CenterCrop | PadCrop


def whole_images(width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """int32 [B, 5] rows (0, 0, width, height, 0)."""
    zero = np.zeros_like(width)
    return np.stack([zero, zero, width, height, zero], axis=1, dtype=np.int32)


def _check_size(size: int) -> None:
    if not 1 <= size <= 16384:
        raise ValueError(f"size={size}: expected 1 to 16384 pixels")


def _check_flip(flip: float) -> None:
    if not 0 <= flip <= 1:
        raise ValueError(f"flip={flip}: expected a probability")


EVALUATION_CROP = CenterCrop(224)
