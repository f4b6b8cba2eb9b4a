"""One step of self-supervised training: views, two passes, losses over prefixes, update."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from matryoshka import devices, distributed
from matryoshka.data.augment import Preprocessing, normalise, step_rng
from matryoshka.data.loader import Batch
from matryoshka.data.views import ViewOptions, apply_views, draw_views
from matryoshka.distributed import World
from matryoshka.evaluation.online_probe import OnlineProbe
from matryoshka.ssl import Method, Towers
from matryoshka.training.compiling import Forward
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.state import TrainState
from matryoshka.training.step import apply_gradients, begin_step, gradient_sync, micro_batches

SHARED = 2**33  # in place of a rank, for a random stream that all ranks share


class Learner(nn.Module):
    """Everything of a run that is trained or carried along: a method, and a probe beside it.

    probe: classifiers of each prefix on detached features; None where there are no classes.
    """

    def __init__(self, method: Method, probe: OnlineProbe | None) -> None:
        super().__init__()
        self.method = method
        self.probe = probe


class ViewMaker:
    """Makes the views of a batch on its device. options: one for each view.

    A view is a pure function of (seed, epoch, sample, view); the loader has cropped and flipped.
    """

    def __init__(
        self, options: Sequence[ViewOptions], preprocessing: Preprocessing, seed: int
    ) -> None:
        self._options = list(options)
        self._preprocessing = preprocessing
        self._seed = seed

    def __call__(self, batch: Batch, epoch: int) -> list[Tensor]:
        """uint8 [B, h, w, 3] for each view."""
        index = batch.host_index
        changed = []
        for view, options in enumerate(self._options):
            draws = draw_views(index, options, seed=self._seed, epoch=epoch, view=view)
            changed.append(apply_views(batch.images[view], draws))
        return changed

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [B, h, w, 3] -> float [B, 3, h, w]."""
        return normalise(images, self._preprocessing.mean, self._preprocessing.std)


class Passes(nn.Module):
    """Both passes of a method, with the normalisation: one piece for torch.compile.

    precision: of the passes; losses are computed in float32, from the embeddings of all ranks.
    """

    def __init__(self, method: Method, preprocessing: Preprocessing, precision: str) -> None:
        super().__init__()
        self.method = method
        self._preprocessing = preprocessing
        self._precision = precision

    def forward(self, queries: list[Tensor], keys: list[Tensor]) -> Towers:
        """Embeddings of views, uint8 [B, h, w, 3] each; none is in half precision."""
        scale = self._preprocessing
        with devices.autocast(queries[0].device, self._precision):
            own = self.method(
                [normalise(view, scale.mean, scale.std) for view in queries],
                [normalise(view, scale.mean, scale.std) for view in keys],
            )
        # The losses in float32: their sums lose too much in half precision.
        return own.map(_not_half)


