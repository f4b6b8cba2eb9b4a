"""Random views of images for self-supervised learning, on the device and in batches.

    draws = draw_views(batch.host_index, SIMCLR, seed=0, epoch=3, view=1)
    images = apply_views(batch.images, draws)      # uint8 [B, H, W, 3], as given
    images = normalise(images, mean, std)

A view is what follows the crop: flip, colour jitter, greyscale, blur and solarisation, each with
its probability. What an image gets is a pure function of (seed, epoch, sample, view): it depends on
neither the batch nor the process that the sample is in. Pixels are torchvision's, within a level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshka.arrays import integers, takes
from matryoshka.data.colour_jitter import ADJUSTMENTS
from matryoshka.data.rand_augment import grey, one_for_each, per_image

SOLARISE_FROM = 128  # values of at least half the range are inverted
_DRAWS = 14  # numbers per image and view
# Numbers of a part on a CPU, whose floats stay in its cache: 1.4 times as fast with 224 pixels.
_IN_CACHE = 1 << 21


@dataclass(frozen=True)
class ViewOptions:
    """Probabilities (flip, jitter, grey, blur, solarise) and strengths of a view.

    strengths: of brightness, contrast, saturation and hue, as torchvision's ColorJitter. kernel:
    pixels of the blur's kernel, odd. sigma: lowest and highest standard deviation of the blur.
    """

    flip: float = 0.5
    jitter: float = 0.8
    strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    grey: float = 0.2
    blur: float = 0.0
    kernel: int = 3
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grey", "blur", "solarise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a probability, 0 to 1")
        if min(self.strengths) < 0 or self.strengths[3] > 0.5:
            raise ValueError(
                f"strengths={self.strengths}: expected 0 or more, and at most 0.5 for the hue"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: expected an odd number of pixels")
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise ValueError(f"sigma={self.sigma}: expected two numbers, more than 0, rising")


class ViewDraws(NamedTuple):
    """What each of B images gets: arrays with B rows, on the host."""

    flip: np.ndarray  # bool
    jitter: np.ndarray  # bool
    factors: np.ndarray  # float [B, 4]: of brightness, contrast, saturation; turns of the hue
    order: np.ndarray  # int [B, 4]: the adjustments in the order of their application
    grey: np.ndarray  # bool
    sigma: np.ndarray  # float; 0: no blur
    solarise: np.ndarray  # bool
    kernel: int

    def of(self, part: slice) -> ViewDraws:
        """Those of some of the images."""
        arrays = self._asdict()
        kernel = arrays.pop("kernel")
        return ViewDraws(**{name: rows[part] for name, rows in arrays.items()}, kernel=kernel)


@takes(index=integers("B"))
def draw_views(
    index: np.ndarray, options: ViewOptions, *, seed: int, epoch: int, view: int
) -> ViewDraws:
    """The random numbers of the samples `index`, int [B], for one view."""
    u = uniform_numbers(index, (seed, epoch, view), _DRAWS)  # [B, 14] in [0, 1)
    factors = np.empty((len(u), 4))
    for k, strength in enumerate(options.strengths):
        low, high = max(0.0, 1 - strength), 1 + strength
        if k == 3:
            low, high = -strength, strength
        factors[:, k] = low + (high - low) * u[:, 5 + k]
    low, high = options.sigma
    return ViewDraws(
        flip=u[:, 0] < options.flip,
        jitter=u[:, 1] < options.jitter,
        factors=factors,
        order=np.argsort(u[:, 10:14], axis=1),
        grey=u[:, 2] < options.grey,
        sigma=np.where(u[:, 3] < options.blur, low + (high - low) * u[:, 9], 0.0),
        solarise=u[:, 4] < options.solarise,
        kernel=options.kernel,
    )


@takes(index=integers("B"))
def uniform_numbers(index: np.ndarray, key: tuple[int, ...], count: int) -> np.ndarray:
    """float64 [B, count] in [0, 1), a pure function of each index and the key.

    SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators") of a counter,
    started at a mixture of key and index.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        state = np.asarray(index).astype(np.int64).view(np.uint64)
        for word in key:
            state = _mixed(state + np.uint64(word % 2**64) * _GOLDEN + _GOLDEN)
        counter = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        return (_mixed(state[:, None] + counter) >> np.uint64(11)) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


