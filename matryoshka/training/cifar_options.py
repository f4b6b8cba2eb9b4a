"""Options of train_cifar10.py, without torch: the flags of two repositories, and sections.

vision-transformers-cifar10 (`--net vit --dimhead 512 --opt adan`) and matryoshka-vit-compression
(`--mrl_flag --mrl_dims 8,16,32`) name their program and many flags alike, but differ in the
defaults. Those of the second apply with its nets and with --mrl_flag. Each flag stands for options
in sections, which are those of train_imagenet.py and `cifar`; docs/coming_from_vit_cifar.md lists
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matryoshka import config
from matryoshka.config import MixedParser, flat_parser, option
from matryoshka.config.limits import (
    MAX_BATCH,
    MAX_DECAY,
    MAX_DIM,
    MAX_EPOCHS,
    MAX_RATE,
    MAX_SEED,
)
from matryoshka.training.options import SECTIONS as TRAINING_SECTIONS
from matryoshka.training.options import adan_betas

FIXED_POSITIONS = "vitfixedposdualpatchnorm"
# The nets of matryoshka-vit-compression; with one of them, its defaults apply.
COMPRESSION_NETS = (FIXED_POSITIONS, "vitfixedpos", "vitlearnedpos", "vitfixedposvqvae")
# Where the logits of a dim come from; `prefixes` for every net, the others for FIXED_POSITIONS.
NESTED = {
    "prefixes": "classifiers on the prefixes of one embedding (MRL)",
    "shared": "the same with one classifier, sliced (MRL-E)",
    "independent": "one transformer for each dim",
    "nested_proj": "the same with one patch projection, sliced",
    "nested": "one transformer, its width sliced",
}
FAMILY_OF = {
    "independent": "vit_independent",
    "nested_proj": "vit_nested_proj",
    "nested": "vit_nested",
}
RANDAUGMENT = 14 / 3  # 14 on the scale of both repositories, which ends at 30; here at 10
OPTIMIZERS = ("adam", "adamw", "sgd", "adan", "muon", "lars")


@dataclass(frozen=True)
class CifarConfig:
    """Section `cifar`."""

    dataset: str = option(
        "cifar10",
        help="cifar10, cifar100, stl10, tiny-imagenet, hf:OWNER/NAME, or a name for data",
        file_name=True,
    )
    data: tuple[str, ...] | None = option(
        None,
        help="instead of a download: a folder with train/ and test/ (and val/), or two .beton "
        "files, for training and test",
        affects_result=False,
        file_name=True,
    )
    cache: str = option(
        "data", help="folder of downloaded data sets", affects_result=False, file_name=True
    )
    image_column: str | None = option(None, help="of hf: data sets; unset: the column of images")
    label_column: str | None = option(
        None, help="of hf: data sets; unset: the column of class labels"
    )
    net: str | None = option(
        None, help="name in the outputs; unset: model.arch", affects_result=False
    )
    size: int = option(32, help="pixels of a side, of the net's input", low=8, high=1024)
    patch: int | None = option(
        None, help="pixels of a patch's side; unset: the net's default", low=1, high=1024
    )
    dim: int | None = option(
        None, help="width of the transformer; unset: the net's default", low=1, high=MAX_DIM
    )
    convkernel: int | None = option(
        None, help="kernel of convmixer's convolutions; unset: the net's default", low=1, high=1024
    )
    val_share: float = option(
        0.1,
        help="share of the training images that is kept for validation; 0: none, the last weights "
        "are the model",
        low=0,
        below=1,
    )
    select_on_test: bool = option(
        False,
        help="choose the best epoch on the test set, as older numbers did; without this the "
        "test set is used once, at the end",
    )
    seed_outputs: bool = option(
        True,
        help="also write checkpoint/, log/ and the names of both repositories",
        affects_result=False,
    )


SECTIONS = {"cifar": CifarConfig, **TRAINING_SECTIONS}


@dataclass(frozen=True)
class Flags:
    """Flags of both repositories, and a few more. None of them is required."""

    net: str | None = option(
        None, help="architecture (vit; vitfixedposdualpatchnorm with MRL)", common=True
    )
    dataset: str | None = option(
        None,
        help="cifar10, cifar100, stl10, tiny-imagenet or hf:OWNER/NAME (cifar10)",
        common=True,
        file_name=True,
    )
    data: str | None = option(
        None,
        help="instead of a download: a folder with train/ and test/ (and val/), or "
        "TRAIN.beton,TEST.beton",
        common=True,
        file_name=True,
    )
    cache: str | None = option(None, help="folder of downloaded data sets (data)", file_name=True)
    lr: float | None = option(
        None, help="peak learning rate (0.0001)", low=0, common=True, high=MAX_RATE
    )
    opt: str | None = option(None, help="optimizer (adam)", choices=OPTIMIZERS, common=True)
    bs: int | None = option(None, help="images per step (512)", low=1, common=True, high=MAX_BATCH)
    n_epochs: int | None = option(
        None,
        help="epochs (200; 100 with MRL)",
        flag="--n_epochs",
        low=1,
        common=True,
        high=MAX_EPOCHS,
    )
    size: int | None = option(None, help="pixels of a side (32)", low=8, common=True, high=1024)
    patch: int | None = option(
        None, help="pixels of a patch's side (4)", low=1, common=True, high=1024
    )
    dimhead: int | None = option(
        None, help="width of the transformer (512)", low=1, common=True, high=MAX_DIM
    )
    embedding_dim: int | None = option(
        None, help="another name of --dimhead", flag="--embedding_dim", low=1, high=MAX_DIM
    )
    convkernel: int | None = option(None, help="kernel of convmixer (8)", low=1, high=1024)
    weight_decay: float | None = option(
        None,
        help="weight decay (0.02 for adamw and adan, else 0)",
        flag="--weight_decay",
        low=0,
        high=MAX_DECAY,
    )
    adan_beta1: float | None = option(
        None,
        help="Adan: weight of the new gradient in the first mean (0.02)",
        flag="--adan_beta1",
        low=0,
        high=1,
    )
    adan_beta2: float | None = option(
        None,
        help="Adan: of the new difference of gradients (0.08)",
        flag="--adan_beta2",
        low=0,
        high=1,
    )
    adan_beta3: float | None = option(
        None, help="Adan: of the new square (0.01)", flag="--adan_beta3", low=0, high=1
    )
    mrl_flag: bool = option(
        False, help="train all of --mrl_dims at once", flag="--mrl_flag", common=True
    )
    mrl_dims: tuple[int, ...] | None = option(
        None,
        help="dims of --mrl_flag (powers of two from 8 to the width)",
        flag="--mrl_dims",
        low=1,
        common=True,
        high=MAX_DIM,
    )
    nested_proj_mrl: bool = option(
        False, help="short for --mrl_kind nested_proj", flag="--nested_proj_mrl"
    )
    mrl_kind: str | None = option(
        None,
        help="; ".join(f"{name}: {text}" for name, text in NESTED.items())
        + f" (independent for {FIXED_POSITIONS}, else prefixes)",
        flag="--mrl_kind",
        choices=tuple(NESTED),
        common=True,
    )
    noaug: bool = option(False, help="no RandAugment")
    mixup: bool = option(False, help="mixup with alpha 1")
    noamp: bool = option(False, help="float32 on a GPU as well")
    dp: bool = option(False, help="train on all visible GPUs")
    device: str | None = option(
        None, help="cuda, mps or cpu (the first of them that there is)", common=True
    )
    seed: int | None = option(None, help="seed of everything random (0)", low=0, high=MAX_SEED)
    resume: bool = option(
        False, help="resume the newest run of this net, data set and patch", short="-r", common=True
    )
    notb: bool = option(False, help="no TensorBoard")
    nowandb: bool = option(False, help="no Weights & Biases")
    val_share: float | None = option(
        None,
        help="share of the training images for validation (0.1)",
        flag="--val_share",
        low=0,
        below=1,
    )
    select_on_test: bool = option(
        False, help="choose the best epoch on the test set", flag="--select_on_test"
    )


DESCRIPTION = """Train a small net, plain or nested, on small images.

    matryoshka cifar --net vit_small --opt adan --lr 9e-4
    matryoshka cifar --mrl_flag --mrl_kind nested --mrl_dims 16,32,64,128
    matryoshka cifar --config-file vit_configs/fast_cnn.yaml --data cifar10/

