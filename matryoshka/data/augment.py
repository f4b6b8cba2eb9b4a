"""Batched augmentation on the device: images arrive as uint8 and become floats there.

Random operations draw all their numbers on the host, from the given generator: they never wait for
the device, and the result is a pure function of the arguments and the generator's state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Number = float | np.ndarray  # one number for all images, or [n]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of an evaluation; stored in every checkpoint."""

    size: int = 224  # pixels, square
    ratio: float = 224 / 256  # side of the central crop / shorter side of the image
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def normalise(
    images: Tensor,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(x / 255 - mean) / std: uint8 [B, H, W, 3] -> `dtype` [B, 3, H, W], channels_last."""
    scale, shift = _scale_and_shift(mean, std, images.device)
    # a permuted NHWC tensor is channels_last already: the conversion to float is the only copy
    return torch.addcmul(shift, images.permute(0, 3, 1, 2).float(), scale).to(dtype)


@cache
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scale and shift, [1, 3, 1, 1] each. Cached: creating them would copy from the host, and so
    wait for the device, in every step.
    """
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale.view(1, 3, 1, 1), shift.view(1, 3, 1, 1)


def resized_crops(images: Tensor, crops: Tensor, size: int) -> Tensor:
    """Crop and resize images of one size: uint8 [B, H, W, 3] -> uint8 [B, size, size, 3].

    crops: integers [B, 5], rows (x, y, w, h, flip) inside the images. Uses the filter of the native
    decoder, area averaging where an axis shrinks and bilinear where it grows, as two batched matrix
    products. Pixels may differ by one level from the native decoder, which uses fixed point and
    rounds between its two passes.
    """
    b, height, width, _ = images.shape
    x, y, w, h, flip = crops.long().unbind(1)
    rows = _resize_weights(y, h, height, size)  # [B, size, H]
    columns = _resize_weights(x, w, width, size)  # [B, size, W]
    columns = torch.where(flip.bool()[:, None, None], columns.flip(1), columns)
    # Rows first, then columns: the filter is separable, so two small products replace one of [size
    # * size, H * W] weights.
    half = torch.bmm(rows, images.float().view(b, height, width * 3)).view(b, size, width, 3)
    half = half.transpose(1, 2).reshape(b, width, size * 3)
    whole = torch.bmm(columns, half).view(b, size, size, 3).transpose(1, 2)  # [B, y, x, 3]
    return whole.add(0.5).clamp_(0, 255).to(torch.uint8).contiguous()


def _resize_weights(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Weights of a resize along one axis, float32 [B, target, source].

    Row i holds the weight of each source pixel in target pixel i, when the pixels [start, start +
    length) are resized to `target`. start, length: int64 [B].
    """
    i = torch.arange(target, device=start.device)[None, :, None]
    j = torch.arange(source, device=start.device)[None, None, :]
    j = j - start[:, None, None]  # relative to the crop's edge
    step = length[:, None, None] / target
    low = i * step
    high = (i + 1) * step
    # Shrinking: the part of the target pixel [low, high) that source pixel j covers.
    area = (torch.minimum(j + 1, high) - torch.maximum(j, low)).clamp_(min=0) / step
    # Enlarging: pixel centres are at + 0.5 on both scales; beyond the crop its edge pixel repeats.
    centre = ((i + 0.5) * step - 0.5).clamp_(min=0).minimum(length[:, None, None] - 1)
    linear = (1 - (j - centre).abs()).clamp_(min=0)
    return torch.where(step >= 1, area, linear)


def shifted(images: Tensor, windows: Tensor, padding: int) -> Tensor:
    """Pad images, uint8 [B, S, S, 3], with `padding` black pixels and cut out `windows`.

    windows: integers [B, 5], as PadCrop.windows returns them.
    """
    b, size = images.shape[:2]
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    x, y, _, _, flip = windows.long().unbind(1)
    steps = torch.arange(size, device=images.device)
    across = torch.where(flip.bool()[:, None], steps.flip(0), steps)
    which = torch.arange(b, device=images.device)[:, None, None]
    return padded[which, (y[:, None] + steps)[:, :, None], (x[:, None] + across)[:, None, :]]


# ---------------------------------------------------------------- mixup, cutmix


def step_rng(seed: int, step: int, rank: int) -> np.random.Generator:
    """The generator of one step on one rank, the same after a resume.

    Steps and ranks have disjoint streams: the step is in the upper half of the counter, the rank in
    the key. The last word of the counter is 1 here and 0 in the streams of order.py.
    """
    counter = np.array([0, 0, step, 1], dtype=np.uint64)
    key = np.array([seed, rank], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


class Mixed(NamedTuple):
    """A batch of mixtures of two images: the target is share x labels + (1 - share) x other."""

    images: Tensor  # [B, 3, H, W]
    labels: Tensor  # int64 [B]
    other: Tensor  # int64 [B]
    share: float


def mix(
    images: Tensor, labels: Tensor, mixup: float, cutmix: float, rng: np.random.Generator
) -> Mixed:
    """Mix each image with the one before it in the batch, the first with the last.

    mixup: the weighted mean of both (Zhang et al. 2018, arXiv 1710.09412). cutmix: a rectangle of
    the other image, clipped to the image, whose area decides the share (Yun et al. 2019, arXiv
    1905.04899). Each value is the alpha of the share's distribution Beta(alpha, alpha), 0 for off;
    if both are on, a batch uses one of them with probability 1/2.

    images: float [B, 3, H, W], whose memory layout is kept. labels: int64 [B].
    """
    if not mixup and not cutmix:
        return Mixed(images, labels, labels, 1.0)
    if mixup and not (cutmix and rng.random() < 0.5):
        share = float(rng.beta(mixup, mixup))
        mixed = images * share
        mixed[1:].add_(images[:-1], alpha=1 - share)  # not roll, which drops channels_last on CUDA
        mixed[:1].add_(images[-1:], alpha=1 - share)
        return Mixed(mixed, labels, labels.roll(1), share)
    height, width = images.shape[2:]
    # A rectangle of the image's shape whose area, before clipping, is 1 - share (CutMix, section
    # 3.1).
    side = (1 - float(rng.beta(cutmix, cutmix))) ** 0.5
    rows = _interval(height, side, rng)
    columns = _interval(width, side, rng)
    mixed = images.clone()
    mixed[1:, :, rows, columns] = images[:-1, :, rows, columns]
    mixed[:1, :, rows, columns] = images[-1:, :, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Mixed(mixed, labels, labels.roll(1), 1 - area / (height * width))


def _interval(length: int, part: float, rng: np.random.Generator) -> slice:
    """`part` of `length` pixels around a uniformly drawn centre, clipped."""
    size = int(length * part)
    start = int(rng.integers(length)) - size // 2
    return slice(max(start, 0), min(start + size, length))


def mixed_loss(
    loss_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], logits: Tensor, mixed: Mixed
) -> tuple[Tensor, Tensor]:
    """The loss of mixed targets: share x loss_of(logits, labels) + (1 - share) x loss_of(logits,
    other).

    loss_of returns the scalar and the losses per prefix [G], and so does this.
    """
    loss, per_prefix = loss_of(logits, mixed.labels)
    if mixed.share == 1:
        return loss, per_prefix
    other, other_per_prefix = loss_of(logits, mixed.other)
    share = mixed.share
    return share * loss + (1 - share) * other, share * per_prefix + (1 - share) * other_per_prefix


# ---------------------------------------------------------------- RandAugment


def rand_augment(images: Tensor, magnitude: float, rng: np.random.Generator) -> Tensor:
    """RandAugment (Cubuk et al. 2020, arXiv 1909.13719): two random operations for each image.

    images: uint8 [B, H, W, 3], as the result. magnitude: 0 (unchanged) to 10, the paper's scale;
    torchvision's scale ends at 30, with the same strengths. Every operation grows stronger with it.
    ValueError outside of this range.
    """
    if not 0 <= magnitude <= 10:
        raise ValueError(f"magnitude={magnitude}: expected 0 to 10")
    if magnitude == 0:
        return images
    for _ in range(2):
        operations = rng.integers(len(OPERATIONS), size=len(images))
        signs = 1 - 2 * rng.integers(2, size=len(images))
        images = distorted(images, operations, signs * (magnitude / 10))
    return images


def distorted(images: Tensor, operations: np.ndarray, levels: np.ndarray) -> Tensor:
    """Apply operation number `operations[i]` of OPERATIONS to image i.

    images: uint8 [B, H, W, 3], as the result. operations: integers [B]. levels: float [B], -1 to 1;
    the sign affects geometry and enhancement only.
    """
    # sorted, so that each operation processes all of its images in one call
    order = np.argsort(operations, kind="stable")
    # One copy to the device for both permutations.
    to_sorted, to_original = _on_device(np.stack([order, np.argsort(order)]), images)
    images = images[to_sorted]
    levels = levels[order]
    ends = np.searchsorted(operations[order], np.arange(len(OPERATIONS) + 1)).tolist()
    for k, operation in enumerate(OPERATIONS.values()):
        own = slice(ends[k], ends[k + 1])
        if own.start < own.stop:
            images[own] = operation(images[own], levels[own])
    return images[to_original]


# AutoAugment (Cubuk et al. 2019, arXiv 1805.09501) gives 150 pixels for images of 331; as a share
# it suits every size.
SHIFT = 150 / 331  # of the image's side, at the highest level

# uint8 [n, H, W, 3], float [n] -> uint8 [n, H, W, 3], with Pillow's arithmetic. Not torchvision's
# functionals: they take one level for all images, and its affine and sharpness copy constants from
# the host, which waits for the device.
OPERATIONS: dict[str, Callable[[Tensor, np.ndarray], Tensor]] = {
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
    "color": lambda images, levels: _away_from(_grey(images), images, levels),
    "contrast": lambda images, levels: _away_from(_mean_grey(images), images, levels),
    "sharpness": lambda images, levels: _away_from(_smooth(images), images, levels),
    "posterize": lambda images, levels: (
        images & _each(256 - 2 ** np.round(4 * abs(levels)), images, np.uint8)
    ),
    "solarize": lambda images, levels: torch.where(
        images < _each(255 * (1 - abs(levels)), images), images, ~images
    ),
    "autocontrast": lambda images, levels: _torchvision("autocontrast", images),
    "equalize": lambda images, levels: _torchvision("equalize", images),
}


def _on_device(numbers: np.ndarray, images: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(images.device, non_blocking=True)


def _each(numbers: np.ndarray, images: Tensor, dtype: type = np.float32) -> Tensor:
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
    plain = plain.int()
    enhanced = plain + _each(1 + 0.9 * levels, images) * (images - plain)
    return enhanced.clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Pillow's mode "L" (ITU-R 601-2 luma in 16-bit fixed point), int32 [n, H, W, 1]."""
    red, green, blue = images.int().split(1, dim=3)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _mean_grey(images: Tensor) -> Tensor:
    """The rounded mean, [n, 1, 1, 1]; integer sums do not depend on the order of addition."""
    pixels = images.shape[1] * images.shape[2]
    return (2 * _grey(images).sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)


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
