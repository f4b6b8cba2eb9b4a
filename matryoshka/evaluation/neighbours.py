"""Exact nearest neighbours and nearest class means on prefixes of features, in bounded memory.

Each prefix is truncated first, then L2-normalised (a zero vector stays zero); distances are
Euclidean. Products are computed in `dtype` and compared as float32: differences below its
resolution are ties. Sources: 1-NN and few-shot accuracy of Kusupati et al., arXiv 2205.13147,
sections 4.2 and 4.3; weighted kNN of Wu et al., arXiv 1805.01978, section 3.4. Dimension legend: G
prefixes, M database entries, N queries, K neighbours, C classes, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from matryoshka.nested import check_dims
from matryoshka.retrieval.exact import stable_top_k

_TILE = 1 << 24  # numbers in the largest intermediate


class NeighbourError(ValueError):
    """Too few images or classes for the requested neighbours, shots or ways."""

    user_error = True


def nearest(
    database: Tensor,
    queries: Tensor,
    dims: Sequence[int],
    k: int = 1,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Indices of the k nearest database entries of each query: int64 [G, N, k], on the CPU.

    Nearest first; ties by index. database [M, D] and queries [N, D] may be on any device. device:
    of the computation, by default that of the database; both are copied there block by block.
    Raises NeighbourError if k exceeds the size of the database.
    """
    dims = check_dims(dims, min(database.shape[1], queries.shape[1]))
    if not 1 <= k <= len(database):
        raise NeighbourError(
            f"{k} neighbours: expected 1 to {len(database)}, the entries of the database"
        )
    device = device or database.device
    neighbours = torch.empty(len(dims), len(queries), k, dtype=torch.int64)
    for g, d in enumerate(dims):
        for first, _, index in _best(database, queries, d, k, device=device, dtype=dtype):
            neighbours[g, first : first + len(index)] = index.cpu()
    return neighbours


def _best(
    database: Tensor,
    queries: Tensor,
    d: int,
    k: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    cosine: bool = False,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Blocks of queries: (number of the first, scores [B, k] falling, database rows [B, k]).

    A score is 2 + q.x for `cosine`, else 2 + q.x - |x|^2 / 2, in float32. They differ in zero
    vectors, whose cosine is 0 and whose distance from any unit vector is 1.
    """
    # Blocks of a size at which the database vectors and the scores have up to _TILE numbers.
    rows = max(1, _TILE // max(d, 512))
    width = max(1, _TILE // min(rows, len(database)))
    for first in range(0, len(queries), width):
        q = unit_prefixes(queries[first : first + width], d, device, dtype)
        score = torch.empty(len(q), 0, device=device)
        index = torch.empty(len(q), 0, dtype=torch.int64, device=device)
        for begin in range(0, len(database), rows):
            x = unit_prefixes(database[begin : begin + rows], d, device, dtype)
            # |q - x|^2 = |q|^2 + |x|^2 - 2 q.x, of which q.x - |x|^2 / 2 depends on x. The 2
            # keeps scores away from zero, where float32 resolves rounding errors of ties.
            offset = torch.full_like(x[:, 0], 2) if cosine else 2 - x.square().sum(1) / 2
            near = torch.addmm(offset, q, x.T).float()
            near, row = stable_top_k(near, k)
            # Merge with the best of the earlier blocks, which come first: ties go by index.
            score, best = stable_top_k(torch.cat([score, near], 1), k)
            index = torch.cat([index, begin + row], 1).gather(1, best)
        yield first, score, index


def unit_prefixes(features: Tensor, d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The first d features, L2-normalised: [N, d]."""
    return torch.nn.functional.normalize(features[:, :d].to(device, dtype), dim=1)


def vote(labels: Tensor) -> Tensor:
    """Majority vote of the labels of each query's neighbours: int64 [..., K] -> [...].

    labels: nearest first. Ties go to the class of the nearest neighbour among the winners.
    """
    # one neighbour at a time: a comparison of all pairs would need K times the memory
    votes = [(labels == labels[..., j : j + 1]).sum(-1) for j in range(labels.shape[-1])]
    winner = torch.stack(votes, dim=-1).argmax(-1, keepdim=True)
    return labels.gather(-1, winner)[..., 0]


def knn_accuracy(neighbours: Tensor, database_labels: Tensor, query_labels: Tensor) -> list[float]:
    """Top-1 % of every prefix [G], by majority vote of the neighbours [G, N, K].

    K = 1 is the paper's 1-NN accuracy.
    """
    predicted = vote(database_labels.cpu()[neighbours])
    return (100 * (predicted == query_labels.cpu()).double().mean(1)).tolist()


def weighted_knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    dims: Sequence[int],
    *,
    k: Sequence[int] = (20, 200),
    temperature: float = 0.07,
    dtype: torch.dtype = torch.float32,
) -> dict[int, dict[int, float]]:
    """{prefix: {neighbours: top-1 %}} of the weighted vote of Wu et al. (2018, section 3.4).

    Each of the k most similar images of the bank votes for its class with exp(cosine /
    temperature). bank [M, D], queries [N, D], labels int64; the computation runs on the bank's
    device. Images without a label (-1) are left out of both. A k beyond the size of the bank is cut
    to it: the keys are the numbers of neighbours that voted. NeighbourError if nothing is left.
    """
    dims = check_dims(dims, min(bank.shape[1], queries.shape[1]))
    if not k or min(k) < 1 or not temperature > 0:
        raise NeighbourError(
            f"k={list(k)}, temperature={temperature}: expected one k or more, all above 0"
        )
    bank, bank_labels = labelled(bank, bank_labels, "the bank")
    queries, labels = labelled(queries, labels, "the queries")
    accuracy = {}
    for d in dims:
        hits = neighbour_hits(
            bank, bank_labels, queries, labels, d=d, k=k, temperature=temperature, dtype=dtype
        )
        accuracy[d] = {count: 100 * right / len(queries) for count, right in hits.votes.items()}
    return accuracy


