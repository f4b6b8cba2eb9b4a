"""What the features of a frozen encoder are worth, per prefix, against three other representations.

    rows = FROZEN_METHODS["pca-knn"](BaselineInputs(...))    # {"PCA kNN k=20": {...}, ...}

Measures: weighted kNN (Wu et al., arXiv 1805.01978), mAP of the nearest neighbours, a converged
linear probe, few-shot class means. Of: the prefixes; PCA to their lengths; random features; the
pixels of small copies of the images. The rows are those of baseline_methods.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from matryoshka.evaluation.baseline_methods import (
    PROJECTED_ROWS,
    BaselineInputs,
    Row,
    Split,
    class_means,
    linear_accuracy,
    make_row,
    random_orders,
    random_probe,
    spread_of_draws,
)
from matryoshka.evaluation.neighbours import RANKED, nearest, weighted_knn
from matryoshka.evaluation.probe import fit
from matryoshka.retrieval.ranking_metrics import mean_average_precision

NEIGHBOURS = (20, 200)
TEMPERATURE = 0.07
PIXEL_SIDE = 32  # of the copies whose pixels are compared

Measure = Callable[[BaselineInputs], dict[str, Row]]


# ---------------------------------------------------------------- measures


def weighted_votes(inputs: BaselineInputs) -> dict[str, Row]:
    """Weighted kNN, one row for each number of neighbours; fewer vote where there are fewer."""
    found = weighted_knn(
        inputs.train.features.to(inputs.device),
        inputs.train.labels,
        inputs.val.features,
        inputs.val.labels,
        inputs.dims,
        k=NEIGHBOURS,
        temperature=TEMPERATURE,
    )
    rows = {}
    for k in found[inputs.dims[0]]:
        values = [found[d][k] for d in inputs.dims]
        rows[f"{inputs.model_name} kNN k={k}"] = make_row(
            "top1 knn", inputs.dims, values, k=k, temperature=TEMPERATURE
        )
    return rows


def average_precision(inputs: BaselineInputs) -> dict[str, Row]:
    """mAP of the nearest training images in percent, divided by k as in all tables of the paper."""
    k = min(RANKED, len(inputs.train.labels))
    neighbours = nearest(
        inputs.train.features,
        inputs.val.features,
        inputs.dims,
        k,
        device=inputs.device,
        dtype=inputs.dtype,
    )
    hits = inputs.train.labels.cpu()[neighbours] == inputs.val.labels.cpu()[:, None]  # [G, N, k]
    values = [100 * mean_average_precision(own.numpy(), k).value for own in hits]
    return {f"{inputs.model_name} mAP@{k}": make_row(f"map@{k}", inputs.dims, values)}


def linear_probe(inputs: BaselineInputs) -> dict[str, Row]:
    """A linear probe of each prefix, fitted until its gradient is small.

    gradient: the largest entry, relative to that at zero weights (probe.py); converged: whether all
    are within the tolerance.
    """
    train = inputs.train
    probe = fit(
        train.features,
        train.labels,
        inputs.dims,
        num_classes=int(train.labels.max()) + 1,
        weight_decay=inputs.weight_decay,
        device=inputs.device,
        dtype=inputs.dtype,
    )
    row = make_row(
        "top1 linear",
        inputs.dims,
        linear_accuracy(inputs.val, probe.heads, inputs.dims),
        weight_decay=inputs.weight_decay,
        gradient=max(probe.gradient),
        converged=all(probe.converged),
    )
    return {f"{inputs.model_name} LP linear": row}


MEASURES: dict[str, Measure] = {
    "knn": weighted_votes,
    "map": average_precision,
    "lp": linear_probe,
    "ncm": class_means,
}


# ---------------------------------------------------------------- representations


def principal_axes(
    features: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mean [D] of features [N, D], and their axes [D, rank] of falling variance."""
    parts = [part.to(device, dtype) for part in features.split(PROJECTED_ROWS)]
    mean = torch.stack([part.sum(0) for part in parts]).sum(0) / len(features)
    scatter = torch.zeros(len(mean), len(mean), dtype=dtype, device=device)
    for part in parts:
        scatter += (part - mean).T @ (part - mean)
    variances, axes = torch.linalg.eigh(scatter)  # rising
    # Directions without variance are rounding errors.
    kept = variances > variances[-1] * len(mean) * torch.finfo(dtype).eps
    return mean, axes[:, kept].flip(1)


