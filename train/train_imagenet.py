"""Train a nested (MRL, MRL-E) or fixed-feature model on two .beton files or image folders.

    python train_imagenet.py --config-file rn50_configs/rn50_40_epochs.yaml --model.mrl=1 \\
        --data.train_dataset=train_500_0.50_90.ffcv --data.val_dataset=val_500_uncompressed.ffcv

Several GPUs: --training.distributed=1, or torchrun. Everything of the run goes to
<logging.folder>/<run id>/; the model is model.safetensors there. A run that was stopped goes on
with --training.resume=auto. `--help` lists all options.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from matryoshka import checkpoint, config, distributed
from matryoshka.checkpoint.transfer import start_model
from matryoshka.data import Loader
from matryoshka.data.augment import mix, mixed_loss, normalise, rand_augment, step_rng
from matryoshka.distributed import World
from matryoshka.evaluation.predict import predict
from matryoshka.models import NestedModel, model_spec
from matryoshka.nested import nested_cross_entropy
from matryoshka.training.checks import check, global_batch_size
from matryoshka.training.guard import Guard, Report
from matryoshka.training.loaders import (
    make_loaders,
    resolution_at,
    training_crop,
    validation_loader,
)
from matryoshka.training.optim import lr_at, make_optimizer, parameter_groups, peak_epoch, peak_lr
from matryoshka.training.options import SECTIONS, parser
from matryoshka.training.run_folder import accuracy_keys, new_run_id
from matryoshka.training.session import FINAL, Session, begin, launch_id
from matryoshka.training.state import Ema, TrainState
from matryoshka.training.watch import Stopped


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
            evaluate_checkpoint(cfg, world) if cfg.training.eval_only else train(cfg, world)
        except Stopped as stopped:
            return stopped.exit_code
    return 0


# ---------------------------------------------------------------- the loop


def train(cfg: SimpleNamespace, world: World) -> None:
    """All of a run: from its first step, or from where it stopped."""
    t = cfg.training
    say = partial(print, flush=True) if world.is_main else lambda *_: None
    distributed.prepare(world.device, t.seed, t.deterministic)
    run_id = distributed.broadcast(
        cfg.logging.run_id or launch_id() or new_run_id(cfg.model.arch.replace(":", "-")), world
    )
    options = config.flat(cfg)
    neutral = config.neutral_options(SECTIONS)
    start = begin(Path(cfg.logging.folder), run_id, t.resume, options, world, neutral=neutral)
    if start.finished:
        say(f"finished {start.path}: this run is done; its model is {start.path / FINAL}")
        return
    before = start.saved.about["global_batch"] if start.saved else None
    train_loader, val_loader = make_loaders(cfg, world, global_batch_size(cfg, world.size, before))
    dataset = train_loader.dataset

    spec = model_spec(cfg.model, dataset.num_classes, t.use_blurpool)
    # The weights of a run that goes on come from its checkpoint.
    wanted = replace(cfg.model, init=None, pretrained=False) if start.saved else cfg.model
    model, notes = start_model(wanted, spec, dataset.classes)
    if start.saved:
        model.preprocessing = checkpoint.preprocessing_of(start.saved.about)
    model.preprocessing = replace(
        model.preprocessing, size=cfg.validation.resolution, ratio=cfg.validation.crop_ratio
    )
    model.classes = dataset.classes
    model = model.to(world.device).to(memory_format=torch.channels_last)
    if t.sync_bn:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(
            model
        )  # in place: the model itself is no batch norm
    ema = Ema(model, t.ema) if t.ema else None
    ddp = distribute(model, world)
    precision = distributed.pick_precision(t.precision, world.device)
    peak = peak_lr(cfg.lr, train_loader.batch_size)
    groups = parameter_groups(model, t.weight_decay, t.bn_wd)
    state = TrainState(
        model,
        make_optimizer(t.optimizer, groups, peak, t.momentum, world.device),
        train_loader,
        torch.amp.GradScaler(world.device.type, enabled=precision == "fp16"),
        torch.zeros(
            len(spec.dims) + 2, device=world.device
        ),  # sum of loss, of each prefix's loss, images
        checkpoint.describe(model),
        ema,
    )
    weights = cfg.model.relative_importance and torch.tensor(
        cfg.model.relative_importance, device=world.device
    )
    guard = Guard(model, world.device, t.clip)
    step_of = partial(
        train_step,
        cfg,
        world,
        ddp,
        state,
        guard,
        precision,
        partial(nested_cross_entropy, weights=weights, label_smoothing=t.label_smoothing),
    )

    steps = len(train_loader)
    say(f"run      {start.path}")
    say(
        f"data     {len(dataset):,} images, {dataset.num_classes} classes; "
        f"{len(val_loader.dataset):,} for validation"
    )
    say(f"model    {spec.arch}, {spec.head_name}, dims {list(spec.dims)}")
    say(
        f"device   {world.size} x {world.device.type}, "
        f"{precision}{compile_model(ddp, cfg, world.device)}"
    )
    say(
        f"steps    {t.epochs} epochs x {steps} steps of {train_loader.batch_size} images, peak "
        f"lr {peak:.4g}"
    )
    for note in (*start.notes, *notes, *notes_on(cfg)):
        say(f"note     {note}")

    with Session(
        state,
        guard,
        world,
        start,
        options,
        config.to_yaml(cfg),
        say=say,
        global_batch=train_loader.batch_size,
        keep_last=t.keep_last,
        every_steps=t.checkpoint_every_steps,
        every_minutes=t.checkpoint_every_minutes,
        skip_limit=t.skip_limit,
        hang_timeout=t.hang_timeout,
        wandb=cfg.logging.wandb,
    ) as session:
        if start.saved:
            say(f"go on    after step {session.progress.step}, epoch {session.progress.epoch}")
        while session.progress.epoch < t.epochs:
            with session.rollback():
                measured = train_epoch(cfg, session, state, step_of, peak)
                end_epoch(cfg, session, state, val_loader, precision, world, measured, say)
        if world.is_main:
            session.snapshots.wait()
            checkpoint.save_upstream(model, start.path / "final_weights.pt")
            if ema is not None:
                checkpoint.save_model(ema.module, start.path / "model_ema.safetensors", options)  # type: ignore[arg-type]
            checkpoint.save_model(
                model, start.path / FINAL, options
            )  # last: it says that the run is finished
            draw(start.path, say)
            say(f"model    {start.path / FINAL}")


def train_epoch(
    cfg, session: Session, state: TrainState[NestedModel], step_of, peak: float
) -> dict[str, float]:
    """The steps that are left of the epoch: seconds, of them waiting for data (wait), last lr,
    median norm.
    """
    loader, epoch, steps = state.loader, session.progress.epoch, len(state.loader)
    loader.image = training_crop(cfg, resolution_at(epoch, cfg.resolution))
    loader.load_state_dict(
        loader.state_dict() | {"epoch": epoch, "batch": session.progress.step - epoch * steps}
    )
    state.model.train()
    started, waited, norms = time.perf_counter(), loader.wait, []
    lr = session.rate * lr_at(session.progress.step / steps, cfg.lr, peak, cfg.training.epochs)
    with contextlib.closing(progress_bar(loader, session, cfg)) as bar:
        for batch in bar:
            lr = session.rate * lr_at(
                session.progress.step / steps, cfg.lr, peak, cfg.training.epochs
            )
            loss, norm, skip = step_of(batch, lr)
            reports = session.after_step(loss, norm, skip)
            norms += [report.norm for report in reports]
            report_steps(
                bar, session, cfg, reports, lr, loader.wait - waited, time.perf_counter() - started
            )
    norm = statistics.median(norms or [0.0])
    return {
        "seconds": time.perf_counter() - started,
        "wait": loader.wait - waited,
        "lr": lr,
        "norm": norm,
    }


def train_step(
    cfg,
    world: World,
    ddp,
    state: TrainState[NestedModel],
    guard: Guard,
    precision: str,
    loss_of,
    batch,
    lr: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step on this rank's share of a global batch; 0-d (mean loss, gradient norm,
    whether skipped).

    DDP averages gradients over ranks; weighting the local mean by its share makes that the gradient
    of the mean over the whole batch, also where the shares are uneven. Images that
    data.on_error=skip left out count with a gradient of zero: the others keep their weight, and no
    rank needs to know what the other ranks lost.
    """
    data, t, step, scale = cfg.data, cfg.training, state.progress.step, state.model.preprocessing
    rng = step_rng(t.seed, step, world.rank)
    torch.manual_seed(
        int(rng.integers(2**62))
    )  # dropout and the like: a function of the step, also after a restart
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros_like(state.totals)
    n, size = len(batch.labels), t.batch_size
    for first in range(0, n, size):
        images, labels = batch.images[first : first + size], batch.labels[first : first + size]
        if data.randaugment:
            images = rand_augment(images, data.randaugment, rng)
        mixed = mix(normalise(images, scale.mean, scale.std), labels, data.mixup, data.cutmix, rng)
        last = first + size >= n
        with contextlib.nullcontext() if last or world.size == 1 else ddp.no_sync():
            with distributed.autocast(images.device, precision):
                logits = ddp(mixed.images)
            loss, per_prefix = mixed_loss(loss_of, logits.float(), mixed)
            share_of_batch = (
                len(labels) * world.size / state.loader.batch_size
            )  # drop_last: every global batch is full
            state.scaler.scale(loss * share_of_batch).backward()
        sums += torch.cat([loss.detach()[None], per_prefix, sums.new_ones(1)]) * len(labels)

    state.scaler.unscale_(state.optimizer)
    norm, skip = guard.before_step()
    if state.scaler.is_enabled():
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        guard.step(state.optimizer, skip)
    if state.ema is not None:
        state.ema.update(step)
    state.totals += torch.where(skip, torch.zeros_like(sums), sums)
    return sums[0] / n, norm, skip


