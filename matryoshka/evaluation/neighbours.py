"""Exact nearest neighbours and nearest class means on prefixes of features, in bounded memory.

Each prefix is truncated first, then L2-normalised (a zero vector stays zero); distances are
Euclidean. Products are computed in `dtype` and compared as float32: differences below its
resolution are ties. Sources: 1-NN and few-shot accuracy of Kusupati et al., arXiv 2205.13147,
sections 4.2 and 4.3. Dimension legend: G prefixes, M database entries, N queries, K neighbours, C
classes, D features.
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
                near = torch.addmm(2 - x.square().sum(1) / 2, q, x.T).float()
                near, row = stable_top_k(near, k)
                # Merge with the best of the earlier blocks, which come first: ties go by index.
                score, best = stable_top_k(torch.cat([score, near], 1), k)
                index = torch.cat([index, begin + row], 1).gather(1, best)
            neighbours[g, first : first + width] = index.cpu()
    return neighbours


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
