"""Named sums over the images of an epoch, reduced over ranks once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Sums:
    """Sums over the images of an epoch of named per-image means, on the device.

    shapes: {name: shape} of one mean, () or (n,), such as {"loss": (), "prefix_loss": (G,)}. All
    sums and the number of images are one vector `totals` [..., images]: one addition per step, one
    reduction per epoch and one tensor in a checkpoint.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shapes = dict(shapes)
        size = sum(math.prod(shape) for shape in self.shapes.values()) + 1
        self.totals = torch.zeros(size, device=device, dtype=dtype)
        # Sums of the current step, which count only if the step is not skipped.
        self._step = torch.zeros_like(self.totals)
        self._step_images = 0
        # Appended to the means: a mean of 1, times the number of images, counts them.
        self._one = torch.ones(1, device=device, dtype=dtype)

    def add(self, images: int, **means: Tensor) -> None:
        """Add the means over the images of one forward pass: a tensor for every name."""
        parts = [means[name].detach().reshape(-1) for name in self.shapes]
        self._step += torch.cat([*parts, self._one]) * images
        self._step_images += images

    def step_mean(self, name: str) -> Tensor:
        """Mean over the images of the current step, in the shape of `name`."""
        start = 0
        for other, shape in self.shapes.items():
            if other == name:
                break
            start += math.prod(shape)
        shape = self.shapes[name]
        values = self._step[start : start + math.prod(shape)] / self._step_images
        return values.view(shape)

    def end_step(self, skipped: Tensor) -> None:
        """Add the step's sums to the totals, unless the step was skipped."""
        # torch.where instead of `if`: the host never waits for the device.
        self.totals += torch.where(skipped, torch.zeros_like(self._step), self._step)
        self._step.zero_()
        self._step_images = 0

    def means(self, totals: Tensor) -> dict[str, Any]:
        """Means by name as a float or a list of floats, and the number of `images`.

        totals: `self.totals`, added up over ranks.
        """
        *values, images = totals.tolist()
        means: dict[str, Any] = {"images": images}
        start = 0
        for name, shape in self.shapes.items():
            end = start + math.prod(shape)
            numbers = [value / max(images, 1) for value in values[start:end]]
            means[name] = numbers if shape else numbers[0]
            start = end
        return means

    def restore(self, totals: Tensor, *, rank: int, ranks: int) -> None:
        """Load the totals of all ranks, [ranks, ...], as a checkpoint holds them."""
        totals = totals.to(self.totals.device)
        if len(totals) == ranks:
            # The same sums in the same order: the log is equal to the last digit.
            self.totals.copy_(totals[rank])
        # Another number of processes: rank 0 takes all sums, and their total stays the same.
        elif rank == 0:
            self.totals.copy_(totals.sum(0))
        else:
            self.totals.zero_()
        self._step.zero_()
        self._step_images = 0

    def reset(self) -> None:
        """Start another epoch."""
        self.totals.zero_()
