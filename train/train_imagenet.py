"""Train a nested (MRL, MRL-E) or fixed-feature model on two .beton files or image folders.

    python train_imagenet.py --config-file rn50_configs/rn50_40_epochs.yaml --model.mrl=1 \\
        --data.train_dataset=train_500_0.50_90.ffcv --data.val_dataset=val_500_uncompressed.ffcv

Several GPUs: --training.distributed=1, or torchrun. All outputs are in <logging.folder>/<run id>/;
the model is model.safetensors. --training.resume=auto resumes a stopped run. `--help` lists all
options.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from matryoshka import config
from matryoshka.training.options import SECTIONS, parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from matryoshka import checkpoint, distributed
from matryoshka.checkpoint.transfer import start_model
from matryoshka.data import Loader, open_dataset
from matryoshka.data.augment import augmented, mixed_loss
from matryoshka.data.loader import Batch
from matryoshka.distributed import World
from matryoshka.evaluation.predict import predict
from matryoshka.models import NestedModel, model_spec
from matryoshka.models.ema import Ema
from matryoshka.nested import nested_cross_entropy
from matryoshka.training.checks import check, global_batch_size, requested_batch_size
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.loaders import (
    is_resident,
    make_loaders,
    resolution_at,
    training_crop,
    validation_loader,
)
from matryoshka.training.meter import EpochMeter
from matryoshka.training.optim import lr_at, make_optimizer, parameter_groups, peak_epoch, peak_lr
from matryoshka.training.progress import Forecast, Progress
from matryoshka.training.run_folder import accuracy_metrics, new_run_id
from matryoshka.training.session import (
    FINAL,
    Session,
    SessionOptions,
    launch_id,
    resolve_run_on_all_ranks,
)
from matryoshka.training.state import TrainState
from matryoshka.training.step import apply_gradients, begin_step, gradient_sync, micro_batches
from matryoshka.training.sums import Sums
from matryoshka.training.watch import Stopped

LEFT_OUT_SHARE = 0.1  # of the images: a note if full batches leave out more than this
FIT_HINT = "; matryoshka fit PHOTOS --minutes 10 chooses sizes that fit into a time"

# (logits [G, B, C], labels [B]) -> (scalar to minimise, detached loss per prefix [G])
LossFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    cfg = parser().parse_args(argv)
    processes = distributed.processes_to_start(
        cfg.dist, cfg.training.distributed, cfg.training.device
    )
    check(cfg, processes)
    if processes > 1:
        return distributed.launch(processes, cfg.dist, str(Path(__file__).resolve()), argv)
    with distributed.joined(cfg.training.device) as world:
        try:
            if cfg.training.eval_only:
                evaluate_checkpoint(cfg, world)
            else:
                train(cfg, world)
        except Stopped as stopped:
            return stopped.exit_code
    return 0


def train(cfg: SimpleNamespace, world: World, *, loss: Callable = nested_cross_entropy) -> None:
    """Run the training to its end, from its first step or from its last checkpoint.

    loss: has the signature of nested_cross_entropy.
    """
    t = cfg.training
    print0 = partial(print, flush=True) if world.is_main else lambda *_: None
    distributed.prepare(world.device, t.seed, t.deterministic)

    # ---- run folder ----
    run_id = cfg.logging.run_id or launch_id() or new_run_id(cfg.model.arch.replace(":", "-"))
    run_id = distributed.broadcast(run_id, world)
    options = config.flat(cfg)
    start = resolve_run_on_all_ranks(
        Path(cfg.logging.folder),
        run_id,
        t.resume,
        options=options,
        neutral=config.neutral_options(SECTIONS),
        world=world,
    )
    if start.finished:
        print0(f"finished {start.path}: this run is done; its model is {start.path / FINAL}")
        return
    resumed = start.checkpoint

    # ---- data ----
    # A resumed run keeps its global batch, also with another number of processes.
    before = resumed.metadata["global_batch"] if resumed else None
    images = len(open_dataset(cfg.data.train_dataset))
    global_batch = global_batch_size(cfg, world.size, images=images, before=before)
    # So do its pixels: a resident set is decoded exactly, a streamed one for speed.
    resident = resumed.metadata.get("resident") if resumed else None
    train_loader, val_loader = make_loaders(cfg, world, global_batch, resident=resident)
    dataset = train_loader.dataset
    steps = len(train_loader)

    # ---- model ----
    spec = model_spec(cfg.model, dataset.num_classes, t.use_blurpool)
    # The weights of a resumed run come from its checkpoint.
    model_config = replace(cfg.model, init=None, pretrained=False) if resumed else cfg.model
    model, notes = start_model(model_config, spec, dataset.classes)
    if resumed:
        model.preprocessing = checkpoint.preprocessing_of(resumed.metadata)
    model.preprocessing = replace(
        model.preprocessing, size=cfg.validation.resolution, ratio=cfg.validation.crop_ratio
    )
    model.classes = dataset.classes
    model = model.to(world.device).to(memory_format=torch.channels_last)
    if t.sync_bn:
        # In place: the model itself is not a batch norm, only its layers are replaced.
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ema = Ema(model, t.ema) if t.ema else None
    # `model` remains the module to save and to evaluate: DDP's keys start with `module.`.
    ddp = distribute(model, world)
    precision = distributed.pick_precision(t.precision, world.device)

    # ---- loss ----
    weights = None  # of the prefixes; all 1
    if cfg.model.relative_importance:
        weights = torch.tensor(cfg.model.relative_importance, device=world.device)
    loss_fn: LossFn = partial(loss, weights=weights, label_smoothing=t.label_smoothing)

    # ---- optimizer ----
    # Linear in the global batch, so a recipe is right for any number of GPUs.
    peak = peak_lr(cfg.lr, global_batch)
    groups = parameter_groups(model, t.weight_decay, t.bn_wd)
    state = TrainState(
        model=model,
        optimizer=make_optimizer(t.optimizer, groups, peak, t.momentum, world.device),
        loader=train_loader,
        scaler=torch.amp.GradScaler(world.device.type, enabled=precision == "fp16"),
        sums=Sums({"loss": (), "prefix_loss": (len(spec.dims),)}, world.device),
        metadata={**checkpoint.describe(model), "resident": is_resident(train_loader)},
        ema=ema,
    )
    guard = NonFiniteGuard(model, world.device, t.clip)

    # ---- summary ----
    print0(f"run      {start.path}")
    print0(
        f"data     {len(dataset):,} images, {dataset.num_classes} classes; "
        f"{len(val_loader.dataset):,} for validation"
    )
    print0(f"model    {spec.arch}, {spec.head_name}, dims {list(spec.dims)}")
    # compile() changes DDP's wrapper in place: the model's keys stay, and evaluation is not
    # compiled.
    compiled = compile_model(ddp, cfg, world.device)
    print0(f"device   {world.size} x {world.device.type}, {precision}{compiled}")
    print0(
        f"steps    {t.epochs} epochs x {steps} steps of {global_batch} images, peak lr {peak:.4g}"
    )
    resolutions = [resolution_at(epoch, cfg.resolution) for epoch in range(t.epochs)]
    print0(f"size     {size_text(resolutions)} to train, {cfg.validation.resolution} to validate")
    notes += batch_notes(cfg, world.size, global_batch, len(dataset))
    for note in (*start.notes, *notes, *schedule_notes(cfg)):
        print0(f"note     {note}")
    progress = Progress(
        Forecast(resolutions, steps), print0, hint=FIT_HINT if world.device.type == "cpu" else ""
    )

    # ---- loop ----
    step = partial(
        train_step,
        cfg=cfg,
        world=world,
        ddp=ddp,
        state=state,
        guard=guard,
        loss_fn=loss_fn,
        precision=precision,
    )
    session_options = SessionOptions(
        best_metric=f"top_1/{spec.dims[-1]}",
        keep_last=t.keep_last,
        checkpoint_every_steps=t.checkpoint_every_steps,
        checkpoint_every_minutes=t.checkpoint_every_minutes,
        skip_limit=t.skip_limit,
        hang_timeout=t.hang_timeout,
        wandb=cfg.logging.wandb,
    )
    with Session(
        state,
        guard,
        world,
        start,
        options=session_options,
        config=options,
        config_yaml=config.to_yaml(cfg),
        print0=print0,
    ) as session:
        if resumed:
            print0(f"resume   after step {session.loop.step}, epoch {session.loop.epoch}")

        def current_lr() -> float:
            epoch = session.loop.step / steps  # fractional: the rate changes in every step
            return session.lr_factor * lr_at(epoch, cfg.lr, peak, t.epochs)

        def validate(
            model: NestedModel, tta: bool = cfg.validation.lr_tta
        ) -> tuple[dict[int, dict[str, float]], float]:
            def batches(loader: Iterable[Batch]) -> Iterable[Batch]:
                shown = progress.batches(loader, len(val_loader), "evaluated")
                return session.interruptible(shown)

            return evaluate(
                model, val_loader, precision=precision, tta=tta, world=world, interruptible=batches
            )

        # The session counts the epochs: a rollback sets the counter back.
        while session.loop.epoch < t.epochs:
            with session.rollback():  # ends here if the session returns to an older checkpoint
                epoch = session.loop.epoch
                train_loader.crop = training_crop(cfg, resolution_at(epoch, cfg.resolution))
                session.start_epoch()
                model.train()
                # Logged if a resumed epoch has no steps left, only its evaluation.
                lr = current_lr()
                with EpochMeter(
                    train_loader,
                    session,
                    progress,
                    log_level=cfg.logging.log_level,
                    prefixes=len(spec.dims),
                ) as meter:
                    for batch in meter:
                        lr = current_lr()
                        step_loss, norm, skipped = step(batch, lr)
                        reports = session.after_step(step_loss, norm, skipped)
                        meter.update(reports, lr)

                means = session.end_epoch()
                metrics = {"loss": means["loss"], "lr": lr, **meter.metrics(means["images"])}
                for dim, prefix_loss in zip(spec.dims, means["prefix_loss"], strict=True):
                    metrics[f"loss/{dim}"] = prefix_loss
                if cfg.logging.log_level > 0 or epoch == t.epochs - 1:
                    accuracy, metrics["val_time"] = validate(model)
                    progress.forecast.add_evaluation(metrics["val_time"])
                    metrics |= accuracy_metrics(accuracy)
                    if ema is not None:
                        accuracy, _ = validate(ema.module)
                        metrics |= accuracy_metrics(accuracy, prefix="ema_")
                progress.print0(epoch_line(epoch, metrics, spec.dims))
                progress.announce(session.loop.step)
                session.log_epoch(metrics)
                session.epoch_done(metrics)

        # ---- final model ----
        # One view, as `matryoshka eval` measures; validation.lr_tta adds the mirror images.
        accuracy, _ = validate(model, tta=False)
        print0(f"accuracy {accuracy_text(accuracy)}  (one view, as matryoshka eval prints)")
        if cfg.validation.lr_tta:
            accuracy, _ = validate(model)
            print0(f"mirrored {accuracy_text(accuracy)}  (with mirror images, validation.lr_tta=1)")
        if world.is_main:
            # the last checkpoint must be complete before the run is finished
            session.snapshots.wait()
            checkpoint.save_upstream(model, start.path / "final_weights.pt")
            if ema is not None:
                checkpoint.save_model(ema.module, start.path / "model_ema.safetensors", options)
            # Last, because this file marks the run as finished.
            checkpoint.save_model(model, start.path / FINAL, options)
            draw_chart(start.path, print0)
            print0(f"model    {start.path / FINAL}")


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
    # drop_last: every global batch is full
    global_batch = state.loader.batch_size
    # Usually one part; more with gradient accumulation.
    for part in micro_batches(batch, t.batch_size, world=world, global_batch=global_batch):
        # uint8 [B, H, W, 3] -> float [B, 3, H, W]
        mixed = augmented(part.images, part.labels, cfg.data, preprocessing, rng)

        with gradient_sync(ddp, part.sync):
            with distributed.autocast(mixed.images.device, precision):
                logits = ddp(mixed.images)  # [G, B, C]
            # The loss in float32: its sums lose too much in half precision.
            loss, prefix_loss = mixed_loss(loss_fn, logits.float(), mixed)
            state.backward(loss * part.loss_weight)
        state.sums.add(images=len(part), loss=loss, prefix_loss=prefix_loss)

    mean_loss = state.sums.step_mean("loss")
    norm, skipped = apply_gradients(state, guard, lr)
    return mean_loss, norm, skipped


def evaluate(
    model: NestedModel,
    loader: Loader,
    *,
    precision: str,
    tta: bool,
    world: World,
    interruptible: Callable[[Iterable], Iterable] = iter,
) -> tuple[dict[int, dict[str, float]], float]:
    """({dim: {top1, top5}} in percent over the validation images of all ranks, seconds)."""
    # torchmetrics takes seconds to import: not before it is needed
    from matryoshka.evaluation.accuracy import PrefixAccuracy

    began = time.perf_counter()
    # Ranks have different batch-norm statistics: all evaluate the model that rank 0 saves.
    distributed.broadcast_buffers(model, world)
    metric = PrefixAccuracy(model.dims).to(world.device)
    for prediction in interruptible(predict(model, loader, precision, tta)):
        metric.update(prediction.logits, prediction.labels)
    return metric.compute(), time.perf_counter() - began


def evaluate_checkpoint(cfg: SimpleNamespace, world: World) -> None:
    """training.eval_only: print the accuracy of every prefix of training.path."""
    model = checkpoint.load_model(cfg.training.path)
    model = model.to(world.device).to(memory_format=torch.channels_last)
    loader = validation_loader(cfg, world)
    model.check_classes(loader.dataset)

    accuracy, seconds = evaluate(
        model,
        loader,
        precision=distributed.pick_precision(cfg.training.precision, world.device),
        tta=cfg.validation.lr_tta,
        world=world,
    )
    if world.is_main:
        for dim, values in accuracy.items():
            print(f"{dim:6d}  top-1 {values['top1']:6.2f}  top-5 {values['top5']:6.2f}")
        print(f"{len(loader.dataset):,} images in {seconds:.1f} s")


def epoch_line(epoch: int, metrics: Mapping[str, float], dims: Sequence[int]) -> str:
    """The line that is printed after an epoch. The loss is the mean over the prefixes.

    The loss that is minimised and logged is their sum (MRL, equation 1).
    """
    top1 = "not evaluated"
    if f"top_1/{dims[-1]}" in metrics:
        top1 = "  ".join(f"{dim}: {metrics[f'top_1/{dim}']:.1f}" for dim in dims)
    if f"ema_top_1/{dims[-1]}" in metrics:
        top1 += f"  (average {metrics[f'ema_top_1/{dims[-1]}']:.1f})"
    return (
        f"epoch {epoch:3d}  loss {metrics['loss'] / len(dims):.3f}  lr {metrics['lr']:.3g}  "
        f"{metrics['images_per_s']:.0f} images/s  wait {100 * metrics['data_wait']:.0f} %  "
        f"top-1 {top1}"
    )


def accuracy_text(accuracy: Mapping[int, Mapping[str, float]]) -> str:
    return "top-1 " + "  ".join(f"{dim}: {row['top1']:.2f}" for dim, row in accuracy.items())


# ---------------------------------------------------------------- set-up and summary


def distribute(model: NestedModel, world: World) -> nn.Module:
    """Wrap the model in DDP if there are several processes."""
    if world.size == 1:
        return model
    device_ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids)


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


def schedule_notes(cfg: SimpleNamespace) -> list[str]:
    """Notes on a learning-rate peak that lies beyond the run and was moved into it."""
    name = "lr_peak_epoch" if cfg.lr.lr_schedule_type == "cyclic" else "warmup_epochs"
    requested = getattr(cfg.lr, name)
    actual = peak_epoch(cfg.lr, cfg.training.epochs)
    if actual == requested:
        return []
    epochs = cfg.training.epochs
    return [f"lr.{name}={requested} is beyond these {epochs} epochs: peak at {actual}"]


def size_text(resolutions: Sequence[int]) -> str:
    """`160 px`, or `160 to 224 px` for a ramp."""
    low, high = min(resolutions), max(resolutions)
    return f"{low} px" if low == high else f"{low} to {high} px"


def batch_notes(cfg: SimpleNamespace, processes: int, global_batch: int, images: int) -> list[str]:
    """Notes on a batch that was lowered, and on images that full batches leave out."""
    notes = []
    requested = requested_batch_size(cfg, processes)
    if requested > images:
        notes.append(
            f"batches of {requested} images are more than the {images} of the training set: "
            f"lowered to {global_batch}"
        )
    left_out = images % global_batch
    if left_out >= LEFT_OUT_SHARE * images:
        notes.append(
            f"each epoch leaves out {left_out} of {images} images, chosen anew: only full batches "
            f"of {global_batch} are trained on; see training.batch_size"
        )
    return notes


def draw_chart(run: Path, print0: Callable[[str], None]) -> None:
    """Draw the run's chart. Failures become a note: the model is already saved."""
    from matryoshka.report import plot_run  # matplotlib: 1 s

    try:
        plot_run(run, run / "accuracy.png")
    except Exception as error:
        print0(f"note     no chart of this run: {error}")


if __name__ == "__main__":
    raise SystemExit(main())
