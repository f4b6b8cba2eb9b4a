"""Accuracy and loss of every prefix, exact for any sharding of the data over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from matryoshka.nested import nested_cross_entropy


class PrefixAccuracy(Metric):
    """Top-1 and top-k accuracy of logits [G, B, C], for each of `dims`.

    The states are integer counts: one sum over the ranks per evaluation is exact. A sample is a hit
    if fewer than k classes rank above its own. Ties, which are common in bf16, rank by class index,
    as in argmax. NaN ranks above everything and is never a hit: a diverged model scores 0.
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
        """Add a batch: logits [G, B, C], labels [B]."""
        label = labels.view(1, -1, 1)
        own = logits.gather(2, label.expand(len(logits), -1, 1))  # [G, B, 1]
        not_earlier = torch.arange(logits.shape[2], device=logits.device) >= label
        # comparisons with NaN are false, so NaN is not below
        below = (logits < own) | ((logits == own) & not_earlier)
        higher = (~below).sum(dim=2)  # [G, B]
        self.hits1 += (higher < 1).sum(dim=1)
        self.hits5 += (higher < self.top_k).sum(dim=1)
        self.count += labels.numel()

    def compute(self) -> dict[int, dict[str, float]]:
        """{dim: {"top1": .., "top5": ..}} in percent; NaN if no sample was counted."""
        # On the CPU: Apple's GPUs have no float64, and float32 is exact up to 2^24 samples only.
        total = self.count.cpu().double()
        top1 = (100 * self.hits1.cpu() / total).tolist()
        top5 = (100 * self.hits5.cpu() / total).tolist()
        return {d: {"top1": a, "top5": b} for d, a, b in zip(self.dims, top1, top5, strict=True)}


class PrefixLoss(Metric):
    """Mean cross-entropy of logits [G, B, C], for each of `dims`."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.add_state("total", torch.zeros(len(self.dims)), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [G, B, C], labels [B]."""
        _, per_prefix = nested_cross_entropy(logits.float(), labels)
        self.total += per_prefix * labels.numel()
        self.count += labels.numel()

    def compute(self) -> dict[int, float]:
        """{dim: mean}; NaN if no sample was counted."""
        return dict(zip(self.dims, (self.total / self.count).tolist(), strict=True))
