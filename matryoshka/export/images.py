"""Images for calibration and verification."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from matryoshka.data import CenterCrop, Loader
from matryoshka.data.augment import Preprocessing
from matryoshka.data.dataset import Dataset
from matryoshka.data.subset import Subset

BATCH = 64


def sample_images(source: Dataset, count: int, preprocessing: Preprocessing) -> Tensor:
    """Up to `count` images of a dataset, evenly spaced, cropped as in evaluation.

    uint8 [N, size, size, 3]. BetonError for a damaged image.
    """
    chosen = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(np.int64)
    crop = CenterCrop(preprocessing.size, preprocessing.ratio)
    loader = Loader(Subset(source, chosen), BATCH, order="sequential", crop=crop)
    return torch.cat([batch.images.clone() for batch in loader])
