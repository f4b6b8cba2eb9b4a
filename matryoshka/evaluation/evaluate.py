"""Accuracy and loss of every prefix on a whole data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from matryoshka import distributed
from matryoshka.data import Loader
from matryoshka.distributed import World
from matryoshka.evaluation.predict import predict
from matryoshka.models import NestedModel


class Evaluation(NamedTuple):
    """accuracy: {dim: {top1, top5}} in percent. loss: {dim: mean cross-entropy}."""

    accuracy: dict[int, dict[str, float]]
    loss: dict[int, float]
    seconds: float


def evaluate(
    model: NestedModel,
    loader: Loader,
    *,
    precision: str,
    tta: bool,
    world: World,
    interruptible: Callable[[Iterable], Iterable] = iter,
) -> Evaluation:
    """Accuracy and loss of every prefix over the images of all ranks."""
    # torchmetrics takes seconds to import: not before it is needed
    from matryoshka.evaluation.accuracy import PrefixAccuracy, PrefixLoss

    began = time.perf_counter()
    # Ranks have different batch-norm statistics: all evaluate the model that rank 0 saves.
    distributed.broadcast_buffers(model, world)
    accuracy = PrefixAccuracy(model.dims).to(world.device)
    loss = PrefixLoss(model.dims).to(world.device)
    for prediction in interruptible(predict(model, loader, precision, tta)):
        accuracy.update(prediction.logits, prediction.labels)
        loss.update(prediction.logits, prediction.labels)
    return Evaluation(accuracy.compute(), loss.compute(), time.perf_counter() - began)
