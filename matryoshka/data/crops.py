"""Crop geometry as pure functions of (seed, epoch, sample index, view).

A crop class has `size`, the side of its square output in pixels; `crops(...)`, the input of the
native decoder; and `exact`: True if pixels must equal those of a full decode, False if they may
differ slightly where that is faster. Results do not depend on the number of threads or ranks, nor
on resumes. Several crops of one image are its views 0, 1, ...; view 0 is what a single crop draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from matryoshka.arrays import integers, takes
from matryoshka.data import _native


@dataclass(frozen=True)
class RandomResizedCrop:
    """Random area and aspect ratio as in Szegedy et al. 2014 (arXiv 1409.4842, section 6), then a
    flip with probability `flip`.

    scale: range of the crop's area as a fraction of the image's. ratio: range of width / height.
    ValueError for a value outside its legal range.
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

    @takes(width=integers("B"), height=integers("B"), index=integers("B"))
    def crops(
        self,
        width: np.ndarray,
        height: np.ndarray,
        index: np.ndarray,
        seed: int,
        epoch: int,
        *,
        view: int = 0,
    ) -> np.ndarray:
        """int32 [B, 5] rows (x, y, w, h, flip)."""
        return _native.random_crops(
            width,
            height,
            index=index,
            seed=seed,
            epoch=epoch,
            scale=self.scale,
            ratio=self.ratio,
            flip=self.flip,
            view=view,
        )


@dataclass(frozen=True)
class CenterCrop:
    """The central square of `ratio` x the shorter side, resized to `size`.

    The default ratio is that of ImageNet evaluation: shorter side to 256, central 224.
    """

    size: int
    ratio: float = 224 / 256
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: expected 0 < ratio <= 1")

    @takes(width=integers("B"), height=integers("B"), index=integers("B"))
    def crops(
        self, width: np.ndarray, height: np.ndarray, index: np.ndarray, seed: int, epoch: int
    ) -> np.ndarray:
        """int32 [B, 5] rows (x, y, w, h, 0)."""
        return _native.center_crops(width, height, self.ratio)


@dataclass(frozen=True)
class PadCrop:
    """CIFAR's augmentation (He et al. 2015, arXiv 1512.03385, section 4.2): pad the image with
    `padding` black pixels, take a random window of `size`, flip it with probability `flip`.

    An image of another size is first resized to size x size.
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

    @takes(width=integers("B"), height=integers("B"), index=integers("B"))
    def crops(
        self, width: np.ndarray, height: np.ndarray, index: np.ndarray, seed: int, epoch: int
    ) -> np.ndarray:
        """int32 [B, 5] rows (0, 0, width, height, 0): `shift` moves the window after the resize."""
        return whole_images(width, height)

    @takes(index=integers("B"))
    def windows(self, index: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """int32 [B, 5] rows (x, y, size, size, flip) inside the padded images; x and y are 0 to 2 x
        padding.
        """
        side = np.full(len(index), self.size + 2 * self.padding, np.int32)
        # a fixed area and ratio, with which the general function always draws size x size windows
        area = (self.size / (self.size + 2 * self.padding)) ** 2
        return _native.random_crops(
            side,
            side,
            index=index,
            seed=seed,
            epoch=epoch,
            scale=(area, area),
            ratio=(1.0, 1.0),
            flip=self.flip,
        )

    def shift(self, images: np.ndarray, windows: np.ndarray) -> None:
        """Replace `images`, uint8 [B, size, size, 3], by the `windows` of their padded versions."""
        size = self.size
        edge = self.padding
        # One padded buffer serves all images: only its centre changes, the border stays black.
        padded = np.zeros((size + 2 * edge, size + 2 * edge, 3), np.uint8)
        for image, (x, y, _, _, flip) in zip(images, windows.tolist(), strict=True):
            padded[edge : edge + size, edge : edge + size] = image
            window = padded[y : y + size, x : x + size]
            image[...] = window[:, ::-1] if flip else window


Crop = RandomResizedCrop | CenterCrop | PadCrop
Views = tuple[RandomResizedCrop, ...]  # several crops of every image


def as_crop(crop: Crop | Sequence[RandomResizedCrop]) -> Crop | Views:
    """A crop as it is, a sequence of crops as a tuple. ValueError for a sequence that is empty, or
    has a crop that is not random: it would be the same in all views.
    """
    if not isinstance(crop, Sequence):
        return crop
    if not crop:
        raise ValueError("crop=[]: expected one crop or more")
    for view in crop:
        if not isinstance(view, RandomResizedCrop):
            raise ValueError(f"crop: {view} in a list of views; expected RandomResizedCrop only")
    return tuple(crop)


def sizes_of(crop: Crop | Views) -> int | tuple[int, ...]:
    """The output side of a crop, or that of every view."""
    return tuple(view.size for view in crop) if isinstance(crop, tuple) else crop.size


@takes(width=integers("B"), height=integers("B"), index=integers("B"))
def crop_rows(
    crop: Crop | Views,
    width: np.ndarray,
    height: np.ndarray,
    *,
    index: np.ndarray,
    seed: int,
    epoch: int,
) -> np.ndarray:
    """int32 [V, B, 5] rows (x, y, w, h, flip) of all views; V is 1 for a single crop."""
    if not isinstance(crop, tuple):
        return crop.crops(width, height, index, seed, epoch)[None]
    views = [view.crops(width, height, index, seed, epoch, view=v) for v, view in enumerate(crop)]
    return np.stack(views)


@takes(width=integers("B"), height=integers("B"))
def whole_images(width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Crops of whole images: int32 [B, 5] rows (0, 0, width, height, 0)."""
    zero = np.zeros_like(width)
    return np.stack([zero, zero, width, height, zero], axis=1, dtype=np.int32)


def _check_size(size: int) -> None:
    if not 1 <= size <= 16384:
        raise ValueError(f"size={size}: expected 1 to 16384 pixels")


def _check_flip(flip: float) -> None:
    if not 0 <= flip <= 1:
        raise ValueError(f"flip={flip}: expected a probability, 0 to 1")


EVALUATION_CROP = CenterCrop(224)
