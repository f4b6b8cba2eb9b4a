"""Differences between an exported file and its model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from matryoshka.export.graph import Deployed, Run


def largest_difference(run: Run, source: Deployed, images: Tensor) -> float:
    """The largest |file - model| / (1 + |model|) over both outputs, for images uint8 [B, S, S, 3].

    It is at most t exactly if numpy's `allclose` holds with rtol = atol = t. Infinite for outputs
    of another shape and for values that are not finite.
    """
    inputs = source.inputs(images)
    with torch.no_grad():
        expected = source(inputs)
    largest = 0.0
    for actual, wanted in zip(run(inputs), expected, strict=True):
        if actual.shape != wanted.shape:
            return math.inf
        difference = (actual.double() - wanted.double()).abs() / (1 + wanted.double().abs())
        if not bool(difference.isfinite().all()):
            return math.inf
        largest = max(largest, float(difference.max()))
    return largest