def of_pca(measure: Measure, inputs: BaselineInputs) -> dict[str, Row]:
    """The measure of projections on the first K principal axes of the training features."""
    mean, axes = principal_axes(inputs.train.features, inputs.device, inputs.dtype)
    dims = tuple(d for d in inputs.dims if d <= axes.shape[1])
    if not dims:
        return {}
    axes = axes[:, : dims[-1]]

    def project(split: Split) -> Split:
        parts = []
        for x in split.features.split(PROJECTED_ROWS):
            parts.append(((x.to(mean) - mean) @ axes).to(x))
        return Split(torch.cat(parts), split.labels)

    train, val = project(inputs.train), project(inputs.val)
    return measure(replace(inputs, model_name="PCA", dims=dims, train=train, val=val))


def of_random_features(measure: Measure, inputs: BaselineInputs) -> dict[str, Row]:
    """The measure of K random features: mean and standard deviation over the draws.

    The whole feature has only one subset: it is measured once.
    """
    inputs = replace(inputs, model_name="Rand.")
    drawn = tuple(d for d in inputs.dims if d < inputs.width)
    draws = []
    if drawn:
        for chosen in random_orders(inputs, drawn[-1]):
            draws.append(measure(replace(chosen, dims=drawn)))
    whole = {}
    if len(drawn) < len(inputs.dims):
        whole = measure(replace(inputs, dims=(inputs.width,)))

    rows = {}
    for name, row in (draws[0] if draws else whole).items():
        values: list[float] = []
        std: list[float | None] | None = []
        if draws:
            measured = [[draw[name]["values"][str(d)] for d in drawn] for draw in draws]
            spread = spread_of_draws(torch.tensor(measured, dtype=torch.float64))
            values += spread.mean
            std = None if spread.std is None else [*spread.std]
        if whole:
            values.append(whole[name]["values"][str(inputs.width)])
            std = None if std is None else [*std, None]
        rows[name] = {
            **row,
            **make_row(row["metric"], inputs.dims, values, std or None),
            "draws": inputs.draws,
            "seed": inputs.seed,
        }
    return rows


def of_pixels(measure: Measure, inputs: BaselineInputs) -> dict[str, Row]:
    """The measure of the pixels of small copies, all of them: a row with a single value.

    The training images' mean is subtracted. Otherwise brightness decides: 35.0 % instead of 46.6 %
    with 20 neighbours on 1,000 test images of CIFAR-10.
    """
    if inputs.pixels is None:
        return {}
    pixels = inputs.pixels()
    mean = pixels[0].features.mean(0)
    train, val = (Split(part.features - mean, part.labels) for part in pixels)
    width = len(mean)
    return measure(replace(inputs, model_name="Pixels", dims=(width,), train=train, val=val))


FROZEN_METHODS: dict[str, Measure] = {**MEASURES}
for _name, _measure in MEASURES.items():
    FROZEN_METHODS[f"pca-{_name}"] = partial(of_pca, _measure)
for _name in ("knn", "map", "ncm"):
    FROZEN_METHODS[f"rand-{_name}"] = partial(of_random_features, MEASURES[_name])
FROZEN_METHODS["rand-lp"] = random_probe
for _name in ("knn", "map", "ncm"):  # a probe of 3072 pixels would take longer than all the rest
    FROZEN_METHODS[f"pixels-{_name}"] = partial(of_pixels, MEASURES[_name])
NEED_PIXELS = tuple(name for name in FROZEN_METHODS if name.startswith("pixels-"))
