"""Train a nested (MRL, MRL-E) or fixed-feature model on two .beton files or image folders.

    python train_imagenet.py --config-file rn50_configs/rn50_40_epochs.yaml --model.mrl=1 \\
        --data.train_dataset=train_500_0.50_90.ffcv --data.val_dataset=val_500_uncompressed.ffcv

Several GPUs: --training.distributed=1, or torchrun. Everything of the run goes to
<logging.folder>/<run id>/; the model is model.safetensors there. `--help` lists all options.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from matryoshka.train.imagenet_data import (  # pyright: ignore[reportMissingImports] (folder train, installed)
    DataConfig,
    ResolutionConfig,
    ValidationConfig,
    check_classes,
    check_crops,
    check_loader,
    make_loaders,
    resolution_at,
    training_crop,
    validation_loader,
)
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from matryoshka import checkpoint, config, distributed
from matryoshka.data import Loader, open_dataset
from matryoshka.data.augment import Preprocessing, normalise
from matryoshka.distributed import DEVICES, PRECISIONS, DistConfig, World
from matryoshka.log import RunExists, RunLog, accuracy_keys, new_run_id
from matryoshka.models import ModelConfig, NestedModel, build, model_spec
from matryoshka.nested import nested_cross_entropy
from matryoshka.optim import LrConfig, lr_at, parameter_groups, peak_epoch, peak_lr
from matryoshka.predict import predict

# ---------------------------------------------------------------- options


@dataclass(frozen=True)
class TrainingConfig:
    """Section `training`."""

    eval_only: bool = field(default=False, metadata={"help": "evaluate training.path instead of training"})
    path: str | None = field(default=None, metadata={"help": "checkpoint for eval_only"})
    batch_size: int = field(default=512, metadata={"help": "images per process and step"})
    optimizer: str = field(default="sgd", metadata={"help": "optimizer", "choices": ("sgd",)})
    momentum: float = field(default=0.9, metadata={"help": "of SGD"})
    weight_decay: float = field(default=4e-5, metadata={"help": "of all but norm layers"})
    bn_wd: float = field(default=0.0, metadata={"help": "weight decay of norm layers, found by their type"})
    epochs: int = field(default=30, metadata={"help": "passes over the training set"})
    label_smoothing: float = field(default=0.1, metadata={"help": "of the cross-entropy"})
    distributed: bool | None = field(
        default=None,
        metadata={"help": "1: start the processes of section dist; under torchrun 1 is implied, 0 an error"},
    )
    use_blurpool: bool = field(default=False, metadata={"help": "anti-aliased strided convolutions"})
    seed: int = field(default=0, metadata={"help": "of weights, sample order and crops"})
    precision: str = field(
        default="auto", metadata={"help": "auto: bf16 or fp16 on CUDA, else fp32", "choices": PRECISIONS}
    )
    device: str = field(default="auto", metadata={"help": "auto: CUDA, else MPS, else CPU", "choices": DEVICES})

    def __post_init__(self) -> None:
        for name in ("momentum", "weight_decay", "bn_wd", "label_smoothing"):
            value = getattr(self, name)
            if value < 0 or (name in ("momentum", "label_smoothing") and value > 1):
                raise ValueError(f"training.{name}={value}: out of range")


@dataclass(frozen=True)
class LoggingConfig:
    """Section `logging`."""

    folder: str = field(default="trainlogs", metadata={"help": "parent of the run folder"})
    run_id: str | None = field(default=None, metadata={"help": "name of the run folder; unset: time, model, 4 digits"})
    log_level: int = field(
        default=1, metadata={"help": "0: evaluate once, at the end; 1: after every epoch; 2: also log steps"}
    )


SECTIONS = {
    "model": ModelConfig,
    "resolution": ResolutionConfig,
    "data": DataConfig,
    "lr": LrConfig,
    "logging": LoggingConfig,
    "validation": ValidationConfig,
    "training": TrainingConfig,
    "dist": DistConfig,
}


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    cfg = config.read(SECTIONS, argv, prog="train_imagenet.py", description=(__doc__ or "").split("\n", 1)[0])
    processes = distributed.processes_to_start(cfg.dist, cfg.training.distributed, cfg.training.device)
    check(cfg, processes)
    if processes > 1:
        return distributed.launch(processes, cfg.dist, str(Path(__file__).resolve()), argv)
    with distributed.joined(cfg.training.device) as world:
        if cfg.training.eval_only:
            evaluate_checkpoint(cfg, world)
        else:
            train(cfg, world)
    return 0


def check(cfg: SimpleNamespace, processes: int) -> None:
    """Whatever can be found out before `processes` are started, so that a mistake is one line."""
    training, data = cfg.training, cfg.data
    if training.eval_only and training.path is None:
        raise config.ConfigError("training.eval_only=1 needs training.path, the checkpoint to evaluate")
    needed = [("data.val_dataset", data.val_dataset)]
    if not training.eval_only:
        needed.append(("data.train_dataset", data.train_dataset))
    for name, value in needed:
        if value is None:
            raise config.ConfigError(f"{name} is required: a .beton file or an image folder")
    for name, value in (("training.batch_size", training.batch_size), ("training.epochs", training.epochs),
                        ("validation.batch_size", cfg.validation.batch_size)):  # fmt: skip
        if value < 1:
            raise config.ConfigError(f"{name}={value}: expected 1 or more")
    for name, value in (("data.num_workers", data.num_workers), ("training.seed", training.seed)):
        if value < 0:
            raise config.ConfigError(f"{name}={value}: expected 0 or more")
    check_crops(cfg)
    check_loader(cfg)
    distributed.check(training.distributed, training.device)
    distributed.pick_precision(training.precision, distributed.pick_device(training.device, 0))
    if not training.eval_only:
        if training.path is not None:
            raise config.ConfigError("training.path is the checkpoint for training.eval_only=1; leave it out to train")
        train_set, val_set = open_dataset(data.train_dataset), open_dataset(data.val_dataset)
        model_spec(cfg.model, train_set.num_classes)
        check_classes(train_set, val_set)
        run = Path(cfg.logging.folder) / cfg.logging.run_id if cfg.logging.run_id else None
        if run is not None and run.exists() and not distributed.started_by_torchrun():
            raise RunExists(run)
        batch = training.batch_size * processes
        if batch > len(train_set):
            raise config.ConfigError(
                f"training.batch_size={training.batch_size} x {processes} processes is more than the {len(train_set)} "
                f"images of {train_set.path}; lower it"
            )


# ---------------------------------------------------------------- the loop


def train(cfg: SimpleNamespace, world: World) -> None:
    torch.manual_seed(cfg.training.seed)
    train_loader, val_loader = make_loaders(cfg, world)
    dataset = train_loader.dataset
    spec = model_spec(cfg.model, dataset.num_classes, cfg.training.use_blurpool)
    model = build(spec, "IMAGENET1K_V1" if cfg.model.pretrained else None)
    model.preprocessing = Preprocessing(cfg.validation.resolution, cfg.validation.crop_ratio)
    model.classes = dataset.classes
    model = model.to(world.device).to(memory_format=torch.channels_last)
    ddp = distribute(model, world)

    precision = distributed.pick_precision(cfg.training.precision, world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    peak = peak_lr(cfg.lr, train_loader.batch_size)
    optimizer = torch.optim.SGD(
        parameter_groups(model, cfg.training.weight_decay, cfg.training.bn_wd),
        lr=peak,
        momentum=cfg.training.momentum,
    )
    weights = cfg.model.relative_importance and torch.tensor(cfg.model.relative_importance, device=world.device)
    loss_of = partial(nested_cross_entropy, weights=weights, label_smoothing=cfg.training.label_smoothing)

    run_id = distributed.broadcast(cfg.logging.run_id or new_run_id(f"{spec.arch}-{spec.head_name}"), world)
    log = RunLog(cfg.logging.folder, run_id, config.flat(cfg), config.to_yaml(cfg)) if world.is_main else None
    say = partial(print, flush=True) if world.is_main else lambda *_: None
    say(f"run      {Path(cfg.logging.folder) / run_id}")
    say(f"data     {len(dataset):,} images, {dataset.num_classes} classes; {len(val_loader.dataset):,} for validation")
    say(f"model    {spec.arch}, {spec.head_name}, dims {list(spec.dims)}")
    say(f"device   {world.size} x {world.device.type}, {precision}")
    epochs, steps = cfg.training.epochs, len(train_loader)
    say(f"steps    {epochs} epochs x {steps} steps of {train_loader.batch_size} images, peak lr {peak:.4g}")
    turn = peak_epoch(cfg.lr, epochs)
    if cfg.lr.lr_schedule_type == "cyclic" and turn != cfg.lr.lr_peak_epoch:
        say(f"note     lr.lr_peak_epoch={cfg.lr.lr_peak_epoch} is beyond these {epochs} epochs: peak at epoch {turn}")

    for epoch in range(epochs):
        train_loader.image = training_crop(cfg, resolution_at(epoch, cfg.resolution))
        started, waited = time.perf_counter(), train_loader.wait
        total = torch.zeros(len(spec.dims) + 2, device=world.device)  # sum of loss, of each prefix's loss, images

        ddp.train()
        for step, batch in enumerate(bar := progress(train_loader, epoch, cfg, world)):
            lr = lr_at(epoch + step / steps, cfg.lr, peak, epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            global_size = train_loader.batch_size  # drop_last: every global batch is full
            loss, per_prefix = train_step(ddp, batch, optimizer, scaler, loss_of, precision, global_size, world)
            n = len(batch.labels)
            total += torch.cat([loss[None] * n, per_prefix * n, total.new_full((1,), n)])
            report_step(bar, log, cfg, epoch * steps + step, loss, lr, train_loader.wait - waited, started)

        seconds = time.perf_counter() - started
        waited = train_loader.wait - waited
        *losses, images = distributed.sum_over_ranks(total, world).tolist()
        mean_loss, *prefix_losses = (value / images for value in losses)
        if not math.isfinite(mean_loss):
            raise config.ConfigError(
                f"epoch {epoch}: the loss is {mean_loss}; lower lr.lr or lr.lr_per_256, or use bf16"
            )
        last = epoch == epochs - 1
        values, accuracy = {"current_lr": lr}, {}
        if cfg.logging.log_level > 0 or last:
            accuracy, val_time = validate(model, val_loader, precision, cfg.validation.lr_tta, world)
            values |= {"val_time": val_time, **accuracy_keys(accuracy)}
        shown = "  ".join(f"{d}: {a['top1']:.1f}" for d, a in accuracy.items()) or "not evaluated"
        speed = {"images_per_s": images / seconds, "data_wait": waited / seconds}
        say(f"epoch {epoch:3d}  loss {mean_loss:.3f}  lr {lr:.3g}  {speed['images_per_s']:.0f} images/s  "
            f"wait {100 * speed['data_wait']:.0f} %  top-1 {shown}")  # fmt: skip
        if log:
            log.event(values | {"train_loss": mean_loss, "epoch": epoch} | speed)
            done = (epoch + 1) * steps
            per_prefix_loss = {f"loss/{d}": value for d, value in zip(spec.dims, prefix_losses, strict=True)}
            top1 = {f"top_1/{d}": a["top1"] for d, a in accuracy.items()}
            log.scalars({"loss": mean_loss, "lr": lr} | per_prefix_loss | top1 | speed, done)
        if cfg.data.on_error == "skip":
            skipped = list_skipped(train_loader, epoch, log, world)
            if skipped:
                say(f"note     {skipped} images were left out of this epoch, see skipped.jsonl")

    if log:
        checkpoint.save_upstream(model, log.path / "final_weights.pt")
        checkpoint.save_model(model, log.path / "model.safetensors", config.flat(cfg))
        log.close()
        say(f"model    {log.path / 'model.safetensors'}")


def train_step(ddp, batch, optimizer, scaler, loss_of, precision, global_size: int, world: World):
    """One optimizer step on this rank's share of a global batch; (loss, loss per prefix [G]), detached.

    DDP averages gradients over ranks; weighting the local mean by its share makes that the gradient of the mean
    over the whole batch, also where the shares are uneven. Images that data.on_error=skip left out count with a
    gradient of zero: the others keep their weight, and no rank needs to know what the other ranks lost.
    """
    images = normalise(batch.images)
    optimizer.zero_grad(set_to_none=True)
    with distributed.autocast(images.device, precision):
        logits = ddp(images)
    loss, per_prefix = loss_of(logits.float(), batch.labels)
    scaler.scale(loss * (len(batch.labels) * world.size / global_size)).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), per_prefix


def validate(model: NestedModel, loader: Loader, precision: str, tta: bool, world: World) -> tuple[dict, float]:
    """({dim: {top1, top5}} over all ranks' shares, seconds)."""
    from matryoshka.metrics import PrefixAccuracy  # torchmetrics takes seconds to import: not before it is needed

    started = time.perf_counter()
    distributed.share_buffers(model, world)  # all shards are judged by the model that rank 0 saves
    metric = PrefixAccuracy(model.dims).to(world.device)
    for prediction in predict(model, loader, precision, tta):
        metric.update(prediction.logits, prediction.labels)
    return metric.compute(), time.perf_counter() - started


def evaluate_checkpoint(cfg: SimpleNamespace, world: World) -> None:
    """training.eval_only: the accuracy of every prefix of training.path on data.val_dataset."""
    model = checkpoint.load_model(cfg.training.path).to(world.device).to(memory_format=torch.channels_last)
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
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)


