"""Small indexes on disk, from seeded rows."""

import numpy as np

from matryoshka.retrieval.store_writer import IndexRows, Writer

MODEL = {"weights_sha256": "ab" * 32, "file": "model.safetensors"}
PREPARED = {"size": 32, "mean": (0.5, 0.25)}


def batch(rows, names=None, classes=("ant", "bee"), labels=None, path="photos", **more):
    rows = np.asarray(rows, np.float32)
    names = [f"{path}/{i}" for i in range(len(rows))] if names is None else names
    labels = np.arange(len(rows)) % 3 if labels is None else np.asarray(labels)
    classes = None if classes is None else list(classes)
    data = [{"path": path}]
    return IndexRows(rows, names, labels, MODEL, PREPARED, classes=classes, data=data, **more)


def built(folder, *args, threads=1, **options):
    with Writer(folder, threads) as writer:
        return writer.build(batch(*args), **options)


def random_rows(n, columns=24, seed=0):
    return np.random.default_rng(seed).standard_normal((n, columns)).astype(np.float32)
