"""Options of train_cifar10.py that follow from others, and the data sets that they name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matryoshka.config import ConfigError
from matryoshka.data.bars import Bars
from matryoshka.data.catalogue import HUGGING_FACE
from matryoshka.data.named import named_dataset
from matryoshka.environment import is_installed
from matryoshka.files import read_regular
from matryoshka.models import FAMILIES, model_spec, option_names
from matryoshka.training.checks import check_options
from matryoshka.training.cifar_options import is_compression
from matryoshka.training.cifar_outputs import newest_run

WANDB_PROJECT = "cifar10-challange"  # as both repositories spell it
CLASSES_OF_A_TRIAL = 10  # any number: the check of a model needs one before the data are there


def resolved(cfg: SimpleNamespace) -> tuple[SimpleNamespace, list[str]]:
    """Options with everything filled in that follows from others, and lines for the user.

    Fetches and writes the data set if it is not in the cache. ConfigError or ModelError, one line,
    for options that cannot be met; those that need no data come first.
    """
    cfg = SimpleNamespace(**vars(cfg))
    _refuse_other_purposes(cfg)
    lines = [_defaults_text(cfg)]
    cfg.model, notes = _with_net_options(cfg)
    model_spec(cfg.model, CLASSES_OF_A_TRIAL)  # its errors, before a download
    cfg.training = _with_newest_run(cfg)
    cfg.logging, wandb_notes = _with_wandb(cfg)
    check_options(cfg)
    cfg.data = _with_data(cfg)
    lines += [f"note     {note}" for note in (*notes, *wandb_notes)]
    return cfg, lines


# ---------------------------------------------------------------- options


def _refuse_other_purposes(cfg: SimpleNamespace) -> None:
    """ConfigError for options of train_imagenet.py that have no place here."""
    if cfg.training.eval_only or cfg.training.path is not None:
        raise ConfigError(
            "training.eval_only: matryoshka cifar trains; evaluate with matryoshka eval --path"
        )
    if cfg.validation.lr_tta:
        raise ConfigError(
            "validation.lr_tta=1: matryoshka cifar looks at one view of each image; for mirror "
            "images use matryoshka eval --tta"
        )
    if cfg.data.loader != "native":
        raise ConfigError(
            f"data.loader={cfg.data.loader}: reads whole .beton files alone, not the part that "
            "validation leaves; use data.loader=native"
        )
    paths = (cfg.data.train_dataset, cfg.data.val_dataset)
    if any(path is not None for path in paths):
        raise ConfigError(
            "data.train_dataset and data.val_dataset: give --data TRAIN.beton,TEST.beton"
        )


def _defaults_text(cfg: SimpleNamespace) -> str:
    given = {"model.arch": cfg.model.arch, "model.mrl": cfg.model.mrl}
    name = "vision-transformers-cifar10"
    if is_compression(given):
        name = "matryoshka-vit-compression"
    return f"defaults {name}: {cfg.cifar.net or cfg.model.arch}, {cfg.training.epochs} epochs"


def _with_net_options(cfg: SimpleNamespace) -> tuple[Any, list[str]]:
    """Section `model` with the options of the net, and notes on those that it does not have."""
    c = cfg.cifar
    accepted = option_names(cfg.model.arch) or ()
    pairs: list[str] = list(cfg.model.arch_options or ())
    given = {pair.partition("=")[0] for pair in pairs}
    notes = []
    wanted = {"image_size": c.size, "patch": c.patch, "kernel": c.convkernel}
    if cfg.model.arch not in FAMILIES:
        wanted["dim"] = c.dim
    flags = {"patch": "--patch", "kernel": "--convkernel", "dim": "--dimhead"}
    for name, value in wanted.items():
        if value is None or name in given:
            continue
        if name in accepted:
            pairs.append(f"{name}={value}")
        elif name in flags:
            notes.append(f"{flags[name]} {value}: {cfg.model.arch} has no such option")
    model = replace(cfg.model, arch_options=tuple(pairs) or None)
    if c.dim is not None and cfg.model.arch in FAMILIES and model.dims is None:
        widths = tuple(2**k for k in range(cfg.model.nesting_start, c.dim.bit_length()))
        model = replace(model, dims=tuple(sorted({*widths, c.dim})))
    elif c.dim is not None and cfg.model.arch in FAMILIES and model.dims[-1] != c.dim:
        raise ConfigError(
            f"--dimhead {c.dim}: the widest of --mrl_dims is {model.dims[-1]}; leave one out"
        )
    return model, notes


def _with_newest_run(cfg: SimpleNamespace) -> Any:
    if cfg.training.resume != "newest":
        return cfg.training
    return replace(cfg.training, resume=str(newest_run(cfg)))


def _with_wandb(cfg: SimpleNamespace) -> tuple[Any, list[str]]:
    """Section `logging` with Weights & Biases where it is installed and configured."""
    if cfg.logging.wandb == "off" or cfg.logging.wandb is not None:
        wandb = None if cfg.logging.wandb == "off" else cfg.logging.wandb
        return replace(cfg.logging, wandb=wandb), []
    reason = _why_no_wandb()
    if reason is None:
        return replace(cfg.logging, wandb=WANDB_PROJECT), []
    return cfg.logging, [f"no Weights & Biases: {reason}; --nowandb hides this note"]


def _why_no_wandb() -> str | None:
    if not is_installed("wandb"):
        return "wandb is not installed"
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "online", "shared", "dryrun"):  # dryrun: the old word for offline
        return None
    if mode == "disabled":
        return "WANDB_MODE=disabled"
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    has_key = "WANDB_API_KEY" in os.environ or (netrc.is_file() and b"wandb" in read_regular(netrc))
    return None if has_key else "wandb is not configured (wandb login)"


# ---------------------------------------------------------------- data


def _with_data(cfg: SimpleNamespace) -> Any:
    """Section `data` with the paths of the training and test set."""
    c = cfg.cifar
    if c.data is not None and len(c.data) == 2:
        train, test = c.data
    elif c.data is not None and len(c.data) != 1:
        raise ConfigError(
            f"--data {','.join(c.data)}: expected a folder, or TRAIN.beton,TEST.beton"
        )
    else:
        name = c.dataset if c.data is None else c.data[0]
        _check_columns(name, c)
        columns = {"image_column": c.image_column, "label_column": c.label_column}
        with Bars() as progress:
            train, test = (
                named_dataset(name, part, c.cache, **columns, progress=progress)
                for part in ("train", "test")
            )
    if Path(train).resolve() == Path(test).resolve():
        raise ConfigError(
            f"{train}: the same images to train and to test on; give a folder with train/ and "
            "test/ (or val/) alone, or TRAIN.beton,TEST.beton"
        )
    return replace(cfg.data, train_dataset=str(train), val_dataset=str(test))


def _check_columns(name: str, c: SimpleNamespace) -> None:
    """ConfigError for columns of a set that has none, and for a file that is one part alone."""
    if not name.startswith(HUGGING_FACE):
        for option in ("image_column", "label_column"):
            if getattr(c, option) is not None:
                raise ConfigError(f"cifar.{option} is for {HUGGING_FACE} data sets; leave it out")
    elif Path(name.removeprefix(HUGGING_FACE)).is_file():
        raise ConfigError(
            f"{name}: one file has no part to test on; give the folder of a train- and a "
            "test-*.parquet"
        )
