"""Options and loaders of an ImageNet-style training run: what train_imagenet.py reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from matryoshka.config import ConfigError
from matryoshka.data import CenterCrop, Loader, RandomResizedCrop
from matryoshka.data.loader import available_cores
from matryoshka.distributed import World


@dataclass(frozen=True)
class ResolutionConfig:
    """Section `resolution`: training images grow from min_res to max_res between two epochs."""

    min_res: int = field(default=160, metadata={"help": "pixels up to start_ramp"})
    max_res: int = field(default=160, metadata={"help": "pixels from end_ramp on"})
    start_ramp: int = field(default=0, metadata={"help": "epoch"})
    end_ramp: int = field(default=0, metadata={"help": "epoch"})


@dataclass(frozen=True)
class DataConfig:
    """Section `data`."""

    train_dataset: str | None = field(default=None, metadata={"help": ".beton/.ffcv file or image folder"})
    val_dataset: str | None = field(default=None, metadata={"help": ".beton/.ffcv file or image folder"})
    num_workers: int = field(default=0, metadata={"help": "decoding threads per process; 0: all cores, shared fairly"})
    in_memory: bool = field(default=True, metadata={"help": "read the training file into the page cache first"})
    flip: float = field(default=0.5, metadata={"help": "probability of a horizontal flip"})
    scale: tuple[float, float] = field(
        default=(0.08, 1.0), metadata={"help": "crop area, share of the image: low,high"}
    )
    ratio: tuple[float, float] = field(default=(3 / 4, 4 / 3), metadata={"help": "crop aspect ratio: low,high"})


@dataclass(frozen=True)
class ValidationConfig:
    """Section `validation`."""

    batch_size: int = field(default=512, metadata={"help": "images per process"})
    resolution: int = field(default=224, metadata={"help": "pixels of the central crop"})
    crop_ratio: float = field(default=224 / 256, metadata={"help": "side of the crop / shorter side of the image"})
    lr_tta: bool = field(default=True, metadata={"help": "add the logits of the mirror image"})


def make_loaders(cfg: SimpleNamespace, world: World) -> tuple[Loader, Loader]:
    train_loader = Loader(
        cfg.data.train_dataset,
        cfg.training.batch_size * world.size,
        order="random",
        image=training_crop(cfg, resolution_at(0, cfg.resolution)),
        drop_last=True,
        seed=cfg.training.seed,
        **loader_place(cfg, world),
    )
    if cfg.data.in_memory:
        train_loader.dataset.preload()
    return train_loader, validation_loader(cfg, world)


def validation_loader(cfg: SimpleNamespace, world: World) -> Loader:
    return Loader(
        cfg.data.val_dataset,
        cfg.validation.batch_size * world.size,
        order="sequential",
        image=CenterCrop(cfg.validation.resolution, cfg.validation.crop_ratio),
        **loader_place(cfg, world),
    )


def loader_place(cfg: SimpleNamespace, world: World) -> dict:
    threads = cfg.data.num_workers or max(1, available_cores() // world.local_size)
    return {"num_workers": threads, "device": world.device, "rank": world.rank, "world": world.size}


def training_crop(cfg: SimpleNamespace, resolution: int) -> RandomResizedCrop:
    return RandomResizedCrop(resolution, cfg.data.scale, cfg.data.ratio, cfg.data.flip)


def resolution_at(epoch: int, c: ResolutionConfig) -> int:
    """Pixels of an epoch: min_res, then linear between the ramp's ends in multiples of 32, then max_res."""
    if epoch <= c.start_ramp:
        return c.min_res
    if epoch >= c.end_ramp:
        return c.max_res
    linear = np.interp(epoch, [c.start_ramp, c.end_ramp], [c.min_res, c.max_res])
    return int(np.round(linear / 32)) * 32


def check_crops(cfg: SimpleNamespace) -> None:
    """ConfigError for sizes, scales, ratios and probabilities that make no sense."""
    crop = "data.scale, data.ratio or data.flip"
    for options, make in (
        (f"resolution.min_res, {crop}", lambda: training_crop(cfg, cfg.resolution.min_res)),
        (f"resolution.max_res, {crop}", lambda: training_crop(cfg, cfg.resolution.max_res)),
        (
            "validation.resolution or validation.crop_ratio",
            lambda: CenterCrop(cfg.validation.resolution, cfg.validation.crop_ratio),
        ),
    ):
        try:
            make()
        except ValueError as error:
            raise ConfigError(f"{options}: {error}") from None


def check_classes(train_set, val_set) -> None:
    """The two sets must agree on what a label means. ConfigError names both."""
    if train_set.classes and val_set.classes and train_set.classes != val_set.classes:
        raise ConfigError(
            f"{val_set.path}: its {val_set.num_classes} classes are not the {train_set.num_classes} of "
            f"{train_set.path}; write both from folders with the same class folders"
        )
    if val_set.num_classes > train_set.num_classes:
        raise ConfigError(
            f"{val_set.path}: has {val_set.num_classes} classes, {train_set.path} only {train_set.num_classes}"
        )
