"""Options of train_ssl.py, without torch: sections, and the flags of two repositories.

`mrl_train` has the flags and defaults of the repository relic (ReLIC + MRL-E), train.py and
train_distributed.py those of MoCo-Matryoshka; each flag stands for options in sections, which all
of the three accept as well. docs/coming_from_mrl_ssl.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka import config
from matryoshka.config import MixedParser, flat_parser, option
from matryoshka.config.limits import (
    MAX_BATCH,
    MAX_COUNT,
    MAX_DECAY,
    MAX_DIM,
    MAX_EPOCHS,
    MAX_PROCESSES,
    MAX_RATE,
    MAX_SEED,
    MAX_TEMPERATURE,
    MAX_THREADS,
    MAX_WEIGHT,
    MIN_TEMPERATURE,
)
from matryoshka.environment import count_in
from matryoshka.models.options import ModelConfig
from matryoshka.runtime import BACKENDS, DistConfig
from matryoshka.ssl.options import METHODS, SslConfig, ViewsConfig
from matryoshka.training.options import (
    EvaluationCrop,
    LoggingConfig,
    LoopConfig,
    LrConfig,
    ReadingConfig,
)

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class SslDataConfig(ReadingConfig):
    """Section `data`."""

    dataset: str | None = option(
        None,
        help="instead of the two paths: a name (cifar10, stl10, hf:OWNER/NAME, ...), or a folder "
        "with train/ (or unlabeled/) and test/ or val/",
        affects_result=False,
        common=True,
        file_name=True,
    )
    bank_dataset: str | None = option(
        None,
        help="labelled images among which neighbours are looked for; unset: the training images",
        affects_result=False,
        existing=True,
    )
    cache: str = option(
        "data", help="folder of downloaded data sets", affects_result=False, file_name=True
    )


@dataclass(frozen=True)
class SslValidationConfig(EvaluationCrop):
    """Section `validation`: how the embeddings are evaluated during the run, where there are labels
    and a set to evaluate on.
    """

    resolution: int = option(0, help="pixels of the crop; 0: views.size", low=0, high=16384)
    crop_ratio: float = option(
        0.0,
        help="side of the crop / shorter side of the image; 0: 1 for small images, else 0.875",
        low=0,
        high=1,
    )
    every: int = option(
        5, help="epochs between two evaluations", low=1, affects_result=False, high=MAX_EPOCHS
    )
    queries: int = option(
        2_000,
        help="images to evaluate on during the run; after the last epoch it is all of them",
        low=1,
        affects_result=False,
        high=MAX_COUNT,
    )
    bank: int = option(
        50_000,
        help="training images among which neighbours are looked for",
        low=1,
        affects_result=False,
        high=MAX_COUNT,
    )


@dataclass(frozen=True)
class SslLoggingConfig(LoggingConfig):
    """Section `logging`."""

    relic_folder: str | None = option(
        None,
        help="also write relic_model.pth and encoder.pth there, as the repository relic does",
        affects_result=False,
        file_name=True,
    )
    moco_folder: str | None = option(
        None,
        help="also write best_model.pt, checkpoint_epoch_<e>.pt and final_model.pt there, as "
        "MoCo-Matryoshka does",
        affects_result=False,
        file_name=True,
    )


SECTIONS = {
    "model": ModelConfig,
    "ssl": SslConfig,
    "views": ViewsConfig,
    "data": SslDataConfig,
    "lr": LrConfig,
    "logging": SslLoggingConfig,
    "validation": SslValidationConfig,
    "training": LoopConfig,
    "dist": DistConfig,
}


# ---------------------------------------------------------------- our own flags


@dataclass(frozen=True)
class Flags:
    """Short forms of options in sections."""

    method: str | None = option(None, help="method (relic)", choices=METHODS, common=True)
    data: str | None = option(
        None,
        help="a name, a folder with train/ and test/ (or val/), a folder of images, or a .beton",
        common=True,
        file_name=True,
    )
    net: str | None = option(None, help="encoder: see docs/models.md (resnet18)", common=True)
    dims: tuple[int, ...] | None = option(
        None,
        help="prefix lengths (powers of two from 8 to the width)",
        low=1,
        common=True,
        high=MAX_DIM,
    )
    plain: bool = option(False, help="no prefixes: the full width alone", common=True)
    epochs: int | None = option(None, help="epochs (200)", low=1, common=True, high=MAX_EPOCHS)
    batch_size: int | None = option(
        None, help="images per process and step (256)", low=1, common=True, high=MAX_BATCH
    )
    lr: float | None = option(None, help="peak learning rate", low=0, common=True, high=MAX_RATE)
    device: str | None = option(None, help="cuda, mps or cpu", common=True)
    seed: int | None = option(
        None, help="seed of everything random (0)", low=0, common=True, high=MAX_SEED
    )


DESCRIPTION = """Train an encoder without labels whose every prefix is a good embedding.

    matryoshka ssl --data cifar10 --method relic
    matryoshka ssl --data photos/ --net resnet50 --method moco
    matryoshka ssl --config-file ssl_configs/relic_cifar10.yaml
