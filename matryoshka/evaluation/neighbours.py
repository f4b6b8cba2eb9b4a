"""Nearest neighbours and nearest class means on the prefixes of features: exact, in bounded memory.

A prefix is L2-normalised after it was cut off; a vector of zeros stays one. Distances are
Euclidean. Products are computed in `dtype` and compared as float32: what is nearer or farther by
less than that resolves counts as a tie. Sources: 1-NN and few-shot accuracy of Kusupati et al.,
arXiv 2205.13147, sections 4.2 and 4.3. Dimension legend: G prefixes, M database entries, N queries,
K neighbours, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from matryoshka.nested import check_dims
from matryoshka.retrieval.exact import stable_top_k

_TILE = 1 << 24  # numbers in the largest intermediate


class NeighbourError(ValueError):
    """Too few images, or classes, for what was asked."""

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
    """The k nearest database entries of each query, nearest first; ties by index: int64 [G, N, k],
    on the CPU.

    database [M, D], queries [N, D], on any device. device: where products are computed, default
    where the database is; blocks travel there. NeighbourError for k beyond the database.
    """
    dims = check_dims(dims, min(database.shape[1], queries.shape[1]))
    if not 1 <= k <= len(database):
        raise NeighbourError(
            f"{k} neighbours were asked for, the database has {len(database)} entries"
        )
    device = device or database.device
    found = torch.empty(len(dims), len(queries), k, dtype=torch.int64)
    for g, d in enumerate(dims):
        rows = max(1, _TILE // max(d, 512))
        width = max(1, _TILE // min(rows, len(database)))
        for first in range(0, len(queries), width):
            q = unit_prefixes(queries[first : first + width], d, device, dtype)
            score = torch.empty(len(q), 0, device=device)
            index = torch.empty(len(q), 0, dtype=torch.int64, device=device)
            for begin in range(0, len(database), rows):
                x = unit_prefixes(database[begin : begin + rows], d, device, dtype)
                # of |q - x|^2 = |q|^2 + |x|^2 - 2 q.x what differs between the entries
                # two more keeps it away from zero, where float32 would tell rounding errors apart
                near = torch.addmm(2 - x.square().sum(1) / 2, q, x.T).float()
                near, place = stable_top_k(near, k)
                score, best = stable_top_k(torch.cat([score, near], 1), k)
                index = torch.cat([index, begin + place], 1).gather(1, best)
            found[g, first : first + width] = index.cpu()
    return found


def unit_prefixes(features: Tensor, d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """features[:, :d], L2-normalised."""
    return torch.nn.functional.normalize(features[:, :d].to(device, dtype), dim=1)


def vote(labels: Tensor) -> Tensor:
    """The majority of the labels of each query's neighbours, int64 [..., K], nearest first ->
    [...].

    Of several classes with as many votes, that of the nearest neighbour among them wins.
    """
    votes = torch.stack(
        [(labels == labels[..., j : j + 1]).sum(-1) for j in range(labels.shape[-1])], dim=-1
    )
    return labels.gather(-1, votes.argmax(-1, keepdim=True))[..., 0]


def knn_accuracy(neighbours: Tensor, database_labels: Tensor, query_labels: Tensor) -> list[float]:
    """Top-1 % of every prefix [G] from the neighbours [G, N, K] by majority; K = 1 is the paper's
    1-NN.
    """
    predicted = vote(database_labels.cpu()[neighbours])
    return (100 * (predicted == query_labels.cpu()).double().mean(1)).tolist()


def draw_shots(
    labels: Tensor, shots: int, seed: int, draw: int, ways: int | None = None
) -> tuple[Tensor, Tensor]:
    """(classes [ways] in ascending order, rows [ways, shots] of them), without replacement.

    The first n columns are the draw of n shots. ways: None for all classes that `labels` has.
    """
    rng = np.random.default_rng([seed, draw])
    given = labels.cpu().numpy()
    classes, counts = np.unique(given, return_counts=True)
    if (fewest := counts.min()) < shots:
        raise NeighbourError(
            f"{shots} shots: class {classes[counts.argmin()]} has only {fewest} images; ask for "
            "fewer shots"
        )
    if ways is not None:
        if not 2 <= ways <= len(classes):
            raise NeighbourError(
                f"{ways} ways: expected 2 to {len(classes)}, the classes that are there"
            )
        classes = np.sort(rng.choice(classes, ways, replace=False))
    by_class = np.argsort(given, kind="stable")
    first = np.searchsorted(given[by_class], classes)
    last = np.searchsorted(given[by_class], classes, side="right")
    rows = [by_class[a + rng.permutation(b - a)[:shots]] for a, b in zip(first, last, strict=True)]
    return torch.from_numpy(classes), torch.from_numpy(np.stack(rows))


def nearest_class_mean(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    dims: Sequence[int],
    shots: Sequence[int] = (1, 3, 5, 7, 9),
    *,
    draws: int = 5,
    seed: int = 0,
    ways: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Few-shot top-1 %: float64 [draws, shots, G], on the CPU.

    Each draw takes n images of each class, the same for every prefix, those of n shots among those
    of more. A class is the mean of its n normalised prefixes; a normalised query belongs to the
    nearest mean, of equal ones the first. ways: that many classes, drawn at random, and the queries
    of these alone. None: all classes that `labels` has, and all queries, of which those of other
    classes are wrong.
    """
    dims = check_dims(dims, min(features.shape[1], queries.shape[1]))
    device = device or features.device
    query_labels = query_labels.cpu()
    accuracy = torch.empty(draws, len(shots), len(dims), dtype=torch.float64)
    for draw in range(draws):
        classes, rows = draw_shots(labels, max(shots), seed, draw, ways)
        known = torch.isin(query_labels, classes)
        asked = (known if ways else torch.ones_like(known)).nonzero()[:, 0]
        if not len(asked):
            raise NeighbourError("no query is of the classes that were drawn; ask for more ways")
        wanted = torch.where(known, torch.searchsorted(classes, query_labels), -1)[asked].to(device)
        support = features[rows.flatten().to(features.device)]
        for g, d in enumerate(dims):
            examples = unit_prefixes(support, d, device, dtype).view(*rows.shape, d)
            means = torch.stack([examples[:, :n].mean(1) for n in shots])  # [S, C, d]
            offset = means.square().sum(2)[:, None] / 2
            hits = torch.zeros(len(shots), dtype=torch.int64, device=device)
            size = max(1, _TILE // (len(shots) * len(classes) + d))
            for part, own in zip(asked.split(size), wanted.split(size), strict=True):
                q = unit_prefixes(queries[part.to(queries.device)], d, device, dtype)
                hits += ((q @ means.mT - offset).float().argmax(2) == own).sum(1)
            accuracy[draw, :, g] = 100 * hits.cpu().double() / len(asked)
    return accuracy
