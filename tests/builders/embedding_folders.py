"""Folders of embeddings without a model, as `matryoshka embed` writes them."""

import numpy as np

from matryoshka.embeddings.writing import EmbeddingWriter, RowWriter

META = {
    "format": "matryoshka-embeddings-1",
    "normalised": False,
    "precision": "fp32",
    "model": {
        "file": "model.safetensors",
        "weights_sha256": "ab" * 32,
        "arch": "resnet10",
        "head": "mrl",
        "dims": [8, 16, 32],
        "width": 32,
    },
    "preprocessing": {
        "name": "checkpoint",
        "size": 32,
        "ratio": 1.0,
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
    },
    "code": {"version": "1"},
}


def nested(n, dim, seed, classes=12):
    """(float32 [n, dim], int64 [n]): clusters, earlier dimensions vary more, all positive as behind
    a ReLU.
    """
    rng = np.random.default_rng(seed)
    spread = (1 + np.arange(dim) / 16) ** -0.6
    centres = np.random.default_rng(99).standard_normal((classes, dim)) * spread
    labels = rng.integers(0, classes, n)
    points = centres[labels] + 0.5 * rng.standard_normal((n, dim)) * spread
    return np.log1p(np.exp(points)).astype(np.float32), labels


def write(folder, rows, labels, *, names=None, weights=None, classes=None, **meta):
    """Write a folder of embeddings; return its path as text."""
    names = names or [f"{i:05d}.jpg" for i in range(len(rows))]
    count = int(labels.max()) + 1 if len(labels) else 1
    about = META | {"rows": len(rows), "columns": rows.shape[1], "dtype": str(rows.dtype)} | meta
    about["data"] = {
        "path": "photos",
        "fingerprint": "ff",
        "num_classes": len(classes or range(count)),
        "classes": classes,
    }
    if weights:
        about["model"] = META["model"] | {"weights_sha256": weights}
    with EmbeddingWriter(folder) as unfinished:
        writer = RowWriter(folder, unfinished.begin(about, labels, names.__getitem__))
        writer.write(np.arange(len(rows)), rows)
        writer.close()
        unfinished.finish()
    return str(folder)
