"""Train the map of an adapter on finished embeddings, in minutes on a CPU.

    fitted = fit_adapter(rows, labels, spec, settings, score=validation.score, report=print)

The training starts at PCA, or, with labels, at a discriminant analysis if that scores higher on
the validation part; the start's score is that of epoch 0. It ends where that score has not improved
for `patience` epochs; the weights are those of the best epoch. Losses: losses.py, the sum over the
prefixes. Legend: N embeddings of D numbers, E behind the adapter, C classes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshka.arrays import floats, integers, takes
from matryoshka.losses import (
    neighbour_divergence,
    neighbourhood_components,
    over_prefixes,
    pairwise_similarity,
    prototype_cross_entropy,
    supervised_contrastive,
    top_k_similarity,
)
from matryoshka.models.adapter import (
    Adapter,
    AdapterError,
    AdapterSpec,
    discriminant_adapter,
    pca_adapter,
)

WARM_UP_STEPS = 20
SUPERVISED = ("nca", "supcon", "classes")
Report = Callable[[str], None]
# (adapted [B, E], original [B, D] of length 1, labels [B]) -> scalar
BatchLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class AdapterTraining:
    """Settings of a training. loss: one of LOSSES of adapter_options.py, but auto.

    lr, temperature: None for those of the loss.
    """

    loss: str
    epochs: int = 40
    patience: int = 10
    batch_size: int = 1024
    lr: float | None = None
    weight_decay: float = 1e-4
    temperature: float | None = None
    neighbours: int = 10
    seed: int = 0


class Fitted(NamedTuple):
    """A trained adapter, with the weights of its best epoch, and PCA of the same rows.

    best_epoch: 0 if no epoch was better than the start. history: loss and score of each epoch, the
    score of the start first.
    """

    adapter: Adapter
    pca: Adapter
    best_epoch: int
    history: list[dict[str, float]]

    @property
    def is_pca(self) -> bool:
        """Whether the adapter is PCA itself."""
        return self.adapter is self.pca


@takes(rows=floats("N D"), labels=integers("N"))
def fit_adapter(
    rows: np.ndarray,
    labels: np.ndarray | None,
    spec: AdapterSpec,
    settings: AdapterTraining,
    *,
    score: Callable[[Adapter], float],
    report: Report | None = None,
) -> Fitted:
    """Fit an adapter to rows [N, D] of the training part.

    labels: int64 [N], needed by the supervised losses. score: of an adapter on the validation part,
    higher is better. AdapterError for fewer rows than numbers, and a single class. The same on
    every run with one number of threads.
    """
    targets, classes = _numbered(labels)
    whole = replace(spec, dims=(spec.width,), hidden=0)
    start = pca_adapter(rows, whole)
    pca = _cut(start, spec)
    best, best_score = pca, score(pca)
    if settings.loss in SUPERVISED:
        assert labels is not None
        discriminant = discriminant_adapter(rows, labels, whole)
        reached = score(_cut(discriminant, spec))
        if reached > best_score:
            start, best, best_score = discriminant, _cut(discriminant, spec), reached
    trained = _Map(start, rows, spec, settings.seed)
    loss, prototypes = batch_loss(settings, trained.adapter, classes)
    optimizer = torch.optim.AdamW(
        [*trained.parameters(), *prototypes],
        lr=rate_of(settings),
        weight_decay=settings.weight_decay,
    )
    prepared = torch.from_numpy(np.array(rows, np.float32))
    batches = max(1, len(prepared) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _share_of_rate(step, settings.epochs * batches)
    )
    order = torch.Generator().manual_seed(settings.seed)

    started = time.perf_counter()
    best_epoch = 0
    history: list[dict[str, float]] = [{"epoch": 0, "score": best_score}]
    for epoch in range(1, settings.epochs + 1):
        total = 0.0
        shuffled = torch.randperm(len(prepared), generator=order)
        for chosen in shuffled[: batches * settings.batch_size].tensor_split(batches):
            original = F.normalize(prepared[chosen], dim=1)
            numbers = targets[chosen] if classes else targets
            value = loss(trained(original), original, numbers)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            total += float(value.detach())
        adapter = trained.folded()
        reached = score(adapter)
        history.append({"epoch": epoch, "loss": total / batches, "score": reached})
        if report is not None:
            seconds = time.perf_counter() - started
            report(
                f"epoch {epoch:3d}  loss {total / batches:.4f}  validation {reached:.2f}  "
                f"{seconds:.0f} s"
            )
        if reached > best_score:
            best_score, best_epoch, best = reached, epoch, adapter
        elif epoch - best_epoch >= settings.patience:
            break
    return Fitted(best, pca, best_epoch, history)


class _Map(nn.Module):
    """An adapter in training: original rows of length 1 [B, D] -> [B, E].

    The start, PCA or a discriminant analysis, turns the rows into D numbers; what is trained is a
    matrix [E, D] behind it, first a cut, and the network. Unlike the product of both, its numbers
    are of one size in all directions, so that one rate fits them, and all D numbers reach the first
    prefix.
    """

    def __init__(self, start: Adapter, rows: np.ndarray, spec: AdapterSpec, seed: int) -> None:
        super().__init__()
        # Mapped rows have the length 1 on average, as a residual network expects.
        length = float(np.linalg.norm(start.apply_to(rows), axis=1).mean())
        self.mean = start.mean
        self.start = start.weight.detach() / length
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of the network's weights
            self.adapter = Adapter(replace(spec, method="learnt"))
        self.adapter.weight.requires_grad_(False)
        self.adapter.mean.copy_(start.mean)
        self.turn = nn.Parameter(torch.eye(self.adapter.width, spec.width))

    def forward(self, original: Tensor) -> Tensor:
        started = F.linear(original - self.mean, self.start)
        return self.adapter.refine(F.linear(started, self.turn))

    @torch.no_grad()
    def folded(self) -> Adapter:
        """The adapter as of now, without gradients."""
        adapter = copy.deepcopy(self.adapter)
        adapter.weight.copy_(self.turn @ self.start)
        return adapter.eval().requires_grad_(False)


@torch.no_grad()
def _cut(whole: Adapter, spec: AdapterSpec) -> Adapter:
    """The linear map of a start for the prefixes of `spec`."""
    adapter = Adapter(replace(spec, hidden=0, method=whole.spec.method))
    adapter.mean.copy_(whole.mean)
    adapter.weight.copy_(whole.weight[: adapter.width])
    return adapter.eval().requires_grad_(False)


def _numbered(labels: np.ndarray | None) -> tuple[Tensor, int]:
    """Labels as 0 to C - 1, and C; without labels a placeholder and 0."""
    if labels is None:
        return torch.zeros(0, dtype=torch.int64), 0
    classes, numbers = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise AdapterError("one class only: labels tell nothing; leave them out")
    return torch.from_numpy(numbers.reshape(-1).astype(np.int64)), len(classes)


# ---------------------------------------------------------------- losses and rates

# lr at the default batch size, and temperature of the cosines: bench/NOTES.md.
RATES = {
    "nca": 3e-3,
    "supcon": 3e-3,
    "classes": 3e-3,
    "neighbours": 1e-3,
    "similarity": 1e-3,
}
TEMPERATURES = {"nca": 0.1, "supcon": 0.2, "classes": 0.1, "neighbours": 0.1}
# Losses of embeddings and labels alone.
OF_LABELS = {"nca": neighbourhood_components, "supcon": supervised_contrastive}


def rate_of(settings: AdapterTraining) -> float:
    return RATES[settings.loss] if settings.lr is None else settings.lr


def temperature_of(settings: AdapterTraining) -> float | None:
    """None for the similarity loss, which has none."""
    if settings.temperature is not None:
        return settings.temperature
    return TEMPERATURES.get(settings.loss)


def batch_loss(
    settings: AdapterTraining, adapter: Adapter, classes: int
) -> tuple[BatchLoss, list[nn.Parameter]]:
    """The loss of a batch, summed over the prefixes, and the parameters that it trains besides the
    adapter's: the prototype of each class, which all prefixes share, as in MRL-E.
    """
    dims = adapter.dims
    temperature = temperature_of(settings)
    if settings.loss == "classes":
        nested = over_prefixes(prototype_cross_entropy, dims)
        drawn = torch.Generator().manual_seed(settings.seed)
        start = torch.randn(classes, adapter.width, generator=drawn) / adapter.width**0.5
        prototypes = nn.Parameter(start)

        def of_classes(adapted: Tensor, _: Tensor, labels: Tensor) -> Tensor:
            return nested(adapted, prototypes, labels=labels, temperature=temperature)[0]

        return of_classes, [prototypes]
    if settings.loss in OF_LABELS:
        nested = over_prefixes(OF_LABELS[settings.loss], dims)

        def of_pairs(adapted: Tensor, _: Tensor, labels: Tensor) -> Tensor:
            return nested(adapted, labels=labels, temperature=temperature)[0]

        return of_pairs, []

    def cosines(original: Tensor) -> Tensor:
        # Without the mean, which all embeddings share and which would hide their differences.
        unit = F.normalize(original - adapter.mean, dim=1)
        return unit @ unit.T

    if settings.loss == "neighbours":
        near = over_prefixes(neighbour_divergence, dims)

        def of_neighbours(adapted: Tensor, original: Tensor, _: Tensor) -> Tensor:
            return near(adapted, wanted=cosines(original), temperature=temperature)[0]

        return of_neighbours, []

    pairs = over_prefixes(pairwise_similarity, dims)
    nearest = over_prefixes(top_k_similarity, dims)

    def of_similarities(adapted: Tensor, original: Tensor, _: Tensor) -> Tensor:
        wanted = cosines(original)
        kept = pairs(adapted, wanted=wanted)[0]
        return kept + nearest(adapted, wanted=wanted, k=settings.neighbours)[0]

    return of_similarities, []


def _share_of_rate(step: int, steps: int) -> float:
    """A linear warm-up, then linearly to 0."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - step / max(steps, 1))