Every option of train_imagenet.py is accepted as well: --training.ema=0.999, --data.cutmix=1.
"""

# Flags that are options under another name, with the same value.
SAME = {
    "dataset": "cifar.dataset",
    "cache": "cifar.cache",
    "lr": "lr.lr",
    "opt": "training.optimizer",
    "bs": "training.global_batch_size",
    "n_epochs": "training.epochs",
    "size": "cifar.size",
    "patch": "cifar.patch",
    "convkernel": "cifar.convkernel",
    "weight_decay": "training.weight_decay",
    "device": "training.device",
    "seed": "training.seed",
    "val_share": "cifar.val_share",
    "select_on_test": "cifar.select_on_test",
}


def parser() -> MixedParser:
    """The options of train_cifar10.py."""
    return MixedParser(
        sections=SECTIONS,
        flags=flat_parser("train_cifar10.py", DESCRIPTION, Flags),
        translate=translate,
        defaults=defaults,
    )


def translate(flags: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Options in sections for the given flags; others: those that files and sections give.

    ConfigError for flags that contradict.
    """
    given = {SAME[name]: value for name, value in flags.items() if name in SAME}
    if "dimhead" in flags and flags.get("embedding_dim", flags["dimhead"]) != flags["dimhead"]:
        raise config.ConfigError(
            f"--dimhead {flags['dimhead']} and --embedding_dim {flags['embedding_dim']}: both are "
            "the width of the transformer; give one"
        )
    for name in ("dimhead", "embedding_dim"):
        if name in flags:
            given["cifar.dim"] = flags[name]
    if flags.get("select_on_test") and "val_share" in flags:
        raise config.ConfigError(
            "--val_share and --select_on_test: the epoch is chosen on one of them; give one"
        )
    if "data" in flags:
        given["cifar.data"] = tuple(flags["data"].split(","))
    given |= _model(flags, others)
    betas = {"adan_beta1": 0.02, "adan_beta2": 0.08, "adan_beta3": 0.01}
    for name in betas:
        if name in flags and flags.get("opt", "adan") != "adan":
            raise config.ConfigError(f"--{name} needs --opt adan")
    if any(name in flags for name in betas):
        try:
            given["training.betas"] = adan_betas(*(flags.get(n, betas[n]) for n in betas))
        except ValueError as error:
            raise config.ConfigError(f"--{error}") from None
    if flags.get("noaug"):
        given["data.randaugment"] = 0
    if flags.get("mixup"):
        given["data.mixup"] = 1.0  # alpha of the paper for CIFAR-10 (section 3.2)
    if flags.get("noamp"):
        given["training.precision"] = "fp32"
    if flags.get("dp"):
        given["training.distributed"] = True
    if flags.get("resume"):
        given["training.resume"] = "newest"
    if flags.get("notb"):
        given["logging.tensorboard"] = False
    if flags.get("nowandb"):
        given["logging.wandb"] = "off"
    return given