# ---------------------------------------------------------------- pixels


def apply_views(images: Tensor, draws: ViewDraws) -> Tensor:
    """The views: uint8 [B, H, W, 3] -> uint8 [B, H, W, 3], a new tensor."""
    images = images.clone()
    count = len(images)
    if images.device.type == "cpu" and images.numel() > _IN_CACHE:
        count = max(1, _IN_CACHE * count // images.numel())
    for first in range(0, len(images), max(1, count)):
        part = slice(first, first + count)
        _change(images[part], draws.of(part))
    return images


def _change(images: Tensor, draws: ViewDraws) -> None:
    """Make views of these images, in place."""
    _replace(images, draws.flip, lambda part: part.flip(2))
    jitter = np.flatnonzero(draws.jitter)
    for k in range(draws.order.shape[1]):
        operation = draws.order[jitter, k]
        factors = draws.factors[jitter, operation]
        _replace(
            images,
            draws.jitter,
            lambda part, o=operation, f=factors: one_for_each(part, ADJUSTMENTS, o, f),
        )
    _replace(images, draws.grey, lambda part: grey(part).to(torch.uint8).expand_as(part))
    sigma = draws.sigma[draws.sigma > 0]
    _replace(images, draws.sigma > 0, lambda part: blurred(part, sigma, draws.kernel))
    _replace(images, draws.solarise, solarised)


def _replace(images: Tensor, chosen: np.ndarray, operation: Callable[[Tensor], Tensor]) -> None:
    """Replace the chosen images, bool [B], by what the operation makes of them."""
    rows = np.flatnonzero(chosen)
    if len(rows):
        rows = torch.from_numpy(rows).to(images.device, non_blocking=True)
        images[rows] = operation(images[rows])


def solarised(images: Tensor) -> Tensor:
    """Invert the values from SOLARISE_FROM on; uint8 [n, H, W, 3]."""
    return torch.where(images >= SOLARISE_FROM, ~images, images)


def blurred(images: Tensor, sigma: np.ndarray, kernel: int) -> Tensor:
    """Gaussian blur, uint8 [n, H, W, 3], with a standard deviation for each image, float [n].

    kernel: odd number of taps; the border is mirrored. ValueError for images that are not larger
    than half of the kernel.
    """
    reach = kernel // 2
    if reach >= min(images.shape[1:3]):
        raise ValueError(
            f"blur with a kernel of {kernel} pixels: images of {images.shape[2]}x{images.shape[1]} "
            "are too small"
        )
    distance = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (distance / np.asarray(sigma)[:, None]) ** 2)
    weights /= weights.sum(1, keepdims=True)  # [n, kernel]
    taps = [per_image(weights[:, k], images) for k in range(kernel)]
    # Sums of shifted images: each has a kernel of its own, which a convolution does in groups.
    pixels = images.float()
    for axis in (1, 2):
        pixels = _mirrored(pixels, axis, reach)
        size = pixels.shape[axis] - 2 * reach
        total = taps[0] * pixels.narrow(axis, 0, size)
        for k in range(1, kernel):
            total += taps[k] * pixels.narrow(axis, k, size)
        pixels = total
    return pixels.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _mirrored(pixels: Tensor, axis: int, reach: int) -> Tensor:
    """[n, H, W, 3] with `reach` more rows (axis 1) or columns (2) on both sides."""
    moved = pixels.movedim(axis, 3)  # F.pad mirrors the last axis
    padded = F.pad(moved, (reach, reach, 0, 0), mode="reflect")
    return padded.movedim(3, axis)


__all__ = [
    "ViewDraws",
    "ViewOptions",
    "apply_views",
    "blurred",
    "draw_views",
    "solarised",
    "uniform_numbers",
]
