"""Supervised training of a nested model: everything around the loop of a training program.

A program prepares a run, opens its session and writes the loop itself:

    run = SupervisedRun(cfg, world, print0, start)      # of `claimed_run`
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
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from matryoshka import checkpoint
from matryoshka.checkpoint.transfer import start_model, start_weights
from matryoshka.data import Loader, open_dataset
from matryoshka.data.augment import Preprocessing
from matryoshka.data.dataset import Dataset
from matryoshka.data.loader import Batch
from matryoshka.distributed import World
from matryoshka.evaluation.evaluate import Evaluation, evaluate
from matryoshka.models import FamilyModel, NestedModel, model_spec
from matryoshka.models.ema import Ema
from matryoshka.nested import distilled_cross_entropy, nested_cross_entropy
from matryoshka.training.checks import global_batch_size
from matryoshka.training.compiling import explained
from matryoshka.training.loaders import (
    is_resident,
    make_loaders,
    resolution_at,
    training_crop,
    validation_loader,
)
from matryoshka.training.meter import EpochMeter
from matryoshka.training.run import Normalisation, TrainingRun, distribute
from matryoshka.training.run_folder import accuracy_metrics
from matryoshka.training.session import ResumePoint, Session, broadcast_checkpoint
from matryoshka.training.snapshot import Checkpoint
from matryoshka.training.snapshot import read as read_checkpoint
from matryoshka.training.summary import batch_notes, schedule_notes, size_text
from matryoshka.training.supervised_step import Objective, train_step


class SupervisedRun(TrainingRun[NestedModel]):
    """A run that is set up from its options and ready for its first or next step.

    cfg: sections of training/options.py. print0: prints a line on rank 0. start: of `claimed_run`,
    not of a finished run. datasets: opened training and validation sets instead of
    data.train_dataset and data.val_dataset. normalisation: mean and std of the images, used unless
    initial weights have their own. val_role: what the validation set is for. loss: has the
    signature of nested_cross_entropy.
    """

    val_loader: Loader
    model: NestedModel

    def __init__(
        self,
        cfg: SimpleNamespace,
        world: World,
        print0: Callable[[str], None],
        start: ResumePoint,
        *,
        datasets: tuple[Dataset, Dataset] | None = None,
        normalisation: Normalisation | None = None,
        val_role: str = "for validation",
        loss: Callable = nested_cross_entropy,
    ) -> None:
        super().__init__(cfg, world, print0, start)
        self._val_role = val_role
        self._load_data(datasets)
        notes = self._build_model(normalisation)
        self._build_state(loss)
        self._print_summary([*notes, *self._validation_notes()])

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
            self.initialise_from_data(self.model)
        if cfg.training.sync_bn:
            # In place: the model itself is not a batch norm, only its layers are replaced.
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.ema = Ema(self.model, cfg.training.ema) if cfg.training.ema else None
        return notes

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
        # `model` remains the module to save, and to evaluate, which is not compiled.
        self._objective = Objective(
            self.model,
            partial(loss, label_smoothing=t.label_smoothing),
            weights=weights,
            precision=self.precision,
        )
        # A step of the sandwich rule leaves out widths, which may have weights of their own.
        self._ddp = distribute(self._objective, self.world, find_unused=t.sandwich is not None)

        sums: dict[str, tuple[int, ...]] = {"loss": (), "prefix_loss": (len(self.dims),)}
        if t.sandwich is not None:
            sums["trained"] = (len(self.dims),)  # share of the images that trained a prefix
        metadata = {
            **checkpoint.describe(self.model),
            "resident": is_resident(self.train_loader),
            "validation": self.val_loader.dataset.content().sampled,
        }
        self.build_state(self.model, sums, metadata, ema=self.ema)

    def _validation_notes(self) -> list[str]:
        """A note if a resumed run has other images for validation than it began with.

        They may be exchanged: the weights do not depend on them.
        """
        resumed = self.start.checkpoint
        before = None if resumed is None else resumed.metadata.get("validation")
        if before in (None, self.state.metadata["validation"]):
            return []
        return [
            f"{self.val_loader.dataset.path}: other images than before: accuracies of earlier "
            "epochs, and the best checkpoint, do not compare with those to come"
        ]

    def _print_summary(self, notes: Sequence[str]) -> None:
        cfg = self.cfg
        dataset = self.train_loader.dataset
        spec = self.model.spec
        self.print0(f"run      {self.start.path}")
        self.print0(
            f"data     {len(dataset):,} images, {dataset.num_classes} classes; "
            f"{len(self.val_loader.dataset):,} {self._val_role}"
        )
        self.print0(f"model    {spec.arch}, {spec.head_name}, dims {list(spec.dims)}")
        obstacle = None
        if cfg.training.sandwich is not None and isinstance(self.model, FamilyModel):
            obstacle = "training.sandwich draws other widths in every step"
        self._forward, line = self.compiled(self._ddp, obstacle=obstacle)
        self.print0(line)
        self.print0(
            f"steps    {cfg.training.epochs} epochs x {self.steps} steps of {self.global_batch} "
            f"images, peak lr {self.peak:.4g}"
        )
        resolutions = self.resolutions
        self.print0(
            f"size     {size_text(resolutions)} to train, {cfg.validation.resolution} to validate"
        )
        batches = batch_notes(cfg, self.world.size, self.global_batch, len(dataset))
        self.print_notes((*self.start.notes, *notes, *batches, *schedule_notes(cfg)))

    @property
    def resolutions(self) -> list[int]:
        return [
            resolution_at(epoch, self.cfg.resolution) for epoch in range(self.cfg.training.epochs)
        ]

    def loader(self, dataset: Dataset) -> Loader:
        """A loader that yields every image of another data set once, as in validation."""
        return validation_loader(self.cfg, self.world, dataset)

    # ---------------------------------------------------------------- the loop's parts

    def session(self, *, best_of_average: bool = False, resume_hint: str | None = None) -> Session:
        """The session of the run, which resumes the checkpoint that `start` found.

        best_of_average: the best checkpoint is that of the averaged weights, where there are any.
        resume_hint: options that resume a stopped run, for the message.
        """
        average = "ema_" if best_of_average and self.ema is not None else ""
        metric = f"{average}top_1/{self.dims[-1]}"
        return self.open_session(best_metric=metric, resume_hint=resume_hint)

    def start_epoch(self, session: Session) -> None:
        """Set the size of the epoch's images and the loader's position."""
        resolution = resolution_at(session.loop.epoch, self.cfg.resolution)
        self.train_loader.crop = training_crop(self.cfg, resolution)
        session.start_epoch()
        self.model.train()

    def meter(self, session: Session) -> EpochMeter:
        return self.epoch_meter(session, self.trained_prefixes)

    def step(self, batch: Batch, lr: float) -> tuple[Tensor, Tensor, Tensor]:
        """One optimizer step on this rank's part of a global batch; see `train_step`."""
        images, labels = batch.images, batch.labels

        def attempt(size: int) -> None:
            loss, _ = self._objective(images[:size], labels[:size])
            loss.backward()
            self.state.optimizer.zero_grad(set_to_none=True)

        size = min(len(labels), self.cfg.training.batch_size)
        with explained(self._forward), self.with_memory(size, attempt):
            numbers = train_step(
                batch,
                lr,
                cfg=self.cfg,
                world=self.world,
                forward=self._forward,
                state=self.state,
                guard=self.guard,
            )
        self.note_graphs()
        return numbers

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

        Of the averaged weights, where there are any. A best checkpoint that is damaged counts as
        none, and is named.
        """
        average = self.ema is not None
        model = copy.deepcopy(self.ema.module if self.ema is not None else self.model)
        session.snapshots.wait()
        best: Checkpoint | None = None
        file = session.snapshots.folder / "best.safetensors"
        if self.world.is_main and file.exists():
            try:
                best = read_checkpoint(file)
            except checkpoint.CheckpointError as error:
                self.print_notes([f"{error}; what follows is the model of the last step"])
        best = broadcast_checkpoint(best, self.world)
        if best is not None:
            model.load_state_dict(best.part("ema." if average else "model."))
        return model
