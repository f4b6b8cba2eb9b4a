"""A convolutional net that learns small images fast: 2.0 million parameters, features [B, 256].

Re-derived from the description of airbench94 (Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a
Single GPU", arXiv 2404.00498, section 3): a frozen 2x2 layer that whitens the images' patches
(section 3.2, after Page 2019), six 3x3 convolutions that start as identities (3.3), batch norm
without scale, GELU, max pools. Unlike there, the features are not divided by a constant before the
classifier, because nested heads have a scale of their own for each prefix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshka.models.options import ModelError
from matryoshka.models.sizes import check_counts, check_least, check_multiple, refuse_weights

KERNEL = 2  # of the whitening layer
PATCH_VALUES = 3 * KERNEL * KERNEL
WHITEN_IMAGES = 5000  # that the whitening is estimated from, at most
_CHUNK = 500


class Whitening(nn.Module):
    """A 2x2 convolution to 24 channels whose filters are set from data and then fixed.

    Its outputs are uncorrelated and have the mean square 1 on the images that it was set from: 12
    filters and their negatives, because the activation that follows is not symmetric. Only the bias
    is trained. The filters are a buffer: an optimizer must not see them, and an average of weights
    copies them.
    """

    filters: Tensor
    is_set: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Without data: twelve orthogonal directions.
        rows = nn.init.orthogonal_(torch.empty(PATCH_VALUES, PATCH_VALUES))
        self.register_buffer("filters", _as_filters(rows))
        self.register_buffer("is_set", torch.tensor(False))
        self.bias = nn.Parameter(torch.zeros(2 * PATCH_VALUES))

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> [B, 24, H - 1, W - 1]."""
        return F.conv2d(images, self.filters.to(images.dtype), self.bias)


def _as_filters(rows: Tensor) -> Tensor:
    """Twelve directions [12, 12] -> filters [24, 3, 2, 2]: each, and its negative."""
    return torch.cat([rows, -rows]).reshape(2 * PATCH_VALUES, 3, KERNEL, KERNEL)


def whitening_directions(images: Tensor, epsilon: float = 5e-4) -> Tensor:
    """Directions [12, 12] that whiten the 2x2 patches of `images` float [B, 3, H, W].

    The eigenvectors of the patches' second moments, largest eigenvalue first, each divided by
    sqrt(eigenvalue + epsilon). At most WHITEN_IMAGES images are read.
    """
    moments = torch.zeros(PATCH_VALUES, PATCH_VALUES, dtype=torch.float64)
    count = 0
    for part in images[:WHITEN_IMAGES].split(_CHUNK):
        # [B, 12, patches] -> [B * patches, 12]
        values = F.unfold(part.float(), KERNEL).transpose(1, 2).reshape(-1, PATCH_VALUES)
        moments += (values.T @ values).cpu().double()
        count += len(values)
    eigenvalues, eigenvectors = torch.linalg.eigh(moments / max(1, count))
    # ascending; rounding can make the smallest a little negative
    scale = (eigenvalues.clamp(min=0) + epsilon).rsqrt()
    return (eigenvectors * scale).T.flip(0).float()


def shift_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm with a trained shift and without scale; running means adapt within a few steps."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    del norm.weight
    # Constant and not stored, because the fused kernel needs a scale.
    norm.register_buffer("weight", torch.ones(channels), persistent=False)
    return norm


class ConvGroup(nn.Module):
    """Convolution, pool, norm, GELU, convolution, norm, GELU: [B, C, H, W] -> half the sides."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = _identity_conv(channels_in, channels)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = shift_norm(channels)
        self.conv2 = _identity_conv(channels, channels)
        self.norm2 = shift_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.pool(self.conv1(x))))
        return F.gelu(self.norm2(self.conv2(x)))


def _identity_conv(channels_in: int, channels: int) -> nn.Conv2d:
    """A 3x3 convolution whose first output channels start as copies of the inputs."""
    conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[:channels_in])
    return conv


class FastCnn(nn.Module):
    """Images [B, 3, H, W] of 9 pixels or more per side -> features [B, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.whitening = Whitening()
        self.group1 = ConvGroup(2 * PATCH_VALUES, dim // 4)
        self.group2 = ConvGroup(dim // 4, dim)
        self.group3 = ConvGroup(dim, dim)

    @torch.no_grad()
    def initialise_from(self, images: Tensor) -> None:
        """Set the whitening from normalised images float [B, 3, H, W], once.

        Call it before the first step of a training, with some thousand images. The filters are
        saved with the model; where they have been set or loaded, nothing changes. ModelError for
        images that are not of this form, or contain NaN or infinity.
        """
        if bool(self.whitening.is_set):
            return
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ModelError(
                f"fast_cnn: images to whiten are {list(images.shape)} {images.dtype}; expected "
                "normalised float [B, 3, H, W]"
            )
        images = images[:WHITEN_IMAGES]
        if not len(images) or not bool(images.isfinite().all()):
            raise ModelError("fast_cnn: the images to whiten are empty, or contain NaN or infinity")
        self.whitening.filters.copy_(_as_filters(whitening_directions(images)))
        self.whitening.is_set.fill_(True)

    def forward(self, images: Tensor) -> Tensor:
        x = F.gelu(self.whitening(images))
        x = self.group3(self.group2(self.group1(x)))
        return x.amax(dim=(2, 3))


def fast_cnn(
    weights: str | None = None, *, image_size: int = 32, dim: int = 256
) -> tuple[FastCnn, int]:
    """(trunk, dim). dim: channels of the last two groups, four times those of the first."""
    refuse_weights("fast_cnn", weights)
    check_counts("fast_cnn", image_size=image_size, dim=dim)
    check_least("fast_cnn", 9, "has a 2x2 layer and three max pools", image_size=image_size)
    check_multiple("fast_cnn", 4, "is four times the first group's width", dim=dim)
    return FastCnn(dim), dim