def _model(flags: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Options of section `model`, and the net's name in the outputs.

    others: options that a config file or a section gives; they name the net if --net does not.
    """
    kind = flags.get("mrl_kind")
    if flags.get("nested_proj_mrl"):
        if kind not in (None, "nested_proj"):
            raise config.ConfigError(f"--nested_proj_mrl and --mrl_kind {kind}: give one")
        kind = "nested_proj"
    dims = {"model.dims": flags["mrl_dims"]} if "mrl_dims" in flags else {}
    if not flags.get("mrl_flag", False):
        is_nested = _is_on(others.get("model.mrl")) or _is_on(others.get("model.efficient"))
        for name in ("mrl_dims", "nested_proj_mrl", "mrl_kind"):
            if name in flags and not is_nested:
                raise config.ConfigError(f"--{name} needs --mrl_flag")
        if kind is None:
            net = flags.get("net")
            return dims if net is None else dims | {"model.arch": net, "cifar.net": net}

    arch = flags.get("net") or others.get("model.arch")
    families = {family: name for name, family in FAMILY_OF.items()}
    net = FIXED_POSITIONS if arch is None or arch in families else arch
    if kind is None and arch in families:
        kind = families[arch]
    if kind is None and net != FIXED_POSITIONS:
        kind = "shared" if _is_on(others.get("model.efficient")) else "prefixes"
    kind = kind or "independent"
    if kind in FAMILY_OF and net != FIXED_POSITIONS:
        raise config.ConfigError(
            f"--mrl_kind {kind}: for --net {FIXED_POSITIONS}, not {net}; use prefixes or shared"
        )
    given = {"model.arch": FAMILY_OF.get(kind, net), "cifar.net": net, "model.mrl": True}
    # A transformer with a sliced width has a sliced classifier: each member is a slice of it.
    given["model.efficient"] = kind in ("shared", "nested")
    return given | dims


def _is_on(value: Any) -> bool:
    """Whether a bool option is given as true, by a file or as text."""
    return str(value).lower() in ("1", "true")


def is_compression(given: Mapping[str, Any]) -> bool:
    """Whether the defaults of matryoshka-vit-compression apply, else vision-transformers-cifar10's.

    given: the given options in sections.
    """
    net = given.get("model.arch")
    return _is_on(given.get("model.mrl")) or net in COMPRESSION_NETS or net in FAMILY_OF.values()


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of both repositories, by the options that are given."""
    net = given.get("cifar.net") or given.get("model.arch") or "vit"
    # vit_base_patch16_384 of timm
    size = given.get("cifar.size", 384 if net == "vit_timm" else CifarConfig.size)
    optimizer = given.get("training.optimizer", "adam")
    dataset = given.get("cifar.dataset", CifarConfig.dataset)
    rate = given.get("lr.lr", given.get("lr.lr_per_256", 1e-4))
    values = {
        "model.arch": "vit",
        "training.epochs": 100 if is_compression(given) else 200,
        "training.optimizer": "adam",
        "training.weight_decay": 0.02 if optimizer in ("adamw", "adan") else 0.0,
        "training.label_smoothing": 0.0,
        "training.batch_size": given.get("training.global_batch_size", 512),
        "lr.lr": 1e-4,
        "lr.lr_schedule_type": "cosine",
        "data.crop": "padded",
        "data.randaugment": RANDAUGMENT,
        "cifar.size": size,
        "resolution.min_res": size,
        "resolution.max_res": size,
        "validation.resolution": size,
        "validation.crop_ratio": 1.0,
        "validation.lr_tta": False,
        "logging.folder": f"runs/{as_name(net)}_lr{rate}_{as_name(dataset)}",
    }
    if "lr.lr_per_256" in given:
        del values["lr.lr"]  # it would win
    if net == "vit_timm":
        values["model.pretrained"] = True
    if optimizer == "sgd":
        values["training.momentum"] = 0.0  # as in both
    return values


def as_name(text: str) -> str:
    """`text` as a part of a file's name: timm:NAME, hf:OWNER/NAME."""
    return text.replace("/", "-").replace(":", "-")
