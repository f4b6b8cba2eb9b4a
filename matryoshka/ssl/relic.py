"""ReLIC (arXiv 2010.07922): contrastive, and invariant in what is found; small views as in ReLICv2
(arXiv 2201.05119).
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
from matryoshka.ssl.towers import LearnedTemperature, Target, Towers


class Relic(Method):
    """Two towers; a loss between each view's online and the other views' target embeddings."""

    def __init__(self, encoder: NestedModel, config: SslConfig) -> None:
        super().__init__(encoder, config)
        self.target = Target(self.online)
        self.temperature = None
        if config.learn_temperature:
            self.temperature = LearnedTemperature(config.temperature[0], config.least_temperature)

    def forward(self, views: Sequence[Tensor], target_views: Sequence[Tensor]) -> Towers:
        return self.two_towers(views, target_views)

    def loss(self, own: Towers, all_ranks: Towers, first: int, **_: Any) -> tuple[Tensor, Tensor]:
        config = self.config
        nested = self.nested(_with_small_views, shares=self.temperatures_by_prefix())
        shared = {}
        if self.temperature is not None:
            shared["temperature"] = self.temperature()
        return nested(
            *own.online,
            *all_ranks.target,
            views=len(own.online),
            alpha=config.alpha,
            stop_gradient=config.stop_gradient,
            first=first,
            **shared,
        )


def _with_small_views(
    *embeddings: Tensor,
    views: int,
    temperature: float | Tensor,
    alpha: float,
    stop_gradient: str,
    first: int,
) -> Tensor:
    """losses.relic of the two large views, the mean with that of each small view.

    embeddings: `views` online ones [B, E], of which the first two are large, and two of the target
    [N, E]. A small view is compared with both targets, and its distribution with that of the large
    view that is not the target's, whose gradient is stopped.
    """
    online, target = embeddings[:views], embeddings[views:]
    arguments = {"temperature": temperature, "alpha": alpha, "first": first}
    terms = [
        losses.relic(
            torch.stack(online[:2]),
            torch.stack(target),
            stop_gradient=stop_gradient,
            **arguments,
        )
    ]
    for small in online[2:]:
        for view in range(2):
            terms.append(losses.relic_small(small, online[1 - view], target[view], **arguments))
    return torch.stack(terms).mean()