"""


def _translate(flags: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    given = _renamed(
        flags,
        {
            "method": "ssl.method",
            "data": "data.dataset",
            "net": "model.arch",
            "dims": "model.dims",
            "epochs": "training.epochs",
            "batch_size": "training.batch_size",
            "lr": "lr.lr",
            "device": "training.device",
            "seed": "training.seed",
        },
    )
    if flags.get("plain"):
        if "dims" in flags:
            raise config.ConfigError("--plain and --dims: give one")
        given["model.mrl"] = False
    return given


def _defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    values = {
        "model.mrl": True,
        "training.batch_size": 256,
        "training.epochs": 200,
        "training.weight_decay": 5e-4,
        "lr.lr_per_256": 0.06,
        "lr.lr_schedule_type": "cosine",
        "lr.warmup_epochs": 10.0,
        "logging.folder": "ssl_runs",
        **METHOD_DEFAULTS[given.get("ssl.method", SslConfig.method)],
    }
    epochs = _number(given.get("training.epochs", values["training.epochs"]))
    if epochs is not None:
        values["lr.warmup_epochs"] = min(10.0, epochs / 10)
    if given.get("lr.lr_schedule_type") == "cyclic":  # has a warm-up of its own
        del values["lr.warmup_epochs"]
    return values


# What a method's paper does, beside the declared defaults.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "relic": {"views.blur": (0.5,), "views.solarise": (0.1,)},
    "moco": {"views.blur": (0.5,), "ssl.momentum_end": 0.999},
    "simclr": {"views.blur": (0.5,)},
    "byol": {"views.blur": (0.5,), "views.solarise": (0.1,)},
    "vicreg": {"ssl.hidden": 2048, "ssl.out": 512, "views.solarise": (0.1,)},
    "sigreg": {"ssl.hidden": 2048, "ssl.out": 64, "views.solarise": (0.1,)},
}


# ---------------------------------------------------------------- the repository relic


@dataclass(frozen=True)
class RelicFlags:
    """Flags of `mrl_train`."""

    dataset_path: str | None = option(
        None,
        help="folder of downloads (./data); or a folder of images, or a .beton, to train on",
        flag="--dataset_path",
        common=True,
        file_name=True,
    )
    dataset_name: str | None = option(
        None,
        help="stl10, cifar10, tiny_imagenet, food101, imagenet1k, or any name of matryoshka write "
        "(stl10)",
        flag="--dataset_name",
        common=True,
    )
    encoder_model_name: str | None = option(
        None, help="encoder (resnet18)", flag="--encoder_model_name", short="-m", common=True
    )
    save_model_dir: str | None = option(
        None,
        help="folder of relic_model.pth and encoder.pth (./models)",
        flag="--save_model_dir",
        short="-save_model_dir",
        common=True,
        file_name=True,
    )
    num_epochs: int | None = option(
        None, help="epochs (100)", flag="--num_epochs", low=1, common=True, high=MAX_EPOCHS
    )
    batch_size: int | None = option(
        None,
        help="images of a step (256)",
        flag="--batch_size",
        short="-b",
        low=1,
        common=True,
        high=MAX_BATCH,
    )
    learning_rate: float | None = option(
        None,
        help="learning rate (3e-4)",
        flag="--learning_rate",
        short="-lr",
        low=0,
        common=True,
        high=MAX_RATE,
    )
    weight_decay: float | None = option(
        None,
        help="weight decay (1e-5)",
        flag="--weight_decay",
        short="-wd",
        low=0,
        common=True,
        high=MAX_DECAY,
    )
    fp16_precision: bool = option(
        False,
        help="half precision on a GPU: bf16 where it has it, else fp16",
        flag="--fp16_precision",
        common=True,
    )
    proj_out_dim: int | None = option(
        None,
        help="numbers of the projector's output (64)",
        flag="--proj_out_dim",
        low=1,
        high=MAX_DIM,
    )
    proj_hidden_dim: int | None = option(
        None,
        help="numbers of its hidden layer (the encoder's width)",
        flag="--proj_hidden_dim",
        low=1,
        high=MAX_DIM,
    )
    log_every_n_steps: int | None = option(
        None,
        help="steps between two checkpoints (400)",
        flag="--log_every_n_steps",
        low=1,
        high=MAX_COUNT,
    )
    gamma: float | None = option(
        None, help="decay of the target at the start (0.995)", low=0, high=1
    )
    alpha: float | None = option(None, help="weight of the invariance (1)", low=0, high=MAX_WEIGHT)
    update_gamma_after_step: int | None = option(
        None,
        help="step from which the decay rises; until then the target is a copy (2)",
        flag="--update_gamma_after_step",
        low=0,
        high=MAX_COUNT,
    )
    update_gamma_every_n_steps: int | None = option(
        None,
        help="steps between two updates of the target (1)",
        flag="--update_gamma_every_n_steps",
        low=1,
        high=MAX_COUNT,
    )
    ckpt_path: str | None = option(
        None,
        help="a run folder or checkpoint to resume, or weights to start from",
        flag="--ckpt_path",
        file_name=True,
    )


RELIC_DESCRIPTION = """Train an encoder with ReLIC and MRL-E, without labels.

    mrl_train --dataset_name cifar10 --encoder_model_name resnet18 --fp16_precision
    mrl_train --dataset_path photos/ --num_epochs 50

