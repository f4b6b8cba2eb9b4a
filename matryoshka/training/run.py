"""What every training run has: a folder, a place to resume from, loaders, rates, a session."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from matryoshka import config, devices, distributed
from matryoshka.data import CenterCrop, Loader
from matryoshka.data.augment import normalise
from matryoshka.data.subset import Subset
from matryoshka.distributed import World
from matryoshka.models import NestedModel
from matryoshka.training import memory
from matryoshka.training.compiling import (
    Forward,
    forward_of,
    outside_graphs,
    part_sizes,
    requested,
    skipped_graphs,
)
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.meter import EpochMeter
from matryoshka.training.optim import configured_optimizer, lr_at, parameter_groups, peak_lr
from matryoshka.training.options import GRAPHS
from matryoshka.training.progress import Forecast, Progress
from matryoshka.training.run_folder import new_run_id
from matryoshka.training.session import (
    ResumePoint,
    Session,
    SessionOptions,
    claim_run,
    launch_id,
)
from matryoshka.training.state import TrainState
from matryoshka.training.sums import Sums

INITIAL_IMAGES = 5000  # that trunks compute initial weights from
FIT_HINT = "; matryoshka fit PHOTOS --minutes 10 chooses sizes that fit into a time"

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean, std of each channel
M = TypeVar("M", bound=nn.Module)


@contextlib.contextmanager
def claimed_run(
    cfg: SimpleNamespace, world: World, *, sections: Mapping[str, type], name: str
) -> Iterator[ResumePoint]:
    """Where a run starts; in the block, no other process can use its folder.

    sections: of the program, which decide what a resumed run may change. name: of a new run's
    folder. Raises what `session.resolve_run` raises.
    """
    run_id = cfg.logging.run_id or launch_id() or new_run_id(name.replace(":", "-"))
    with claim_run(
        Path(cfg.logging.folder),
        distributed.broadcast(run_id, world),
        cfg.training.resume,
        options=config.flat(cfg),
        neutral=config.neutral_options(sections),
        defaults=config.default_options(sections),
        world=world,
    ) as start:
        yield start


class TrainingRun(Generic[M]):
    """The part of a run that does not depend on what is learned. M: the module that is trained.

    cfg: sections `model`, `data`, `lr`, `training`, `logging` and those of the program. print0:
    prints a line on rank 0. start: of `claimed_run`, not of a finished run.
    """

    train_loader: Loader
    state: TrainState[M]
    global_batch: int

    def __init__(
        self,
        cfg: SimpleNamespace,
        world: World,
        print0: Callable[[str], None],
        start: ResumePoint,
    ) -> None:
        self.cfg = cfg
        self.world = world
        self.print0 = print0
        self.start = start
        self.options = config.flat(cfg)
        self._noted_graphs = False
        devices.prepare(world.device, cfg.training.seed, cfg.training.deterministic)

    @property
    def resumed(self) -> bool:
        return self.start.checkpoint is not None

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return len(self.train_loader)

    @property
    def resolutions(self) -> list[int]:
        """Pixels of the training images in each epoch."""
        raise NotImplementedError

    @cached_property
    def progress(self) -> Progress:
        hint = FIT_HINT if self.world.device.type == "cpu" else ""
        return Progress(Forecast(self.resolutions, self.steps), self.print0, hint=hint)

    # ---------------------------------------------------------------- set-up

    def initialise_from_data(self, model: NestedModel) -> None:
        """Let a trunk that computes weights from images, such as fast_cnn's whitening, do so."""
        initialise = getattr(model.trunk, "initialise_from", None)
        if initialise is None:
            return
        scale = model.preprocessing
        count = len(self.train_loader.dataset)
        # Evenly over the set: a folder is in the order of its classes.
        chosen = np.unique(np.linspace(0, count - 1, min(INITIAL_IMAGES, count)).astype(np.int64))
        # The same images on every rank, so that all compute the same weights.
        loader = Loader(
            Subset(self.train_loader.dataset, chosen),
            len(chosen),
            order="sequential",
            crop=CenterCrop(scale.size, scale.ratio),
            device=self.world.device,
            on_error=self.cfg.data.on_error,
        )
        batch = next(iter(loader))
        initialise(normalise(batch.images, scale.mean, scale.std))

    def build_state(
        self,
        model: M,
        sums: Mapping[str, tuple[int, ...]],
        metadata: Mapping[str, Any],
        **parts: Any,
    ) -> None:
        """Set `state` and what a step needs beside it. parts: further ones of TrainState."""
        t = self.cfg.training
        device = self.world.device
        # Linear in the global batch, so a recipe is right for any number of GPUs.
        self.peak = peak_lr(self.cfg.lr, self.global_batch)
        groups = parameter_groups(model, t.weight_decay, t.bn_wd)
        self.state = TrainState(
            model=model,
            optimizer=configured_optimizer(t, groups, self.peak, device),
            loader=self.train_loader,
            scaler=torch.amp.GradScaler(device.type, enabled=self.precision == "fp16"),
            sums=Sums(sums, device),
            metadata=metadata,
            **parts,
        )
        self.guard = NonFiniteGuard(model, device, t.clip)

    @cached_property
    def precision(self) -> str:
        return devices.pick_precision(self.cfg.training.precision, self.world.device)

    # ---------------------------------------------------------------- the loop's parts

    def open_session(self, *, best_metric: str, resume_hint: str | None = None) -> Session:
        """The session of the run, which resumes the checkpoint that `start` found.

        best_metric: see SessionOptions. resume_hint: options that resume a stopped run, for the
        message.
        """
        cfg = self.cfg
        session_options = SessionOptions(
            best_metric=best_metric,
            epochs=cfg.training.epochs,
            tensorboard=cfg.logging.tensorboard,
            resume_hint=resume_hint or SessionOptions.resume_hint,
            keep_last=cfg.training.keep_last,
            checkpoint_every_steps=cfg.training.checkpoint_every_steps,
            checkpoint_every_minutes=cfg.training.checkpoint_every_minutes,
            skip_limit=cfg.training.skip_limit,
            hang_timeout=cfg.training.hang_timeout,
            wandb=cfg.logging.wandb,
        )
        session = Session(
            self.state,
            self.guard,
            self.world,
            self.start,
            options=session_options,
            config=self.options,
            config_yaml=config.to_yaml(cfg),
            print0=self.print0,
        )
        if self.resumed:
            self.print0(f"resume   after step {session.loop.step}, epoch {session.loop.epoch}")
        return session

    def lr(self, session: Session) -> float:
        """The learning rate of the next step."""
        epoch = session.loop.step / self.steps  # fractional: the rate changes in every step
        rate = lr_at(epoch, self.cfg.lr, self.peak, self.cfg.training.epochs)
        return session.lr_factor * rate

    def epoch_meter(self, session: Session, prefixes: int) -> EpochMeter:
        """The epoch's batches, measured. prefixes: how many losses a step's loss is the sum of."""
        return EpochMeter(
            self.train_loader,
            session,
            self.progress,
            log_level=self.cfg.logging.log_level,
            device=self.world.device,
            prefixes=prefixes,
        )

    def compiled(self, ddp: nn.Module, *, obstacle: str | None = None) -> tuple[Forward, str]:
        """The forward pass of `ddp` as training.compile wants it, and the line of the device.

        obstacle: why this run cannot be compiled.
        """
        t = self.cfg.training
        device = self.world.device
        shapes = len(set(self.resolutions))
        how = requested(t, device, t.epochs * self.steps // shapes)
        first_ranks = self.global_batch % self.world.size  # they take one image more
        local_batch = self.global_batch // self.world.size + (self.world.rank < first_ranks)
        sizes = part_sizes(local_batch, t.batch_size)
        forward, text = forward_of(
            ddp,
            how,
            device,
            sizes=sizes,
            shapes=shapes * len(sizes),
            obstacle=obstacle,
            processes=self.world.size,
        )
        line = f"device   {self.world.size} x {device.type}, {self.precision}{text}"
        outside = outside_graphs(self.cfg.data, t) if forward.has_graphs else []
        if outside:
            line += f" without {' and '.join(outside)}"
        if forward.is_compiled:
            line += "; the first steps at each size of images compile, their epochs show it"
        return forward, line

    def with_memory(
        self, size: int, attempt: Callable[[int], None], *, accumulates: bool = True
    ) -> contextlib.AbstractContextManager:
        """A block with a step of `size` images per pass; OutOfMemory if the GPU has too little.

        attempt: does a forward and backward pass of fewer images. accumulates: whether a step may
        consist of several passes.
        """

        def remedy(fits: int) -> str:
            alone = f"--training.batch_size={fits}"
            if not accumulates:
                return f"{alone}, in smaller steps"
            whole = f"{alone} --training.global_batch_size={self.global_batch}"
            if self.cfg.training.accumulate > 1:
                whole += ", without training.accumulate,"
            return f"{whole} makes the same steps of them"

        if self.world.size > 1:
            # DDP's hooks would send the gradients of an attempt to ranks that make none.
            return memory.explained(self.world.device, size, None, remedy)

        return memory.explained(self.world.device, size, attempt, remedy)

    def note_graphs(self) -> None:
        """Say once, after the first step, that parts of it could not be recorded as CUDA graphs."""
        if self._noted_graphs or self.cfg.training.compile != GRAPHS:
            return
        self._noted_graphs = True
        skipped = skipped_graphs()
        if skipped:
            self.print_notes(
                [
                    f"training.compile=graphs: {skipped} parts of the step could not be recorded "
                    "and are launched as with training.compile=1; TORCH_LOGS=perf_hints says why"
                ]
            )

    def print_notes(self, notes: Sequence[str]) -> None:
        for note in notes:
            self.print0(f"note     {note}")


# ---------------------------------------------------------------- processes


def distribute(model: nn.Module, world: World, find_unused: bool = False) -> nn.Module:
    """Wrap the model in DDP if there are several processes.

    find_unused: a step may leave parameters without a gradient.
    """
    if world.size == 1:
        return model
    device_ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, find_unused_parameters=find_unused)
