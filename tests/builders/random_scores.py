"""Saved predictions of a model that does not exist, for the analyses and the report."""

import json

import numpy as np


def write_scores(folder, rng, *, dims, strengths, chance, images, **facts):
    """logits.npy, gt.npy and results.json of normal scores in which the label weighs `strengths`.

    chance: the share of each class in the labels. facts: further keys of results.json, which is
    returned.
    """
    labels = rng.choice(len(chance), images, p=chance)
    logits = rng.standard_normal((len(dims), images, len(chance))).astype(np.float32)
    for g, strength in enumerate(strengths):
        logits[g, np.arange(images), labels] += strength
    np.save(folder / "logits.npy", logits)
    np.save(folder / "gt.npy", labels)
    top1 = 100 * (logits.argmax(2) == labels).mean(1)
    results = {
        "prefixes": {str(d): {"top1": float(a)} for d, a in zip(dims, top1, strict=True)},
        "images": images,
        "arrays": {"logits": "logits.npy", "gt": "gt.npy"},
        **facts,
    }
    (folder / "results.json").write_text(json.dumps(results))
    return results