Every option of `matryoshka ssl` is accepted as well: --ssl.projector=mrl, --views.small=4.
"""

RELIC_SETS = {"tiny_imagenet": "tiny-imagenet", "food101": "hf:ethz/food101"}
RELIC_SETS["imagenet1k"] = "hf:ILSVRC/imagenet-1k"
RELIC_LARGE = 192  # pixels of a crop of photos, as there
RELIC_SIZES: dict[str, int] = {
    "cifar10": 32,
    "cifar100": 32,
    "stl10": 96,
    "tiny-imagenet": 64,
    RELIC_SETS["food101"]: RELIC_LARGE,
    RELIC_SETS["imagenet1k"]: RELIC_LARGE,
}


def _translate_relic(flags: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    given = _renamed(
        flags,
        {
            "encoder_model_name": "model.arch",
            "save_model_dir": "logging.relic_folder",
            "num_epochs": "training.epochs",
            "batch_size": "training.batch_size",
            "learning_rate": "lr.lr",
            "weight_decay": "training.weight_decay",
            "proj_out_dim": "ssl.out",
            "proj_hidden_dim": "ssl.hidden",
            "log_every_n_steps": "training.checkpoint_every_steps",
            "gamma": "ssl.momentum",
            "alpha": "ssl.alpha",
            "update_gamma_after_step": "ssl.momentum_after",
            "update_gamma_every_n_steps": "ssl.momentum_every",
        },
    )
    name = flags.get("dataset_name")
    path = flags.get("dataset_path")
    if path is not None and _holds_images(Path(path)):
        given["data.dataset"] = path
        if name is not None:
            given["views.size"] = RELIC_SIZES.get(_known_name(name), RELIC_LARGE)
    else:
        if path is not None:
            if name is None and not Path(path).exists():
                raise config.ConfigError(
                    f"--dataset_path {path}: no such folder or file; for downloads to it, name "
                    "what to download: --dataset_name stl10"
                )
            given["data.cache"] = path
        if name is not None:
            given["data.dataset"] = _known_name(name)
    if flags.get("fp16_precision"):
        given["training.precision"] = "auto"
    if "weight_decay" in flags:
        given["training.bn_wd"] = flags["weight_decay"]  # of all layers, as there
    if "ckpt_path" in flags:
        given[_resume_or_init(Path(flags["ckpt_path"]))] = flags["ckpt_path"]
    return given


def _known_name(name: str) -> str:
    """That repository's name of a data set, as `matryoshka write` knows it."""
    return RELIC_SETS.get(name, name)


def _holds_images(path: Path) -> bool:
    """Whether a --dataset_path is data itself: a file, or a folder with images in it, in its
    folders or in theirs; else it is the folder of downloads, as in the repository relic.
    """
    if path.is_file():
        return True
    if not path.is_dir():
        return False
    for pattern in ("*", "*/*", "*/*/*"):
        if any(entry.suffix.lower() in IMAGE_ENDINGS for entry in path.glob(pattern)):
            return True
    return False


def _resume_or_init(path: Path) -> str:
    """The option that a --ckpt_path means: the checkpoint of a run is resumed, weights are a start.

    In the repository relic it restores the weights alone.
    """
    is_run = path.is_dir() or path.parent.name == "checkpoints"
    return "training.resume" if is_run else "model.init"


