"""Supervised training of a nested model: everything around the loop of a training program.

A program prepares a run, opens its session and writes the loop itself:

    run = SupervisedRun(cfg, world, print0, sections=SECTIONS)
    with run.session() as session:
        while session.loop.epoch < epochs:
            with session.rollback():
                run.start_epoch(session)
                with run.meter(session) as meter:
                    for batch in meter:
                        lr = run.lr(session)
                        reports = session.after_step(*run.step(batch, lr))
                        meter.update(reports, lr)
                metrics = run.metrics(session.end_epoch(), meter, lr)
                session.log_epoch(metrics)
                session.epoch_done(metrics)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from matryoshka import checkpoint, config, distributed
from matryoshka.checkpoint.transfer import start_model, start_weights
from matryoshka.data import CenterCrop, Loader, open_dataset
from matryoshka.data.augment import Preprocessing, normalise
from matryoshka.data.dataset import Dataset
from matryoshka.data.loader import Batch
from matryoshka.data.subset import Subset
from matryoshka.distributed import World
from matryoshka.evaluation.evaluate import Evaluation, evaluate
from matryoshka.models import NestedModel, model_spec
from matryoshka.models.ema import Ema
from matryoshka.nested import distilled_cross_entropy, nested_cross_entropy
from matryoshka.training.checks import global_batch_size
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.loaders import (
    is_resident,
    make_loaders,
    resolution_at,
    training_crop,
    validation_loader,
)
from matryoshka.training.meter import EpochMeter
from matryoshka.training.optim import (
    configured_optimizer,
    lr_at,
    parameter_groups,
    peak_lr,
)
from matryoshka.training.progress import Forecast, Progress
from matryoshka.training.run_folder import accuracy_metrics, new_run_id
from matryoshka.training.session import (
    Session,
    SessionOptions,
    broadcast_checkpoint,
    launch_id,
    resolve_run_on_all_ranks,
)
from matryoshka.training.snapshot import Checkpoint
from matryoshka.training.snapshot import read as read_checkpoint
from matryoshka.training.state import TrainState
from matryoshka.training.summary import batch_notes, schedule_notes, size_text
from matryoshka.training.sums import Sums
from matryoshka.training.supervised_step import LossFn, train_step

INITIAL_IMAGES = 5000  # that trunks compute initial weights from
FIT_HINT = "; matryoshka fit PHOTOS --minutes 10 chooses sizes that fit into a time"

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean, std of each channel


class SupervisedRun:
    """A run that is set up from its options and ready for its first or next step.

    cfg: sections of training/options.py. print0: prints a line on rank 0. sections: of the program,
    which decide what a resumed run may change. datasets: opened training and validation sets
    instead of data.train_dataset and data.val_dataset. normalisation: mean and std of the images,
    used unless initial weights have their own. val_role: what the validation set is for. loss: has
    the signature of nested_cross_entropy.

    A finished run (`start.finished`) has no loaders and no model.
    """

    train_loader: Loader
    val_loader: Loader
    model: NestedModel
    state: TrainState[NestedModel]

    def __init__(
        self,
        cfg: SimpleNamespace,
        world: World,
        print0: Callable[[str], None],
        *,
        sections: Mapping[str, type],
        datasets: tuple[Dataset, Dataset] | None = None,
        normalisation: Normalisation | None = None,
        val_role: str = "for validation",
        loss: Callable = nested_cross_entropy,
    ) -> None:
        self.cfg = cfg
        self.world = world
        self.print0 = print0
        self._val_role = val_role
        t = cfg.training
        distributed.prepare(world.device, t.seed, t.deterministic)

        # ---- run folder ----
        run_id = cfg.logging.run_id or launch_id() or new_run_id(cfg.model.arch.replace(":", "-"))
        run_id = distributed.broadcast(run_id, world)
        self.options = config.flat(cfg)
        self.start = resolve_run_on_all_ranks(
            Path(cfg.logging.folder),
            run_id,
            t.resume,
            options=self.options,
            neutral=config.neutral_options(sections),
            defaults=config.default_options(sections),
            world=world,
        )
        if self.start.finished:
            return
        self._load_data(datasets)
        notes = self._build_model(normalisation)
        self._build_state(loss)
        self._print_summary(notes)

    @property
    def resumed(self) -> bool:
        return self.start.checkpoint is not None

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return len(self.train_loader)

    @property
    def dims(self) -> tuple[int, ...]:
        return self.model.spec.dims

    @property
    def trained_prefixes(self) -> int:
        """Number of prefixes whose losses a step's loss is the sum of."""
        extra = self.cfg.training.sandwich
        return len(self.dims) if extra is None else min(len(self.dims), 2 + extra)

    # ---------------------------------------------------------------- set-up

    def _load_data(self, datasets: tuple[Dataset, Dataset] | None) -> None:
        cfg = self.cfg
        images = len(open_dataset(cfg.data.train_dataset) if datasets is None else datasets[0])
        # A resumed run keeps its global batch, also with another number of processes. So do its
        # pixels: a resident set is decoded exactly, a streamed one for speed.
        before, resident = None, None
        if self.start.checkpoint is not None:
            before = self.start.checkpoint.metadata["global_batch"]
            resident = self.start.checkpoint.metadata.get("resident")
        self.global_batch = global_batch_size(cfg, self.world.size, images=images, before=before)
        self.train_loader, self.val_loader = make_loaders(
            cfg, self.world, self.global_batch, datasets=datasets, resident=resident
        )

    def _build_model(self, normalisation: Normalisation | None) -> list[str]:
        """Build `model`, `ema` and `ddp`; return notes about its initial weights."""
        cfg = self.cfg
        dataset = self.train_loader.dataset
        spec = model_spec(cfg.model, dataset.num_classes, cfg.training.use_blurpool)
        resumed = self.start.checkpoint
        # The weights of a resumed run come from its checkpoint.
        model_config = replace(cfg.model, init=None, pretrained=False) if resumed else cfg.model
        model, notes = start_model(model_config, spec, dataset.classes)
        if resumed:
            model.preprocessing = checkpoint.preprocessing_of(resumed.metadata)
        elif normalisation is not None and model.preprocessing == Preprocessing():
            mean, std = normalisation
            model.preprocessing = replace(model.preprocessing, mean=mean, std=std)
        model.preprocessing = replace(
            model.preprocessing, size=cfg.validation.resolution, ratio=cfg.validation.crop_ratio
        )
        model.classes = dataset.classes
        self.model = model.to(self.world.device).to(memory_format=torch.channels_last)
        if not resumed and not start_weights(cfg.model):
            self._initialise_from_data()
        if cfg.training.sync_bn:
            # In place: the model itself is not a batch norm, only its layers are replaced.
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.ema = Ema(self.model, cfg.training.ema) if cfg.training.ema else None
        # `model` remains the module to save and to evaluate: DDP's keys start with `module.`.
        # A step of the sandwich rule leaves out widths, which may have weights of their own.
        self._ddp = distribute(
            self.model, self.world, find_unused=cfg.training.sandwich is not None
        )
        self.precision = distributed.pick_precision(cfg.training.precision, self.world.device)
        return notes

    def _initialise_from_data(self) -> None:
        """Let a trunk that computes weights from images, such as fast_cnn's whitening, do so."""
        initialise = getattr(self.model.trunk, "initialise_from", None)
        if initialise is None:
            return
        scale = self.model.preprocessing
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

    def _build_state(self, loss: Callable) -> None:
        cfg = self.cfg
        t = cfg.training
        device = self.world.device
        weights = None  # of the prefixes; all 1
        if cfg.model.relative_importance:
            weights = torch.tensor(cfg.model.relative_importance, device=device)
        if t.distill:
            loss = partial(
                distilled_cross_entropy, share=t.distill, temperature=t.distill_temperature
            )
        self._loss_fn: LossFn = partial(loss, weights=weights, label_smoothing=t.label_smoothing)

        # Linear in the global batch, so a recipe is right for any number of GPUs.
        self._peak = peak_lr(cfg.lr, self.global_batch)
        groups = parameter_groups(self.model, t.weight_decay, t.bn_wd)
        sums: dict[str, tuple[int, ...]] = {"loss": (), "prefix_loss": (len(self.dims),)}
        if t.sandwich is not None:
            sums["trained"] = (len(self.dims),)  # share of the images that trained a prefix
        self.state = TrainState(
            model=self.model,
            optimizer=configured_optimizer(t, groups, self._peak, device),
            loader=self.train_loader,
            scaler=torch.amp.GradScaler(device.type, enabled=self.precision == "fp16"),
            sums=Sums(sums, device),
            metadata={
                **checkpoint.describe(self.model),
                "resident": is_resident(self.train_loader),
            },
            ema=self.ema,
        )
        self._guard = NonFiniteGuard(self.model, device, t.clip)

    def _print_summary(self, notes: Sequence[str]) -> None:
        cfg = self.cfg
        dataset = self.train_loader.dataset
        device = self.world.device
        spec = self.model.spec
        self.print0(f"run      {self.start.path}")
        self.print0(
            f"data     {len(dataset):,} images, {dataset.num_classes} classes; "
            f"{len(self.val_loader.dataset):,} {self._val_role}"
        )
        self.print0(f"model    {spec.arch}, {spec.head_name}, dims {list(spec.dims)}")
        # compile() changes DDP's wrapper in place: the model's keys stay, and evaluation is not
        # compiled.
        compiled = compile_model(self._ddp, cfg, device)
        self.print0(f"device   {self.world.size} x {device.type}, {self.precision}{compiled}")
        self.print0(
            f"steps    {cfg.training.epochs} epochs x {self.steps} steps of {self.global_batch} "
            f"images, peak lr {self._peak:.4g}"
        )
        resolutions = self._resolutions
        self.print0(
            f"size     {size_text(resolutions)} to train, {cfg.validation.resolution} to validate"
        )
        batches = batch_notes(cfg, self.world.size, self.global_batch, len(dataset))
        for note in (*self.start.notes, *notes, *batches, *schedule_notes(cfg)):
            self.print0(f"note     {note}")

    @property
    def _resolutions(self) -> list[int]:
        return [
            resolution_at(epoch, self.cfg.resolution) for epoch in range(self.cfg.training.epochs)
        ]

    @cached_property
    def progress(self) -> Progress:
        hint = FIT_HINT if self.world.device.type == "cpu" else ""
        return Progress(Forecast(self._resolutions, self.steps), self.print0, hint=hint)

    def loader(self, dataset: Dataset) -> Loader:
        """A loader that yields every image of another data set once, as in validation."""
        return validation_loader(self.cfg, self.world, dataset)

    # ---------------------------------------------------------------- the loop's parts

    def session(self, *, best_of_average: bool = False, resume_hint: str | None = None) -> Session:
        """The session of the run, which resumes the checkpoint that `start` found.

        best_of_average: the best checkpoint is that of the averaged weights, where there are any.
        resume_hint: options that resume a stopped run, for the message.
        """
        cfg = self.cfg
        average = "ema_" if best_of_average and self.ema is not None else ""
        session_options = SessionOptions(
            best_metric=f"{average}top_1/{self.dims[-1]}",
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
            self._guard,
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

    def start_epoch(self, session: Session) -> None:
        """Set the size of the epoch's images and the loader's position."""
        resolution = resolution_at(session.loop.epoch, self.cfg.resolution)
        self.train_loader.crop = training_crop(self.cfg, resolution)
        session.start_epoch()
        self.model.train()

    def lr(self, session: Session) -> float:
        """The learning rate of the next step."""
        epoch = session.loop.step / self.steps  # fractional: the rate changes in every step
        rate = lr_at(epoch, self.cfg.lr, self._peak, self.cfg.training.epochs)
        return session.lr_factor * rate

    def meter(self, session: Session) -> EpochMeter:
        return EpochMeter(
            self.train_loader,
            session,
            self.progress,
            log_level=self.cfg.logging.log_level,
            prefixes=self.trained_prefixes,
        )

    def step(self, batch: Batch, lr: float) -> tuple[Tensor, Tensor, Tensor]:
        """One optimizer step on this rank's part of a global batch; see `train_step`."""
        return train_step(
            batch,
            lr,
            cfg=self.cfg,
            world=self.world,
            ddp=self._ddp,
            state=self.state,
            guard=self._guard,
            loss_fn=self._loss_fn,
            precision=self.precision,
        )

    def metrics(self, means: Mapping[str, Any], meter: EpochMeter, lr: float) -> dict[str, float]:
        """The metrics of an epoch's training steps, under the names of `run_folder`."""
        metrics = {"loss": means["loss"], "lr": lr, **meter.metrics(means["images"])}
        trained = means.get("trained", [1.0] * len(self.dims))
        for dim, loss, share in zip(self.dims, means["prefix_loss"], trained, strict=True):
            if share:
                metrics[f"loss/{dim}"] = loss / share
        return metrics

    def validation_metrics(self, session: Session, *, tta: bool = False) -> dict[str, float]:
        """Metrics of the model, and of its average, on the validation set."""
        result = self.evaluate(session, tta=tta)
        self.progress.forecast.add_evaluation(result.seconds)
        metrics = {"val_time": result.seconds, "val_loss": sum(result.loss.values())}
        metrics |= accuracy_metrics(result.accuracy)
        if self.ema is not None:
            result = self.evaluate(session, model=self.ema.module, tta=tta)
            metrics |= accuracy_metrics(result.accuracy, prefix="ema_")
        return metrics

    def evaluate(
        self,
        session: Session,
        *,
        model: NestedModel | None = None,
        loader: Loader | None = None,
        tta: bool = False,
    ) -> Evaluation:
        """Evaluate `model` (default: the trained one) on `loader` (default: validation).

        Ends with Stopped after a stop signal.
        """
        loader = loader or self.val_loader

        def interruptible(batches: Iterable[Batch]) -> Iterable[Batch]:
            shown = self.progress.batches(batches, len(loader), "evaluated")
            return session.interruptible(shown)

        return evaluate(
            model or self.model,
            loader,
            precision=self.precision,
            tta=tta,
            world=self.world,
            interruptible=interruptible,
        )

    def best_model(self, session: Session) -> NestedModel:
        """The model of the best checkpoint; without one, of the last step. A copy, on all ranks.

        Of the averaged weights, where there are any.
        """
        average = self.ema is not None
        model = copy.deepcopy(self.ema.module if self.ema is not None else self.model)
        session.snapshots.wait()
        best: Checkpoint | None = None
        file = session.snapshots.folder / "best.safetensors"
        if self.world.is_main and file.exists():
            best = read_checkpoint(file)
        best = broadcast_checkpoint(best, self.world)
        if best is not None:
            model.load_state_dict(best.part("ema." if average else "model."))
        return model


# ---------------------------------------------------------------- processes and compilation


def distribute(model: NestedModel, world: World, find_unused: bool = False) -> nn.Module:
    """Wrap the model in DDP if there are several processes.

    find_unused: a step may leave parameters without a gradient.
    """
    if world.size == 1:
        return model
    device_ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, find_unused_parameters=find_unused)


def compile_model(ddp: nn.Module, cfg: SimpleNamespace, device: torch.device) -> str:
    """Compile the forward and backward pass if requested and possible; return a text about it."""
    requested = cfg.training.compile
    if requested is None:
        requested = device.type == "cuda" and not cfg.training.deterministic
    if not requested:
        return ""
    reason = distributed.why_not_compile(device)
    if reason is not None:
        return f", not compiled ({reason})"
    ddp.compile()
    return ", compiled"
