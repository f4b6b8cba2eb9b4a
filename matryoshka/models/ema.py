"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Ema(Generic[M]):
    """Exponential moving average (EMA) of a model's parameters; its buffers are copied.

    The decay warms up as (1 + step) / (10 + step) until it reaches `decay`, so that a short run is
    not dominated by its initial weights. `module` is the averaged model, in eval mode.
    """

    def __init__(self, model: M, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._average: list[Tensor] = list(self.module.parameters())
        self._source: list[Tensor] = list(model.parameters())
        # By type: a call for tensors of several types would copy them one by one.
        self._buffers: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for averaged, current in zip(self.module.buffers(), model.buffers(), strict=True):
            copies, sources = self._buffers.setdefault(current.dtype, ([], []))
            copies.append(averaged)
            sources.append(current)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after optimizer step `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        # One call for all parameters instead of a kernel launch for each.
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            self._average, self._source, 1 - decay
        )
        # Copied, not averaged: batch norm's statistics are running averages already, and its
        # counter of batches is an integer.
        for copies, sources in self._buffers.values():
            torch._foreach_copy_(copies, sources)  # pyright: ignore[reportPrivateImportUsage]
