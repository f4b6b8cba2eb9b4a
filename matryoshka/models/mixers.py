"""MLP-Mixer and ConvMixer for small images, as timm builds them."""

from __future__ import annotations

from torch import nn

from matryoshka.models.sizes import check_counts, check_patches, check_shares, refuse_weights
from matryoshka.models.timm_models import import_timm


def mlpmixer(
    weights: str | None = None,
    *,
    image_size: int = 32,
    patch: int = 4,
    dim: int = 512,
    depth: int = 6,
    dropout: float = 0.0,
) -> tuple[nn.Module, int]:
    """(trunk, dim) of an MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601).

    The hidden layers are 4 times the number of tokens, and half of dim.
    """
    refuse_weights("mlpmixer", weights)
    check_counts("mlpmixer", image_size=image_size, patch=patch, dim=dim, depth=depth)
    check_shares("mlpmixer", dropout=dropout)
    check_patches("mlpmixer", image_size, patch)
    import_timm("model.arch=mlpmixer")
    from timm.models.mlp_mixer import MlpMixer

    tokens = (image_size // patch) ** 2
    # timm takes both as shares of dim and rounds down; the half keeps 4 * tokens from becoming one
    # less.
    hidden = ((4 * tokens + 0.5) / dim, 0.5)
    trunk = MlpMixer(
        num_classes=0,
        img_size=image_size,
        patch_size=patch,
        num_blocks=depth,
        embed_dim=dim,
        mlp_ratio=hidden,
        proj_drop_rate=dropout,
    )
    return trunk, dim


def convmixer(
    weights: str | None = None,
    *,
    image_size: int = 32,
    patch: int = 1,
    dim: int = 256,
    depth: int = 16,
    kernel: int = 8,
) -> tuple[nn.Module, int]:
    """(trunk, dim) of a ConvMixer-256/16 (Trockman and Kolter 2022, arXiv 2201.09792)."""
    refuse_weights("convmixer", weights)
    check_counts(
        "convmixer", image_size=image_size, patch=patch, dim=dim, depth=depth, kernel=kernel
    )
    check_patches("convmixer", image_size, patch)
    import_timm("model.arch=convmixer")
    from timm.models.convmixer import ConvMixer

    trunk = ConvMixer(dim, depth, kernel_size=kernel, patch_size=patch, num_classes=0)
    if kernel % 2 == 0:
        for module in trunk.modules():
            if isinstance(module, nn.Conv2d) and module.padding == "same":
                # Zeros as before, but padded by an operator of their own: otherwise torch warns
                # that an even kernel needs one more row on one side.
                module.padding_mode = "constant"  # pyright: ignore[reportAttributeAccessIssue]
    return trunk, dim
