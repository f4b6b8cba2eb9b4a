"""MoCo: a queue of keys (version 1, arXiv 1911.05722; 2, arXiv 2003.04297), or none and a predictor
(3, arXiv 2104.02057).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from matryoshka import losses
from matryoshka.models import NestedModel
from matryoshka.ssl.method import Method
from matryoshka.ssl.options import SslConfig
from matryoshka.ssl.queue import KeyQueue
from matryoshka.ssl.towers import Target, Towers


class Moco(Method):
    """Queries of the online tower find their keys, of the target, among those of the queue.

    One queue holds whole keys; a prefix's loss cuts its columns off and normalises them.
    """

    def __init__(self, encoder: NestedModel, config: SslConfig) -> None:
        super().__init__(encoder, config)
        self.target = Target(self.online)
        is_third = config.version == 3
        self.symmetric = is_third if config.symmetric is None else config.symmetric
        self.queue = None if is_third else KeyQueue(config.queue, self.online.projector.width)

    def forward(self, views: Sequence[Tensor], target_views: Sequence[Tensor]) -> Towers:
        # Small views are queries of the first key alone, as the second view is where the method
        # is not symmetric.
        return self.two_towers(views, target_views)

    def key_views(self, large: int) -> tuple[int, ...]:
        return tuple(range(large)) if self.symmetric else (1,)

    def query_views(self, views: int, large: int) -> tuple[int, ...]:
        if self.symmetric:
            return tuple(range(views))
        return tuple(v for v in range(views) if v != 1)

    def loss(self, own: Towers, all_ranks: Towers, first: int, **_: Any) -> tuple[Tensor, Tensor]:
        nested = self.nested(losses.info_nce, shares=self.temperatures_by_prefix())
        total: list[tuple[Tensor, Tensor]] = []
        # without symmetry the only key is of view 1, and no query is of it
        for q, queries in enumerate(own.online):
            for k, keys in enumerate(all_ranks.target):
                if self.symmetric and q == k:
                    continue
                tensors = [queries, keys]
                if self.queue is not None:
                    tensors.append(self.queue.keys)
                total.append(nested(*tensors, in_batch=self.queue is None, first=first))
        scalars, per_prefix = zip(*total, strict=True)
        return torch.stack(scalars).mean(), torch.stack(per_prefix).mean(0)

    def after_part(self, all_ranks: Towers, skipped: Tensor | None = None) -> None:
        if self.queue is not None:
            self.queue.push(torch.cat(all_ranks.target), skipped)
