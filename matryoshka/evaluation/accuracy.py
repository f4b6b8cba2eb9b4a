"""Accuracy of every prefix, kept as sums so that one reduction per evaluation is exact for any
sharding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class PrefixAccuracy(Metric):
    """Top-1 and top-k accuracy of logits [G, B, C], for each of `dims`; states are counts, summed
    over ranks.

    A sample hits when fewer than k classes rank above its own, in a sort that is stable by class
    index (argmax's rule for ties, which bf16 logits have). NaN ranks above everything and never
    hits, so a broken model scores 0.
    """

    full_state_update = False
    hits1: Tensor
    hits5: Tensor
    count: Tensor

    def __init__(self, dims: Sequence[int], top_k: int = 5) -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.top_k = top_k
        for name in ("hits1", "hits5"):
            self.add_state(
                name, torch.zeros(len(self.dims), dtype=torch.int64), dist_reduce_fx="sum"
            )
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        own = logits.gather(2, labels.view(1, -1, 1).expand(len(logits), -1, 1))
        first = torch.arange(logits.shape[2], device=logits.device) >= labels.view(1, -1, 1)
        below = (logits < own) | ((logits == own) & first)
        higher = (~below).sum(dim=2)  # [G, B]
        self.hits1 += (higher < 1).sum(dim=1)
        self.hits5 += (higher < self.top_k).sum(dim=1)
        self.count += labels.numel()

    def compute(self) -> dict[int, dict[str, float]]:
        """{dim: {"top1": .., "top5": ..}} in percent; NaN where nothing was counted."""
        total = self.count.double()
        top1 = (100 * self.hits1 / total).tolist()
        top5 = (100 * self.hits5 / total).tolist()
        return {d: {"top1": a, "top5": b} for d, a, b in zip(self.dims, top1, top5, strict=True)}