def train_step(
    batch: Batch,
    lr: float,
    *,
    cfg: SimpleNamespace,
    world: World,
    forward: Forward,
    state: TrainState[Learner],
    guard: NonFiniteGuard,
    views: ViewMaker,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One optimizer step on this rank's part of a global batch.

    forward: of the Passes of the method. momentum: of the target after this step. Returns (mean
    loss, gradient norm, whether the step was skipped), 0-d tensors on the device, and the loss of
    each prefix [G].
    """
    t = cfg.training
    method, probe = state.model.method, state.model.probe
    begin_step(state, seed=t.seed, rank=world.rank)
    forward.begin_step()
    shared = step_rng(t.seed, state.loop.step, SHARED)
    pixels = views(batch, state.loop.epoch)
    queries = method.query_views(len(pixels), cfg.views.count)
    keys = method.key_views(cfg.views.count)
    seen: list[Towers] = []
    # Parts of the rows of all views; several with gradient accumulation.
    rows = Batch(batch.labels, batch.labels, batch.index)
    start = 0
    global_batch = state.loader.batch_size
    for part in micro_batches(rows, t.batch_size, world=world, global_batch=global_batch):
        of_part = slice(start, start + len(part))
        start = of_part.stop
        generator = torch.Generator().manual_seed(int(shared.integers(2**62)))
        order = key_order(cfg, world, len(part), shared)
        with gradient_sync(forward.module, part.sync):
            own = forward(
                [pixels[v][of_part] for v in queries],
                [reordered(pixels[v][of_part], order, world) for v in keys],
            )
            everyone = of_all_ranks(own, order, world, target_features=method.evaluates_target)
            first = world.rank * len(part)
            loss, prefix_loss = method.loss(own, everyone, first=first, generator=generator)
            state.backward(loss * part.loss_weight)
        sums = {"loss": loss, "prefix_loss": prefix_loss}
        if probe is not None:
            sums["right"] = _probe_step(probe, everyone.features, part.labels, world)
        state.sums.add(images=len(part), **sums)
        seen.append(everyone.map(Tensor.detach))

    mean_loss = state.sums.step_mean("loss")
    prefix_losses = state.sums.step_mean("prefix_loss")
    norm, skipped = apply_gradients(state, guard, lr)
    # Also after a skipped step, which left the online tower unchanged.
    for everyone in seen[:-1]:
        method.after_part(everyone, skipped)
    method.after_step(seen[-1], momentum, skipped)
    return mean_loss, norm, skipped, prefix_losses


def _not_half(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _probe_step(probe: OnlineProbe, features: Tensor, labels: Tensor, world: World) -> Tensor:
    """A step of the probe; the share that was right before, [G].

    features: of the images of all ranks; labels: of this rank's.
    """
    right, labelled = probe.update(features, distributed.gather_rows(labels, world))
    return right / labelled.clamp_min(1)


# ---------------------------------------------------------------- the company of keys


# MoCo's own has 32 on each of 8 GPUs; its demo for CIFAR-10 on one GPU 64, eight groups of 512.
BN_GROUP = 64


def bn_group(cfg: SimpleNamespace, world: World) -> int:
    """Keys of a process that share batch norm's statistics; 0: all of them.

    Batch norm mixes the images of a process. If a query and its key are in the same company, their
    statistics give them away (MoCo, arXiv 1911.05722, section 3.3). Ranks shuffle their images; a
    process on its own computes the keys in groups. Without a queue all keys are of one batch.
    """
    ssl = cfg.ssl
    if ssl.method != "moco" or not ssl.shuffle_bn:
        return 0
    if ssl.bn_group == 0 and world.size == 1 and ssl.version < 3:
        return BN_GROUP
    return ssl.bn_group


def key_order(
    cfg: SimpleNamespace, world: World, count: int, shared: np.random.Generator
) -> np.ndarray | None:
    """The order in which keys are computed, int64 [ranks x count], equal on all ranks; None: as the
    images come. See `bn_group`.
    """
    if cfg.ssl.method != "moco" or not cfg.ssl.shuffle_bn:
        return None
    return shared.permutation(world.size * count)


def reordered(images: Tensor, order: np.ndarray | None, world: World) -> Tensor:
    """This rank's images of another order of those of all ranks; [B, ...]."""
    if order is None:
        return images
    if world.size == 1:
        return images[torch.from_numpy(order).to(images.device, non_blocking=True)]
    everyone = distributed.gather_rows(images, world)
    own = order[world.rank * len(images) : (world.rank + 1) * len(images)]
    return everyone[torch.from_numpy(own).to(images.device, non_blocking=True)]


def of_all_ranks(
    own: Towers, order: np.ndarray | None, world: World, *, target_features: bool
) -> Towers:
    """The embeddings of all ranks, of the images in their own order; with two towers, the target's
    alone are gathered: nothing is compared with the online ones.

    target_features: whether the features are the target's, which has seen the other order.
    """
    if world.size == 1 and order is None:
        return own
    features = distributed.gather_rows(own.features, world)
    if not own.target:
        return Towers([distributed.gather_rows(x, world) for x in own.online], [], features)
    target = [distributed.gather_rows(x, world) for x in own.target]
    if order is not None:
        back = torch.from_numpy(np.argsort(order)).to(features.device, non_blocking=True)
        target = [x[back] for x in target]
        features = features[back] if target_features else features
    return Towers(own.online, target, features)
