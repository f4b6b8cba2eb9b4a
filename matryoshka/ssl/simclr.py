"""SimCLR (arXiv 2002.05709)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from matryoshka import losses
from matryoshka.ssl.method import Method
from matryoshka.ssl.towers import Towers


class SimClr(Method):
    """One tower; each view finds its partner among all other views."""

    def forward(self, views: Sequence[Tensor], target_views: Sequence[Tensor]) -> Towers:
        return self.one_tower(views)

    def loss(self, own: Towers, all_ranks: Towers, first: int, **_: Any) -> tuple[Tensor, Tensor]:
        nested = self.nested(losses.nt_xent, shares=self.temperatures_by_prefix())
        return nested(torch.stack(own.online), torch.stack(all_ranks.online), first=first)
