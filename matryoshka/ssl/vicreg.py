"""VICReg (arXiv 2105.04906): variance, invariance and covariance of two views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from matryoshka import losses
from matryoshka.ssl.method import Method
from matryoshka.ssl.towers import Towers


class VicReg(Method):
    """One tower; statistics of the whole batch."""

    def forward(self, views: Sequence[Tensor], target_views: Sequence[Tensor]) -> Towers:
        return self.one_tower(views)

    def loss(self, own: Towers, all_ranks: Towers, first: int, **_: Any) -> tuple[Tensor, Tensor]:
        config = self.config
        return self.nested(losses.vicreg)(
            *all_ranks.online,
            invariance=config.invariance,
            variance=config.variance,
            covariance=config.covariance,
        )
