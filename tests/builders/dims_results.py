"""A dims.json of a model that does not exist, for the report."""

import json

import numpy as np


def write_dims(folder, *, dims, names, images=50, seed=0, **facts):
    """dims/dims.json in `folder`, the content of which is returned. facts: its other keys."""
    rng = np.random.default_rng(seed)
    count = len(names)
    labels = rng.integers(0, count, images)
    found = {
        "checkpoint": "run/model.safetensors",
        "arch": "vit_nested",
        "head": "mrl",
        "dims": list(dims),
        "dataset": "cifar10",
        "data": "data/cifar10-test.beton",
        "classes": count,
        "class_names": list(names),
        "images": images,
        "resolution": 32,
        "threads": 2,
        "device": "cpu",
        "blocks": 5,
        "map": {"method": "tsne", "labels": labels.tolist(), "points": {}},
    }
    for key in ("prefixes", "loss", "macs", "costs", "confusion", "confused"):
        found[key] = {}
    for dim in dims:
        predictions = np.where(rng.random(images) < 0.6, labels, rng.integers(0, count, images))
        matrix = [[0] * count for _ in names]
        for label, prediction in zip(labels, predictions, strict=True):
            matrix[label][prediction] += 1
        errors = [
            [a, b, matrix[a][b]]
            for a in range(count)
            for b in range(count)
            if a != b and matrix[a][b]
        ]
        key = str(dim)
        top1 = 100 * float((labels == predictions).mean())
        found["prefixes"][key] = {"top1": top1, "top5": 100.0}
        found["loss"][key] = 1.0
        found["macs"][key] = 1000 * dim * dim
        found["costs"][key] = {
            "file": "run/model.safetensors",
            "parameters": 100 * dim * dim,
            "bytes": 400 * dim * dim,
            "seconds": {"1": 0.001 * dim, "128": 0.01 * dim},
        }
        found["confusion"][key] = matrix
        found["confused"][key] = errors[:15]
        found["map"]["points"][key] = rng.standard_normal((images, 2)).round(3).tolist()
    found |= facts
    (folder / "dims").mkdir(exist_ok=True)
    (folder / "dims/dims.json").write_text(json.dumps(found))
    return found