def _defaults_relic(given: Mapping[str, Any]) -> dict[str, Any]:
    method = given.get("ssl.method", "relic")
    dataset = given.get("data.dataset", "stl10")
    size = RELIC_SIZES.get(dataset, 0)
    blurred = given.get("views.size") or size
    values = {
        "model.arch": "resnet18",
        "model.mrl": True,
        "data.dataset": "stl10",
        "ssl.method": "relic",
        "ssl.projector": "mrl-e",
        "ssl.out": 64,
        "views.size": size,
        "views.scale": (0.08, 1.0),
        "views.strengths": (0.8, 0.8, 0.8, 0.2),
        "views.blur": (1.0,),
        "views.blur_kernel": (3 if _number(blurred) in (32, 64) else 9,),
        "views.solarise": (0.5,),
        "training.optimizer": "adam",
        "training.epochs": 100,
        "training.batch_size": 256,
        "training.weight_decay": 1e-5,
        "training.bn_wd": 1e-5,
        "training.precision": "fp32",
        "training.checkpoint_every_steps": 400,
        "lr.lr": 3e-4,
        "lr.lr_schedule_type": "constant",
        "logging.folder": "ssl_runs",
        "logging.relic_folder": "models",
    }
    if method == "relic":
        values |= {
            "ssl.learn_temperature": True,
            "ssl.temperature": (1.0,),
            "ssl.least_temperature": 0.2,  # theirs: 1 / temperature is at most 5
            "ssl.momentum": 0.995,
            "ssl.momentum_after": 2,
        }
        # The term compares two views and the images of one process.
        several = _number(given.get("views.small")) or _is_distributed(given)
        values["ssl.stop_gradient"] = "none" if several else "columns"
    return values


def _is_distributed(given: Mapping[str, Any]) -> bool:
    """Whether several processes will train, as far as options and torchrun say."""
    asked = str(given.get("training.distributed", False)).lower() in ("1", "true")
    return asked or count_in("WORLD_SIZE", 1) > 1


# ---------------------------------------------------------------- MoCo-Matryoshka


@dataclass(frozen=True)
class MocoFlags:
    """Flags of train.py and train_distributed.py."""

    data: str | None = option(
        None,
        help="instead of ImageNet-100 from the Hugging Face hub: a folder with train/ and val/, a "
        "name, or a .beton",
        common=True,
        file_name=True,
    )
    batch_size: int | None = option(
        None, help="images per process and step (256)", low=1, common=True, high=MAX_BATCH
    )
    epochs: int | None = option(None, help="epochs (100)", low=1, common=True, high=MAX_EPOCHS)
    lr: float | None = option(None, help="learning rate (0.03)", low=0, common=True, high=MAX_RATE)
    momentum: float | None = option(None, help="momentum of SGD (0.9)", low=0, high=1)
    weight_decay: float | None = option(None, help="weight decay (0.0001)", low=0, high=MAX_DECAY)
    nesting_list: tuple[int, ...] | None = option(
        None, help="prefix lengths (8,16,...,2048)", low=1, common=True, nonempty=True, high=MAX_DIM
    )
    dim: int | None = option(
        None, help="width of the embedding without prefixes: plain MoCo", low=1, high=MAX_DIM
    )
    queue_size: int | None = option(
        None, help="keys in the queue (4096)", low=1, common=True, high=10_000_000
    )
    moco_m: float | None = option(
        None, help="decay of the key encoder (0.999)", low=0, high=1, common=True
    )
    temp: float | None = option(
        None, help="temperature (0.07)", common=True, low=MIN_TEMPERATURE, high=MAX_TEMPERATURE
    )
    eval_interval: int | None = option(
        None, help="epochs between two evaluations (5)", low=1, common=True, high=MAX_EPOCHS
    )
    num_workers: int | None = option(
        None, help="decoding threads per process (all cores)", low=0, high=MAX_THREADS
    )
    num_gpus: int | None = option(
        None,
        help="processes, one for each GPU or MIG slice (train.py: 1; train_distributed.py: all)",
        low=1,
        common=True,
        high=MAX_PROCESSES,
    )
    backend: str | None = option(
        None, help="of collectives: gloo, nccl (nccl; gloo on MIG slices)", choices=BACKENDS
    )
    grad_clip: float | None = option(None, help="largest gradient norm", low=0, high=1e9)
    pretrained: bool = option(False, help="start from ImageNet weights of torchvision")
    log_dir: str | None = option(None, help="folder of the runs (runs)", file_name=True)
    checkpoint_dir: str | None = option(
        None, help="folder of best_model.pt and final_model.pt (checkpoints)", file_name=True
    )


