"""Baselines of the MRL paper, computed from the features of one model.

    rows = METHODS["1nn"](BaselineInputs(...))    # {"MRL 1-NN": {"metric": ..., "values": ...}}

Each method returns rows of baselines.json: {name: {"metric", "values": {dim: top-1 %}, "std", ..}}.
Source: Kusupati et al., arXiv 2205.13147, sections 4.2 and 4.3. Dimension legend: N images, D
features, C classes, G prefixes, K length of a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matryoshka.evaluation.neighbours import knn_accuracy, nearest, nearest_class_mean
from matryoshka.evaluation.probe import fit
from matryoshka.nested import Head, nested_logits

ROWS = 1024  # features classified at a time: [G, 1024, 1000] logits are 80 MB for G = 10
PROJECTED_ROWS = 8192

Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """A data set as features [N, D] and labels int64 [N]."""

    features: Tensor
    labels: Tensor

    def columns(self, chosen: Tensor) -> Split:
        """The same images with some of their features."""
        return Split(self.features[:, chosen.to(self.features.device)], self.labels)


@dataclass(frozen=True)
class BaselineInputs:
    """Model, data and settings of the baselines.

    model_name: MRL, MRL-E or FF<width>. heads: the model's classifiers (weight [C, d], bias [C]).
    model_dims: prefixes that the heads were trained for. dims: prefixes to evaluate. ways: classes
    in a few-shot draw, None for all. pixels: reads the images' pixels as features of (train, val);
    None without images.
    """

    model_name: str
    heads: list[Head]
    model_dims: tuple[int, ...]
    dims: tuple[int, ...]
    train: Split
    val: Split
    shots: tuple[int, ...]
    ways: int | None
    draws: int
    seed: int
    weight_decay: float
    device: torch.device
    dtype: torch.dtype
    pixels: Callable[[], tuple[Split, Split]] | None = None

    @property
    def width(self) -> int:
        return self.train.features.shape[1]

    def columns(self, chosen: Tensor) -> BaselineInputs:
        """The same images with some of their features."""
        return replace(self, train=self.train.columns(chosen), val=self.val.columns(chosen))


def make_row(
    metric: str,
    dims: Sequence[int],
    values: Sequence[float],
    std: Sequence[float | None] | None = None,
    **more: Any,
) -> Row:
    """One method's entry of baselines.json."""
    keys = [str(d) for d in dims]
    return {
        "metric": metric,
        "values": dict(zip(keys, values, strict=True)),
        "std": None if std is None else dict(zip(keys, std, strict=True)),
        **more,
    }


class Spread(NamedTuple):
    """Mean and sample standard deviation over draws; std is None for a single draw."""

    mean: list[float]
    std: list[float] | None


def spread_of_draws(accuracies: Tensor) -> Spread:
    """Mean and standard deviation of accuracies [draws, G] for each prefix."""
    std = accuracies.std(0).tolist() if len(accuracies) > 1 else None
    return Spread(accuracies.mean(0).tolist(), std)


def linear_accuracy(split: Split, heads: Sequence[Head], dims: Sequence[int]) -> list[float]:
    """Top-1 % [G] of linear classifiers on the prefixes of a split's features."""
    weight = heads[0][0]
    hits = torch.zeros(len(dims), dtype=torch.int64)
    for x, y in zip(split.features.split(ROWS), split.labels.split(ROWS), strict=True):
        logits = nested_logits(x.to(weight.device, weight.dtype), heads, dims, fused=False)
        hits += (logits.argmax(2).cpu() == y).sum(1)
    return (100 * hits.double() / len(split.labels)).tolist()


def neighbour_accuracy(inputs: BaselineInputs, dims: Sequence[int]) -> list[float]:
    """Top-1 % [G] of the nearest training image, on normalised prefixes."""
    neighbours = nearest(
        inputs.train.features,
        inputs.val.features,
        dims,
        device=inputs.device,
        dtype=inputs.dtype,
    )
    return knn_accuracy(neighbours, inputs.train.labels, inputs.val.labels)


# ---------------------------------------------------------------- the model's own prefixes


def linear(inputs: BaselineInputs) -> dict[str, Row]:
    """The model's own classifiers, at the prefixes that they were trained for."""
    accuracy = linear_accuracy(inputs.val, inputs.heads, inputs.model_dims)
    values = dict(zip(inputs.model_dims, accuracy, strict=True))
    kept = [d for d in inputs.dims if d in values]
    if not kept:
        return {}
    return {f"{inputs.model_name} linear": make_row("top1 linear", kept, [values[d] for d in kept])}


def one_nn(inputs: BaselineInputs) -> dict[str, Row]:
    """The class of the nearest training image."""
    values = neighbour_accuracy(inputs, inputs.dims)
    return {f"{inputs.model_name} 1-NN": make_row("top1 1-nn", inputs.dims, values)}


