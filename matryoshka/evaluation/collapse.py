"""Collapse of self-supervised embeddings: what to measure in every prefix, and when to warn.

    history.append(collapse_monitors(view1, view2, dims=(8, 64, 512)))
    for line in fallen(history, images=2 * len(view1)):
        log.warning(line)

A collapsed encoder gives every image the same embedding, or embeddings along a few directions; its
loss may still look well. Legend: B images, D features, d numbers of a prefix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshka.nested import check_dims

MONITORS = ("std", "alignment", "uniformity", "rank")
# Embeddings with a mean direction of length m have a std of about sqrt(1 - m^2): 0.1 means that a
# random pair has a cosine of 0.99.
STD_FLOOR = 0.1
# Of the d directions that a prefix has: with fewer, a tenth of its length would say as much.
RANK_SHARE = 0.1
# A line has rank 1; of a short prefix, a tenth of its length would never be reached.
RANK_FLOOR = 1.5
# A half: the noise of one batch moves the monitors by a few percent.
FALL = 0.5
_TILE = 1 << 24  # numbers in the largest intermediate

Monitors = Mapping[int, Mapping[str, float]]


def collapse_monitors(
    view1: Tensor, view2: Tensor, dims: Sequence[int]
) -> dict[int, dict[str, float]]:
    """{prefix: {"std", "alignment", "uniformity", "rank"}} of two views' embeddings [B, D], B >= 2.

    std: standard deviation of each number of the normalised prefix, the mean over numbers and
    views, times sqrt(d): 1 if isotropic, 0 if all images have one embedding (Chen and He, arXiv
    2011.10566, section 4.1). alignment: mean squared distance of an image's two normalised views;
    uniformity: log of the mean of exp(-2 squared distance) over pairs of images, the mean of both
    views; lower is better in both (Wang and Isola, arXiv 2005.10242, section 4.1, alpha = t = 2).
    rank: RankMe (arXiv 2210.02885, equation 1) of the prefixes of both views, not normalised: the
    exponential of the entropy of their singular values, 1 to min(d, 2B).

    Embeddings with a nan or an inf give nan. ValueError for other shapes.
    """
    if view1.shape != view2.shape or view1.ndim != 2 or len(view1) < 2:
        raise ValueError(
            f"views of shapes {list(view1.shape)} and {list(view2.shape)}: expected both [B, D], "
            "with two images or more"
        )
    dims = check_dims(dims, view1.shape[1])
    views = torch.stack([view1.detach(), view2.detach()])  # [2, B, D]
    if views.dtype not in (torch.float32, torch.float64):
        views = views.float()
    monitors = {}
    for d in dims:
        prefixes = views[..., :d]
        if not bool(torch.isfinite(prefixes).all()):
            monitors[d] = dict.fromkeys(MONITORS, math.nan)
            continue
        z = F.normalize(prefixes, dim=2)
        spread = z.std(dim=1, correction=0).mean() * math.sqrt(d)
        distance = (z[0] - z[1]).square().sum(1).mean()
        monitors[d] = {
            "std": float(spread),
            "alignment": float(distance),
            "uniformity": (_uniformity(z[0]) + _uniformity(z[1])) / 2,
            "rank": effective_rank(prefixes.flatten(0, 1)),
        }
    return monitors


def _uniformity(z: Tensor) -> float:
    """log(mean over pairs of exp(-2 |zi - zj|^2)) of vectors [B, d], B >= 2."""
    count = len(z)
    lengths = z.square().sum(1)
    total = 0.0
    for first in range(0, count, max(1, _TILE // count)):
        rows = slice(first, first + max(1, _TILE // count))
        distance = lengths[rows, None] + lengths - 2 * z[rows] @ z.T
        near = (-2 * distance.clamp_min(0)).exp()
        near.diagonal(first).zero_()  # an image is no pair with itself
        total += float(near.sum())
    return math.log(total / (count * (count - 1)))


def effective_rank(embeddings: Tensor) -> float:
    """RankMe (Garrido et al., arXiv 2210.02885, equation 1) of embeddings [N, d].

    exp(-sum p log p) of the singular values' shares p, to each of which 1e-7 is added; 0 for zeros.
    """
    values = torch.linalg.svdvals(embeddings)
    total = values.sum()
    if not bool(total > 0):
        return 0.0
    shares = values / total + 1e-7
    return float((-(shares * shares.log()).sum()).exp())


def fallen(history: Sequence[Monitors], *, images: int | None = None) -> list[str]:
    """A line for every monitor of the newest entry that has fallen, and had not in the one before.

    history: what `collapse_monitors` returned, oldest first. images: embeddings that it saw, 2B: a
    rank cannot exceed their number. Has fallen: any value that is not finite; a std below
    STD_FLOOR; a rank below RANK_SHARE of its largest possible value, or below RANK_FLOOR; a std,
    a rank or minus the uniformity below FALL times its best value so far. Alignment falls in
    training and in collapse alike, so it proves nothing.
    """
    if not history:
        return []
    earlier = _lows(history[:-1], images)
    lines = []
    for place, line in _lows(history, images).items():
        if place not in earlier:
            lines.append(line)
    return lines


def _lows(history: Sequence[Monitors], images: int | None) -> dict[tuple[int, str], str]:
    """{(prefix, monitor): why its newest value is too low}."""
    found = {}
    for d, monitors in history[-1].items() if history else ():
        most = min(d, images) if images else d
        for name, value in monitors.items():
            reason = None
            if not math.isfinite(value):
                reason = "is not finite"
            elif name == "std" and value < STD_FLOOR:
                reason = f"is {value:.3f}, below {STD_FLOOR}: all images are nearly one point"
            elif name == "rank" and value < max(RANK_SHARE * most, min(RANK_FLOOR, most)):
                reason = f"is {value:.1f} of {most}: the embeddings use few directions"
            elif name != "alignment":
                reason = _fall(d, name, history)
            if reason is not None:
                found[d, name] = f"{name} of prefix {d} {reason}"
    return found


def _fall(d: int, name: str, history: Sequence[Monitors]) -> str | None:
    """Why a value is too low against its best so far; None if it is not."""
    sign = -1 if name == "uniformity" else 1  # rises from -4 to 0 in a collapse
    values = [sign * entry[d][name] for entry in history if d in entry and name in entry[d]]
    best = max(value for value in values if math.isfinite(value))
    if values[-1] >= FALL * best:
        return None
    return f"is {sign * values[-1]:.2f}, it has been {sign * best:.2f}"
