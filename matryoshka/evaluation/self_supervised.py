"""Evaluation of an encoder without a trained classifier, in every prefix."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from matryoshka import distributed
from matryoshka.data import Loader
from matryoshka.data.augment import normalise
from matryoshka.devices import autocast
from matryoshka.distributed import World
from matryoshka.evaluation.collapse import collapse_monitors
from matryoshka.evaluation.neighbours import NeighbourHits, labelled, neighbour_hits
from matryoshka.evaluation.online_probe import OnlineProbe
from matryoshka.models import NestedModel


class Evaluation(NamedTuple):
    """knn: {dim: {k: top-1 %}}, of the weighted vote; knn_top_5: {dim: %}, of that of 20.
    map: {dim: mAP@10 in %}. probe: {dim: top-1 %}. monitors: see collapse_monitors. Empty where
    there was nothing to evaluate on.
    """

    knn: dict[int, dict[int, float]]
    knn_top_5: dict[int, float]
    map: dict[int, float]
    probe: dict[int, float]
    monitors: dict[int, dict[str, float]]
    seconds: float


def evaluate_encoder(
    encoder: NestedModel,
    bank: Loader | None,
    queries: Loader | None,
    *,
    probe: OnlineProbe | None,
    watched: Iterable[tuple[Tensor, Tensor]],
    precision: str,
    world: World,
    interruptible: Callable[[Iterable], Iterable] = iter,
) -> Evaluation:
    """Evaluate the features of an encoder; the modes of its modules are left as they were.

    bank, queries: labelled images; the neighbours of the second are looked for among the first.
    probe: classifiers of the features. watched: two views of some images, normalised, in batches,
    the same on all ranks.
    """
    began = time.perf_counter()
    # Ranks have different batch-norm statistics: all evaluate what rank 0 saves.
    distributed.broadcast_buffers(encoder, world)
    found = Neighbours({}, {}, {})
    probed: dict[int, float] = {}
    with evaluating(encoder), torch.no_grad():
        if bank is not None and queries is not None:
            known, known_labels = all_features(encoder, interruptible(bank), bank, precision, world)
            asked, labels = all_features(encoder, interruptible(queries), queries, precision, world)
            known, known_labels = labelled(known, known_labels, "the bank")
            asked, labels = labelled(asked, labels, "the queries")
            parts = neighbour_parts(
                known, known_labels, asked, labels, dims=encoder.dims, world=world
            )
            found = over_ranks(list(interruptible(parts)), encoder.dims, len(asked), world)
            if probe is not None:
                with evaluating(probe):
                    right, answered = probe.answers(asked, labels)
                shares = (100 * right / answered).tolist()
                probed = dict(zip(encoder.dims, shares, strict=True))
        first, second = [], []
        for views in interruptible(watched):
            with autocast(views[0].device, precision):
                first.append(encoder.features(views[0]).float())
                second.append(encoder.features(views[1]).float())
        monitors = collapse_monitors(torch.cat(first), torch.cat(second), encoder.dims)
    return Evaluation(*found, probed, monitors, time.perf_counter() - began)


class Neighbours(NamedTuple):
    """The first fields of Evaluation."""

    knn: dict[int, dict[int, float]]
    knn_top_5: dict[int, float]
    map: dict[int, float]


def neighbour_parts(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    *,
    dims: Sequence[int],
    world: World,
) -> Iterator[NeighbourHits]:
    """Sums over this rank's part of the queries, for each prefix."""
    own = slice(world.rank, None, world.size)
    for d in dims:
        yield neighbour_hits(bank, bank_labels, queries[own], labels[own], d=d)


def over_ranks(
    parts: Sequence[NeighbourHits], dims: Sequence[int], queries: int, world: World
) -> Neighbours:
    """Percentages of all ranks' sums."""
    sums = [[*hits.votes.values(), hits.top_5, hits.precision] for hits in parts]
    total = distributed.sum_over_ranks(torch.tensor(sums, device=world.device), world)
    rows = (100 * total.cpu().double() / queries).tolist()
    knn, knn_top_5, precision = {}, {}, {}
    for d, hits, row in zip(dims, parts, rows, strict=True):
        *votes, knn_top_5[d], precision[d] = row
        knn[d] = dict(zip(hits.votes, votes, strict=True))
    return Neighbours(knn, knn_top_5, precision)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; each module's own mode again after it."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def all_features(
    encoder: NestedModel, batches: Iterable, loader: Loader, precision: str, world: World
) -> tuple[Tensor, Tensor]:
    """(features float32 [N, D], labels int64 [N]) of a loader's data set, on all ranks.

    batches: those of `loader`, of which each rank has its part. Memory: N x D numbers, on the
    device.
    """
    count = len(loader.dataset)
    mean, std = encoder.preprocessing.mean, encoder.preprocessing.std
    features = torch.zeros(count, encoder.width, device=world.device)
    # One more than the label: 0 for an image that was left out, which then has none.
    labels = torch.zeros(count, dtype=torch.int64, device=world.device)
    for batch in batches:
        with autocast(batch.images.device, precision):
            output = encoder.features(normalise(batch.images, mean, std))
        features[batch.index] = output.float()
        labels[batch.index] = batch.labels + 1
    # every row is of one rank, and zero on the others
    labels = distributed.sum_over_ranks(labels, world) - 1
    return distributed.sum_over_ranks(features, world), labels
