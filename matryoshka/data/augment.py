"""Batched operations on the device; uint8 travels there, floats are made there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What evaluation does to an image before the model; kept in every checkpoint."""

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
    """uint8 [B, H, W, 3] -> (x / 255 - mean) / std, [B, 3, H, W] in channels_last memory."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(1, 3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(1, 3, 1, 1)
    # a permuted NHWC tensor is channels_last already: no copy but the conversion to float
    return torch.addcmul(shift, images.permute(0, 3, 1, 2).float(), scale).to(dtype)


def resized_crops(images: Tensor, crops: Tensor, size: int) -> Tensor:
    """Crops of images of one size, resized: uint8 [B, H, W, 3] -> uint8 [B, size, size, 3].

    crops: integers [B, 5], rows (x, y, w, h, flip) inside the images. Area averaging where an axis shrinks,
    bilinear where it grows: the weights of the native decoder, here as two batched matrix products. The native
    decoder rounds between its two passes and works in fixed point: pixels may differ by one level.
    """
    b, height, width, _ = images.shape
    x, y, w, h, flip = crops.long().unbind(1)
    rows = _resize_weights(y, h, height, size)  # [B, size, H]
    columns = _resize_weights(x, w, width, size)  # [B, size, W]
    columns = torch.where(flip.bool()[:, None, None], columns.flip(1), columns)
    half = torch.bmm(rows, images.float().view(b, height, width * 3)).view(b, size, width, 3)
    half = half.transpose(1, 2).reshape(b, width, size * 3)
    whole = torch.bmm(columns, half).view(b, size, size, 3).transpose(1, 2)  # [B, y, x, 3]
    return whole.add(0.5).clamp_(0, 255).to(torch.uint8).contiguous()


def _resize_weights(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """float32 [B, target, source]: the share of each source pixel in each pixel of the resized [start, start + length).

    start, length: int64 [B].
    """
    i = torch.arange(target, device=start.device)[None, :, None]
    j = torch.arange(source, device=start.device)[None, None, :] - start[:, None, None]  # from the crop's edge
    step = length[:, None, None] / target
    low, high = i * step, (i + 1) * step
    area = (torch.minimum(j + 1, high) - torch.maximum(j, low)).clamp_(min=0) / step
    centre = ((i + 0.5) * step - 0.5).clamp_(min=0).minimum(length[:, None, None] - 1)
    linear = (1 - (j - centre).abs()).clamp_(min=0)
    return torch.where(step >= 1, area, linear)


def shifted(images: Tensor, windows: Tensor, padding: int) -> Tensor:
    """uint8 [B, S, S, 3] with `padding` black pixels around, cut to `windows`: PadCrop's, integers [B, 5]."""
    b, size = images.shape[:2]
    padded = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
    x, y, _, _, flip = windows.long().unbind(1)
    steps = torch.arange(size, device=images.device)
    across = torch.where(flip.bool()[:, None], steps.flip(0), steps)
    which = torch.arange(b, device=images.device)[:, None, None]
    return padded[which, (y[:, None] + steps)[:, :, None], (x[:, None] + across)[:, None, :]]
