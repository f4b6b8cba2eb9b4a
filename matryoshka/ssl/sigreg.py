"""LeJEPA with SIGReg (arXiv 2511.08544): views agree, and embeddings are Gaussian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from matryoshka import losses
from matryoshka.ssl.method import Method
from matryoshka.ssl.towers import Towers


class SigReg(Method):
    """One tower, no queue, no average; statistics of the whole batch."""

    def forward(self, views: Sequence[Tensor], target_views: Sequence[Tensor]) -> Towers:
        return self.one_tower(views)

    def loss(
        self, own: Towers, all_ranks: Towers, first: int, *, generator: torch.Generator, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """generator: of the directions, in the same state on all ranks."""
        config = self.config
        width = self.online.projector.width
        directions = torch.randn(config.directions, width, generator=generator)
        return self.nested(losses.lejepa)(
            directions.to(all_ranks.online[0], non_blocking=True),
            *all_ranks.online,
            gaussian=config.gaussian,
            knots=config.knots,
            large=self.large,
        )
