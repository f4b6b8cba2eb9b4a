"""Layers between an encoder's features and the loss, and what each prefix's loss sees of them.

Legend: B images, D features, G prefixes, h hidden and o output numbers of a projector.
A projector maps features [B, D] to one tensor [B, W]; `columns` says which of its columns are the
embedding of each prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshka.ssl.options import SslConfig

HIDDEN = 512  # numbers of the hidden layers, unless ssl.hidden says otherwise


class Projector(nn.Module):
    """A projector: `columns`, G slices of its output, and `width`, W."""

    columns: tuple[slice, ...]
    width: int


class NoProjector(Projector):
    """The features themselves: the loss of a prefix takes the prefix. W = the longest prefix.

    Its columns overlap, so it serves no predictor, which maps each prefix to one of its own: see
    Prefixes.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.columns = tuple(slice(0, d) for d in dims)
        self.width = dims[-1]

    def forward(self, features: Tensor) -> Tensor:
        return features[:, : self.width]


class Prefixes(Projector):
    """The prefixes of the features side by side, unchanged; W = the sum of their lengths."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self._dims = tuple(dims)
        ends = list(accumulate(dims))
        self.columns = tuple(slice(end - d, end) for d, end in zip(dims, ends, strict=True))
        self.width = ends[-1]

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([features[:, :d] for d in self._dims], dim=1)


class PrefixProjectors(Projector):
    """A projector of its own for each prefix (MRL); their outputs side by side, W = G x o."""

    def __init__(self, dims: Sequence[int], config: SslConfig) -> None:
        super().__init__()
        self._dims = tuple(dims)
        self.columns = blocks(len(dims), config.out)
        self.width = len(dims) * config.out
        hidden = config.hidden or HIDDEN
        self.parts = nn.ModuleList(
            mlp(d, hidden, config.out, layers=config.layers, norm=config.norm) for d in dims
        )

    def forward(self, features: Tensor) -> Tensor:
        outputs = [part(features[:, :d]) for part, d in zip(self.parts, self._dims, strict=True)]
        return torch.cat(outputs, dim=1)


class SlicedProjector(Projector):
    """One projector D -> h -> o without biases, sliced for each prefix (MRL-E); W = G x o.

    The prefix of d features sees the first d columns of the first layer and the first d h / D (at
    least one) hidden units, with ReLU between, as in the repository relic, where h is D.
    """

    def __init__(self, dims: Sequence[int], config: SslConfig) -> None:
        super().__init__()
        width = dims[-1]
        hidden = config.hidden or width
        self._sizes = [(d, max(1, hidden * d // width)) for d in dims]
        self.columns = blocks(len(dims), config.out)
        self.width = len(dims) * config.out
        self.first = nn.Linear(width, hidden, bias=False)
        self.second = nn.Linear(hidden, config.out, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        outputs = []
        for d, h in self._sizes:
            # Only what the prefix uses: d x h products instead of D x h for each.
            hidden = F.relu(F.linear(features[:, :d], self.first.weight[:h, :d]))
            outputs.append(F.linear(hidden, self.second.weight[:, :h]))
        return torch.cat(outputs, dim=1)


class Predictors(nn.Module):
    """A small network behind each block of a projector's output: [B, W] -> [B, W]."""

    def __init__(self, columns: Sequence[slice], hidden: int) -> None:
        super().__init__()
        self._columns = tuple(columns)
        widths = [c.stop - c.start for c in columns]
        self.parts = nn.ModuleList(mlp(w, hidden, w, layers=2, norm=True) for w in widths)

    def forward(self, projected: Tensor) -> Tensor:
        outputs = [part(projected[:, c]) for part, c in zip(self.parts, self._columns, strict=True)]
        return torch.cat(outputs, dim=1)


def make_predictor(columns: Sequence[slice], config: SslConfig) -> Predictors:
    """Predictors of a method that has them; `ssl.hidden` as for projectors."""
    return Predictors(columns, config.hidden or HIDDEN)


def make_projector(dims: Sequence[int], config: SslConfig, *, predicted: bool) -> Projector:
    """The projector that `ssl.projector` names, for prefixes `dims` of the features.

    predicted: a predictor follows.
    """
    if config.projector == "none":
        return Prefixes(dims) if predicted else NoProjector(dims)
    if config.projector == "mrl-e":
        return SlicedProjector(dims, config)
    return PrefixProjectors(dims, config)


def blocks(count: int, width: int) -> tuple[slice, ...]:
    """`count` slices of `width` columns, side by side."""
    return tuple(slice(k * width, (k + 1) * width) for k in range(count))


def mlp(inputs: int, hidden: int, outputs: int, *, layers: int, norm: bool) -> nn.Sequential:
    """Linear layers, each but the last followed by batch norm (if `norm`) and ReLU."""
    parts: list[nn.Module] = []
    width = inputs
    for _ in range(layers - 1):
        parts.append(nn.Linear(width, hidden, bias=not norm))
        if norm:
            parts.append(nn.BatchNorm1d(hidden))
        parts.append(nn.ReLU())
        width = hidden
    parts.append(nn.Linear(width, outputs))
    return nn.Sequential(*parts)
