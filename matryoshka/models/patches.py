"""From an image to tokens: patch embeddings and positions of vision transformers.

Every embedding maps images [B, 3, H, W] to tokens [B, N, D], row by row from the top left; H and W
are multiples of the patch. B images, N tokens, D width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cut(images: Tensor, patch: int) -> Tensor:
    """Pixels of square patches: images [B, C, H, W] -> [B, N, patch * patch * C].

    Within a patch: rows, columns, channels, as in published ViTs.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    pieces = images.reshape(batch, channels, rows, patch, columns, patch)
    pieces = pieces.permute(0, 2, 4, 3, 5, 1)  # [B, rows, columns, patch, patch, C]
    return pieces.reshape(batch, rows * columns, patch * patch * channels)


class LinearPatches(nn.Module):
    """A linear map of each patch's pixels (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.project = nn.Linear(3 * patch * patch, dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(cut(images, self.patch))


class DualNormPatches(nn.Module):
    """LayerNorms before and after the linear map (Kumar et al. 2023, arXiv 2302.01327).

    The norms have no parameters of their own.
    """

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        pixels = 3 * patch * patch
        self.patch = patch
        self.norm_pixels = nn.LayerNorm(pixels, elementwise_affine=False)
        self.project = nn.Linear(pixels, dim)
        self.norm_tokens = nn.LayerNorm(dim, elementwise_affine=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm_tokens(self.project(self.norm_pixels(cut(images, self.patch))))


class ShiftedPatches(nn.Module):
    """Shifted patch tokenisation (Lee et al. 2021, arXiv 2112.13492).

    The image and four copies, shifted by half a patch along each diagonal, are concatenated along
    the channels before they are cut: a token sees the neighbourhood of its patch.
    """

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.shift = patch // 2
        pixels = 5 * 3 * patch * patch
        self.norm = nn.LayerNorm(pixels)
        self.project = nn.Linear(pixels, dim)

    def forward(self, images: Tensor) -> Tensor:
        copies = [images]
        for right in (self.shift, -self.shift):
            for down in (self.shift, -self.shift):
                # Positive pads move the picture, negative ones cut what leaves it.
                copies.append(F.pad(images, (right, -right, down, -down)))
        return self.project(self.norm(cut(torch.cat(copies, dim=1), self.patch)))


class ConvTokens(nn.Module):
    """A 3x3 convolution, ReLU and max pool 3x3 of stride 2 (Hassani et al. 2021, arXiv 2104.05704).

    One token for each 2x2 pixels: convolutions give the transformer a notion of neighbourhood.
    """

    patch = 2  # pixels per side of a token

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, dim, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(F.relu(self.conv(images))).flatten(2).transpose(1, 2)


def sincos_positions(rows: int, columns: int, dim: int, *, scale: float = 1.0) -> Tensor:
    """Fixed 2-D positions [rows * columns, dim], row by row; dim is a multiple of 4.

    The first half of a row encodes x, the second y: sines, then cosines, of the coordinate times
    dim / 4 frequencies 10000^(-k / (dim / 4)) (Vaswani et al. 2017, arXiv 1706.03762, for each
    axis). A row has the length scale * sqrt(dim / 2).
    """
    # Where only sizes are checked there are no numbers: arithmetic there makes torch load its
    # compiler, which takes seconds.
    if torch.get_default_device().type == "meta":
        return torch.empty(rows * columns, dim)
    frequencies = 10000.0 ** -(np.arange(dim // 4) / (dim // 4))
    x = np.arange(columns)[:, None] * frequencies  # [columns, dim / 4]
    y = np.arange(rows)[:, None] * frequencies
    grid = np.empty((rows, columns, dim))
    grid[:, :, : dim // 2] = np.concatenate([np.sin(x), np.cos(x)], axis=1)
    grid[:, :, dim // 2 :] = np.concatenate([np.sin(y), np.cos(y)], axis=1)[:, None]
    return torch.tensor((scale * grid.reshape(rows * columns, dim)).astype(np.float32))


UNIT_VARIANCE = math.sqrt(2)  # scale at which a row's elements have the mean square 1