def progress(loader: Loader, epoch: int, cfg: SimpleNamespace, world: World):
    """A bar on a terminal; elsewhere the plain loader (a line per epoch is printed anyway)."""
    shown = world.is_main and sys.stderr.isatty()
    return tqdm(loader, desc=f"epoch {epoch}", total=len(loader), leave=False, disable=not shown, unit="step")


def list_skipped(loader: Loader, epoch: int, log: RunLog | None, world: World) -> int:
    """Append what an epoch left out, on all ranks, to the run's skipped.jsonl; how many images that were."""
    skipped = sorted(distributed.gather(loader.skipped, world))
    loader.skipped.clear()
    if log and skipped:
        with open(log.path / "skipped.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"epoch": epoch} | s._asdict()) + "\n" for s in skipped)
    return len(skipped)


def report_step(bar, log, cfg, step: int, loss, lr: float, waited: float, started: float) -> None:
    """On a terminal: the bar. log_level 2: TensorBoard, and a line per step where there is no terminal.

    Reading the loss waits for the device: without log_level 2 only every tenth step does.
    """
    every_step = cfg.logging.log_level > 1
    if log is None or not (every_step or (not bar.disable and step % 10 == 0)):
        return
    seconds = time.perf_counter() - started
    value, wait = loss.item(), waited / seconds
    if not bar.disable:
        bar.set_postfix(loss=f"{value:.3f}", lr=f"{lr:.3g}", wait=f"{100 * wait:.0f}%", refresh=False)
    if every_step:
        log.scalars({"step/loss": value, "step/lr": lr, "step/data_wait": wait}, step)
        if bar.disable:
            rate = cfg.training.batch_size * (step % len(bar) + 1) / seconds
            print(
                f"step {step}  loss {value:.3f}  lr {lr:.3g}  {rate:.0f} images/s  wait {100 * wait:.0f} %",
                flush=True,
            )


if __name__ == "__main__":
    raise SystemExit(main())
