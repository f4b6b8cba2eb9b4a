"""Self-supervised training of a nested encoder: everything around the loop of train_ssl.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from matryoshka import checkpoint, distributed
from matryoshka.checkpoint.transfer import start_model, start_weights
from matryoshka.data import Loader
from matryoshka.data.augment import Preprocessing
from matryoshka.data.catalogue import normalisation
from matryoshka.data.loader import Batch
from matryoshka.data.subset import Subset
from matryoshka.distributed import World
from matryoshka.evaluation.collapse import MONITORS, fallen
from matryoshka.evaluation.online_probe import OnlineProbe
from matryoshka.evaluation.self_supervised import Evaluation, evaluate_encoder
from matryoshka.models import NestedModel, module_multiply_adds, pflop
from matryoshka.ssl import make_method, momentum_at
from matryoshka.ssl.options import WITH_TARGET
from matryoshka.training.checks import global_batch_size
from matryoshka.training.compiling import explained
from matryoshka.training.loaders import (
    is_resident,
    loader_resources,
    new_loader,
    training_order,
    validation_loader,
)
from matryoshka.training.meter import EpochMeter
from matryoshka.training.run import TrainingRun, distribute
from matryoshka.training.session import ResumePoint, Session
from matryoshka.training.ssl_setup import (
    Images,
    accumulates,
    check_batch,
    encoder_spec,
    view_crops,
    view_options,
)
from matryoshka.training.ssl_step import Learner, Passes, ViewMaker, bn_group, train_step
from matryoshka.training.summary import batch_notes, schedule_notes, size_text

WATCHED = 2048  # images whose two views the monitors of collapse look at
BEST_METRIC = "knn20_mean"  # over the prefixes


class SslRun(TrainingRun[Learner]):
    """A run that is set up from its options and ready for its first or next step.

    cfg: resolved by ssl_setup. print0: prints a line on rank 0. start: of `claimed_run`, not of a
    finished run. images: the opened data sets.
    """

    learner: Learner

    def __init__(
        self,
        cfg: SimpleNamespace,
        world: World,
        print0: Callable[[str], None],
        start: ResumePoint,
        *,
        images: Images,
    ) -> None:
        super().__init__(cfg, world, print0, start)
        self.images = images
        self._load_data()
        notes = self._build_learner()
        self._build_state()
        self._print_summary(notes)

    @property
    def dims(self) -> tuple[int, ...]:
        return self.learner.method.dims

    @property
    def encoder(self) -> NestedModel:
        """The encoder that is evaluated and saved."""
        return self.learner.method.encoder

    @property
    def resolutions(self) -> list[int]:
        return [self.cfg.views.size] * self.cfg.training.epochs

    # ---------------------------------------------------------------- set-up

    def _load_data(self) -> None:
        cfg = self.cfg
        train = self.images.train
        before, resident = None, None
        if self.start.checkpoint is not None:
            before = self.start.checkpoint.metadata["global_batch"]
            resident = self.start.checkpoint.metadata.get("resident")
        self.global_batch = global_batch_size(
            cfg, self.world.size, images=len(train), before=before
        )
        check_batch(cfg, self.world.size, self.global_batch)
        self.train_loader = new_loader(
            cfg,
            self.world,
            train,
            self.global_batch,
            resident=resident,
            order=training_order(cfg, self.world, train),
            crop=view_crops(cfg),
            drop_last=True,
            seed=cfg.training.seed,
            window_pages=cfg.data.window_pages,
            on_error=cfg.data.on_error,
        )
        if cfg.data.in_memory and not is_resident(self.train_loader):
            train.preload()

    def _build_learner(self) -> list[str]:
        """Build `learner`; return notes about its initial weights."""
        cfg = self.cfg
        classes = self.images.train.classes if self.images.has_classes else []
        spec = encoder_spec(cfg, self.images.num_classes)
        resumed = self.start.checkpoint
        model_config = replace(cfg.model, init=None, pretrained=False) if resumed else cfg.model
        encoder, notes = start_model(model_config, spec, classes)
        if resumed:
            encoder.preprocessing = checkpoint.preprocessing_of(resumed.metadata)
        elif encoder.preprocessing == Preprocessing() and not start_weights(cfg.model):
            mean, std = normalisation(cfg.data.dataset or "")
            encoder.preprocessing = replace(encoder.preprocessing, mean=mean, std=std)
        encoder.preprocessing = replace(
            encoder.preprocessing, size=cfg.validation.resolution, ratio=cfg.validation.crop_ratio
        )
        encoder.classes = classes or None
        if not resumed and not start_weights(cfg.model):
            encoder.to(self.world.device)
            self.initialise_from_data(encoder)
        method = make_method(encoder, cfg.ssl)
        method.weights = cfg.model.relative_importance
        method.large = cfg.views.count
        method.bn_group = bn_group(cfg, self.world)
        probe = OnlineProbe(spec.dims, spec.num_classes) if self.images.has_classes else None
        self.learner = Learner(method, probe).to(self.world.device)
        if cfg.training.sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.learner)
        self._passes = Passes(method, encoder.preprocessing, self.precision)
        # All ranks push the same keys: nothing of the queue needs to travel in each step.
        buffers = [name for name, _ in self._passes.named_buffers()]
        of_queue = [name for name in buffers if name.startswith("method.queue.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self._passes, of_queue)
        self._ddp = distribute(self._passes, self.world)
        self._views = ViewMaker(
            [view_options(cfg.views, view) for view in range(cfg.views.count + cfg.views.small)],
            encoder.preprocessing,
            cfg.training.seed,
        )
        return notes

    def _build_state(self) -> None:
        sums: dict[str, tuple[int, ...]] = {"loss": (), "prefix_loss": (len(self.dims),)}
        if self.learner.probe is not None:
            sums["right"] = (len(self.dims),)
        metadata = {
            **checkpoint.describe(self.encoder),
            "resident": is_resident(self.train_loader),
            "method": self.cfg.ssl.method,
        }
        path = f"method.{self.learner.method.encoder_path}"
        self.build_state(self.learner, sums, metadata, encoder=path)

    def _print_summary(self, notes: Sequence[str]) -> None:
        cfg = self.cfg
        method = self.learner.method
        train, evaluation = self.images.train, self.images.evaluation
        kept = "target" if method.evaluates_target else "online"
        self.print0(f"run      {self.start.path}")
        ignored = f" (its {train.num_classes} classes are ignored)" if train.num_classes > 1 else ""
        looked_up = "no evaluation" if evaluation is None else f"{len(evaluation):,} to evaluate on"
        self.print0(f"data     {len(train):,} images{ignored}; {looked_up}")
        self.print0(
            f"method   {cfg.ssl.method}, projector {cfg.ssl.projector}, saves the {kept} encoder"
        )
        self.print0(f"model    {cfg.model.arch}, prefixes {list(self.dims)}")
        self._forward, line = self.compiled(self._ddp)
        self.print0(line)
        self.print0(
            f"steps    {cfg.training.epochs} epochs x {self.steps} steps of {self.global_batch} "
            f"images, peak lr {self.peak:.4g}"
        )
        small = f" and {cfg.views.small} of {cfg.views.small_size} px" if cfg.views.small else ""
        self.print0(f"views    {cfg.views.count} of {size_text([cfg.views.size])}{small}")
        if self.images.why_not:
            notes = [*notes, f"neighbours are not evaluated: {self.images.why_not}"]
        batches = batch_notes(cfg, self.world.size, self.global_batch, len(train))
        self.print_notes((*self.start.notes, *notes, *batches, *schedule_notes(cfg)))

    # ---------------------------------------------------------------- the loop's parts

    def session(self) -> Session:
        hint = f"--training.resume={self.start.path}"
        return self.open_session(best_metric=BEST_METRIC, resume_hint=hint)

    def start_epoch(self, session: Session) -> None:
        """Set the loader's position, and everything to training mode."""
        session.start_epoch()
        self.learner.train()

    def meter(self, session: Session) -> EpochMeter:
        return self.epoch_meter(session, len(self.dims))

    def momentum(self, session: Session) -> float:
        """The decay of the target's average after the next step."""
        ssl = self.cfg.ssl
        return momentum_at(
            session.loop.step,
            self.steps * self.cfg.training.epochs,
            start=ssl.momentum,
            end=ssl.momentum_end,
            after=ssl.momentum_after,
            every=ssl.momentum_every,
        )

    def step(self, batch: Batch, lr: float, momentum: float) -> tuple[Tensor, ...]:
        """One optimizer step on this rank's part of a global batch; see `train_step`."""
        views = batch.images
        method = self.learner.method

        def attempt(size: int) -> None:
            queries = method.query_views(len(views), self.cfg.views.count)
            keys = method.key_views(self.cfg.views.count)
            own = self._passes([views[v][:size] for v in queries], [views[v][:size] for v in keys])
            torch.stack([embedding.sum() for embedding in own.online]).sum().backward()
            self.state.optimizer.zero_grad(set_to_none=True)

        size = min(len(batch.labels), self.cfg.training.batch_size)
        with (
            explained(self._forward),
            self.with_memory(size, attempt, accumulates=accumulates(self.cfg.ssl)),
        ):
            numbers = train_step(
                batch,
                lr,
                cfg=self.cfg,
                world=self.world,
                forward=self._forward,
                state=self.state,
                guard=self.guard,
                views=self._views,
                momentum=momentum,
            )
        self.note_graphs()
        return numbers

    def metrics(
        self, session: Session, meter: EpochMeter, *, lr: float, momentum: float
    ) -> dict[str, float]:
        """The metrics of an epoch's training steps, under the names of `run_folder`."""
        means = session.end_epoch()
        metrics = {"loss": means["loss"], "lr": lr, **meter.metrics(means["images"])}
        metrics["pflop"] = self.pflop(session.loop.epoch + 1)
        for dim, loss in zip(self.dims, means["prefix_loss"], strict=True):
            metrics[f"loss/{dim}"] = loss
        for dim, right in zip(self.dims, means.get("right", ()), strict=False):
            metrics[f"probe_train/{dim}"] = 100 * right
        if self.cfg.ssl.method in WITH_TARGET:
            metrics["momentum"] = momentum
        temperature = getattr(self.learner.method, "temperature", None)
        if temperature is not None:
            metrics["temperature"] = float(temperature().detach())
        return metrics

    def pflop(self, epochs: int) -> float:
        """PFLOP of this many epochs: of the encoders and projectors, all views."""
        trained, target = self._macs
        return pflop(trained, target, epochs * self.steps * self.global_batch)

    @cached_property
    def _macs(self) -> tuple[int, int]:
        """Multiply-adds of an image in what is trained, and in the target."""
        method, views = self.learner.method, self.cfg.views
        sizes = [views.size] * views.count + [views.small_size] * views.small
        counts = {size: module_multiply_adds(method.online, size) for size in set(sizes)}
        trained = sum(counts[sizes[v]] for v in method.query_views(len(sizes), views.count))
        target = sum(counts[sizes[v]] for v in method.key_views(views.count))
        return trained, target

    # ---------------------------------------------------------------- evaluation

    def is_evaluated(self, epoch: int) -> bool:
        """Whether the embeddings are evaluated after this epoch, counted from 0."""
        cfg = self.cfg
        is_last = epoch == cfg.training.epochs - 1
        return is_last or (cfg.logging.log_level > 0 and (epoch + 1) % cfg.validation.every == 0)

    def evaluation_metrics(self, session: Session, *, last: bool) -> dict[str, float]:
        """Metrics of the encoder's embeddings; warns of a collapse. last: on all images."""
        result = self.evaluate(session, last=last)
        self.progress.forecast.add_evaluation(result.seconds / self.cfg.validation.every)
        metrics = {"val_time": result.seconds}
        for dim, values in result.monitors.items():
            metrics |= {f"{name}/{dim}": value for name, value in values.items()}
        for k in (20, 200):
            votes = {dim: row[k] for dim, row in result.knn.items() if k in row}
            metrics |= {f"knn{k}/{dim}": value for dim, value in votes.items()}
            if k == 20 and votes:
                metrics[BEST_METRIC] = sum(votes.values()) / len(votes)
        metrics |= {f"knn20_top5/{dim}": value for dim, value in result.knn_top_5.items()}
        metrics |= {f"map10/{dim}": value for dim, value in result.map.items()}
        metrics |= {f"probe/{dim}": value for dim, value in result.probe.items()}
        if session.log is not None:
            # From the log, which a resumed run continues and a rollback cuts.
            earlier = [monitors_of(line, self.dims) for line in session.log.lines()]
            history = [*filter(None, earlier), result.monitors]
            for line in fallen(history, images=2 * len(self._watched())):
                self.progress.print0(f"warning  epoch {session.loop.epoch}: {line}")
                session.event("collapse", epoch=session.loop.epoch, text=line)
        return metrics

    def evaluate(self, session: Session, *, last: bool) -> Evaluation:
        """Neighbours, probe and monitors of the encoder; its modes are left as they were.

        last: on all images to evaluate on, else on validation.queries of them.
        """
        # Every image once: a set that is resident for the epochs' sake would be held twice.
        data = replace(self.cfg.data, resident="0")
        cfg = SimpleNamespace(**vars(self.cfg) | {"data": data})
        evaluation = self.images.evaluation
        bank = queries = None
        if evaluation is not None:
            chosen = evenly(len(self.images.bank), cfg.validation.bank)
            # As in training, an image that cannot be decoded may be left out.
            bank = validation_loader(
                cfg, self.world, Subset(self.images.bank, chosen), on_error=cfg.data.on_error
            )
            asked = evenly(len(evaluation), len(evaluation) if last else cfg.validation.queries)
            queries = validation_loader(cfg, self.world, Subset(evaluation, asked))
        return evaluate_encoder(
            self.encoder,
            bank,
            queries,
            probe=self.learner.probe,
            watched=self._watched_views(),
            precision=self.precision,
            world=self.world,
            interruptible=session.interruptible,
        )

    def _watched(self) -> np.ndarray:
        return evenly(len(self.images.train), WATCHED)

    def _watched_views(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Two views of some training images, always the same: float [B, 3, h, w] each."""
        cfg = self.cfg
        loader = Loader(
            Subset(self.images.train, self._watched()),
            min(cfg.validation.batch_size, WATCHED),
            order="sequential",
            crop=view_crops(cfg)[:2],
            seed=cfg.training.seed,
            on_error=cfg.data.on_error,
            num_workers=loader_resources(cfg, self.world)["num_workers"],
            device=self.world.device,
        )
        two = ViewMaker(
            [view_options(cfg.views, view) for view in range(2)],
            self.encoder.preprocessing,
            cfg.training.seed,
        )
        for batch in loader:
            first, second = two(batch, 0)
            yield two.normalised(first), two.normalised(second)

    def write_probe(self) -> None:
        """Give the encoders the classifiers of the probe, so that a checkpoint answers."""
        probe, method = self.learner.probe, self.learner.method
        if probe is not None:
            probe.write_into(method.online.encoder.head)
            if method.target is not None:
                probe.write_into(method.target.tower.encoder.head)

    def final_model(self) -> NestedModel:
        """A copy of the encoder, whose classifiers are the probe's, in eval mode."""
        distributed.broadcast_buffers(self.learner, self.world)
        self.write_probe()
        model = copy.deepcopy(self.encoder)
        return model.requires_grad_(True).eval()


def monitors_of(line: Mapping[str, Any], dims: Sequence[int]) -> dict[int, dict[str, float]]:
    """The monitors in an epoch's line of the log; empty if it was not evaluated."""
    found = {}
    for d in dims:
        values = {name: line[f"{name}/{d}"] for name in MONITORS if f"{name}/{d}" in line}
        if values:
            found[d] = values
    return found


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` positions of `count`, int64, evenly spread: a folder is in class order."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))
