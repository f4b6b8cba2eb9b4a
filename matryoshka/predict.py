"""Batches -> logits of every prefix, all from one forward pass."""

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
