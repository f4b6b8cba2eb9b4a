"""One step of supervised training: augmentation, forward, backward, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from matryoshka import distributed
from matryoshka.data.augment import augmented, mixed_loss, step_rng
from matryoshka.data.loader import Batch
from matryoshka.distributed import World
from matryoshka.models import FamilyModel, NestedModel
from matryoshka.nested import sandwich
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.state import TrainState
from matryoshka.training.step import apply_gradients, begin_step, gradient_sync, micro_batches

SANDWICH = 2**32  # in place of a rank, for a random stream that no rank has
# (logits [G, B, C], labels [B]) -> (scalar to minimise, detached loss per prefix [G])
LossFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def train_step(
    batch: Batch,
    lr: float,
    *,
    cfg: SimpleNamespace,
    world: World,
    ddp: nn.Module,
    state: TrainState[NestedModel],
    guard: NonFiniteGuard,
    loss_fn: LossFn,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step on this rank's part of a global batch.

    Returns (mean loss, gradient norm, whether the step was skipped), 0-d tensors on the device.
    """
    t = cfg.training
    preprocessing = state.model.preprocessing
    rng = begin_step(state, seed=t.seed, rank=world.rank)
    which = None  # all prefixes
    if t.sandwich is not None:
        # All ranks train the same widths: DDP averages the gradients of each parameter.
        shared = step_rng(t.seed, state.loop.step, SANDWICH)
        which = sandwich(len(state.model.dims), t.sandwich, shared)
        loss_fn = _loss_of(loss_fn, which)
    # drop_last: every global batch is full
    global_batch = state.loader.batch_size
    # Usually one part; more with gradient accumulation.
    for part in micro_batches(batch, t.batch_size, world=world, global_batch=global_batch):
        # uint8 [B, H, W, 3] -> float [B, 3, H, W]
        mixed = augmented(part.images, part.labels, cfg.data, preprocessing, rng)

        with gradient_sync(ddp, part.sync):
            with distributed.autocast(mixed.images.device, precision):
                if which is None:
                    logits = ddp(mixed.images)  # [G, B, C]
                elif isinstance(state.model, FamilyModel):
                    logits = ddp(mixed.images, which=which)
                else:
                    logits = ddp(mixed.images)[list(which)]
            # The loss in float32: its sums lose too much in half precision.
            loss, prefix_loss = mixed_loss(loss_fn, logits.float(), mixed)
            state.backward(loss * part.loss_weight)
        sums = {"loss": loss, "prefix_loss": prefix_loss}
        if which is not None:
            sums |= _scattered(prefix_loss, which, len(state.model.dims))
        state.sums.add(images=len(part), **sums)

    mean_loss = state.sums.step_mean("loss")
    norm, skipped = apply_gradients(state, guard, lr)
    return mean_loss, norm, skipped


def _loss_of(loss_fn: LossFn, which: Sequence[int]) -> LossFn:
    """The loss of the prefixes `which`, with their weights."""
    assert isinstance(loss_fn, partial)
    weights = loss_fn.keywords["weights"]
    return partial(loss_fn, weights=None if weights is None else weights[list(which)])


def _scattered(prefix_loss: Tensor, which: Sequence[int], count: int) -> dict[str, Tensor]:
    """The losses of the prefixes `which` among zeros, and which these are: [G] each."""
    columns = torch.tensor(which, device=prefix_loss.device)
    empty = prefix_loss.new_zeros(count)
    return {
        "prefix_loss": empty.index_copy(0, columns, prefix_loss),
        "trained": empty.index_fill(0, columns, 1.0),
    }