MOCO_DESCRIPTION = """Train a ResNet-50 with MoCo whose every prefix is contrasted, without labels.

    python train.py --batch-size 256 --epochs 100
    python train_distributed.py --batch-size 256 --epochs 100 --num-gpus 4

Every option of `matryoshka ssl` is accepted as well: --ssl.version=2, --model.arch=resnet18.
"""
IMAGENET_100 = "hf:clane9/imagenet-100"
MOCO_DIMS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def _translate_moco(flags: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    given = _renamed(
        flags,
        {
            "data": "data.dataset",
            "batch_size": "training.batch_size",
            "epochs": "training.epochs",
            "lr": "lr.lr",
            "momentum": "training.momentum",
            "weight_decay": "training.weight_decay",
            "nesting_list": "model.dims",
            "queue_size": "ssl.queue",
            "moco_m": "ssl.momentum",
            "eval_interval": "validation.every",
            "num_workers": "data.num_workers",
            "num_gpus": "dist.world_size",
            "backend": "dist.backend",
            "grad_clip": "training.clip",
            "log_dir": "logging.folder",
            "checkpoint_dir": "logging.moco_folder",
        },
    )
    if "temp" in flags:
        given["ssl.temperature"] = (flags["temp"],)
    if "moco_m" in flags:
        given["ssl.momentum_end"] = flags["moco_m"]
    if "num_gpus" in flags:
        given["training.distributed"] = flags["num_gpus"] > 1
    if flags.get("pretrained"):
        given["model.pretrained"] = True
    if "dim" in flags:
        if "nesting_list" in flags:
            raise config.ConfigError("--dim and --nesting-list: give one")
        given["model.neck"] = f"linear:{flags['dim']}"
        given["model.mrl"] = False
    elif "nesting_list" in flags:
        given["model.neck"] = f"linear:{max(flags['nesting_list'])}"
    return given


def _defaults_moco(given: Mapping[str, Any]) -> dict[str, Any]:
    plain = str(given.get("model.mrl", True)).lower() in ("0", "false")
    values: dict[str, Any] = {
        "model.arch": "resnet50",
        "model.mrl": True,
        "model.neck": "linear:2048",
        "data.dataset": IMAGENET_100,
        "ssl.method": "moco",
        "ssl.projector": "none",
        "training.batch_size": 256,
        "training.epochs": 100,
        "training.weight_decay": 1e-4,
        "lr.lr": 0.03,
        "lr.lr_schedule_type": "cosine",
        "logging.folder": "runs",
        "logging.moco_folder": "checkpoints",
    }
    if given.get("ssl.method", "moco") == "moco":
        values |= {
            "ssl.version": 1,
            "ssl.temperature": (0.07,),
            "ssl.momentum": 0.999,
            "ssl.momentum_end": 0.999,
        }
    if not plain and "model.dims" not in given:
        values["model.dims"] = MOCO_DIMS
    return values


def _defaults_distributed(given: Mapping[str, Any]) -> dict[str, Any]:
    return {**_defaults_moco(given), "training.distributed": True}


# ---------------------------------------------------------------- the three faces


class Face(NamedTuple):
    """A program's name, flags and defaults."""

    prog: str
    text: str
    flags: type
    translate: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    defaults: Callable[[Mapping[str, Any]], dict[str, Any]]


FACES = {
    "ssl": Face("train_ssl.py", DESCRIPTION, Flags, _translate, _defaults),
    "relic": Face("mrl_train", RELIC_DESCRIPTION, RelicFlags, _translate_relic, _defaults_relic),
    "moco": Face("train.py", MOCO_DESCRIPTION, MocoFlags, _translate_moco, _defaults_moco),
    "moco-distributed": Face(
        "train_distributed.py", MOCO_DESCRIPTION, MocoFlags, _translate_moco, _defaults_distributed
    ),
}


def parser(face: str = "ssl") -> MixedParser:
    """The options of train_ssl.py under one of its faces."""
    chosen = FACES[face]
    return MixedParser(
        sections=SECTIONS,
        flags=flat_parser(chosen.prog, chosen.text, chosen.flags),
        translate=chosen.translate,
        defaults=chosen.defaults,
    )


def _renamed(flags: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names[name]: value for name, value in flags.items() if name in names}


def _number(value: Any) -> int | None:
    """An option as a file or the command line gives it, as a number; None if it is none."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
