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
