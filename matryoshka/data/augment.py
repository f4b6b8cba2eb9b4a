"""Batched augmentation on the device: images arrive as uint8 and become floats there.

Random operations draw all their numbers on the host, from the given generator: they never wait for
the device, and the result is a pure function of the arguments and the generator's state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshka.data.colour_jitter import colour_jitter
from matryoshka.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from matryoshka.data.rand_augment import rand_augment


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
    compiling = torch.compiler.is_compiling()
    scale, shift = (_filled if compiling else _scale_and_shift)(mean, std, images.device)
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


def _filled(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """`_scale_and_shift` for torch.compile, which ignores the cache: filled in on the device."""
    scale = torch.stack([torch.full((), 1 / (255 * s), device=device) for s in std])
    shifts = [-m / s for m, s in zip(mean, std, strict=True)]
    shift = torch.stack([torch.full((), value, device=device) for value in shifts])
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
    share: float | Tensor  # of a compiled step: float32, 0-d, on the device


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
    share = mixed.share
    if not isinstance(share, Tensor) and share == 1:
        return loss, per_prefix
    other, other_per_prefix = loss_of(logits, mixed.other)
    return share * loss + (1 - share) * other, share * per_prefix + (1 - share) * other_per_prefix


# ---------------------------------------------------------------- random erasing

# torchvision's ranges; those of the paper, section 5, are (0.02, 0.4) and (0.3, 1 / 0.3)
ERASED_AREA = (0.02, 0.33)  # as a share of the image
ERASED_RATIO = (0.3, 3.3)  # height / width
_ATTEMPTS = 10  # to draw a rectangle that fits; torchvision's number


def random_erasing(images: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """Erase a random rectangle of each image with this probability (Zhong et al. 2017, arXiv
    1708.04896): its values become 0, the mean of normalised images.

    images: float [B, 3, H, W], whose memory layout is kept.
    """
    height, width = images.shape[2:]
    rectangles = erased_rectangles(len(images), height, width, probability=probability, rng=rng)
    edges = torch.from_numpy(rectangles).to(images.device, non_blocking=True)
    top, left, bottom, right = edges.unbind(1)
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    rows = (y >= top[:, None]) & (y < bottom[:, None])  # [B, H]
    columns = (x >= left[:, None]) & (x < right[:, None])  # [B, W]
    erased = rows[:, None, :, None] & columns[:, None, None, :]  # [B, 1, H, W]
    return images.clone().masked_fill_(erased, 0)  # clone keeps the layout, masked_fill may not


def erased_rectangles(
    n: int, height: int, width: int, *, probability: float, rng: np.random.Generator
) -> np.ndarray:
    """Rows (top, left, bottom, right), int64 [n, 4]; zeros where nothing is erased.

    The area is uniform, the logarithm of the ratio is uniform. A rectangle that does not fit into
    the image is drawn again.
    """
    chosen = rng.random(n) < probability
    tries = n, _ATTEMPTS
    area = rng.uniform(ERASED_AREA[0], ERASED_AREA[1], tries) * height * width
    ratio = np.exp(rng.uniform(np.log(ERASED_RATIO[0]), np.log(ERASED_RATIO[1]), tries))
    heights = np.round(np.sqrt(area * ratio)).astype(np.int64)
    widths = np.round(np.sqrt(area / ratio)).astype(np.int64)
    fits = (heights < height) & (widths < width)
    first = np.arange(n), fits.argmax(axis=1)  # 0 where none fits, which `erased` leaves out
    erased = chosen & fits.any(axis=1)
    h = np.where(erased, heights[first], 0)
    w = np.where(erased, widths[first], 0)
    top = np.floor(rng.random(n) * (height - h + 1)).astype(np.int64)
    left = np.floor(rng.random(n) * (width - w + 1)).astype(np.int64)
    rows = np.stack([top, left, top + h, left + w], axis=1)
    return np.where(erased[:, None], rows, 0)


# ---------------------------------------------------------------- all of them


class Augmentations(Protocol):
    """The options of `augmented`, as section `data` of a training run has them."""

    @property
    def color_jitter(self) -> tuple[float, float, float, float]: ...
    @property
    def randaugment(self) -> float: ...
    @property
    def randaugment_ops(self) -> int: ...
    @property
    def random_erasing(self) -> float: ...
    @property
    def mixup(self) -> float: ...
    @property
    def cutmix(self) -> float: ...


def augmented(
    images: Tensor,
    labels: Tensor,
    options: Augmentations,
    preprocessing: Preprocessing,
    rng: np.random.Generator,
) -> Mixed:
    """A training batch as the network takes it: uint8 [B, H, W, 3] -> float [B, 3, H, W].

    Colour jitter, RandAugment, normalisation, random erasing, then mixup or CutMix; what the
    options leave off draws no random numbers. labels: int64 [B].
    """
    images = changed_pixels(images, options, rng)
    images = normalise(images, preprocessing.mean, preprocessing.std)
    if options.random_erasing:
        images = random_erasing(images, options.random_erasing, rng)
    return mix(images, labels, options.mixup, options.cutmix, rng)


def changed_pixels(images: Tensor, options: Augmentations, rng: np.random.Generator) -> Tensor:
    """The part of `augmented` before the normalisation: uint8 [B, H, W, 3] -> the same."""
    images = colour_jitter(images, options.color_jitter, rng)
    if options.randaugment:
        images = rand_augment(images, options.randaugment, rng, options.randaugment_ops)
    return images


def ends_with_normalisation(options: Augmentations) -> bool:
    """Whether nothing of `augmented` follows the normalisation."""
    return not (options.random_erasing or options.mixup or options.cutmix)
