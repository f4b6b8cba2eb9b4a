"""Loaders of an ImageNet-style training run, from its options."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import cast

import numpy as np

from matryoshka.config import ConfigError
from matryoshka.data import CenterCrop, Loader, RandomResizedCrop, ResidentLoader
from matryoshka.distributed import World
from matryoshka.environment import available_cores
from matryoshka.training.options import DataConfig, ResolutionConfig


def make_loaders(cfg: SimpleNamespace, world: World, global_batch: int) -> tuple[Loader, Loader]:
    """The training loader (only full global batches) and the validation loader."""
    native = (
        {}
        if cfg.data.loader == "ffcv"
        else {"window_pages": cfg.data.window_pages, "on_error": cfg.data.on_error}
    )
    train_loader = loader_class(cfg)(
        cfg.data.train_dataset,
        global_batch,
        order=training_order(cfg, world),
        image=training_crop(cfg, resolution_at(0, cfg.resolution)),
        drop_last=True,
        seed=cfg.training.seed,
        **native,
        **loader_place(cfg, world),
    )
    if cfg.data.in_memory and not cfg.data.resident:
        train_loader.dataset.preload()
    return train_loader, validation_loader(cfg, world)


def validation_loader(cfg: SimpleNamespace, world: World) -> Loader:
    """Every image of the validation set once, over all ranks; one that cannot be decoded is always
    an error.
    """
    return loader_class(cfg)(
        cfg.data.val_dataset,
        cfg.validation.batch_size * world.size,
        order="sequential",
        image=CenterCrop(cfg.validation.resolution, cfg.validation.crop_ratio),
        **loader_place(cfg, world),
    )


def loader_class(cfg: SimpleNamespace) -> type[Loader]:
    """Loader, or what has its interface: data.loader, data.resident."""
    if cfg.data.loader == "native":
        return ResidentLoader if cfg.data.resident else Loader
    from matryoshka.data.ffcv_backend import FFCVLoader

    return cast(type[Loader], FFCVLoader)


def training_order(cfg: SimpleNamespace, world: World) -> str:
    """data.order without auto."""
    if cfg.data.order != "auto":
        return cfg.data.order
    no_pages = cfg.data.in_memory or os.path.isdir(cfg.data.train_dataset)
    if no_pages or (
        cfg.data.loader == "ffcv" and world.size > 1
    ):  # FFCV has quasi_random for one process alone
        return "random"
    return "quasi_random"


def loader_place(cfg: SimpleNamespace, world: World) -> dict:
    threads = cfg.data.num_workers or max(1, available_cores() // world.local_size)
    ranks = {"rank": world.rank, "world": world.size}
    return {
        "num_workers": threads,
        "device": world.device,
        "in_memory": cfg.data.in_memory,
        **ranks,
    }


def training_crop(cfg: SimpleNamespace, resolution: int) -> RandomResizedCrop:
    return RandomResizedCrop(resolution, cfg.data.scale, cfg.data.ratio, cfg.data.flip)


def resolution_at(epoch: int, c: ResolutionConfig) -> int:
    """Pixels of an epoch: min_res, then linear between the ramp's ends in multiples of 32, then
    max_res.
    """
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


def check_loader(cfg: SimpleNamespace) -> None:
    """An error for data.loader, data.order and what belongs to them, where they cannot work."""
    data = cfg.data
    if (
        data.order == "quasi_random"
        and data.train_dataset is not None
        and os.path.isdir(data.train_dataset)
    ):
        raise ConfigError(
            f"data.order=quasi_random needs the pages of a .beton file, {data.train_dataset} is "
            "a folder; "
            "write a .beton of it, or take data.order=random"
        )
    if data.loader == "ffcv":
        from matryoshka.data.ffcv_backend import check_installed

        for name in ("resident", "window_pages", "on_error"):
            if getattr(data, name) != getattr(DataConfig, name):
                raise ConfigError(
                    f"data.{name}={getattr(data, name)} is for data.loader=native, FFCV does not "
                    "have it"
                )
        check_installed("data.loader=ffcv")
        for name in ("train_dataset", "val_dataset"):
            path = getattr(data, name)
            if path is not None and os.path.isdir(path):
                raise ConfigError(
                    f"data.{name}={path}: is a folder, which data.loader=ffcv cannot read; "
                    "write a .beton of it, or take data.loader=native"
                )


def check_classes(train_set, val_set) -> None:
    """The two sets must agree on what a label means. ConfigError names both."""
    if train_set.classes and val_set.classes and train_set.classes != val_set.classes:
        raise ConfigError(
            f"{val_set.path}: its {val_set.num_classes} classes are not the "
            f"{train_set.num_classes} of "
            f"{train_set.path}; write both from folders with the same class folders"
        )
    if val_set.num_classes > train_set.num_classes:
        raise ConfigError(
            f"{val_set.path}: has {val_set.num_classes} classes, {train_set.path} only "
            f"{train_set.num_classes}"
        )
