"""Logits of every prefix from one forward pass per batch, and features of whole data sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka.data.augment import normalise
from matryoshka.data.loader import Batch
from matryoshka.devices import autocast
from matryoshka.models import NestedModel


class Prediction(NamedTuple):
    logits: Tensor  # float32 [G, B, C]
    labels: Tensor  # int64 [B]
    index: Tensor  # int64 [B]: positions in the data set


@torch.inference_mode()
def predict(
    model: NestedModel, batches: Iterable[Batch], precision: str = "fp32", tta: bool = False
) -> Iterator[Prediction]:
    """Yield the logits of every batch. Leaves the model in eval mode.

    tta: test-time augmentation, the sum of the logits of the image and its mirror image (as
    upstream).
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
    """(features float32 [N, D], labels int64 [N]) of the trunk, on the CPU, in data set order.

    For a single process. count: N, the size of the data set; ValueError if an image is missing.
    Leaves the model in eval mode. Memory: the N x D features and one batch.
    """
    model.eval()
    mean, std = model.preprocessing.mean, model.preprocessing.std
    features = torch.empty(count, model.width)  # [N, D]
    labels = torch.empty(count, dtype=torch.int64)
    missing = torch.ones(count, dtype=torch.bool)  # unwritten rows would be arbitrary numbers
    for batch in batches:
        with autocast(batch.images.device, precision):
            output = model.features(normalise(batch.images, mean, std))  # [B, D]
        index = batch.index.cpu()
        features[index] = output.float().cpu()
        labels[index] = batch.labels.cpu()
        missing[index] = False
    if missing.any():
        raise ValueError(
            f"{int(missing.sum())} of {count} images are missing, the first is "
            f"{int(missing.int().argmax())}"
        )
    return features, labels
