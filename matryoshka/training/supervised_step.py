"""One step of supervised training: augmentation, forward, backward, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from matryoshka import devices
from matryoshka.data.augment import (
    Mixed,
    augmented,
    changed_pixels,
    ends_with_normalisation,
    mixed_loss,
    normalise,
    step_rng,
)
from matryoshka.data.loader import Batch
from matryoshka.distributed import World
from matryoshka.models import FamilyModel, NestedModel
from matryoshka.nested import sandwich
from matryoshka.training.compiling import Forward
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.state import TrainState
from matryoshka.training.step import apply_gradients, begin_step, gradient_sync, micro_batches

SANDWICH = 2**32  # in place of a rank, for a random stream that no rank has
# (logits [G, B, C], labels [B]) -> (scalar to minimise, detached loss per prefix [G]); with the
# argument `weights`, [G] or None
LossFn = Callable[..., tuple[Tensor, Tensor]]


class Objective(nn.Module):
    """What a step differentiates, in one piece for torch.compile: normalisation, model and loss.

    weights: of the prefixes, float [G], or None for all 1. precision: of the model; the loss is in
    float32.
    """

    def __init__(
        self, model: NestedModel, loss_fn: LossFn, *, weights: Tensor | None, precision: str
    ) -> None:
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn
        self._weights = weights
        self._precision = precision

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        other: Tensor | None = None,
        share: float | Tensor | None = None,
        *,
        which: Tensor | None = None,
        members: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(scalar to minimise, detached loss of each prefix).

        images: uint8 [B, H, W, 3], or float [B, 3, H, W], normalised. labels: int64 [B]; other,
        share: those of mixed images, see `Mixed`. which: int64, the prefixes to train, None for
        all. members: the same as numbers, for a family, which computes no others.
        """
        if images.dtype == torch.uint8:
            scale = self.model.preprocessing
            images = normalise(images, scale.mean, scale.std)
        with devices.autocast(images.device, self._precision):
            logits = self.model(images) if members is None else self.model(images, which=members)
        if which is not None and members is None:
            logits = logits.index_select(0, which)
        weights = self._weights
        if which is not None and weights is not None:
            weights = weights.index_select(0, which)

        def loss_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            return self._loss_fn(logits, labels, weights=weights)

        # The loss in float32: its sums lose too much in half precision.
        logits = logits.float()
        if other is None or share is None:
            return loss_of(logits, labels)
        return mixed_loss(loss_of, logits, Mixed(images, labels, other, share))


def train_step(
    batch: Batch,
    lr: float,
    *,
    cfg: SimpleNamespace,
    world: World,
    forward: Forward,
    state: TrainState[NestedModel],
    guard: NonFiniteGuard,
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step on this rank's part of a global batch.

    forward: of an Objective of `state.model`. Returns (mean loss, gradient norm, whether the step
    was skipped), 0-d tensors on the device.
    """
    t = cfg.training
    rng = begin_step(state, seed=t.seed, rank=world.rank)
    forward.begin_step()
    which, members = None, None  # all prefixes
    if t.sandwich is not None:
        # All ranks train the same widths: DDP averages the gradients of each parameter.
        shared = step_rng(t.seed, state.loop.step, SANDWICH)
        members = sandwich(len(state.model.dims), t.sandwich, shared)
        which = torch.tensor(members).to(batch.labels.device, non_blocking=True)
    # drop_last: every global batch is full
    global_batch = state.loader.batch_size
    # Usually one part; more with gradient accumulation.
    for part in micro_batches(batch, t.batch_size, world=world, global_batch=global_batch):
        mixed = _prepared(part.images, part.labels, cfg.data, state.model, rng)
        other, share = None, None
        if cfg.data.mixup or cfg.data.cutmix:
            other, share = mixed.other, mixed.share
        chosen = members if isinstance(state.model, FamilyModel) else None
        with gradient_sync(forward.module, part.sync):
            loss, prefix_loss = forward(
                mixed.images, mixed.labels, other, share, which=which, members=chosen
            )
            state.backward(loss * part.loss_weight)
        sums = {"loss": loss, "prefix_loss": prefix_loss}
        if which is not None:
            sums |= _scattered(prefix_loss, which, len(state.model.dims))
        state.sums.add(images=len(part), **sums)

    mean_loss = state.sums.step_mean("loss")
    norm, skipped = apply_gradients(state, guard, lr)
    return mean_loss, norm, skipped


def _prepared(
    images: Tensor,
    labels: Tensor,
    options: Any,
    model: NestedModel,
    rng: np.random.Generator,
) -> Mixed:
    """A training batch, augmented; its images are still uint8 if only the normalisation is left,
    which the objective then does.
    """
    if ends_with_normalisation(options):
        return Mixed(changed_pixels(images, options, rng), labels, labels, 1.0)
    return augmented(images, labels, options, model.preprocessing, rng)


def _scattered(prefix_loss: Tensor, which: Tensor, count: int) -> dict[str, Tensor]:
    """The losses of the prefixes `which` among zeros, and which these are: [G] each."""
    empty = prefix_loss.new_zeros(count)
    return {
        "prefix_loss": empty.index_copy(0, which, prefix_loss),
        "trained": empty.index_fill(0, which, 1.0),
    }
