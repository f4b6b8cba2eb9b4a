"""Steps whose gradient is not finite: skipped on the device, without waiting for it; many in a row
are told.

The same decision on every rank: it is made from the norm of the gradients after they were averaged.
Running statistics of batch norm that are not finite, which the optimizer does not protect, go back
to the last that were.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Report(NamedTuple):
    """One step's numbers, on the host. row: steps skipped in a row, this one included, 0 where it
    was done.
    """

    step: int
    loss: float
    norm: float
    row: int


class Guard:
    """One for a run, made when the model is on its device.

    clip: the largest norm of a step's gradients; 0 for any. lag: steps after which a report reaches
    the host (0 on a CPU: it is there at once).
    """

    def __init__(self, model: nn.Module, device: torch.device, clip: float = 0.0) -> None:
        self.clip = clip
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]
        self.lag = 2 if device.type == "cuda" else 0
        self._row = torch.zeros((), device=device)
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.reset()

    def reset(self) -> None:
        """After the model was loaded: its buffers are good, no report is due."""
        self._good = _flat(self._buffers)
        self._row.zero_()
        self._pending.clear()

    @torch.no_grad()
    def before_step(self) -> tuple[Tensor, Tensor]:
        """(norm of the gradients, whether the step must be skipped as 0-d bool); clips them. After
        backward.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.clip, norm)
        return norm, ~torch.isfinite(norm)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
        """optimizer.step() unless `skip`."""
        if not skip.is_cuda or not getattr(optimizer, "_step_supports_amp_scaling", False):
            if not skip:
                optimizer.step()
            return
        # what a GradScaler tells fused optimizers: they skip on the device
        optimizer.grad_scale, optimizer.found_inf = None, skip.float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]

    @torch.no_grad()
    def after_step(self, step: int, loss: Tensor, norm: Tensor, skip: Tensor) -> list[Report]:
        """Mend the buffers, count; the reports that have arrived."""
        if self._buffers:
            now = _flat(self._buffers)
            bad = skip | ~torch.isfinite(now).all()
            self._good = torch.where(bad, self._good, now)
            _copy_from_flat(self._buffers, self._good)
        self._row = torch.where(skip, self._row + 1, torch.zeros_like(self._row))
        numbers, event = torch.stack([loss.float(), norm.float(), self._row]), None
        if numbers.is_cuda:
            numbers = numbers.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, numbers, event))
        return self._arrived(self.lag)

    def finish(self) -> list[Report]:
        """All reports that are still due: at the end of an epoch."""
        return self._arrived(0)

    def _arrived(self, lag: int) -> list[Report]:
        reports = []
        while len(self._pending) > lag:
            step, numbers, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            loss, norm, row = numbers.tolist()
            reports.append(Report(step, loss, norm, int(row)))
        return reports


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    parts = [tensor.reshape(-1) for tensor in tensors]
    return torch.cat(parts) if parts else torch.zeros(0)


def _copy_from_flat(tensors: list[Tensor], flat: Tensor) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    views = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, views)  # pyright: ignore[reportPrivateImportUsage] (one launch for all of them)
