"""BYOL (arXiv 2006.07733): predictions of a target without negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from matryoshka import losses
from matryoshka.models import NestedModel
from matryoshka.ssl.method import Method
from matryoshka.ssl.options import SslConfig
from matryoshka.ssl.towers import Target, Towers


class Byol(Method):
    """Each view's prediction meets the target's embedding of every other large view."""

    def __init__(self, encoder: NestedModel, config: SslConfig) -> None:
        super().__init__(encoder, config)
        self.target = Target(self.online)

    def forward(self, views: Sequence[Tensor], target_views: Sequence[Tensor]) -> Towers:
        return self.two_towers(views, target_views)

    def loss(self, own: Towers, all_ranks: Towers, first: int, **_: Any) -> tuple[Tensor, Tensor]:
        online, target = [], []
        for v, prediction in enumerate(own.online):
            for t, embedding in enumerate(own.target):
                if v != t:
                    online.append(prediction)
                    target.append(embedding)
        return self.nested(losses.byol)(torch.stack(online), torch.stack(target))
