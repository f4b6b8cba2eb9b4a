"""Random brightness, contrast, saturation and hue, on the device and in batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from matryoshka.data.rand_augment import (
    Operation,
    blended,
    grey,
    mean_grey,
    one_for_each,
    per_image,
)


def hue_turned(images: Tensor, turns: np.ndarray) -> Tensor:
    """Turn the hue of images, uint8 [n, H, W, 3], by `turns` (float [n]; 1 is the whole circle)."""
    pixels = images.float()
    value = pixels.amax(3, keepdim=True)
    chroma = value - pixels.amin(3, keepdim=True)
    red, green, blue = pixels.split(1, dim=3)
    # The hue in sixths of the circle (Smith 1978, "Color gamut transform pairs"); grey has none.
    divisor = chroma.clamp(min=1)
    of_red = (green - blue) / divisor
    of_green = 2 + (blue - red) / divisor
    of_blue = 4 + (red - green) / divisor
    hue = torch.where(value == red, of_red, torch.where(value == green, of_green, of_blue))
    hue = hue + 6 * per_image(turns, images)
    # The inverse: each channel is the value, less the chroma by its distance on the circle.
    phases = torch.cat([hue + 5, hue + 3, hue + 1], dim=3) % 6
    away = torch.minimum(phases, 4 - phases).clamp(0, 1)
    return (value - chroma * away).add_(0.5).clamp_(0, 255).to(torch.uint8)


# In the order of the strengths. factors: float [n]; of hue: turns of the colour wheel.
ADJUSTMENTS: dict[str, Operation] = {
    "brightness": lambda images, factors: blended(torch.zeros_like(images), images, factors),
    "contrast": lambda images, factors: blended(mean_grey(images), images, factors),
    "saturation": lambda images, factors: blended(grey(images), images, factors),
    "hue": hue_turned,
}


def colour_jitter(
    images: Tensor, strengths: tuple[float, float, float, float], rng: np.random.Generator
) -> Tensor:
    """Brightness, contrast, saturation and hue, each changed at random, in an order drawn for each
    image.

    images: uint8 [B, H, W, 3], as the result. strengths: those of torchvision's ColorJitter: the
    factors of the first three are uniform in [max(0, 1 - strength), 1 + strength], the hue turns by
    a uniform part of the colour wheel in [-strength, strength], at most 0.5. 0 is off.
    """
    names = list(ADJUSTMENTS)
    on = np.flatnonzero(strengths)
    if not len(on):
        return images
    b = len(images)
    factors = np.empty((b, len(names)))
    for k, name in enumerate(names):
        middle = 0.0 if name == "hue" else 1.0
        low = middle - strengths[k] if name == "hue" else max(0.0, middle - strengths[k])
        factors[:, k] = rng.uniform(low, middle + strengths[k], b)
    orders = rng.permuted(np.tile(on, (b, 1)), axis=1)  # [B, adjustments that are on]
    for operations in orders.T:
        chosen = factors[np.arange(b), operations]
        images = one_for_each(images, ADJUSTMENTS, operations, chosen)
    return images
