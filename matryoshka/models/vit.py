"""Vision transformers for small images: one trunk with a choice of patches, positions and norms.

    trunk, width = vision_transformer("vitfixedposdualpatchnorm", dim=128)
    features = trunk(images)      # [B, 3, 32, 32] -> [B, 128]

VIT_NETS holds the settings of the nets by name; every setting is also an option of each net.
Sources: Dosovitskiy et al. 2021 (arXiv 2010.11929); pre-norm blocks, no dropout of positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshka.models.options import ModelError
from matryoshka.models.patches import (
    UNIT_VARIANCE,
    ConvTokens,
    DualNormPatches,
    LinearPatches,
    ShiftedPatches,
    sincos_positions,
)
from matryoshka.models.sizes import (
    check_choices,
    check_counts,
    check_heads,
    check_images,
    check_multiple,
    check_patches,
    check_scales,
    check_shares,
    refuse_weights,
)
from matryoshka.models.vqvae import Encoder, VqvaePatches, checked_sizes, read_encoder

# ---------------------------------------------------------------- parts


class DynamicTanh(nn.Module):
    """weight * tanh(alpha * x) + bias instead of a norm (Zhu et al. 2025, arXiv 2503.10622).

    x [..., dim]; alpha is one number, weight and bias are [dim].
    """

    def __init__(self, dim: int, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


WRITTEN_OUT = 128  # tokens up to which `attend` may do without the fused kernel
NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "tanh": DynamicTanh}


def attend(queries: Tensor, keys: Tensor, values: Tensor, drop: float) -> Tensor:
    """softmax(Q K^T / sqrt(E)) V: [B, heads, N, E] each -> [B, heads, N, E].

    Written out where PyTorch's fused kernel is slow: its backward pass in bfloat16 on a CPU, of few
    tokens. Forward and backward of [256, 4, 64, 32] on two AMD EPYC cores with AVX-512 BF16: 70 ms
    fused, 14 ms so; of 256 tokens the two are equal (bench/NOTES.md).
    """
    slow = queries.device.type == "cpu" and queries.dtype == torch.bfloat16
    if not (slow and queries.requires_grad and keys.shape[2] <= WRITTEN_OUT):
        return F.scaled_dot_product_attention(queries, keys, values, dropout_p=drop)
    weights = (queries * queries.shape[3] ** -0.5 @ keys.transpose(2, 3)).softmax(3)
    return F.dropout(weights, drop) @ values


class Attention(nn.Module):
    """Multi-head self-attention: x [B, N, dim] -> [B, N, dim].

    heads * head_dim may differ from dim. The rows of `qkv.weight` are [3, heads, head_dim]: all
    queries, then keys, then values.

    local: locality self-attention (Lee et al. 2021, arXiv 2112.13492): a token does not attend to
    itself, and the temperature 1 / sqrt(head_dim) is learned.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        dropout: float,
        drop_scores: float,
        local: bool,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.drop_scores = drop_scores
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.temperature: nn.Parameter | None = None
        if local:
            self.temperature = nn.Parameter(torch.tensor(math.log(head_dim**-0.5)))

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        """`first`: only the outputs of that many tokens, [B, first, dim]; they attend to all N."""
        if first is None:
            queries, keys, values = self.qkv(x).chunk(3, dim=2)
        else:
            inner = self.heads * self.head_dim
            queries = F.linear(x[:, :first], self.qkv.weight[:inner])
            keys, values = F.linear(x, self.qkv.weight[inner:]).chunk(2, dim=2)
        queries, keys, values = self._split(queries), self._split(keys), self._split(values)
        drop = self.drop_scores if self.training else 0.0
        if self.temperature is None:
            mixed = attend(queries, keys, values, drop)
        else:
            tokens = x.shape[1]
            others = ~torch.eye(tokens, dtype=torch.bool, device=x.device)[:first]
            queries = queries * self.temperature.exp()
            mixed = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=others, dropout_p=drop, scale=1.0
            )
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, heads * head_dim] -> [B, heads, N, head_dim]."""
        return x.unflatten(2, (self.heads, self.head_dim)).transpose(1, 2)


class Mlp(nn.Module):
    """Two linear layers with GELU: x [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """A pre-norm transformer block; `drop_path` is the probability that a branch is left out."""

    def __init__(
        self, attention: Attention, mlp: Mlp, norms: tuple[nn.Module, nn.Module], drop_path: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attention = attention
        self.mlp = mlp
        self.drop_path: nn.Module = nn.Identity()
        if drop_path:
            from torchvision.ops import StochasticDepth  # importing torchvision takes seconds

            self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        """x [B, N, dim] -> [B, N, dim]; with `first`, only that many tokens, [B, first, dim]."""
        x = x[:, :first] + self.drop_path(self.attention(self.norm1(x), first))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SequencePool(nn.Module):
    """A learned weighted mean of the tokens [B, N, dim] -> [B, dim] (arXiv 2104.05704, 3.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(x).softmax(dim=1)  # [B, N, 1]
        return (weights * x).sum(dim=1)


# ---------------------------------------------------------------- the trunk


class VisionTransformer(nn.Module):
    """Patches -> positions -> blocks -> norm -> pooled features [B, dim].

    patches: images [B, 3, image_size, image_size] -> tokens [B, N, dim].
    pool: "cls" adds a learned token in front and returns it; "mean" and "sequence" have no such
    token. positions: "fixed" (a buffer that is computed, not stored), "learned" or "none".
    saved_options and normalisation: see backbones.py.
    """

    positions: Tensor | None

    def __init__(
        self,
        patches: nn.Module,
        blocks: list[Block],
        norm: nn.Module,
        *,
        image_size: int,
        patch: int,
        dim: int,
        pool: str,
        positions: str,
        position_scale: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.saved_options: dict[str, Any] = {}
        self.normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
        self.image_size = image_size
        self.pool = pool
        self.patches = patches
        self.cls = nn.Parameter(torch.randn(dim)) if pool == "cls" else None
        side = image_size // patch
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.dropout = nn.Dropout(dropout)
        self.sequence_pool = SequencePool(dim) if pool == "sequence" else None
        if positions == "fixed":
            grid = sincos_positions(side, side, dim, scale=position_scale)
            if pool == "cls":
                grid = F.pad(grid, (0, 0, 1, 0))  # the CLS token has no place: a row of zeros
            self.register_buffer("positions", grid, persistent=False)
        elif positions == "learned":
            count = side * side + (1 if pool == "cls" else 0)
            self.positions = nn.Parameter(torch.randn(count, dim))
        else:
            self.positions = None

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.image_size)
        x = self.patches(images)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], 1, -1), x], dim=1)
        if self.positions is not None:
            x = x + self.positions
        x = self.dropout(x)
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            # Nothing reads the last block's other tokens: a tenth of the work of six blocks.
            x = block(x, first=1 if self.pool == "cls" and layer == last else None)
        if self.sequence_pool is not None:
            return self.sequence_pool(self.norm(x))
        if self.pool == "cls":
            return self.norm(x[:, 0])
        return self.norm(x.mean(dim=1))


# ---------------------------------------------------------------- by name

# head_dim and mlp_dim None: dim. attention "local" and patches "shifted" are those of the paper
# "Vision Transformer for Small-Size Datasets".
VIT_NETS: dict[str, dict[str, Any]] = {
    "vit": {"head_dim": 64, "mlp_dim": 512, "positions": "learned"},
    "vit_small": {
        "head_dim": 64,
        "mlp_dim": 512,
        "positions": "learned",
        "patches": "shifted",
        "attention": "local",
    },
    "vit_tiny": {
        "depth": 4,
        "heads": 6,
        "head_dim": 64,
        "mlp_dim": 256,
        "positions": "learned",
        "patches": "shifted",
        "attention": "local",
    },
    "simplevit": {
        "head_dim": 64,
        "mlp_dim": 512,
        "positions": "fixed",
        "position_scale": 1.0,
        "pool": "mean",
        "dropout": 0.0,
    },
    "dyt": {"head_dim": 64, "mlp_dim": 512, "positions": "learned", "norm": "tanh"},
    "vitfixedpos": {"positions": "fixed"},
    "vitlearnedpos": {"positions": "learned"},
    "vitfixedposdualpatchnorm": {"positions": "fixed", "patches": "dual_norm"},
    "vitfixedposvqvae": {"positions": "fixed", "patches": "vqvae"},
}
PATCHES = ("linear", "dual_norm", "shifted", "conv", "vqvae")


def vision_transformer(
    net: str,
    weights: str | None = None,
    *,
    image_size: int = 32,
    patch: int = 4,
    dim: int = 512,
    depth: int = 6,
    heads: int = 8,
    head_dim: int | None = None,
    mlp_dim: int | None = None,
    dropout: float = 0.1,
    attention_dropout: float | None = None,
    drop_path: float = 0.0,
    patches: str = "linear",
    positions: str = "learned",
    position_scale: float = UNIT_VARIANCE,
    pool: str = "cls",
    attention: str = "full",
    norm: str = "layer",
    vqvae: str | Mapping[str, int] | None = None,
) -> tuple[VisionTransformer, int]:
    """(trunk, dim) of a transformer for square images of `image_size` pixels.

    `net` is the name for messages. head_dim and mlp_dim default to dim.
    dropout: of tokens and both layers of the MLP; of attention, too, without attention_dropout.
    drop_path: stochastic depth of the last block, falling linearly to 0 at the first (Huang et al.
    2016, arXiv 1603.09382).
    patches: linear, dual_norm, shifted, conv (patch=2), vqvae. positions: fixed, learned, none.
    pool: cls, mean, sequence. attention: full, local. norm: layer, tanh.
    vqvae: the file of `matryoshka vqvae` whose encoder makes the tokens. A saved model holds the
    encoder's weights, and its options the sizes in place of the name (`saved_options`).

    ModelError for a combination that is not possible.
    """
    refuse_weights(net, weights)
    head_dim = dim if head_dim is None else head_dim
    mlp_dim = dim if mlp_dim is None else mlp_dim
    check_counts(
        net,
        image_size=image_size,
        patch=patch,
        dim=dim,
        depth=depth,
        heads=heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
    )
    attention_dropout = dropout if attention_dropout is None else attention_dropout
    check_shares(net, dropout=dropout, attention_dropout=attention_dropout, drop_path=drop_path)
    check_scales(net, position_scale=position_scale)
    check_choices(net, PATCHES, patches=patches)
    check_choices(net, ("fixed", "learned", "none"), positions=positions)
    check_choices(net, ("cls", "mean", "sequence"), pool=pool)
    check_choices(net, ("full", "local"), attention=attention)
    check_choices(net, NORMS, norm=norm)
    check_patches(net, image_size, patch)
    if patches == "conv" and patch != ConvTokens.patch:
        raise ModelError(
            f"model.arch_options: {net}: patch={patch}: convolutional tokens are those of "
            f"patch={ConvTokens.patch}"
        )
    if positions == "fixed":
        check_multiple(net, 4, "the sines and cosines of x and y need", dim=dim)
    if patches == "vqvae" and vqvae is None:
        raise ModelError(
            f"model.arch_options: {net} needs vqvae=FILE, the encoder of its patches; `matryoshka "
            "vqvae` writes one"
        )
    if patches != "vqvae" and vqvae is not None:
        raise ModelError(f"model.arch_options: {net}: vqvae=... is for patches=vqvae only")
    local = attention == "local"
    if local and pool != "cls" and image_size == patch:
        raise ModelError(
            f"model.arch_options: {net}: patch={patch} makes one token, and local attention needs "
            f"another one to attend to; legal: a patch below {image_size}"
        )

    make_norm = NORMS[norm]
    blocks = []
    for layer in range(depth):
        attend = Attention(
            dim,
            heads=heads,
            head_dim=head_dim,
            dropout=dropout,
            drop_scores=attention_dropout,
            local=local,
        )
        path = drop_path * layer / max(1, depth - 1)
        norms = (make_norm(dim), make_norm(dim))
        blocks.append(Block(attend, Mlp(dim, mlp_dim, dropout), norms, path))
    tokens = _patches(patches, patch, dim) if vqvae is None else _vqvae(vqvae, patch, dim)
    trunk = VisionTransformer(
        tokens,
        blocks,
        make_norm(dim),
        image_size=image_size,
        patch=patch,
        dim=dim,
        pool=pool,
        positions=positions,
        position_scale=position_scale,
        dropout=dropout,
    )
    if isinstance(tokens, VqvaePatches):
        trunk.saved_options = {"vqvae": asdict(tokens.sizes)}
        trunk.normalisation = tokens.normalisation
    return trunk, dim


def _vqvae(vqvae: object, patch: int, dim: int) -> VqvaePatches:
    """Tokens of the encoder in a file, or of one whose weights a checkpoint will fill in."""
    normalisation = None
    if isinstance(vqvae, str):
        stored = read_encoder(vqvae)
        encoder, sizes = stored.encoder, stored.sizes
        normalisation = stored.mean, stored.std
    elif isinstance(vqvae, Mapping):
        sizes = checked_sizes(vqvae)
        encoder = Encoder(sizes)
    else:
        raise ModelError(f"model.arch_options: vqvae={vqvae}: expected the name of a file")
    if sizes.patch != patch:
        raise ModelError(
            f"model.arch_options: patch={patch}, but the VQ-VAE has patch={sizes.patch}; give both "
            "the same"
        )
    return VqvaePatches(encoder, sizes, dim, normalisation)


def _patches(kind: str, patch: int, dim: int) -> nn.Module:
    if kind == "conv":
        return ConvTokens(dim)
    if kind == "shifted":
        return ShiftedPatches(patch, dim)
    if kind == "dual_norm":
        return DualNormPatches(patch, dim)
    return LinearPatches(patch, dim)


def cct(
    weights: str | None = None,
    *,
    image_size: int = 32,
    dim: int = 256,
    depth: int = 7,
    heads: int = 4,
    mlp_dim: int | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.1,
    drop_path: float = 0.1,
    positions: str = "learned",
) -> tuple[VisionTransformer, int]:
    """(trunk, dim) of a compact convolutional transformer, CCT-7/3x1 (arXiv 2104.05704).

    Convolutional tokens, sequence pooling, stochastic depth. heads divides dim; mlp_dim defaults to
    2 * dim; the rest as in `vision_transformer`.
    """
    check_counts("cct", dim=dim, heads=heads)
    check_heads("cct", dim, heads)
    trunk, width = vision_transformer(
        "cct",
        weights,
        image_size=image_size,
        patch=ConvTokens.patch,
        dim=dim,
        depth=depth,
        heads=heads,
        head_dim=dim // heads,
        mlp_dim=2 * dim if mlp_dim is None else mlp_dim,
        dropout=dropout,
        attention_dropout=attention_dropout,
        drop_path=drop_path,
        patches="conv",
        positions=positions,
        pool="sequence",
    )
    _initialise_cct(trunk)
    return trunk, width


def _initialise_cct(trunk: VisionTransformer) -> None:
    """The paper's code: small normal weights, zero biases, positions of deviation 0.2."""
    for module in trunk.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    if isinstance(trunk.positions, nn.Parameter):
        nn.init.trunc_normal_(trunk.positions, std=0.2)
