"""Slow, independent computations for comparison."""

import numpy as np
import torch
from PIL import Image

from matryoshka.data.augment import IMAGENET_MEAN, IMAGENET_STD


def area_weights(n_in: int, n_out: int) -> np.ndarray:
    """[n_out, n_in] share of each source pixel in each output pixel, for shrinking."""
    edges = np.linspace(0, n_in, n_out + 1)
    left = np.maximum(edges[:-1, None], np.arange(n_in)[None])
    right = np.minimum(edges[1:, None], np.arange(n_in)[None] + 1)
    return np.maximum(right - left, 0) / (n_in / n_out)


def one_by_one(model, folder):
    """(features [N, width], labels, names): every image alone, in the order of sorted folders and
    files.
    """
    rows, labels, names = [], [], []
    for label, place in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())):
        for file in sorted(place.iterdir()):
            pixels = (np.asarray(Image.open(file)) / 255 - IMAGENET_MEAN) / IMAGENET_STD
            with torch.inference_mode():
                rows.append(
                    model.trunk(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32))[
                        0
                    ].numpy()
                )
            labels.append(label)
            names.append(f"{place.name}/{file.name}")
    return np.stack(rows), np.array(labels), names
