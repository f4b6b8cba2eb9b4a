"""Towers: an encoder and its projector, and a second tower that follows the first."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from matryoshka.models import NestedModel
from matryoshka.ssl.projector import Projector


class Towers(NamedTuple):
    """What a method computes for a batch: one tensor [B, W] for each view.

    online: of the tower that is trained (behind its predictor, where there is one). target: of the
    tower that follows it, without gradients; empty for methods with one tower. Its views are the
    large ones. features: of one view, [B, D], detached, from the encoder that is evaluated.
    """

    online: list[Tensor]
    target: list[Tensor]
    features: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Towers:
        """The same with every tensor changed."""
        online = [change(x) for x in self.online]
        return Towers(online, [change(x) for x in self.target], change(self.features))


class Tower(nn.Module):
    """Images -> features -> projector: float [B, 3, H, W] -> [B, W]."""

    def __init__(self, encoder: NestedModel, projector: Projector) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, D], embedding [B, W])."""
        features = self.encoder.features(images)
        return features, self.projector(features)


class Target(nn.Module):
    """A tower whose weights are a moving average of another one's; it has no gradients.

    Its batch norms keep running statistics of their own: it runs in training mode, as in MoCo and
    BYOL.
    """

    def __init__(self, online: Tower) -> None:
        super().__init__()
        self.tower = copy.deepcopy(online).requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, together: int = 0) -> tuple[Tensor, Tensor]:
        """See Tower. together: images that share statistics of batch norm; 0: all."""
        groups = len(images) // together if together else 1
        if groups < 2:
            return self.tower(images)
        parts = [self.tower(part) for part in images.tensor_split(groups)]
        features, embedding = zip(*parts, strict=True)
        return torch.cat(features), torch.cat(embedding)

    @torch.no_grad()
    def follow(self, online: Tower, momentum: float) -> None:
        """weights = momentum x weights + (1 - momentum) x those of `online`."""
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.tower.parameters()), list(online.parameters()), 1 - momentum
        )


def momentum_at(
    step: int, steps: int, *, start: float, end: float = 1.0, after: int = 0, every: int = 1
) -> float:
    """The target's decay after optimizer step `step` (from 0) of `steps`; 1: no update.

    0 in the first `after` steps, so that the target is a copy. Then from `start` to `end` along
    half a cosine (BYOL, arXiv 2006.07733, section 3.3), in every `every`-th step.
    """
    if step < after:
        return 0.0
    if (step - after) % every:
        return 1.0
    progress = (step - after) / max(1, steps - after)
    return end - (end - start) * (math.cos(math.pi * min(progress, 1.0)) + 1) / 2


class LearnedTemperature(nn.Module):
    """A temperature that is learned, always above `least`.

    1 / temperature is sigmoid(raw) / least: unlike a clamp, this has a gradient everywhere.
    """

    def __init__(self, initial: float, least: float) -> None:
        super().__init__()
        share = least / initial
        self.least = least
        self.raw = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    def forward(self) -> Tensor:
        return self.least / torch.sigmoid(self.raw)
