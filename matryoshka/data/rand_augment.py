"""RandAugment on the device, in batches: uint8 [B, H, W, 3] -> uint8 [B, H, W, 3].

All numbers are drawn on the host, from the given generator. The strengths are shares of the
picture or of the range of its values, so that one magnitude suits every size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Number = float | np.ndarray  # one number for all images, or [n]
# uint8 [n, H, W, 3], float [n] -> uint8 [n, H, W, 3]
Operation = Callable[[Tensor, np.ndarray], Tensor]


def rand_augment(
    images: Tensor, magnitude: float, rng: np.random.Generator, ops: int = 2
) -> Tensor:
    """RandAugment (Cubuk et al. 2020, arXiv 1909.13719): `ops` random operations for each image.

    images: uint8 [B, H, W, 3], as the result. magnitude: 0 (unchanged) to 10, the paper's scale;
    torchvision's scale ends at 30, with the same strengths. Every operation grows stronger with it.
    An operation that would leave one colour in a picture is not applied to it. ValueError outside
    of this range.
    """
    if not 0 <= magnitude <= 10:
        raise ValueError(f"magnitude={magnitude}: expected 0 to 10")
    if magnitude == 0:
        return images
    for _ in range(ops):
        operations = rng.integers(len(OPERATIONS), size=len(images))
        signs = 1 - 2 * rng.integers(2, size=len(images))
        after = distorted(images, operations, signs * (magnitude / 10))
        # Posterize leaves nothing of a picture that brightness has darkened to a tenth: one of
        # 10,000 pictures at magnitude 9 would be blank.
        images = torch.where(_has_one_colour(after), images, after)
    return images


def _has_one_colour(images: Tensor) -> Tensor:
    """Whether all pixels of a picture are equal, bool [B, 1, 1, 1]."""
    differs = (images != images[:, :1, :1]).flatten(1).any(1)
    return ~differs[:, None, None, None]


def distorted(images: Tensor, operations: np.ndarray, levels: np.ndarray) -> Tensor:
    """Apply operation number `operations[i]` of OPERATIONS to image i.

    images: uint8 [B, H, W, 3], as the result. operations: integers [B]. levels: float [B], -1 to 1;
    the sign affects geometry and enhancement only.
    """
    return one_for_each(images, OPERATIONS, operations, levels)


def one_for_each(
    images: Tensor, table: Mapping[str, Operation], operations: np.ndarray, levels: np.ndarray
) -> Tensor:
    """Apply operation number `operations[i]` of `table` to image i, at levels[i].

    images: uint8 [B, H, W, 3], as the result. operations: integers [B]. levels: float [B].
    """
    # sorted, so that each operation processes all of its images in one call
    order = np.argsort(operations, kind="stable")
    # One copy to the device for both permutations.
    to_sorted, to_original = _on_device(np.stack([order, np.argsort(order)]), images)
    images = images[to_sorted]
    levels = levels[order]
    ends = np.searchsorted(operations[order], np.arange(len(table) + 1)).tolist()
    for k, operation in enumerate(table.values()):
        own = slice(ends[k], ends[k + 1])
        if own.start < own.stop:
            images[own] = operation(images[own], levels[own])
    return images[to_original]


# AutoAugment (Cubuk et al. 2019, arXiv 1805.09501) gives 150 pixels for images of 331; as a share
# it suits every size.
SHIFT = 150 / 331  # of the image's side, at the highest level

# With Pillow's arithmetic. Not torchvision's functionals: they take one level for all images, and
# its affine and sharpness copy constants from the host, which waits for the device.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda images, levels: images,
    "shear_x": lambda images, levels: _affine(images, (1, 0.3 * levels, 0), (0, 1, 0)),
    "shear_y": lambda images, levels: _affine(images, (1, 0, 0), (0.3 * levels, 1, 0)),
    "translate_x": lambda images, levels: _affine(
        images, (1, 0, -SHIFT * images.shape[2] * levels), (0, 1, 0)
    ),
    "translate_y": lambda images, levels: _affine(
        images, (1, 0, 0), (0, 1, -SHIFT * images.shape[1] * levels)
    ),
    "rotate": lambda images, levels: _rotated(images, np.radians(30 * levels)),
    "brightness": lambda images, levels: _away_from(torch.zeros_like(images), images, levels),
    "color": lambda images, levels: _away_from(grey(images), images, levels),
    "contrast": lambda images, levels: _away_from(mean_grey(images), images, levels),
    "sharpness": lambda images, levels: _away_from(_smooth(images), images, levels),
    "posterize": lambda images, levels: (
        images & per_image(256 - 2 ** np.round(4 * abs(levels)), images, np.uint8)
    ),
    "solarize": lambda images, levels: torch.where(
        images < per_image(255 * (1 - abs(levels)), images), images, ~images
    ),
    "autocontrast": lambda images, levels: _torchvision("autocontrast", images),
    "equalize": lambda images, levels: _torchvision("equalize", images),
}


def _on_device(numbers: np.ndarray, images: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(images.device, non_blocking=True)


def per_image(numbers: np.ndarray, images: Tensor, dtype: type = np.float32) -> Tensor:
    """One number per image on the device, [n, 1, 1, 1]."""
    return _on_device(numbers.astype(dtype), images).view(-1, 1, 1, 1)


def _affine(images: Tensor, column: tuple[Number, ...], row: tuple[Number, ...]) -> Tensor:
    """Affine transform with nearest-neighbour sampling; black outside.

    The output pixel with its centre at (x, y) is the input pixel that contains the point (column .
    (x, y, 1), row . (x, y, 1)); coordinates are in pixels from the image's corner.
    """
    n, height, width, _ = images.shape
    coefficients = [np.broadcast_to(number, n) for number in (*column, *row)]
    matrix = np.stack(coefficients).astype(np.float32)
    a, b, c, d, e, f = _on_device(matrix, images).view(6, n, 1, 1)
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device)[:, None] + 0.5
    u = (a * x + b * y + c).floor().long()  # [n, H, W]
    v = (d * x + e * y + f).floor().long()
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    which = torch.arange(n, device=images.device)[:, None, None]
    return images[which, v.clamp(0, height - 1), u.clamp(0, width - 1)] * inside[..., None]


def _rotated(images: Tensor, angle: np.ndarray) -> Tensor:
    """Rotate about the centre, anticlockwise, by `angle` radians [n]."""
    cos = np.cos(angle)
    sin = np.sin(angle)
    x = images.shape[2] / 2
    y = images.shape[1] / 2
    return _affine(images, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))


def _away_from(plain: Tensor, images: Tensor, levels: np.ndarray) -> Tensor:
    """Pillow's ImageEnhance: extrapolate away from `plain` for positive levels, interpolate towards
    it for negative ones.
    """
    return blended(plain, images, 1 + 0.9 * levels)


def blended(plain: Tensor, images: Tensor, factors: np.ndarray) -> Tensor:
    """plain + factor x (images - plain), clamped: uint8 [n, H, W, 3]. factors: float [n]."""
    plain = plain.int()
    enhanced = plain + per_image(factors, images) * (images - plain)
    return enhanced.clamp_(0, 255).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """Pillow's mode "L" (ITU-R 601-2 luma in 16-bit fixed point), int32 [n, H, W, 1]."""
    red, green, blue = images.int().split(1, dim=3)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def mean_grey(images: Tensor) -> Tensor:
    """The rounded mean, [n, 1, 1, 1]; integer sums do not depend on the order of addition."""
    pixels = images.shape[1] * images.shape[2]
    return (2 * grey(images).sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)


def _smooth(images: Tensor) -> Tensor:
    """Pillow's SMOOTH: the mean of 3 x 3 pixels, the middle one with weight 5; border pixels are
    unchanged.
    """
    if min(images.shape[1:3]) < 3:
        return images
    planes = images.permute(0, 3, 1, 2).float()
    sums = F.avg_pool2d(planes, 3, 1, divisor_override=1) + 4 * planes[:, :, 1:-1, 1:-1]
    smooth = images.clone()
    smooth[:, 1:-1, 1:-1] = (sums / 13 + 0.5).to(torch.uint8).permute(0, 2, 3, 1)
    return smooth


def _torchvision(name: str, images: Tensor) -> Tensor:
    # Imported on use: it takes seconds, which programs without RandAugment should not spend.
    from torchvision.transforms.v2 import functional

    return getattr(functional, name)(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
