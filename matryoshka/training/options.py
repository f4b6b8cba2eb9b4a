"""Options of train_imagenet.py and the checks that run before any process starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

from matryoshka import config, distributed
from matryoshka.checkpoint.transfer import check_start
from matryoshka.data import open_dataset
from matryoshka.distributed import DEVICES, PRECISIONS, DistConfig
from matryoshka.models import ModelConfig, ModelSpec, model_spec
from matryoshka.training.loaders import (
    DataConfig,
    ResolutionConfig,
    ValidationConfig,
    check_classes,
    check_crops,
    check_loader,
    resolution_at,
)
from matryoshka.training.optim import OPTIMIZERS, LrConfig


@dataclass(frozen=True)
class TrainingConfig:
    """Section `training`."""

    eval_only: bool = field(
        default=False, metadata={"help": "evaluate training.path instead of training"}
    )
    path: str | None = field(default=None, metadata={"help": "checkpoint for eval_only"})
    batch_size: int = field(
        default=512, metadata={"help": "images per process and forward pass, at most"}
    )
    accumulate: int = field(default=1, metadata={"help": "forward passes per optimizer step"})
    global_batch_size: int = field(
        default=0,
        metadata={"help": "images per optimizer step; 0: batch_size x processes x accumulate"},
    )
    optimizer: str = field(default="sgd", metadata={"help": "optimizer", "choices": OPTIMIZERS})
    momentum: float = field(default=0.9, metadata={"help": "of SGD, LARS and Muon; beta1 of AdamW"})
    weight_decay: float = field(default=4e-5, metadata={"help": "of all but norm layers"})
    bn_wd: float = field(
        default=0.0, metadata={"help": "weight decay of norm layers, found by their type"}
    )
    clip: float = field(
        default=0.0, metadata={"help": "largest norm of the gradients of a step; 0: any"}
    )
    ema: float = field(
        default=0.0,
        metadata={"help": "decay of an average of the weights, evaluated, too; 0: none"},
    )
    sync_bn: bool = field(
        default=False, metadata={"help": "batch norm over all processes (GPUs only)"}
    )
    epochs: int = field(default=30, metadata={"help": "passes over the training set"})
    label_smoothing: float = field(default=0.1, metadata={"help": "of the cross-entropy"})
    distributed: bool | None = field(
        default=None,
        metadata={
            "help": "1: start the processes of section dist; under torchrun 1 is implied, 0 an "
            "error"
        },
    )
    use_blurpool: bool = field(
        default=False, metadata={"help": "anti-aliased strided convolutions"}
    )
    seed: int = field(
        default=0, metadata={"help": "of weights, sample order, crops and augmentations"}
    )
    deterministic: bool = field(
        default=False,
        metadata={"help": "the same weights in every run, slower: no compilation, no autotuning"},
    )
    precision: str = field(
        default="auto",
        metadata={"help": "auto: bf16 or fp16 on CUDA, else fp32", "choices": PRECISIONS},
    )
    compile: bool | None = field(default=None, metadata={"help": "torch.compile; unset: on CUDA"})
    device: str = field(
        default="auto", metadata={"help": "auto: CUDA, else MPS, else CPU", "choices": DEVICES}
    )
    resume: str | None = field(
        default=None,
        metadata={
            "help": "auto: go on with logging.run_id where it stopped; or a run folder, or a "
            "checkpoint in one"
        },
    )
    checkpoint_every_steps: int = field(
        default=0,
        metadata={"help": "steps between two checkpoints; 0: only those of epochs and minutes"},
    )
    checkpoint_every_minutes: float = field(
        default=10.0, metadata={"help": "minutes between two checkpoints within an epoch; 0: none"}
    )
    keep_last: int = field(default=3, metadata={"help": "checkpoints to keep, beside the best one"})
    skip_limit: int = field(
        default=10,
        metadata={
            "help": "steps without a finite gradient in a row: then back to the last checkpoint"
        },
    )
    hang_timeout: float = field(
        default=1800.0,
        metadata={
            "help": "seconds without progress: then stacks are saved and the run ends; 0: never"
        },
    )

    def __post_init__(self) -> None:
        for name in ("momentum", "weight_decay", "bn_wd", "label_smoothing", "clip", "ema"):
            value = getattr(self, name)
            if value < 0 or (name in ("momentum", "label_smoothing", "ema") and value > 1):
                raise ValueError(f"training.{name}={value}: out of range")
        for name in ("batch_size", "accumulate", "epochs", "keep_last", "skip_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}={getattr(self, name)}: expected 1 or more")
        for name in (
            "global_batch_size",
            "seed",
            "checkpoint_every_steps",
            "checkpoint_every_minutes",
            "hang_timeout",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name}={getattr(self, name)}: expected 0 or more")
        if self.global_batch_size and self.accumulate != 1:
            raise ValueError(
                f"training.accumulate={self.accumulate} and "
                f"training.global_batch_size={self.global_batch_size}: "
                "give one, either follows from the other"
            )


@dataclass(frozen=True)
class LoggingConfig:
    """Section `logging`."""

    folder: str = field(default="trainlogs", metadata={"help": "parent of the run folder"})
    run_id: str | None = field(
        default=None,
        metadata={
            "help": "name of the run folder; unset: torchrun's run id, or time, model, 4 digits"
        },
    )
    log_level: int = field(
        default=1,
        metadata={"help": "0: evaluate once, at the end; 1: after every epoch; 2: also log steps"},
    )
    wandb: str | None = field(
        default=None,
        metadata={
            "help": "project of Weights & Biases to log to as well (WANDB_MODE=offline: a folder)"
        },
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


def global_batch_size(cfg: SimpleNamespace, processes: int, before: int | None = None) -> int:
    """Images per optimizer step. before: that of the checkpoint of a resumed run, which stays."""
    t = cfg.training
    size = before or t.global_batch_size or t.batch_size * processes * t.accumulate
    if t.global_batch_size and before and before != t.global_batch_size:
        raise config.ConfigError(
            f"training.global_batch_size={t.global_batch_size}: the resumed run has {before}; "
            "leave it out"
        )
    if size < processes:
        raise config.ConfigError(
            f"training.global_batch_size={size}: expected {processes} or more, one image for each "
            "process"
        )
    return size


def check(cfg: SimpleNamespace, processes: int) -> None:
    """Raise ConfigError for every mistake that can be found before `processes` start."""
    training, data = cfg.training, cfg.data
    if training.eval_only and training.path is None:
        raise config.ConfigError(
            "training.eval_only=1 needs training.path, the checkpoint to evaluate"
        )
    needed = [("data.val_dataset", data.val_dataset)]
    if not training.eval_only:
        needed.append(("data.train_dataset", data.train_dataset))
    for name, value in needed:
        if value is None:
            raise config.ConfigError(f"{name} is required: a .beton file or an image folder")
    if cfg.validation.batch_size < 1:
        raise config.ConfigError(
            f"validation.batch_size={cfg.validation.batch_size}: expected 1 or more"
        )
    if data.num_workers < 0:
        raise config.ConfigError(f"data.num_workers={data.num_workers}: expected 0 or more")
    check_crops(cfg)
    check_loader(cfg)
    distributed.check(training.distributed, training.device)
    device = distributed.pick_device(training.device, 0)
    distributed.pick_precision(training.precision, device)
    if training.sync_bn and device.type != "cuda":
        raise config.ConfigError(
            f"training.sync_bn=1 needs GPUs, the device is {device.type}; leave it out"
        )
    if training.deterministic and training.compile:
        raise config.ConfigError(
            "training.compile=1 and training.deterministic=1: compiled code is not; leave one out"
        )
    if training.eval_only:
        return
    if training.path is not None:
        raise config.ConfigError(
            "training.path is the checkpoint for training.eval_only=1; leave it out to train"
        )
    if (
        training.resume == "auto"
        and cfg.logging.run_id is None
        and not distributed.started_by_torchrun()
    ):
        raise config.ConfigError("training.resume=auto needs logging.run_id, the run to resume")
    train_set, val_set = open_dataset(data.train_dataset), open_dataset(data.val_dataset)
    spec = model_spec(cfg.model, train_set.num_classes, training.use_blurpool)
    if training.resume is None:  # a resumed run has its weights
        r = cfg.resolution
        ramp = range(r.start_ramp, r.end_ramp + 1)
        sizes = {resolution_at(epoch, r) for epoch in (0, r.start_ramp, *ramp, r.end_ramp)}
        sizes.add(cfg.validation.resolution)
        check_start(cfg.model, spec, train_set.classes, sizes=sorted(sizes))
    check_classes(train_set, val_set)
    check_mixing(cfg, spec)
    batch = global_batch_size(cfg, processes)
    if batch > len(train_set):
        raise config.ConfigError(
            f"training.batch_size={training.batch_size} makes global batches of {batch}, more "
            f"than the {len(train_set)} images of {train_set.path}; lower it"
        )


def check_mixing(cfg: SimpleNamespace, spec: ModelSpec) -> None:
    for name in ("mixup", "cutmix", "randaugment"):
        if getattr(cfg.data, name) < 0:
            raise config.ConfigError(
                f"data.{name}={getattr(cfg.data, name)}: expected 0 (off) or more"
            )
    if cfg.data.randaugment > 10:
        raise config.ConfigError(
            f"data.randaugment={cfg.data.randaugment}: expected 0 (off) to 10, the paper's scale"
        )
    if spec.num_classes < 2 and (cfg.data.mixup or cfg.data.cutmix):
        raise config.ConfigError(
            "data.mixup and data.cutmix mix classes, the training set has only one"
        )
