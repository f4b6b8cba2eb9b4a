"""What each dim answers on a data set: predictions, losses, and features for a map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from matryoshka.arrays import integers, takes
from matryoshka.data.augment import normalise
from matryoshka.data.loader import Batch
from matryoshka.devices import autocast
from matryoshka.models import NestedModel
from matryoshka.nested import nested_logits


@dataclass(frozen=True)
class DimAnswers:
    """Answers of G dims for N images, in data set order.

    labels: int64 [N]. predictions: {dim: int64 [N]}. accuracy: {dim: {top1, top5}} in percent.
    loss: {dim: mean cross-entropy}. features: {dim: float32 [n, dim]} of the images `rows`, what
    the classifier of this dim sees.
    """

    labels: np.ndarray
    rows: np.ndarray
    predictions: dict[int, np.ndarray] = field(default_factory=dict)
    accuracy: dict[int, dict[str, float]] = field(default_factory=dict)
    loss: dict[int, float] = field(default_factory=dict)
    features: dict[int, np.ndarray] = field(default_factory=dict)


def dim_logits(model: NestedModel, images: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(dim, features [B, dim], logits [B, C]) of each dim: from one pass, or one pass for each."""
    features = model.features(images) if model.one_pass else None
    for dim in model.dims:
        own = model.features_of(images, dim) if features is None else features[:, :dim]
        yield dim, own, nested_logits(own, [model.classifier(dim)], (dim,))[0]


@torch.inference_mode()
def answer(
    model: NestedModel,
    batches: Iterable[Batch],
    into: DimAnswers,
    *,
    precision: str = "fp32",
) -> None:
    """Add the answers of all dims of `model` to `into`. For a single process.

    batches: every image of the data set once, in any order. Leaves the model in eval mode.
    """
    # torchmetrics takes seconds to import: not before it is needed
    from matryoshka.evaluation.accuracy import PrefixAccuracy, PrefixLoss

    model.eval()
    device = next(model.parameters()).device
    accuracy = PrefixAccuracy(model.dims).to(device)
    loss = PrefixLoss(model.dims).to(device)
    place = np.full(len(into.labels), -1)
    place[into.rows] = np.arange(len(into.rows))
    for dim in model.dims:
        into.predictions[dim] = np.zeros(len(into.labels), np.int64)
        into.features[dim] = np.zeros((len(into.rows), dim), np.float32)

    for batch in batches:
        images = normalise(batch.images, model.preprocessing.mean, model.preprocessing.std)
        index = batch.index.cpu().numpy()
        kept = place[index] >= 0
        all_logits = []
        with autocast(device, precision):
            for dim, features, logits in dim_logits(model, images):
                all_logits.append(logits.float())
                into.predictions[dim][index] = logits.argmax(1).cpu().numpy()
                into.features[dim][place[index[kept]]] = features.float().cpu().numpy()[kept]
        logits = torch.stack(all_logits)  # [G, B, C]
        accuracy.update(logits, batch.labels)
        loss.update(logits, batch.labels)
    into.accuracy.update(accuracy.compute())
    into.loss.update(loss.compute())


@takes(labels=integers("N+", low=0), predictions=integers("N", low=0))
def confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """int64 [C, C]: how many images of the class of the row were predicted as that of the column.

    labels, predictions: int64 [N], 0 to C - 1.
    """
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(labels, predictions, labels=np.arange(classes))


@takes(matrix=integers("C C", low=0))
def most_confused(matrix: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """The largest entries off the diagonal: (true class, predicted class, images), largest first.

    Entries of 0 are left out; equal ones come in the order of the matrix.
    """
    errors = np.array(matrix)
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:count]
    found = []
    for true, predicted in zip(*np.unravel_index(order, errors.shape), strict=True):
        if errors[true, predicted]:
            found.append((int(true), int(predicted), int(errors[true, predicted])))
    return found


def sample_of(images: int, most: int, seed: int) -> np.ndarray:
    """Numbers of at most `most` random images (-1: all), int64, rising."""
    if most < 0 or images <= most:
        return np.arange(images)
    return np.sort(np.random.default_rng(seed).choice(images, most, replace=False))


def by_dim(values: dict, dims: Sequence[int]) -> dict[str, object]:
    """{dim: value} with JSON's keys, in the order of `dims`."""
    return {str(dim): values[dim] for dim in dims}
