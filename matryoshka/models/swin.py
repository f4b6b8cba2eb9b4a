"""Swin transformer for small images: torchvision's blocks with tokens of 2 x 2 pixels.

Source: Liu et al. 2021 (arXiv 2103.14030). The last stage keeps its resolution and only doubles the
channels: a 32-px image has 16, 8, 4 and 4 tokens per side.
"""

from __future__ import annotations

from torch import Tensor, nn

from matryoshka.models.options import ModelError
from matryoshka.models.sizes import check_counts, check_multiple, check_shares, refuse_weights

DEPTHS = (2, 2, 6, 2)
HEAD_DIM = 32
MAX_WINDOW = 32  # tokens per side; a block stores the square of the tokens of a window
TOKEN = 2  # pixels per side of a token of the first stage


class DoubledChannels(nn.Module):
    """LayerNorm and a linear map: [B, H, W, C] -> [B, H, W, 2 C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, 2 * dim, bias=False)
        nn.init.trunc_normal_(self.project.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.norm(x))


def swin(
    weights: str | None = None,
    *,
    image_size: int = 32,
    patch: int = 4,
    dim: int = 96,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> tuple[nn.Module, int]:
    """(trunk, 8 * dim) of a Swin-T.

    patch: side of a window in tokens, which is what `--patch` sets in the public ViT collection for
    CIFAR. A stage whose side is no multiple of it is padded. dim: width of the first stage, a
    multiple of 32, the width of a head.
    """
    refuse_weights("swin", weights)
    check_counts("swin", image_size=image_size, patch=patch, dim=dim)
    check_shares("swin", dropout=dropout, drop_path=drop_path)
    check_multiple(
        "swin", 8, "its tokens of 2 pixels and two mergings of 2 tokens need", image_size=image_size
    )
    if patch > min(MAX_WINDOW, image_size // TOKEN):
        raise ModelError(
            f"model.arch_options: swin: patch={patch}: a window has 1 to "
            f"{min(MAX_WINDOW, image_size // TOKEN)} tokens per side"
        )
    check_multiple("swin", HEAD_DIM, "is the width of its heads", dim=dim)
    from torchvision.models import SwinTransformer

    heads = dim // HEAD_DIM
    trunk = SwinTransformer(
        patch_size=[TOKEN, TOKEN],
        embed_dim=dim,
        depths=list(DEPTHS),
        num_heads=[heads, 2 * heads, 4 * heads, 8 * heads],
        window_size=[patch, patch],
        dropout=dropout,
        stochastic_depth_prob=drop_path,
        num_classes=1,
    )
    # features: tokens, stage, merging, stage, merging, stage, merging, stage
    trunk.features[6] = DoubledChannels(4 * dim)
    trunk.add_module("head", nn.Identity())
    return trunk, 8 * dim
