"""MoCo's queue: keys of past batches, which serve as negatives (arXiv 1911.05722, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class KeyQueue(nn.Module):
    """A ring of `size` keys of `width` numbers, as they came: prefixes are cut off and normalised
    where they are used. Keys, position and count are in the state_dict.
    """

    keys: Tensor
    position: Tensor
    stays_finite = True  # `push` leaves skipped keys out: no copy of a large queue in each step

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        # Random directions until real keys have replaced them, as in MoCo.
        self.register_buffer("keys", torch.randn(size, width))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor, skipped: Tensor | None = None) -> None:
        """Replace the oldest keys by `keys` [N, width], N <= size. No wait for the device.

        skipped: bool, 0-d: whether to leave everything as it is, because the keys are not finite.
        """
        size = len(self.keys)
        rows = (self.position + torch.arange(len(keys), device=keys.device)) % size
        new, count = keys.to(self.keys.dtype), torch.full_like(self.position, len(keys))
        if skipped is not None:
            new = torch.where(skipped, self.keys[rows], new)
            count = torch.where(skipped, torch.zeros_like(count), count)
        self.keys.index_copy_(0, rows, new)
        self.position.copy_((self.position + count) % size)
