"""CaiT for small images: patches talk among themselves, then a CLS token reads them.

Source: Touvron et al. 2021 (arXiv 2103.17239). Not timm's, whose heads must divide the width (six
heads of 64 do not divide 512), nor vit-pytorch's, which leaves out whole layers for a whole batch:
their parameters then have no gradient, which DDP takes for an error. Here each image leaves out
branches of its own (stochastic depth), at the same rate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from matryoshka.models.patches import LinearPatches
from matryoshka.models.sizes import (
    check_counts,
    check_images,
    check_patches,
    check_shares,
    refuse_weights,
)
from matryoshka.models.vit import Mlp


class TalkingHeads(nn.Module):
    """Attention whose heads are mixed before and after the softmax (arXiv 2003.02436).

    queries [B, Q, dim], context [B, N, dim] -> [B, Q, dim].
    """

    def __init__(self, dim: int, *, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.scale = head_dim**-0.5
        self.query = nn.Linear(dim, inner, bias=False)
        self.key_value = nn.Linear(dim, 2 * inner, bias=False)
        self.mix_scores = nn.Parameter(torch.randn(heads, heads))
        self.mix_weights = nn.Parameter(torch.randn(heads, heads))
        self.out = nn.Linear(inner, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        q = self._split(self.query(queries)) * self.scale
        keys, values = self.key_value(context).chunk(2, dim=2)
        scores = q @ self._split(keys).mT  # [B, heads, Q, N]
        scores = torch.einsum("bhqn,hg->bgqn", scores, self.mix_scores)
        weights = self.dropout(scores.softmax(dim=3))
        weights = torch.einsum("bhqn,hg->bgqn", weights, self.mix_weights)
        mixed = weights @ self._split(values)  # [B, heads, Q, head_dim]
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, heads * head_dim] -> [B, heads, N, head_dim]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class CaitBlock(nn.Module):
    """Attention and MLP, each behind a norm, a learned scale per channel and stochastic depth."""

    def __init__(self, attention: TalkingHeads, mlp: Mlp, dim: int, drop_path: float) -> None:
        super().__init__()
        from torchvision.ops import StochasticDepth  # importing torchvision takes seconds

        self.norm1 = nn.LayerNorm(dim)
        self.attention = attention
        self.scale1 = nn.Parameter(torch.full((dim,), 0.1))  # the paper's for up to 18 layers
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.scale2 = nn.Parameter(torch.full((dim,), 0.1))
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """x attends to itself, and to `tokens` where these are given."""
        queries = self.norm1(x)
        context = queries if tokens is None else torch.cat([queries, tokens], dim=1)
        x = x + self.drop_path(self.attention(queries, context) * self.scale1)
        return x + self.drop_path(self.mlp(self.norm2(x)) * self.scale2)


class Cait(nn.Module):
    """Images [B, 3, image_size, image_size] -> features [B, dim]."""

    def __init__(
        self,
        patches: nn.Module,
        blocks: list[CaitBlock],
        cls_blocks: list[CaitBlock],
        *,
        image_size: int,
        tokens: int,
        dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patches = patches
        self.positions = nn.Parameter(torch.randn(tokens, dim))
        self.cls = nn.Parameter(torch.randn(dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.cls_blocks = nn.ModuleList(cls_blocks)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.image_size)
        tokens = self.dropout(self.patches(images) + self.positions)
        for block in self.blocks:
            tokens = block(tokens)
        cls = self.cls.expand(images.shape[0], 1, -1)
        for block in self.cls_blocks:
            cls = block(cls, tokens)
        return self.norm(cls[:, 0])


CAIT_NETS: dict[str, dict[str, Any]] = {
    "cait": {"heads": 8, "mlp_dim": 512},
    "cait_small": {"heads": 6, "mlp_dim": 256},
}


def cait(
    net: str,
    weights: str | None = None,
    *,
    image_size: int = 32,
    patch: int = 4,
    dim: int = 512,
    depth: int = 6,
    cls_depth: int = 2,
    heads: int = 8,
    head_dim: int = 64,
    mlp_dim: int = 512,
    dropout: float = 0.1,
    drop_path: float = 0.05,
) -> tuple[Cait, int]:
    """(trunk, dim): `depth` blocks of the patches, then `cls_depth` blocks of the CLS token.

    `net` is the name for messages. dropout: of tokens, attention and both layers of the MLP.
    drop_path: stochastic depth of every block.
    """
    refuse_weights(net, weights)
    check_counts(
        net,
        image_size=image_size,
        patch=patch,
        dim=dim,
        depth=depth,
        cls_depth=cls_depth,
        heads=heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
    )
    check_shares(net, dropout=dropout, drop_path=drop_path)
    check_patches(net, image_size, patch)

    blocks = []
    for _ in range(depth + cls_depth):
        attention = TalkingHeads(dim, heads=heads, head_dim=head_dim, dropout=dropout)
        blocks.append(CaitBlock(attention, Mlp(dim, mlp_dim, dropout), dim, drop_path))
    trunk = Cait(
        LinearPatches(patch, dim),
        blocks[:depth],
        blocks[depth:],
        image_size=image_size,
        tokens=(image_size // patch) ** 2,
        dim=dim,
        dropout=dropout,
    )
    return trunk, dim
