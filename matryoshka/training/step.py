"""Functions around a training step; the step itself is visible in each program.

rng = begin_step(state, seed=seed, rank=world.rank)
for part in micro_batches(batch, size, world=world, global_batch=global_batch):
    with gradient_sync(ddp, part.sync):
        loss, per_prefix = loss_fn(ddp(part.images), part.labels)
        state.backward(loss * part.loss_weight)
    state.sums.add(images=len(part), loss=loss, prefix_loss=per_prefix)
norm, skipped = apply_gradients(state, guard, lr)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from matryoshka.data.augment import step_rng
from matryoshka.data.loader import Batch
from matryoshka.distributed import World
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.state import TrainState


class StepError(ValueError):
    """A batch size that the loss cannot work with; the message names the option and the remedy."""

    user_error = True


@dataclass(frozen=True)
class MicroBatch:
    """The images of one forward pass: a slice of this rank's slice of a global batch.

    loss_weight: factor of the mean loss over these images, see `micro_batches`. sync: whether DDP
    averages the gradients after this backward pass.
    """

    images: Tensor  # uint8 [B, H, W, 3]
    labels: Tensor  # int64 [B]
    loss_weight: float
    sync: bool

    def __len__(self) -> int:
        return len(self.labels)


def micro_batches(
    batch: Batch, size: int, *, world: World, global_batch: int
) -> Iterator[MicroBatch]:
    """Split this rank's batch into forward passes of at most `size` images.

    DDP averages gradients over ranks. Weighting each mean loss by images x ranks / global_batch
    turns that average into the gradient of the mean over the whole global batch, also if ranks hold
    different numbers of images. Images that data.on_error=skip left out count with a zero gradient:
    the others keep their weight, and no rank needs to know what other ranks lost.
    """
    count = len(batch.labels)
    for first in range(0, count, size):
        labels = batch.labels[first : first + size]
        # DDP averages once per step, with the last part; earlier parts only accumulate.
        is_last = first + size >= count
        yield MicroBatch(
            images=batch.images[first : first + size],
            labels=labels,
            loss_weight=len(labels) * world.size / global_batch,
            sync=is_last or world.size == 1,
        )


def check_whole_batch(loss: str, size: int, *, world: World, global_batch: int) -> None:
    """Raise StepError if a rank must split its batch into forward passes of `size` images.

    For losses that compare the images of a batch with each other (contrastive losses, variance
    terms): accumulation over parts would compute another loss.
    """
    largest = -(-global_batch // world.size)  # the first ranks take one image more
    if size < largest:
        raise StepError(
            f"training.batch_size={size}: {loss} compares all images of a batch and cannot "
            f"accumulate gradients over parts of it; expected {largest} or more, or a smaller "
            "training.global_batch_size"
        )


def begin_step(state: TrainState[Any], *, seed: int, rank: int) -> np.random.Generator:
    """Clear the gradients and seed all randomness of the step; return the augmentations' generator.

    All random numbers are functions of (seed, step, rank), also after a restart.
    """
    rng = step_rng(seed, state.loop.step, rank)
    torch.manual_seed(int(rng.integers(2**62)))  # dropout and other layers that draw from torch
    state.optimizer.zero_grad(set_to_none=True)
    return rng


def gradient_sync(model: nn.Module, sync: bool) -> contextlib.AbstractContextManager:
    """Context of a forward and backward pass; DDP all-reduces its gradients only if `sync`."""
    return contextlib.nullcontext() if sync else model.no_sync()  # type: ignore[operator]


def apply_gradients(
    state: TrainState[Any], guard: NonFiniteGuard, lr: float
) -> tuple[Tensor, Tensor]:
    """Unscale, clip and apply the gradients at rate `lr`, then update the average of the weights.

    Returns (gradient norm before clipping, whether the step was skipped), both 0-d on the device.
    A skipped step adds nothing to the epoch's sums.
    """
    # Set, not stepped by a scheduler: the rate is a function of the step, also after a resume.
    for group in state.optimizer.param_groups:
        group["lr"] = lr

    state.scaler.unscale_(state.optimizer)
    norm, skipped = guard.before_step()
    scaler = state.scaler
    if scaler.is_enabled() and not getattr(state.optimizer, "undoable", False):
        scaler.step(state.optimizer)  # skips non-finite gradients by itself
    else:
        guard.step(state.optimizer, skipped)
    if scaler.is_enabled():
        scaler.update()

    # Also after a skipped step, which left the weights unchanged: `skipped` is on the device, and
    # reading it would wait for it.
    if state.ema is not None:
        state.ema.update(state.loop.step)
    state.sums.end_step(skipped)
    return norm, skipped
