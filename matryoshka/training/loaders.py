"""Loaders of an ImageNet-style training run, from its options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from matryoshka.config import ConfigError
from matryoshka.data import (
    CenterCrop,
    Loader,
    PadCrop,
    RandomResizedCrop,
    ResidentLoader,
    open_dataset,
)
from matryoshka.data.crops import Crop, as_crop
from matryoshka.data.dataset import Dataset
from matryoshka.data.resident import NotResidentError, suits_residence
from matryoshka.distributed import World
from matryoshka.environment import available_cores
from matryoshka.training.options import DataConfig, ResolutionConfig


def make_loaders(
    cfg: SimpleNamespace,
    world: World,
    global_batch: int,
    *,
    datasets: tuple[Dataset, Dataset] | None = None,
    resident: bool | None = None,
) -> tuple[Loader, Loader]:
    """Build the training loader (only full global batches) and the validation loader.

    datasets: training and validation set; default: data.train_dataset and data.val_dataset.
    resident: how data.resident=auto was decided for the training set when the run started.
    """
    train_set, val_set = datasets or (cfg.data.train_dataset, cfg.data.val_dataset)
    native = {}  # options that FFCV's loader does not have
    if cfg.data.loader == "native":
        native = {"window_pages": cfg.data.window_pages, "on_error": cfg.data.on_error}
    train_loader = new_loader(
        cfg,
        world,
        train_set,
        global_batch,
        resident=resident,
        order=training_order(cfg, world, train_set),
        crop=training_crop(cfg, resolution_at(0, cfg.resolution)),
        drop_last=True,
        seed=cfg.training.seed,
        **native,
    )
    if cfg.data.loader == "native":
        # Now, not in the epoch that reaches it.
        train_loader.check_memory(training_crop(cfg, cfg.resolution.max_res))
    # A resident loader decodes the whole file once and never reads it again.
    if cfg.data.in_memory and not is_resident(train_loader):
        train_loader.dataset.preload()
    return train_loader, validation_loader(cfg, world, val_set)


def validation_loader(
    cfg: SimpleNamespace,
    world: World,
    val_set: Dataset | None = None,
    **options: Any,
) -> Loader:
    """Build the loader that yields every image of `val_set`, or of data.val_dataset, once over all
    ranks.

    An image that cannot be decoded is an error, unless `options` of the loader say otherwise.
    """
    return new_loader(
        cfg,
        world,
        cfg.data.val_dataset if val_set is None else val_set,
        cfg.validation.batch_size * world.size,
        order="sequential",
        crop=CenterCrop(cfg.validation.resolution, cfg.validation.crop_ratio),
        **options,
    )


def is_resident(loader: Loader) -> bool:
    return isinstance(loader, ResidentLoader)


def new_loader(
    cfg: SimpleNamespace,
    world: World,
    dataset: str | Dataset,
    batch_size: int,
    *,
    crop: Crop | Sequence[RandomResizedCrop],
    resident: bool | None = None,
    **options: Any,
) -> Loader:
    """A loader of the class that data.loader and data.resident select.

    crop: one, or one for each view.
    """
    crop = as_crop(crop)
    options |= {"crop": crop, **loader_resources(cfg, world)}
    if cfg.data.loader == "ffcv":
        # Here, because FFCV is an optional package.
        from matryoshka.data.ffcv_backend import FFCVLoader

        return cast(Loader, FFCVLoader(cast(str, dataset), batch_size, **options))
    if cfg.data.resident == "1":
        return ResidentLoader(dataset, batch_size, **options)
    # data.in_memory=0 asks for bounded memory.
    if cfg.data.resident == "auto" and cfg.data.in_memory:
        if isinstance(dataset, str):
            dataset = open_dataset(dataset)
        if resident is None:
            resident = suits_residence(dataset, world.device, crop, copies=world.local_size)
        if resident:
            try:
                return ResidentLoader(dataset, batch_size, **options)
            except NotResidentError:
                pass  # of a folder only some sizes were known; or the memory is used by now
    return Loader(dataset, batch_size, **options)


def training_order(cfg: SimpleNamespace, world: World, train_set: str | Dataset) -> str:
    """Resolve data.order=auto."""
    if cfg.data.order != "auto":
        return cfg.data.order
    if isinstance(train_set, str):
        has_pages = not os.path.isdir(train_set)
    else:
        has_pages = train_set.pages() is not None
    if cfg.data.in_memory or not has_pages:
        return "random"
    if cfg.data.loader == "ffcv" and world.size > 1:
        return "random"  # FFCV supports quasi_random for one process only
    return "quasi_random"


def loader_resources(cfg: SimpleNamespace, world: World) -> dict:
    """Threads, device and rank of a loader; processes on one machine share its cores evenly."""
    # Of this machine: each machine has its own cores.
    threads = cfg.data.num_workers or max(1, available_cores() // world.local_size)
    return {
        "num_workers": threads,
        "device": world.device,
        "in_memory": cfg.data.in_memory,
        "rank": world.rank,
        "world": world.size,
    }


def training_crop(cfg: SimpleNamespace, resolution: int) -> RandomResizedCrop | PadCrop:
    if cfg.data.crop == "padded":
        return PadCrop(resolution, cfg.data.padding, cfg.data.flip)
    return RandomResizedCrop(resolution, cfg.data.scale, cfg.data.ratio, cfg.data.flip)


def resolution_at(epoch: int, c: ResolutionConfig) -> int:
    """Training resolution of an epoch, in pixels.

    min_res up to start_ramp, max_res from end_ramp on, between them linear in multiples of 32, but
    never outside the two: both may be less than 32.
    """
    if epoch <= c.start_ramp:
        return c.min_res
    if epoch >= c.end_ramp:
        return c.max_res
    linear = np.interp(epoch, [c.start_ramp, c.end_ramp], [c.min_res, c.max_res])
    return min(max(c.min_res, int(np.round(linear / 32)) * 32), c.max_res)


def check_crops(cfg: SimpleNamespace) -> None:
    """Raise ConfigError if a crop cannot be built from the options."""
    unused = ("scale", "ratio") if cfg.data.crop == "padded" else ("padding",)
    for name in unused:
        value = getattr(cfg.data, name)
        if value != getattr(DataConfig, name):
            shown = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else value
            raise ConfigError(f"data.{name}={shown} is not used with data.crop={cfg.data.crop}")
    crop = "data.padding or data.flip"
    if cfg.data.crop == "resized":
        crop = "data.scale, data.ratio or data.flip"
    # The crops know their own ranges: build each one, and name the options that it is made of.
    options = f"resolution.min_res, {crop}"
    try:
        training_crop(cfg, cfg.resolution.min_res)
        options = f"resolution.max_res, {crop}"
        training_crop(cfg, cfg.resolution.max_res)
        options = "validation.resolution or validation.crop_ratio"
        CenterCrop(cfg.validation.resolution, cfg.validation.crop_ratio)
    except ValueError as error:
        raise ConfigError(f"{options}: {error}") from None


def check_loader(cfg: SimpleNamespace) -> None:
    """Raise ConfigError if data.loader and data.order do not fit the datasets or each other."""
    data = cfg.data
    if (
        data.order == "quasi_random"
        and data.train_dataset is not None
        and os.path.isdir(data.train_dataset)
    ):
        raise ConfigError(
            f"data.order=quasi_random needs the pages of a .beton file, {data.train_dataset} is "
            "a folder; write a .beton of it, or use data.order=random"
        )
    if data.loader == "ffcv":
        from matryoshka.data.ffcv_backend import check_installed

        for name in ("resident", "window_pages", "on_error", "crop"):
            value = getattr(data, name)
            if value != getattr(DataConfig, name) and (name, value) != ("resident", "0"):
                raise ConfigError(
                    f"data.{name}={value}: works with data.loader=native only; "
                    "FFCV's loader does not support it"
                )
        check_installed("data.loader=ffcv")
        for name in ("train_dataset", "val_dataset"):
            path = getattr(data, name)
            if path is not None and os.path.isdir(path):
                raise ConfigError(
                    f"data.{name}={path}: is a folder, which data.loader=ffcv cannot read; "
                    "write a .beton of it, or use data.loader=native"
                )


def check_classes(train_set, val_set) -> None:
    """Raise ConfigError, which names both sets, if a label means different classes in them, or if
    images have no label.
    """
    for data in (train_set, val_set):
        if without := int((data.labels < 0).sum()):
            raise ConfigError(
                f"{data.path}: {without:,} of its {len(data):,} images have no label (-1)"
            )
    if train_set.classes and val_set.classes and train_set.classes != val_set.classes:
        raise ConfigError(
            f"{val_set.path}: its {val_set.num_classes} classes are not the "
            f"{train_set.num_classes} of {train_set.path}; write both from folders with the same "
            "class folders"
        )
    if val_set.num_classes > train_set.num_classes:
        raise ConfigError(
            f"{val_set.path}: has {val_set.num_classes} classes, {train_set.path} only "
            f"{train_set.num_classes}"
        )