def class_means(inputs: BaselineInputs) -> dict[str, Row]:
    """Few-shot classification by the nearest class mean, one row for each number of shots."""
    accuracy = nearest_class_mean(
        inputs.train.features,
        inputs.train.labels,
        inputs.val.features,
        inputs.val.labels,
        dims=inputs.dims,
        shots=inputs.shots,
        draws=inputs.draws,
        seed=inputs.seed,
        ways=inputs.ways,
        device=inputs.device,
        dtype=inputs.dtype,
    )  # [draws, shots, G]
    ways = f"{inputs.ways}-way " if inputs.ways else ""
    rows = {}
    for s, shots in enumerate(inputs.shots):
        spread = spread_of_draws(accuracy[:, s])
        rows[f"{inputs.model_name} NCM {ways}{shots}-shot"] = make_row(
            "top1 ncm",
            inputs.dims,
            spread.mean,
            spread.std,
            draws=inputs.draws,
            shots=shots,
            ways=inputs.ways,
            seed=inputs.seed,
        )
    return rows


# ---------------------------------------------------------------- singular value decomposition


def svd(inputs: BaselineInputs) -> dict[str, Row]:
    """The classifier's weight cut to rank K; the bias stays."""
    weight, bias = inputs.heads[0]
    u, s, v = torch.linalg.svd(weight.cpu().double(), full_matrices=False)
    values = []
    for k in inputs.dims:
        # slices end at the rank of the weight: from there on this is the weight itself
        low_rank = (u[:, :k] * s[:k] @ v[:k]).to(weight)
        values += linear_accuracy(inputs.val, [(low_rank, bias)], [weight.shape[1]])
    return {"SVD linear": make_row("top1 linear", inputs.dims, values, rank=len(s))}


def svd_one_nn(inputs: BaselineInputs) -> dict[str, Row]:
    """1-NN on projections of the features on the first K right singular vectors of the weight."""
    weight, _ = inputs.heads[0]
    v = torch.linalg.svd(weight.cpu().double(), full_matrices=False)[2]  # [rank, D]
    dims = [k for k in inputs.dims if k <= len(v)]
    if not dims:
        return {}
    axes = v[: dims[-1]].to(inputs.device, inputs.dtype)

    def project(split: Split) -> Split:
        parts = [(x.to(axes) @ axes.T).to(x) for x in split.features.split(PROJECTED_ROWS)]
        return Split(torch.cat(parts), split.labels)

    projected = replace(inputs, train=project(inputs.train), val=project(inputs.val))
    values = neighbour_accuracy(projected, dims)
    return {"SVD 1-NN": make_row("top1 1-nn", dims, values, rank=len(v))}


# ---------------------------------------------------------------- random features


def random_orders(inputs: BaselineInputs, count: int) -> Iterator[BaselineInputs]:
    """The same images with `count` random features, for each draw."""
    for draw in range(inputs.draws):
        # a large prime apart, so that seeds 0 and 1 share no draw
        rng = torch.Generator().manual_seed((inputs.seed * 1_000_003 + draw) % 2**63)
        yield inputs.columns(torch.randperm(inputs.width, generator=rng)[:count])


def over_random_orders(
    metric: str,
    inputs: BaselineInputs,
    accuracy: Callable[[BaselineInputs, Sequence[int]], list[float]],
    **more: Any,
) -> Row:
    """A row of accuracy(inputs, dims) for random orders of the features.

    The first K features of a random order are a random subset. The whole feature has only one
    subset: it is evaluated once and has no standard deviation.
    """
    drawn = [d for d in inputs.dims if d < inputs.width]
    values: list[float] = []
    std: list[float | None] | None = []
    if drawn:
        accuracies = []
        for chosen in random_orders(inputs, drawn[-1]):
            accuracies.append(accuracy(chosen, drawn))
        spread = spread_of_draws(torch.tensor(accuracies, dtype=torch.float64))
        values += spread.mean
        std = None if spread.std is None else [*spread.std]
    if len(drawn) < len(inputs.dims):
        values += accuracy(inputs, [inputs.width])
        std = None if std is None else [*std, None]
    return make_row(
        metric, inputs.dims, values, std or None, draws=inputs.draws, seed=inputs.seed, **more
    )


def random_one_nn(inputs: BaselineInputs) -> dict[str, Row]:
    """1-NN on K random features."""
    return {"Rand. FS 1-NN": over_random_orders("top1 1-nn", inputs, neighbour_accuracy)}


def random_probe(inputs: BaselineInputs) -> dict[str, Row]:
    """A linear probe on K random features."""
    converged: list[bool] = []

    def probe_accuracy(chosen: BaselineInputs, dims: Sequence[int]) -> list[float]:
        train = chosen.train
        probe = fit(
            train.features,
            train.labels,
            dims,
            num_classes=int(train.labels.max()) + 1,
            weight_decay=chosen.weight_decay,
            device=chosen.device,
            dtype=chosen.dtype,
        )
        converged.extend(probe.converged)
        return linear_accuracy(chosen.val, probe.heads, dims)

    row = over_random_orders(
        "top1 linear", inputs, probe_accuracy, weight_decay=inputs.weight_decay
    )
    row["converged"] = all(converged)
    return {"Rand. LP linear": row}


METHODS: dict[str, Callable[[BaselineInputs], dict[str, Row]]] = {
    "linear": linear,
    "1nn": one_nn,
    "ncm": class_means,
    "svd": svd,
    "svd-1nn": svd_one_nn,
    "rand-fs": random_one_nn,
    "rand-lp": random_probe,
}
NEED_CLASSES = ("linear", "svd", "svd-1nn")  # the classes that the model was trained on
NEED_ONE_HEAD = ("svd", "svd-1nn")