def end_epoch(
    cfg,
    session: Session,
    state: TrainState[NestedModel],
    val_loader,
    precision,
    world,
    measured,
    say,
) -> None:
    """Evaluate, tell and log an epoch; its checkpoint."""
    epoch, dims = session.progress.epoch, state.model.dims
    *losses, images = session.end_epoch()
    mean_loss, *prefix_losses = (value / max(images, 1) for value in losses)
    seconds, lr = measured["seconds"], measured["lr"]
    values, accuracy, averaged = {"current_lr": lr}, {}, {}
    if cfg.logging.log_level > 0 or epoch == cfg.training.epochs - 1:
        tta, watched = cfg.validation.lr_tta, session.watched
        accuracy, val_time = validate(state.model, val_loader, precision, tta, world, watched)
        values |= {"val_time": val_time, **accuracy_keys(accuracy)}
        if state.ema is not None:
            averaged, _ = validate(state.ema.module, val_loader, precision, tta, world, watched)
            values |= {f"ema_{key}": value for key, value in accuracy_keys(averaged).items()}
    shown = "  ".join(f"{d}: {a['top1']:.1f}" for d, a in accuracy.items()) or "not evaluated"
    shown += "".join(f"  (average {a['top1']:.1f})" for d, a in averaged.items() if d == dims[-1])
    speed = {"images_per_s": images / seconds, "data_wait": measured["wait"] / seconds}
    say(
        f"epoch {epoch:3d}  loss {mean_loss:.3f}  lr {lr:.3g}  {speed['images_per_s']:.0f} "
        "images/s  "
        f"wait {100 * speed['data_wait']:.0f} %  top-1 {shown}"
    )
    skipped = distributed.gather(state.loader.skipped, world) if cfg.data.on_error == "skip" else []
    state.loader.skipped.clear()
    if session.log:
        session.log.event(values | {"train_loss": mean_loss, "epoch": epoch} | speed)
        scalars = {"loss": mean_loss, "lr": lr, "gradient_norm": measured["norm"], **speed}
        scalars |= {f"loss/{d}": value for d, value in zip(dims, prefix_losses, strict=True)}
        scalars |= {f"top_1/{d}": a["top1"] for d, a in accuracy.items()}
        scalars |= {f"ema_top_1/{d}": a["top1"] for d, a in averaged.items()}
        session.log.scalars(scalars, session.progress.step)
        for one in sorted(skipped):
            session.log.skipped({"epoch": epoch} | one._asdict())
    if skipped:
        say(f"note     {len(skipped)} images were left out of this epoch, see skipped.jsonl")
    session.epoch_is_done(accuracy[dims[-1]]["top1"] if accuracy else None)