RANKED = 10  # results of a query whose precision counts: mAP@10, as in the MRL paper
CLASSES = 5  # of a vote, for top-5


class NeighbourHits(NamedTuple):
    """Sums over queries. votes: {neighbours: those whose vote is right}; top_5: those whose class
    is among the first five of the vote of the fewest neighbours; precision: of AP@10, divided by 10
    as in all tables of the MRL paper.
    """

    votes: dict[int, int]
    top_5: int
    precision: float


def neighbour_hits(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    *,
    d: int,
    k: Sequence[int] = (20, 200),
    temperature: float = 0.07,
    dtype: torch.dtype = torch.float32,
) -> NeighbourHits:
    """What the neighbours by the first d features say, see `weighted_knn`; all images have a label.

    Fewer results than 10 are ranked where the largest k is smaller.
    """
    device = bank.device
    bank_labels, labels = bank_labels.to(device), labels.to(device)
    counts = sorted({min(count, len(bank)) for count in k})
    num_classes = int(bank_labels.max()) + 1
    hits = dict.fromkeys(counts, 0)
    top_5, precision = 0, 0.0
    ranked = min(RANKED, counts[-1])
    ranks = torch.arange(1, ranked + 1, device=device)
    blocks = _best(bank, queries, d, counts[-1], device=device, dtype=dtype, cosine=True)
    for first, score, index in blocks:
        # Relative to the nearest image, so that no weight overflows.
        weights = ((score - score[:, :1]) / temperature).exp()
        votes_for = bank_labels[index]
        truth = labels[first : first + len(index)]
        votes = torch.zeros(len(index), num_classes, device=device)
        counted = 0
        for count in counts:
            new = slice(counted, count)
            votes.scatter_add_(1, votes_for[:, new], weights[:, new])
            hits[count] += int((votes.argmax(1) == truth).sum())
            if not counted:
                best = votes.topk(min(CLASSES, num_classes), dim=1)
                # a class without a vote is no answer
                answers = torch.where(best.values > 0, best.indices, -1)
                top_5 += int((answers == truth[:, None]).sum())
            counted = count
        right = (votes_for[:, :ranked] == truth[:, None]).float()
        precision += float((right * right.cumsum(1) / ranks).sum()) / ranked
    return NeighbourHits(hits, top_5, precision)


