"""Skip steps with non-finite gradients without a device sync, and report long streaks.

Every rank decides the same, because the decision uses the gradient norm after DDP has averaged the
gradients. Non-finite running statistics of batch norm, which the optimizer does not protect, are
reset to their last finite values, before anything copies them.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor, nn

from matryoshka.training.undoable import flat_view, undoable_step


class StepReport(NamedTuple):
    """Numbers of one step, on the host.

    consecutive_skips: length of the streak of skipped steps that ends here; 0 if this step counted.
    prefix_losses: of each prefix, where the caller gave them.
    """

    step: int
    loss: float
    norm: float
    consecutive_skips: int
    prefix_losses: tuple[float, ...] = ()


class NonFiniteGuard:
    """Skip, clip and report the steps of one run. Create it when the model is on its device.

    clip: maximum gradient norm; 0 disables clipping. lag: steps until a report reaches the host
    (0 on a CPU, where it is available at once).
    """

    def __init__(self, model: nn.Module, device: torch.device, clip: float = 0.0) -> None:
        self.clip = clip
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._buffers = _guarded_buffers(model)
        # Two steps later the copy to the host has finished: reading it does not stall the GPU.
        self.lag = 2 if device.type == "cuda" else 0
        self._skips = torch.zeros((), device=device)
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Accept the current buffers and drop pending reports; call after loading weights."""
        self._current = [flat_view(buffer) for buffer in self._buffers]
        if self._current:
            # Their last good values in one block, with a view for each: made once, because the
            # making of many views takes longer than their copies.
            self._good = torch.cat(self._current)
            self._good_views = self._good.split([len(buffer) for buffer in self._current])
        self._skips.zero_()
        self._pending.clear()

    @torch.no_grad()
    def before_step(self) -> tuple[Tensor, Tensor]:
        """Clip the gradients; return (their norm before clipping, 0-d bool: skip this step).

        The buffers that the forward pass of a bad step has changed get their last good values.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        # One number answers for all gradients: a NaN or infinity in any of them makes it
        # non-finite.
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.clip, norm)
        skip = ~torch.isfinite(norm)
        self._mend_buffers(skip)
        return norm, skip

    def _mend_buffers(self, skip: Tensor) -> None:
        if not self._current:
            return
        current = torch.cat(self._current)
        bad = skip | ~torch.isfinite(current).all()
        # torch.where instead of `if`: the host never waits for the device.
        torch.where(bad, self._good, current, out=self._good)
        # One kernel launch for all of them.
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            self._current, self._good_views
        )

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
        """Run optimizer.step() unless `skip`."""
        if not skip.is_cuda:
            if not skip:
                optimizer.step()
            return
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            if getattr(optimizer, "undoable", False):
                undoable_step(optimizer, skip)
            elif not skip:  # waits for the device
                optimizer.step()
            return

        # A GradScaler passes these attributes to fused optimizers, which then skip on the device.
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]

    @torch.no_grad()
    def after_step(
        self,
        step: int,
        loss: Tensor,
        norm: Tensor,
        skip: Tensor,
        *,
        prefix_losses: Tensor | None = None,
    ) -> list[StepReport]:
        """Count the skips and return the reports that have arrived."""
        self._skips = torch.where(skip, self._skips + 1, torch.zeros_like(self._skips))

        # One copy to the host for all numbers of the step.
        numbers = torch.stack([loss.float(), norm.float(), self._skips])
        if prefix_losses is not None:
            numbers = torch.cat([numbers, prefix_losses.float()])
        event = None
        if numbers.is_cuda:
            numbers = numbers.to("cpu", non_blocking=True)
            # blocking: a wait would otherwise spin, on a core of the decoders
            event = torch.cuda.Event(blocking=True)
            event.record()
        self._pending.append((step, numbers, event))
        return self._arrived(self.lag)

    def finish(self) -> list[StepReport]:
        """Wait for all pending reports; call at the end of an epoch."""
        return self._arrived(0)

    def _arrived(self, lag: int) -> list[StepReport]:
        reports = []
        while len(self._pending) > lag:
            step, numbers, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            loss, norm, skips, *prefix_losses = numbers.tolist()
            reports.append(StepReport(step, loss, norm, int(skips), tuple(prefix_losses)))
        return reports


def _guarded_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers that a bad step may damage; a module with `stays_finite` looks after its own."""
    buffers = []
    for module in model.modules():
        if not getattr(module, "stays_finite", False):
            buffers += [b for b in module.buffers(recurse=False) if b.is_floating_point()]
    return buffers