def validate(
    model: NestedModel, loader: Loader, precision: str, tta: bool, world: World, watched=iter
) -> tuple[dict, float]:
    """({dim: {top1, top5}} over all ranks' shares, seconds)."""
    from matryoshka.evaluation.metrics import (
        PrefixAccuracy,  # torchmetrics takes seconds to import: not before it is needed
    )

    started = time.perf_counter()
    distributed.share_buffers(model, world)  # all shards are judged by the model that rank 0 saves
    metric = PrefixAccuracy(model.dims).to(world.device)
    for prediction in watched(predict(model, loader, precision, tta)):
        metric.update(prediction.logits, prediction.labels)
    return metric.compute(), time.perf_counter() - started


def evaluate_checkpoint(cfg: SimpleNamespace, world: World) -> None:
    """training.eval_only: the accuracy of every prefix of training.path on data.val_dataset."""
    model = (
        checkpoint.load_model(cfg.training.path)
        .to(world.device)
        .to(memory_format=torch.channels_last)
    )
    loader = validation_loader(cfg, world)
    model.check_classes(loader.dataset)
    precision = distributed.pick_precision(cfg.training.precision, world.device)
    accuracy, seconds = validate(model, loader, precision, cfg.validation.lr_tta, world)
    if world.is_main:
        for dim, values in accuracy.items():
            print(f"{dim:6d}  top-1 {values['top1']:6.2f}  top-5 {values['top5']:6.2f}")
        print(f"{len(loader.dataset):,} images in {seconds:.1f} s")


