"""Batches -> logits of every prefix, all from one forward pass; or the features that they are made
of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka.data.augment import normalise
from matryoshka.data.loader import Batch
from matryoshka.distributed import autocast
from matryoshka.models import NestedModel


class Prediction(NamedTuple):
    logits: Tensor  # float32 [G, B, C]
    labels: Tensor  # int64 [B]
    index: Tensor  # int64 [B]


@torch.inference_mode()
def predict(
    model: NestedModel, batches: Iterable[Batch], precision: str = "fp32", tta: bool = False
) -> Iterator[Prediction]:
    """Logits of every batch. Puts the model into eval mode (and leaves it there).

    tta: the sum of the logits of the image and its mirror image, as upstream.
    """
    model.eval()
    mean, std = model.preprocessing.mean, model.preprocessing.std
    for batch in batches:
        images = normalise(batch.images, mean, std)
        with autocast(batch.images.device, precision):
            logits = model(images).float()
            if tta:
                logits = logits + model(images.flip(3)).float()
        yield Prediction(logits, batch.labels, batch.index)


@torch.inference_mode()
def extract_features(
    model: NestedModel, batches: Iterable[Batch], count: int, precision: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """(features float32 [N, D], labels int64 [N]) of the trunk, on the CPU, in the data set's
    order. For one process.

    count: N, the images of the data set; every one has to come once, else ValueError. Puts the
    model into eval mode (and leaves it there). The features are written where they stay: memory is
    N x D numbers and a batch.
    """
    model.eval()
    mean, std = model.preprocessing.mean, model.preprocessing.std
    features, labels = torch.empty(count, model.width), torch.empty(count, dtype=torch.int64)
    missing = torch.ones(count, dtype=torch.bool)
    for batch in batches:
        with autocast(batch.images.device, precision):
            got = model.features(normalise(batch.images, mean, std))
        index = batch.index.cpu()
        features[index] = got.float().cpu()
        labels[index] = batch.labels.cpu()
        missing[index] = False
    if missing.any():
        raise ValueError(
            f"{int(missing.sum())} of {count} images did not come, the first is "
            f"{int(missing.int().argmax())}"
        )
    return features, labels