def labelled(features: Tensor, labels: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """The images that have a label. what: names them in the NeighbourError if there are none."""
    kept = labels >= 0
    if len(labels) != len(features) or not bool(kept.any()):
        raise NeighbourError(
            f"{what}: {len(features)} images with {int(kept.sum())} labels; expected a label for "
            "each, and one or more that are not -1"
        )
    if bool(kept.all()):
        return features, labels
    return features[kept.to(features.device)], labels[kept]


def draw_shots(
    labels: Tensor, shots: int, seed: int, draw: int, ways: int | None = None
) -> tuple[Tensor, Tensor]:
    """Draw `shots` images of each class: (classes [ways] ascending, row numbers [ways, shots]).

    Draws are without replacement; the first n columns are the draw of n shots. ways: number of
    classes to draw, None for all that `labels` has. draw: number of the draw under `seed`.
    """
    rng = np.random.default_rng([seed, draw])
    class_of_row = labels.cpu().numpy()
    classes, counts = np.unique(class_of_row, return_counts=True)
    fewest = counts.min()
    if fewest < shots:
        raise NeighbourError(
            f"{shots} shots: class {classes[counts.argmin()]} has only {fewest} images; use fewer "
            "shots"
        )
    if ways is not None:
        if not 2 <= ways <= len(classes):
            raise NeighbourError(
                f"{ways} ways: expected 2 to {len(classes)}, the number of classes"
            )
        classes = np.sort(rng.choice(classes, ways, replace=False))
    # Sorted by class, the rows of a class are a range.
    by_class = np.argsort(class_of_row, kind="stable")
    starts = np.searchsorted(class_of_row[by_class], classes)
    ends = np.searchsorted(class_of_row[by_class], classes, side="right")
    rows = []
    for start, end in zip(starts, ends, strict=True):
        # A permutation, cut to `shots`: fewer shots are the beginning of the same draw.
        rows.append(by_class[start + rng.permutation(end - start)[:shots]])
    return torch.from_numpy(classes), torch.from_numpy(np.stack(rows))


def nearest_class_mean(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    dims: Sequence[int],
    shots: Sequence[int] = (1, 3, 5, 7, 9),
    draws: int = 5,
    seed: int = 0,
    ways: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Few-shot top-1 % by nearest class mean: float64 [draws, shots, G], on the CPU.

    Each draw selects n images of each class, the same for every prefix; the images of n shots are
    among those of more shots. A class is the mean of its n normalised prefixes; a normalised query
    belongs to the nearest mean, the first one of ties. ways: number of random classes in a draw,
    which is evaluated on the queries of these classes. None: all classes of `labels`, evaluated on
    all queries; those of other classes count as wrong.
    """
    dims = check_dims(dims, min(features.shape[1], queries.shape[1]))
    device = device or features.device
    query_labels = query_labels.cpu()
    accuracy = torch.empty(draws, len(shots), len(dims), dtype=torch.float64)
    for draw in range(draws):
        classes, rows = draw_shots(labels, max(shots), seed, draw, ways)
        known = torch.isin(query_labels, classes)
        counted = known if ways else torch.ones_like(known)
        evaluated = counted.nonzero()[:, 0]  # row numbers of the queries
        if not len(evaluated):
            raise NeighbourError("no query has one of the drawn classes; use more ways")
        # position of each query's class in `classes`, -1 if it was not drawn
        position = torch.where(known, torch.searchsorted(classes, query_labels), -1)
        targets = position[evaluated].to(device)
        support = features[rows.flatten().to(features.device)]
        for g, d in enumerate(dims):
            examples = unit_prefixes(support, d, device, dtype).view(*rows.shape, d)
            means = torch.stack([examples[:, :n].mean(1) for n in shots])  # [S, C, d]
            # |q - m|^2 / 2 without |q|^2 / 2, which is equal for all means
            offset = means.square().sum(2)[:, None] / 2  # [S, 1, C]
            hits = torch.zeros(len(shots), dtype=torch.int64, device=device)
            size = max(1, _TILE // (len(shots) * len(classes) + d))
            for part, target in zip(evaluated.split(size), targets.split(size), strict=True):
                q = unit_prefixes(queries[part.to(queries.device)], d, device, dtype)
                nearest_mean = (q @ means.mT - offset).float().argmax(2)  # [S, B]
                hits += (nearest_mean == target).sum(1)
            accuracy[draw, :, g] = 100 * hits.cpu().double() / len(evaluated)
    return accuracy


class MeanInterval(NamedTuple):
    """Mean of repeated draws and its 95 % interval, by Student's t; one draw has no interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """Mean of independent values, and the 95 % interval of their expectation (nan for one)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return MeanInterval(mean, math.nan, math.nan)
    from scipy.special import stdtrit  # scipy.stats would take a second to import

    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = float(stdtrit(len(values) - 1, 0.975)) * math.sqrt(variance / len(values))
    return MeanInterval(mean, mean - half, mean + half)


def few_shot(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    dims: Sequence[int],
    *,
    shots: Sequence[int] = (1, 5),
    draws: int = 10,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[int, dict[int, MeanInterval]]:
    """{prefix: {shots: top-1 % with its interval}} of `nearest_class_mean` over the draws.

    Arguments as in `weighted_knn`; images without a label (-1) are left out. The interval is that
    of the draw of the shots, on these queries.
    """
    bank, bank_labels = labelled(bank, bank_labels, "the bank")
    queries, labels = labelled(queries, labels, "the queries")
    accuracy = nearest_class_mean(
        bank,
        bank_labels,
        queries,
        labels,
        dims=dims,
        shots=shots,
        draws=draws,
        seed=seed,
        dtype=dtype,
    )
    found: dict[int, dict[int, MeanInterval]] = {}
    for g, d in enumerate(dims):
        found[d] = {}
        for s, count in enumerate(shots):
            found[d][count] = mean_interval(accuracy[:, s, g].tolist())
    return found
