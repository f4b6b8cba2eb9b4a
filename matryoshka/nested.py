"""Nested (Matryoshka) representations: every prefix of a feature vector is a feature vector of its
own.

Source: Kusupati et al., "Matryoshka Representation Learning", arXiv 2205.13147, section 3.
Dimension legend: G prefixes, B images, C classes, D features. Logits are always [G, B, C]; the
plain baseline (`dims=(D,)`) and a fixed feature (`dims=(d,)`) are the case G = 1, not a special
one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def default_dims(width: int, start: int = 8) -> tuple[int, ...]:
    """Powers of two from `start` up to `width`, and `width` itself: (8, 16, ..., 2048) for a
    ResNet-50.
    """
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


# ---------------------------------------------------------------- logits

Head = tuple[Tensor, Tensor | None]  # weight [C, >= d], bias [C] or None


def nested_logits(
    features: Tensor, heads: Sequence[Head], dims: Sequence[int], fused: bool | None = None
) -> Tensor:
    """Logits of every prefix: `features[:, :d] @ W[:, :d].T + b` for each d -> [G, B, C].

    features [B, D]; heads: one per prefix (MRL), or a single one that all prefixes share by slicing
    its columns (MRL-E; the whole bias is added to each prefix).

    fused: True computes all prefixes in one product, with zeros where a prefix has no columns: few
    launches, up to G times the arithmetic. False computes prefix by prefix, without extra
    arithmetic. None: True on a GPU, where launches cost more than arithmetic (bench/step.py).
    """
    if len(heads) not in (1, len(dims)):
        raise ValueError(
            f"{len(heads)} heads for {len(dims)} dims: give one per prefix, or one for all"
        )
    if features.shape[-1] < dims[-1]:
        raise ValueError(
            f"features have {features.shape[-1]} columns, the longest prefix needs {dims[-1]}"
        )
    # The plain baseline: one linear layer, and only the axis G is added.
    if len(dims) == 1:
        weight, bias = heads[0]
        return F.linear(features[:, : dims[0]], weight[:, : dims[0]], bias)[None]
    # On a CPU one product is 3 to 12 times slower than prefix by prefix (MRL; bench/NOTES.md).
    fused = features.is_cuda if fused is None else fused
    if fused:
        compute = _in_one_product
    elif len(heads) > 1:
        compute = _prefix_by_prefix
    else:
        compute = _segment_by_segment
    return compute(features[:, : dims[-1]], heads, dims)


def _in_one_product(features: Tensor, heads: Sequence[Head], dims: Sequence[int]) -> Tensor:
    width = dims[-1]
    if len(heads) == 1:  # the features of each prefix, followed by zeros
        weight, bias = heads[0]
        compiling = torch.compiler.is_compiling()
        inside = (_compare if compiling else _inside)(tuple(dims), features.device)
        prefixes = features * inside[:, None].to(features.dtype)
        return F.linear(prefixes, weight[:, :width], bias)
    # Independent classifiers have different widths: zeros make them one batch of matrices.
    padded = torch.stack(  # [G, C, D]
        [F.pad(weight[:, :d], (0, width - d)) for (weight, _), d in zip(heads, dims, strict=True)]
    )
    many = features.expand(len(dims), *features.shape)  # [G, B, D], a view
    biases = [bias for _, bias in heads if bias is not None]
    if not biases:
        return torch.bmm(many, padded.mT)
    return torch.baddbmm(torch.stack(biases)[:, None], many, padded.mT)


@cache
def _inside(dims: tuple[int, ...], device: torch.device) -> Tensor:
    """[G, D]: whether a prefix has a column. Cached: making it takes G + 2 launches."""
    return _compare(dims, device)


def _compare(dims: tuple[int, ...], device: torch.device) -> Tensor:
    """`_inside`, made on the device. torch.compile ignores the cache, and a tensor of the host in
    its graph would be copied, with a wait, in every step and rule CUDA graphs out.
    """
    columns = torch.arange(dims[-1], device=device)
    return torch.stack([columns < d for d in dims])


def _prefix_by_prefix(features: Tensor, heads: Sequence[Head], dims: Sequence[int]) -> Tensor:
    return torch.stack(
        [
            F.linear(features[:, :d], weight[:, :d], bias)
            for (weight, bias), d in zip(heads, dims, strict=True)
        ]
    )


def _segment_by_segment(features: Tensor, heads: Sequence[Head], dims: Sequence[int]) -> Tensor:
    """A shared classifier: each prefix adds its new columns' product to the logits of the previous
    one.
    """
    weight, bias = heads[0]
    sizes = [end - begin for begin, end in itertools.pairwise((0, *dims))]
    # split, not slices: in the backward pass every slice writes a whole zero-padded gradient, 9 x 8
    # MB for ResNet-50, which made head and loss 3 times slower at batch 16 (bench/NOTES.md).
    parts = zip(features.split(sizes, 1), weight[:, : dims[-1]].split(sizes, 1), strict=True)
    logits = []
    for x, w in parts:
        if not logits:
            logits.append(F.linear(x, w, bias))  # later prefixes inherit the bias
        else:
            logits.append(logits[-1] + F.linear(x, w))
    return torch.stack(logits)


# ---------------------------------------------------------------- head and loss


class NestedLinear(nn.Module):
    """Linear classifiers on the prefixes of a feature vector: features [B, D] -> logits [G, B, C].

    shared=False (MRL) keeps an independent classifier for each prefix; shared=True (MRL-E) keeps
    one of the longest width and slices its columns. `heads[i]` is an nn.Linear of d_i (or, shared,
    of d_max) inputs.
    """

    def __init__(
        self, dims: Sequence[int], num_classes: int, shared: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        self.dims = check_dims(dims, max(dims, default=0))
        self.num_classes = num_classes
        # With one prefix the two kinds of head are the same; saved heads then have one form.
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
    """Plain weighted sum over prefixes of the mean cross-entropy (eq. 1 of the paper; not divided
    by G).

    logits [G, B, C]; labels int64 [B]; weights [G] relative importance c_m, None for all ones.
    Returns (scalar to minimise, detached unweighted loss per prefix [G]).
    """
    # one fused call over [G*B, C]: each prefix sees the same labels
    g, b, c = logits.shape
    losses = F.cross_entropy(
        logits.reshape(g * b, c),
        labels.repeat(g),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    per_prefix = losses.view(g, b).mean(dim=1)  # [G]
    if weights is None:
        total = per_prefix.sum()
    else:
        total = (weights.to(per_prefix) * per_prefix).sum()
    return total, per_prefix.detach()


def distilled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    *,
    share: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`nested_cross_entropy`, in which the last (longest) prefix also teaches the shorter ones.

    The loss of every prefix but the last becomes
        (1 - share) x cross-entropy with the labels
        + share x temperature^2 x KL(softmax(last / temperature) || softmax(own / temperature)),
    the mean over the images. No gradient reaches the last prefix through its answers: it learns
    from the labels alone. Source: Hinton et al., arXiv 1503.02531; from the full width of the same
    network in each step, without a second one: Yu and Huang, arXiv 1903.05134 ("in-place").

    share: 0 (labels only) to 1. Returns the scalar to minimise and, detached, the cross-entropy
    with the labels of each prefix [G], comparable with runs without distillation.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: expected 0 to 1")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    g, b, c = logits.shape
    losses = F.cross_entropy(
        logits.reshape(g * b, c),
        labels.repeat(g),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    per_prefix = losses.view(g, b).mean(dim=1)  # [G]
    teacher = (logits[-1].detach() / temperature).log_softmax(dim=-1)  # [B, C]
    students = (logits[:-1] / temperature).log_softmax(dim=-1)  # [G-1, B, C]
    divergence = (teacher.exp() * (teacher - students)).sum(dim=-1).mean(dim=-1)  # [G-1]
    # temperature^2 keeps the size of the gradient, which the softer softmax divides by it.
    taught = (1 - share) * per_prefix[:-1] + share * temperature**2 * divergence
    combined = torch.cat([taught, per_prefix[-1:]])
    if weights is not None:
        combined = weights.to(combined) * combined
    return combined.sum(), per_prefix.detach()


# ---------------------------------------------------------------- prefixes of a step


def sandwich(count: int, extra: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Indices, ascending, of the prefixes or widths to train in one step, out of `count`.

    Always the first and the last, and `extra` random ones of the rest (all of them if there are
    fewer). The smallest and the largest bound the others' accuracy, which a few random ones per
    step then approach. Source: Yu and Huang, arXiv 1903.05134, the "sandwich rule".
    """
    if count < 1 or extra < 0:
        raise ValueError(f"sandwich of {count} with {extra} extra: expected at least 1 and 0")
    between = np.arange(1, count - 1)
    chosen = rng.permutation(between)[:extra].tolist()
    return tuple(sorted({0, count - 1, *chosen}))