# ---------------------------------------------------------------- parts of it


def distribute(model: NestedModel, world: World) -> torch.nn.Module:
    """DDP where there is more than one process."""
    if world.size == 1:
        return model
    return DistributedDataParallel(
        model, device_ids=[world.device] if world.device.type == "cuda" else None
    )


def compile_model(ddp: torch.nn.Module, cfg, device: torch.device) -> str:
    """torch.compile of the forward and backward pass, where it is wanted and works; what to say of
    it.
    """
    t = cfg.training
    wanted = device.type == "cuda" and not t.deterministic if t.compile is None else t.compile
    if not wanted:
        return ""
    if reason := distributed.why_not_compile(device):
        return f", not compiled ({reason})"
    ddp.compile()
    return ", compiled"


def draw(run: Path, say) -> None:
    """The chart of a run that is safe already: whatever goes wrong is said, no more."""
    from matryoshka.report.tables import plot_run  # matplotlib: 1 s

    try:
        plot_run(run, run / "accuracy.png")
    except Exception as error:
        say(f"note     no chart of this run: {error}")


def notes_on(cfg) -> list[str]:
    turn, name = peak_epoch(cfg.lr, cfg.training.epochs), "warmup_epochs"
    if cfg.lr.lr_schedule_type == "cyclic":
        name = "lr_peak_epoch"
    if turn != getattr(cfg.lr, name):
        return [
            f"lr.{name}={getattr(cfg.lr, name)} is beyond these {cfg.training.epochs} epochs: "
            f"peak at {turn}"
        ]
    return []


def progress_bar(loader: Loader, session: Session, cfg):
    """A bar on a terminal; elsewhere the plain loader (a line per epoch is printed anyway)."""
    shown = session.log is not None and sys.stderr.isatty()
    first = session.progress.step - session.progress.epoch * len(loader)
    return tqdm(
        loader,
        desc=f"epoch {session.progress.epoch}",
        total=len(loader),
        initial=first,
        leave=False,
        disable=not shown,
        unit="step",
    )


def report_steps(
    bar, session: Session, cfg, reports: list[Report], lr: float, waited: float, seconds: float
) -> None:
    """On a terminal: the bar. log_level 2: TensorBoard, and a line per step where there is no
    terminal.
    """
    if session.log is None:
        return
    wait = waited / seconds
    for step, loss, norm, _ in reports:
        if not bar.disable and step % 10 == 0:
            bar.set_postfix(
                loss=f"{loss:.3f}", lr=f"{lr:.3g}", wait=f"{100 * wait:.0f}%", refresh=False
            )
        if cfg.logging.log_level > 1:
            values = {
                "step/loss": loss,
                "step/lr": lr,
                "step/gradient_norm": norm,
                "step/data_wait": wait,
            }
            session.log.scalars(values, step)
            if bar.disable:
                print(
                    f"step {step}  loss {loss:.3f}  lr {lr:.3g}  norm {norm:.3g}  wait "
                    f"{100 * wait:.0f} %",
                    flush=True,
                )


if __name__ == "__main__":
    raise SystemExit(main())
