"""Losses of embeddings as pure functions of tensors, plain and nested: of self-supervised learning,
and of adapters behind a frozen encoder.

    loss, per_prefix = over_prefixes(info_nce, dims=(8, 64, 512))(queries, keys, temperature=0.1)

Legend: B images of this process, N images of all processes, E numbers of an embedding, K negatives
of a queue. Embeddings need no normalisation: a loss that compares directions normalises, after the
prefix is cut off. In several processes the caller gathers what is called [N, E] and says with
`first` where its own B rows begin; the mean of the processes' losses is then the loss of one
process with all images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshka.nested import check_dims

NestedLoss = Callable[..., tuple[Tensor, Tensor]]


def over_prefixes(
    loss: Callable[..., Tensor],
    dims: Sequence[int] | Sequence[slice],
    weights: Sequence[float] | None = None,
    per_prefix: Mapping[str, Sequence[Any]] | None = None,
) -> NestedLoss:
    """A loss of embeddings as the sum of the losses of their prefixes (MRL, arXiv 2205.13147).

    loss: a function of this file. dims: G prefix lengths, rising; or slices: the columns of each
    prefix's embedding, where these stand side by side. weights: one for each, 1 by default.
    per_prefix: {argument of the loss: its value for each prefix}, such as temperatures.

    Returns f(*embeddings, **arguments) -> (scalar, unweighted loss of each prefix [G], detached).
    The last axis of every embedding is cut. ValueError for numbers of weights or values that are
    not G, and for embeddings narrower than the longest prefix.
    """
    columns = _columns(dims)
    lengths = {"weights": columns if weights is None else weights, **(per_prefix or {})}
    for name, values in lengths.items():
        if len(values) != len(columns):
            raise ValueError(f"{name}: {len(values)} values for {len(columns)} prefixes")
    needed = max(c.stop for c in columns)

    def nested(*embeddings: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        narrowest = min(x.shape[-1] for x in embeddings)
        if narrowest < needed:
            raise ValueError(f"embeddings of {narrowest} numbers, the longest prefix has {needed}")
        values = []
        for g, part in enumerate(columns):
            own = {name: given[g] for name, given in (per_prefix or {}).items()}
            values.append(loss(*(x[..., part] for x in embeddings), **arguments, **own))
        stacked = torch.stack(values)
        weighted = stacked if weights is None else stacked * stacked.new_tensor(list(weights))
        return weighted.sum(), stacked.detach()

    return nested


def _columns(dims: Sequence[int] | Sequence[slice]) -> list[slice]:
    lengths = [d for d in dims if not isinstance(d, slice)]
    if lengths:
        return [slice(0, d) for d in check_dims(lengths, max(lengths))]
    slices = [d for d in dims if isinstance(d, slice)]
    if not slices:
        raise ValueError("no prefixes")
    return slices


# ---------------------------------------------------------------- contrastive


def info_nce(
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor,
    in_batch: bool = True,
    first: int = 0,
) -> Tensor:
    """Cross-entropy of finding each query's own key by cosine similarity.

    queries [B, E]; keys [N, E], of which row first + i belongs to query i; negatives [K, E]: keys
    of other images, a queue. in_batch: the other keys are negatives, too (CPC, arXiv 1807.03748);
    False: those of the queue alone (MoCo, arXiv 1911.05722, algorithm 1).
    """
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    rows = len(queries)
    if in_batch:
        logits = queries @ keys.T
        own = torch.arange(first, first + rows, device=queries.device)
    else:
        logits = (queries * keys[first : first + rows]).sum(1, keepdim=True)
        own = torch.zeros(rows, dtype=torch.int64, device=queries.device)
    if negatives is not None:
        logits = torch.cat([logits, queries @ F.normalize(negatives, dim=1).T], 1)
    return F.cross_entropy(logits / temperature, own)


def nt_xent(
    views: Tensor, all_views: Tensor | None = None, *, temperature: float | Tensor, first: int = 0
) -> Tensor:
    """SimCLR's loss (arXiv 2002.05709, algorithm 1): each view finds its partner among 2N - 1.

    views [2, B, E]; all_views [2, N, E], `views` by default, of which rows first + i are this
    process's.
    """
    given = views if all_views is None else all_views
    anchors, others = F.normalize(views, dim=2), F.normalize(given, dim=2)
    rows, total = views.shape[1], given.shape[1]
    logits = anchors.flatten(0, 1) @ others.flatten(0, 1).T / temperature  # [2B, 2N]
    own = torch.arange(first, first + rows, device=views.device)
    itself = torch.cat([own, own + total])
    logits = logits.scatter(1, itself[:, None], float("-inf"))
    return F.cross_entropy(logits, torch.cat([own + total, own]))


STOP_GRADIENTS = ("none", "first", "second", "columns")


def relic(
    online: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor,
    alpha: float = 1.0,
    stop_gradient: str = "second",
    first: int = 0,
) -> Tensor:
    """ReLIC (arXiv 2010.07922): InfoNCE in both directions, and invariance of what is found.

    online [2, B, E] and target [2, N, E]: the two views' embeddings. p is the distribution of view
    1 over the targets of view 2, q that of view 2 over the targets of view 1. The loss is
    (H(p) + H(q)) / 2, H being the cross-entropy with the own target, plus alpha x KL(p || q), the
    mean over images. stop_gradient says which of p and q gets no gradient of the KL term. columns:
    the term of the repository `relic`: for each view, KL(c || r) of the softmax over the columns
    (c, of [B, B] similarities) and rows (r), both with gradients; for one process.
    """
    if stop_gradient not in STOP_GRADIENTS:
        raise ValueError(f"stop_gradient={stop_gradient}: expected {', '.join(STOP_GRADIENTS)}")
    online, target = F.normalize(online, dim=2), F.normalize(target, dim=2)
    rows = online.shape[1]
    own = torch.arange(first, first + rows, device=online.device)
    logits = [online[i] @ target[1 - i].T / temperature for i in range(2)]  # [B, N]
    contrast = torch.stack([F.cross_entropy(each, own) for each in logits]).mean()
    log_p, log_q = (each.log_softmax(1) for each in logits)
    if stop_gradient == "columns":
        both = [_kl(each.T.log_softmax(1), each.log_softmax(1)) for each in logits]
        divergence = torch.stack(both).mean()
    else:
        log_p = log_p.detach() if stop_gradient == "first" else log_p
        log_q = log_q.detach() if stop_gradient == "second" else log_q
        divergence = _kl(log_p, log_q)
    return contrast + alpha * divergence


def relic_small(
    small: Tensor,
    large: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor,
    alpha: float = 1.0,
    first: int = 0,
) -> Tensor:
    """The term of a small view (ReLICv2, arXiv 2201.05119, section 2): it finds the own target, in
    the same distribution as a large view does.

    small, large [B, E]: online embeddings; target [N, E]: of another large view. alpha weighs
    KL(large || small), through which `large` gets no gradient.
    """
    small, large, target = (F.normalize(x, dim=1) for x in (small, large, target))
    own = torch.arange(first, first + len(small), device=small.device)
    logits = small @ target.T / temperature
    reference = (large @ target.T / temperature).detach().log_softmax(1)
    return F.cross_entropy(logits, own) + alpha * _kl(reference, logits.log_softmax(1))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of distributions in rows, the mean over rows."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


# ---------------------------------------------------------------- with labels


def supervised_contrastive(
    embeddings: Tensor, *, labels: Tensor, temperature: float | Tensor
) -> Tensor:
    """SupCon (arXiv 2004.11362, equation 2): each image finds all others of its class.

    embeddings [N, E], labels int64 [N]. The mean over the images whose class has others; 0, with
    gradients, if there are none.
    """
    unit = F.normalize(embeddings, dim=1)
    rows = len(unit)
    itself = torch.eye(rows, dtype=torch.bool, device=unit.device)
    logits = (unit @ unit.T / temperature).masked_fill(itself, float("-inf"))
    own_class = (labels[:, None] == labels) & ~itself
    # -inf times 0 would be NaN: what is not of the class is left out before the sum.
    log_found = logits.log_softmax(1).masked_fill(~own_class, 0)
    others = own_class.sum(1)
    has_others = others > 0
    of_each = -log_found.sum(1) / others.clamp(min=1)
    return (of_each * has_others).sum() / has_others.sum().clamp(min=1)


def neighbourhood_components(
    embeddings: Tensor, *, labels: Tensor, temperature: float | Tensor
) -> Tensor:
    """Neighbourhood components analysis (Goldberger et al., NIPS 2004): the probability that the
    neighbour which each image draws by a softmax over its cosines is of its class.

    embeddings [N, E], labels int64 [N]. The mean of -log of it (their second objective) over the
    images whose class has others; 0, with gradients, if there are none.
    """
    unit = F.normalize(embeddings, dim=1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    # Finite: where a class has no others, a sum over -inf alone has no gradient but NaN.
    lowest = torch.finfo(unit.dtype).min / 4
    logits = (unit @ unit.T / temperature).masked_fill(itself, lowest)
    own_class = (labels[:, None] == labels) & ~itself
    has_others = own_class.any(1)
    of_each = logits.logsumexp(1) - logits.masked_fill(~own_class, lowest).logsumexp(1)
    return of_each.masked_fill(~has_others, 0).sum() / has_others.sum().clamp(min=1)


def prototype_cross_entropy(
    embeddings: Tensor, prototypes: Tensor, *, labels: Tensor, temperature: float | Tensor
) -> Tensor:
    """Cross-entropy of the cosines to one prototype of each class (arXiv 1811.12649, equation 2).

    embeddings [N, E], prototypes [C, E], labels int64 [N].
    """
    cosines = F.normalize(embeddings, dim=1) @ F.normalize(prototypes, dim=1).T
    return F.cross_entropy(cosines / temperature, labels)


# ---------------------------------------------------------------- similarities that are kept


def pairwise_similarity(embeddings: Tensor, *, wanted: Tensor) -> Tensor:
    """How far the cosines of all pairs are from the wanted ones (arXiv 2407.20243, L_pair).

    embeddings [N, E], wanted [N, N]: the cosines of the same images at full width. The mean of
    |cosine - wanted| over the pairs of two different images.
    """
    difference = (_cosines(embeddings) - wanted).abs()
    count = len(embeddings)
    return (difference.sum() - difference.diagonal().sum()) / (count * (count - 1))


def top_k_similarity(embeddings: Tensor, *, wanted: Tensor, k: int) -> Tensor:
    """`pairwise_similarity` of each image and the k others most similar to it by `wanted` (arXiv
    2407.20243, L_topk).
    """
    count = len(embeddings)
    itself = torch.eye(count, dtype=torch.bool, device=wanted.device)
    nearest = wanted.masked_fill(itself, float("-inf")).topk(min(k, count - 1), dim=1).indices
    return (_cosines(embeddings) - wanted).abs().gather(1, nearest).mean()


def neighbour_divergence(
    embeddings: Tensor, *, wanted: Tensor, temperature: float | Tensor
) -> Tensor:
    """How far each image's neighbours are from the wanted ones: the divergence of SNE (Hinton and
    Roweis, NIPS 2002) with cosines for distances.

    embeddings [N, E], N >= 2; wanted [N, N]: the cosines of the same images at full width. Both are
    softmax distributions of each image over all others; the mean of KL(wanted || found).
    """
    itself = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    # Finite: the product of a probability of 0 and a logarithm of -inf would be NaN.
    lowest = torch.finfo(embeddings.dtype).min / 4
    goal = (wanted / temperature).masked_fill(itself, lowest).log_softmax(1)
    found = (_cosines(embeddings) / temperature).masked_fill(itself, lowest).log_softmax(1)
    return _kl(goal, found)


def _cosines(embeddings: Tensor) -> Tensor:
    unit = F.normalize(embeddings, dim=1)
    return unit @ unit.T


# ---------------------------------------------------------------- without negatives


def byol(predictions: Tensor, targets: Tensor) -> Tensor:
    """BYOL (arXiv 2006.07733, equation 2): squared distance of unit vectors [..., E], the mean."""
    return (2 - 2 * F.cosine_similarity(predictions, targets, dim=-1)).mean()


def vicreg(
    first_view: Tensor,
    second_view: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Tensor:
    """VICReg (arXiv 2105.04906, equations 1 to 6) of two views' embeddings [N, E], N >= 2.

    Weighted sum of: the mean squared difference; a hinge that keeps the standard deviation of every
    number at 1 or more, the mean of both views; the squares of the covariances off the diagonal,
    divided by E, the sum of both views. The two means are those of the authors' code.
    """
    spread, mixing = 0.0, 0.0
    for view in (first_view, second_view):
        centred = view - view.mean(0)
        count, width = view.shape
        deviation = (centred.square().sum(0) / (count - 1) + 1e-4).sqrt()
        spread = spread + F.relu(1 - deviation).mean() / 2
        products = centred.T @ centred / (count - 1)
        off_diagonal = products.square().sum() - products.diagonal().square().sum()
        mixing = mixing + off_diagonal / width
    difference = F.mse_loss(first_view, second_view)
    return invariance * difference + variance * spread + covariance * mixing


def sigreg(
    embeddings: Tensor, directions: Tensor, *, knots: int = 17, widest: float = 3.0
) -> Tensor:
    """SIGReg (LeJEPA, arXiv 2511.08544): how far embeddings [N, E] are from a standard Gaussian.

    directions [M, E]: random vectors, normalised here, so that the prefixes of Gaussian ones serve
    prefixes. Along each, the statistic of Epps and Pulley: N times the integral over t of
    |mean(exp(i t s)) - exp(-t^2 / 2)|^2 exp(-t^2 / 2), s being the N projections, by the
    trapezoidal rule with `knots` points on [0, widest], twice for both signs of t. The mean over
    directions. 0 for a perfect Gaussian; 0.4 x N when all embeddings are 0.
    """
    if knots < 2:
        raise ValueError(f"knots={knots}: a trapezoid needs 2 or more")
    projected = embeddings @ F.normalize(directions, dim=1).T  # [N, M]
    if projected.device.type != "cpu":
        return _epps_pulley(projected, knots, widest)
    statistic = _EppsPulley.apply(projected, knots, widest)
    assert isinstance(statistic, Tensor)
    return statistic


def _epps_pulley(projected: Tensor, knots: int, widest: float) -> Tensor:
    """The statistic of projections [N, M], all knots at once: few kernels, for a GPU."""
    t = torch.linspace(0, widest, knots, device=projected.device, dtype=projected.dtype)
    gaussian = torch.exp(-t.square() / 2)
    angles = projected[:, :, None] * t  # [N, M, knots]
    real, imaginary = angles.cos().mean(0), angles.sin().mean(0)
    distance = ((real - gaussian).square() + imaginary.square()) * gaussian  # [M, knots]
    return 2 * len(projected) * torch.trapezoid(distance, t, dim=1).mean()


class _EppsPulley(torch.autograd.Function):
    """The same statistic and its gradient in one pass, knot by knot, for a CPU: 5 times as fast.

    [N, M] numbers stay in the cache where [N, M, knots] do not, and the sine and cosine of each
    knot follow from those of the one before by the angle of a step.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, knots: int, widest: float) -> Tensor:
        count, lines = projected.shape
        step = widest / (knots - 1)
        first_cos, first_sin = (projected * step).cos_(), (projected * step).sin_()
        cos, sin = torch.ones_like(projected), torch.zeros_like(projected)
        gradient = torch.zeros_like(projected)
        total = projected.new_zeros(())
        for k in range(knots):
            t = k * step
            gaussian = math.exp(-t * t / 2)
            weight = 2 * step * gaussian / lines * (0.5 if k in (0, knots - 1) else 1.0)
            real, imaginary = cos.mean(0) - gaussian, sin.mean(0)
            total += weight * (real.square() + imaginary.square()).sum()
            gradient.addcmul_(cos, imaginary, value=2 * weight * t)
            gradient.addcmul_(sin, real, value=-2 * weight * t)
            if k < knots - 1:
                turned = cos * first_cos
                turned.addcmul_(sin, first_sin, value=-1)
                sin.mul_(first_cos).addcmul_(cos, first_sin)
                cos = turned
        ctx.save_for_backward(gradient)
        return count * total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # d(count x total) / d(projected): the means' 1 / count and the factor count cancel
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


def lejepa(
    directions: Tensor, *views: Tensor, gaussian: float, knots: int = 17, large: int = 2
) -> Tensor:
    """LeJEPA (arXiv 2511.08544): (1 - gaussian) x distance of views + gaussian x sigreg.

    views: V embeddings [N, E], of which the first `large` are of large views. The distance is the
    mean square of a view's difference from the mean of the large views; sigreg, with `directions`
    [M, E], is the mean over views.
    """
    centre = torch.stack(views[:large]).mean(0)
    distance = (torch.stack(views) - centre).square().mean()
    irregular = torch.stack([sigreg(view, directions, knots=knots) for view in views]).mean()
    return (1 - gaussian) * distance + gaussian * irregular


__all__ = [
    "STOP_GRADIENTS",
    "NestedLoss",
    "byol",
    "info_nce",
    "lejepa",
    "neighbour_divergence",
    "neighbourhood_components",
    "nt_xent",
    "over_prefixes",
    "pairwise_similarity",
    "prototype_cross_entropy",
    "relic",
    "relic_small",
    "sigreg",
    "supervised_contrastive",
    "top_k_similarity",
    "vicreg",
]
