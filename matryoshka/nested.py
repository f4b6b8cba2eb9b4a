"""Nested (Matryoshka) representations: every prefix of a feature vector is a feature vector of its own.

Source: Kusupati et al., "Matryoshka Representation Learning", arXiv 2205.13147, section 3.
Dimension legend: G prefixes, B images, C classes, D features. Logits are always [G, B, C]; the plain
baseline (`dims=(D,)`) and a fixed feature (`dims=(d,)`) are the case G = 1, not a special one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def default_dims(width: int, start: int = 8) -> tuple[int, ...]:
    """Powers of two from `start` up to `width`, and `width` itself: (8, 16, ..., 2048) for a ResNet-50."""
    dims = []
    d = start
    while d < width:
        dims.append(d)
        d *= 2
    return check_dims((*dims, width), width)


def check_dims(dims: Iterable[int], width: int) -> tuple[int, ...]:
    """`dims` as a tuple. ValueError unless strictly increasing, positive and at most `width`."""
    dims = tuple(int(d) for d in dims)
    if not dims:
        raise ValueError("dims is empty: give at least one prefix length")
    if dims[0] < 1 or any(a >= b for a, b in itertools.pairwise(dims)):
        raise ValueError(f"dims {list(dims)} must be positive and strictly increasing")
    if dims[-1] > width:
        raise ValueError(f"dims {list(dims)} go beyond the feature width {width}")
    return dims


def nested_logits(features: Tensor, heads: Sequence[tuple[Tensor, Tensor | None]], dims: Sequence[int]) -> Tensor:
    """Logits of every prefix: `features[:, :d] @ W[:, :d].T + b` for each d -> [G, B, C].

    features [B, D]; heads: one (weight [C, >= d], bias [C] or None) per prefix (MRL), or a single pair
    that all prefixes share by slicing its columns (MRL-E; the whole bias is added to each prefix).
    """
    if len(heads) not in (1, len(dims)):
        raise ValueError(f"{len(heads)} heads for {len(dims)} dims: give one per prefix, or one for all")
    if features.shape[-1] < dims[-1]:
        raise ValueError(f"features have {features.shape[-1]} columns, the longest prefix needs {dims[-1]}")
    logits = []
    for i, d in enumerate(dims):
        weight, bias = heads[i] if len(heads) > 1 else heads[0]
        logits.append(F.linear(features[:, :d], weight[:, :d], bias))
    return torch.stack(logits)


class NestedLinear(nn.Module):
    """Linear classifiers on the prefixes of a feature vector: features [B, D] -> logits [G, B, C].

    shared=False (MRL) keeps an independent classifier for each prefix; shared=True (MRL-E) keeps one of the
    longest width and slices its columns. `heads[i]` is an nn.Linear of d_i (or, shared, of d_max) inputs.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, shared: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.dims = check_dims(dims, max(dims, default=0))
        self.num_classes = num_classes
        self.shared = shared and len(self.dims) > 1
        widths = self.dims[-1:] if self.shared else self.dims
        self.heads = nn.ModuleList(nn.Linear(d, num_classes, bias=bias) for d in widths)

    def forward(self, features: Tensor) -> Tensor:
        return nested_logits(features, [(h.weight, h.bias) for h in self.heads], self.dims)  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"dims={list(self.dims)}, num_classes={self.num_classes}, shared={self.shared}"


def nested_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Plain weighted sum over prefixes of the mean cross-entropy (eq. 1 of the paper; not divided by G).

    logits [G, B, C]; labels int64 [B]; weights [G] relative importance c_m, None for all ones.
    Returns (scalar to minimise, detached unweighted loss per prefix [G]).
    """
    # one fused call over [G*B, C]: each prefix sees the same labels
    g, b, c = logits.shape
    losses = F.cross_entropy(
        logits.reshape(g * b, c), labels.repeat(g), reduction="none", label_smoothing=label_smoothing
    )
    per_prefix = losses.view(g, b).mean(dim=1)
    total = per_prefix.sum() if weights is None else (weights.to(per_prefix) * per_prefix).sum()
    return total, per_prefix.detach()
