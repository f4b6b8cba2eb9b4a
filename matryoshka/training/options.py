"""Options of train_imagenet.py, without torch.

checks.py checks them against each other, the data and the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from matryoshka import config
from matryoshka.config import AUTO, check_fields, check_name, option
from matryoshka.config.limits import (
    MAX_ALPHA,
    MAX_BATCH,
    MAX_COUNT,
    MAX_DECAY,
    MAX_EPOCHS,
    MAX_JITTER,
    MAX_MINUTES,
    MAX_RATE,
    MAX_RATIO,
    MAX_SECONDS,
    MAX_SEED,
    MAX_SIDE,
    MAX_TEMPERATURE,
    MAX_THREADS,
    MIN_RATIO,
    MIN_TEMPERATURE,
)
from matryoshka.data.options import ON_ERROR, ORDERS
from matryoshka.models.options import ModelConfig
from matryoshka.runtime import DEVICES, PRECISIONS, DistConfig

OPTIMIZERS = ("sgd", "adam", "adamw", "adan", "lars", "muon")
MOMENTUM = 0.9
ADAN_BETAS = (0.98, 0.92, 0.99)  # of the authors' code
BETAS = {"adam": 2, "adamw": 2, "adan": 3, "muon": 2}  # their number, by optimizer
CROPS = ("resized", "padded")
GRAPHS = "graphs"  # of training.compile: CUDA graphs
COMPILE = ("1", "0", GRAPHS)
SHORTEST_HANG = 1  # second; every step counts as progress, and the first one takes longest


@dataclass(frozen=True)
class ResolutionConfig:
    """Section `resolution`: training images grow from min_res to max_res between two epochs."""

    min_res: int = option(160, help="pixels up to start_ramp", low=1, high=MAX_SIDE, common=True)
    max_res: int = option(160, help="pixels from end_ramp on", low=1, high=MAX_SIDE, common=True)
    start_ramp: int = option(0, help="epoch at which images start to grow", low=0, high=MAX_EPOCHS)
    end_ramp: int = option(0, help="epoch from which images have max_res", low=0, high=MAX_EPOCHS)


def check_color_jitter(strengths: tuple[float, float, float, float]) -> None:
    """ValueError for a hue that would turn by more than half the colour wheel."""
    if strengths[3] > 0.5:
        raise ValueError(f"expected a hue of 0 to 0.5, got {strengths[3]:g}")


@dataclass(frozen=True)
class ReadingConfig:
    """Options of section `data` that say where images come from and how they are read."""

    train_dataset: str | None = option(
        None,
        help=".beton/.ffcv file or image folder",
        affects_result=False,
        common=True,
        existing=True,
    )
    val_dataset: str | None = option(
        None,
        help=".beton/.ffcv file or image folder",
        affects_result=False,
        common=True,
        existing=True,
    )
    loader: str = option(
        "native", help="ffcv: FFCV's own loader, for comparison", choices=("native", "ffcv")
    )
    num_workers: int = option(
        0,
        help="decoding threads per process; 0: all cores, divided among the processes",
        low=0,
        high=MAX_THREADS,
        affects_result=False,
    )
    in_memory: bool = option(
        True,
        help="1: read the training file into the page cache first; 0: read through a bounded "
        "buffer",
        affects_result=False,
    )
    order: str = option(
        "auto",
        help="order of training images; auto: random; with in_memory=0 and a .beton quasi_random, "
        "which reads whole pages",
        choices=("auto", *ORDERS),
    )
    window_pages: int = option(
        128,
        help="pages (8 MB each) that quasi_random mixes and, with in_memory=0, holds",
        low=1,
        high=2**20,
    )
    resident: str = option(
        "auto",
        help="1: keep both sets on the device, decoded; auto: small images of one size that fit",
        choices=AUTO,
    )
    on_error: str = option(
        "error",
        help="a training image that cannot be decoded: stop, or skip it and list it in "
        "skipped.jsonl",
        choices=ON_ERROR,
    )


@dataclass(frozen=True)
class DataConfig(ReadingConfig):
    """Section `data`."""

    flip: float = option(0.5, help="probability of a horizontal flip", low=0, high=1)
    crop: str = option(
        "resized",
        help="resized: a random part, resized; padded: shifted by up to data.padding pixels",
        choices=CROPS,
    )
    padding: int = option(
        4, help="black pixels around the image, for crop=padded", low=0, high=MAX_SIDE
    )
    scale: tuple[float, float] = option(
        (0.08, 1.0), help="crop area, share of the image: low,high", above=0, high=1
    )
    ratio: tuple[float, float] = option(
        (3 / 4, 4 / 3),
        help="crop aspect ratio: low,high",
        low=MIN_RATIO,
        high=MAX_RATIO,
    )
    mixup: float = option(
        0.0,
        help="alpha of mixup; with cutmix, each for half of the batches; 0: off",
        low=0,
        high=MAX_ALPHA,
    )
    cutmix: float = option(0.0, help="alpha of CutMix; 0: off", low=0, high=MAX_ALPHA)
    randaugment: float = option(
        0.0,
        help="magnitude of RandAugment on the paper's scale; 0: off",
        low=0,
        high=10,
    )
    randaugment_ops: int = option(2, help="operations of RandAugment per image", low=1, high=16)
    color_jitter: tuple[float, float, float, float] = option(
        (0.0, 0.0, 0.0, 0.0),
        help="strength of random brightness,contrast,saturation,hue, as torchvision's; 0: off",
        low=0,
        check=check_color_jitter,
        high=MAX_JITTER,
    )
    random_erasing: float = option(
        0.0, help="probability that a rectangle of the image is erased", low=0, high=1
    )


@dataclass(frozen=True)
class EvaluationCrop:
    """Options of section `validation`: images of an evaluation."""

    batch_size: int = option(
        512, help="images per process", low=1, affects_result=False, high=MAX_BATCH
    )
    resolution: int = option(224, help="pixels of the central crop", low=1, high=MAX_SIDE)
    crop_ratio: float = option(
        224 / 256, help="side of the crop / shorter side of the image", above=0, high=1
    )


@dataclass(frozen=True)
class ValidationConfig(EvaluationCrop):
    """Section `validation`."""

    lr_tta: bool = option(True, help="add the logits of the mirror image")


@dataclass(frozen=True)
class LrConfig:
    """Section `lr`."""

    lr: float | None = option(
        None, help="peak rate; unset: lr_per_256 x global batch / 256", low=0, high=MAX_RATE
    )
    lr_per_256: float = option(
        0.125,
        help="peak rate per 256 images of the global batch",
        low=0,
        common=True,
        high=MAX_RATE,
    )
    lr_schedule_type: str = option(
        "cyclic", help="shape over the run", choices=("step", "cyclic", "constant", "cosine")
    )
    lr_peak_epoch: int = option(2, help="cyclic: epoch of the highest rate", low=0, high=MAX_EPOCHS)
    warmup_epochs: float = option(
        0.0,
        help="step, constant, cosine: epochs from 1e-4 x the peak rate to the peak, linear",
        low=0,
        high=MAX_EPOCHS,
    )
    step_ratio: float = option(0.1, help="step: factor at each step", low=0, high=1)
    step_length: int = option(30, help="step: epochs between two steps", low=1, high=MAX_EPOCHS)

    def __post_init__(self) -> None:
        check_fields(self, "lr")
        if self.warmup_epochs and self.lr_schedule_type == "cyclic":
            raise ValueError(
                f"lr.warmup_epochs={self.warmup_epochs}: the ramp of lr.lr_schedule_type=cyclic "
                "is its warm-up; give lr.lr_peak_epoch"
            )
        if self.warmup_epochs > self.step_length and self.lr_schedule_type == "step":
            raise ValueError(
                f"lr.warmup_epochs={self.warmup_epochs}: longer than "
                f"lr.step_length={self.step_length}; the first step would fall into the warm-up"
            )


def check_hang_timeout(seconds: float) -> None:
    """ValueError for a time in which no step can be made."""
    if 0 < seconds < SHORTEST_HANG:
        raise ValueError(f"expected 0, or {SHORTEST_HANG} seconds or more")


@dataclass(frozen=True)
class LoopConfig:
    """Options of section `training` that every training program has."""

    batch_size: int = option(
        512,
        help="largest batch per process and forward pass",
        low=1,
        affects_result=False,
        common=True,
        high=MAX_BATCH,
    )
    accumulate: int = option(
        1, help="forward passes per optimizer step", low=1, affects_result=False, high=65_536
    )
    global_batch_size: int = option(
        0,
        help="images per optimizer step; 0: batch_size x processes x accumulate",
        low=0,
        affects_result=False,
        high=MAX_COUNT,
    )
    optimizer: str = option("sgd", help="optimizer", choices=OPTIMIZERS)
    momentum: float = option(
        MOMENTUM, help="momentum of SGD, LARS and Muon; beta1 of Adam and AdamW", low=0, high=1
    )
    betas: tuple[float, ...] | None = option(
        None,
        help="weights of the old means: two for adam, adamw and muon's AdamW (default: "
        "momentum,0.999), three for adan (default: 0.98,0.92,0.99)",
        low=0,
        below=1,
    )
    nesterov: bool = option(False, help="Nesterov's momentum for sgd and muon")
    muon_steps: int = option(5, help="muon: Newton-Schulz iterations", low=1, high=20)
    muon_scale: str = option(
        "adamw",
        help="muon: steps as large as AdamW's; filters: filters of a fixed norm, for convolutions "
        "that a normalisation follows (with muon_rest=sgd)",
        choices=("adamw", "filters"),
    )
    muon_rest: str = option(
        "adamw",
        help="muon: optimizer of vectors and classifiers; with muon_scale=filters of all but "
        "filters",
        choices=("adamw", "sgd"),
    )
    muon_rest_lr: float = option(
        1.0, help="muon: rate of the rest, as a factor of the rate", above=0, high=MAX_RATE
    )
    muon_rest_momentum: float | None = option(
        None, help="muon: momentum of muon_rest=sgd; unset: momentum", low=0, below=1
    )
    weight_decay: float = option(
        4e-5, help="weight decay of all but norm layers", low=0, high=MAX_DECAY
    )
    bn_wd: float = option(
        0.0, help="weight decay of norm layers, found by their type", low=0, high=MAX_DECAY
    )
    clip: float = option(
        0.0,
        help="largest gradient norm of a step, longer ones are scaled; 0: no limit",
        low=0,
        high=1e9,
    )
    sync_bn: bool = option(
        False, help="batch norm over all processes; every layer waits for the GPU (GPUs only)"
    )
    epochs: int = option(
        30, help="passes over the training set", low=1, common=True, high=MAX_EPOCHS
    )
    distributed: bool | None = option(
        None,
        help="1: start the processes of section dist; under torchrun 1 is implied, 0 an error",
        affects_result=False,
    )
    seed: int = option(
        0, help="seed of weights, sample order, crops and augmentations", low=0, high=MAX_SEED
    )
    deterministic: bool = option(
        False, help="the same weights in every run, slower: no compilation, no autotuning"
    )
    precision: str = option(
        "auto", help="auto: bf16 or fp16 on CUDA, else fp32 (without TF32)", choices=PRECISIONS
    )
    compile: str | None = option(
        None,
        help="1: torch.compile; graphs: as CUDA graphs, too, for small networks, images and "
        "batches on one GPU; unset: 1 on CUDA, in runs of 5,000 steps and more",
        choices=COMPILE,
        affects_result=False,
    )
    device: str = option(
        "auto",
        help="auto: CUDA, else MPS, else CPU",
        choices=DEVICES,
        affects_result=False,
        common=True,
    )
    resume: str | None = option(
        None,
        help="auto: resume logging.run_id from its last checkpoint; or a run folder, or a "
        "checkpoint in one",
        affects_result=False,
        common=True,
        file_name=True,
    )
    checkpoint_every_steps: int = option(
        0,
        help="steps between two checkpoints; 0: only those of epochs and minutes",
        low=0,
        affects_result=False,
        high=MAX_COUNT,
    )
    checkpoint_every_minutes: float = option(
        10.0,
        help="minutes between two checkpoints within an epoch; 0: off",
        low=0,
        affects_result=False,
        high=MAX_MINUTES,
    )
    keep_last: int = option(
        3,
        help="number of checkpoints to keep, beside the best one",
        low=1,
        affects_result=False,
        high=MAX_COUNT,
    )
    skip_limit: int = option(
        10,
        help="consecutive steps without a finite gradient before a rollback to the last checkpoint",
        low=1,
        affects_result=False,
        high=MAX_COUNT,
    )
    hang_timeout: float = option(
        1800.0,
        help="seconds without progress before the run saves its stacks and ends; 0: never",
        low=0,
        check=check_hang_timeout,
        affects_result=False,
        high=MAX_SECONDS,
    )

    def __post_init__(self) -> None:
        if self.global_batch_size and self.accumulate != 1:
            raise ValueError(
                f"training.accumulate={self.accumulate} and "
                f"training.global_batch_size={self.global_batch_size}: "
                "give one, the other follows from it"
            )
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        """ValueError for an option that this optimizer has no use for."""
        name = self.optimizer
        if self.betas is not None:
            count = BETAS.get(name)
            shown = ",".join(map(str, self.betas))
            if count is None or (name == "muon" and self.muon_rest == "sgd"):
                raise ValueError(f"training.betas={shown}: SGD and LARS have none; leave it out")
            if len(self.betas) != count:
                raise ValueError(f"training.betas={shown}: {name} has {count}")
            if name != "muon" and self.momentum != MOMENTUM:
                raise ValueError(
                    f"training.momentum={self.momentum} and training.betas={shown}: "
                    "the momentum is the first beta; leave one out"
                )
        if name == "adan" and self.momentum != MOMENTUM:
            raise ValueError(
                f"training.momentum={self.momentum}: adan has none; give training.betas"
            )
        if self.nesterov and (name not in ("sgd", "muon") or not self.momentum):
            raise ValueError(
                "training.nesterov=1: needs training.optimizer=sgd or muon, and a momentum"
            )
        self._check_muon()

    def _check_muon(self) -> None:
        defaults = {"muon_steps": 5, "muon_scale": "adamw", "muon_rest": "adamw"}
        defaults |= {"muon_rest_lr": 1.0, "muon_rest_momentum": None}
        for option_name, default in defaults.items():
            value = getattr(self, option_name)
            if self.optimizer != "muon" and value != default:
                raise ValueError(
                    f"training.{option_name}={value}: needs training.optimizer=muon, not "
                    f"{self.optimizer}"
                )
        if self.muon_rest != "sgd" and self.muon_scale == "filters":
            raise ValueError("training.muon_scale=filters: needs training.muon_rest=sgd")
        if self.muon_rest != "sgd" and self.muon_rest_momentum is not None:
            raise ValueError(
                f"training.muon_rest_momentum={self.muon_rest_momentum}: needs "
                "training.muon_rest=sgd; AdamW has training.betas"
            )


@dataclass(frozen=True)
class TrainingConfig(LoopConfig):
    """Section `training`."""

    eval_only: bool = option(False, help="evaluate training.path instead of training")
    path: str | None = option(None, help="checkpoint for eval_only", existing=True)
    ema: float = option(
        0.0,
        help="decay of an exponential moving average of the weights, also evaluated; 0: off",
        low=0,
        high=1,
    )
    label_smoothing: float = option(0.1, help="label smoothing of the loss", low=0, high=1)
    distill: float = option(
        0.0,
        help="share of the loss of every shorter prefix (or width) that pulls its answers to the "
        "longest one's, the rest is the labels'; 0: off",
        low=0,
        high=1,
    )
    distill_temperature: float = option(
        1.0,
        help="distill: temperature that softens both answers",
        low=MIN_TEMPERATURE,
        high=MAX_TEMPERATURE,
    )
    sandwich: int | None = option(
        None,
        help="train the smallest, the largest and this many random other widths in each step; "
        "unset: all",
        low=0,
        high=1024,
    )
    use_blurpool: bool = option(False, help="anti-aliased strided convolutions")


def adan_betas(beta1: float, beta2: float, beta3: float) -> tuple[float, float, float]:
    """`training.betas` for Adan's betas as adan-pytorch has them (seed flags --adan_beta1 .02 ...).

    There, as in Algorithm 1 of the paper (arXiv 2208.06677), a beta is the weight of the new
    gradient; here, as in the authors' code, in timm and in Adam, it is that of the old mean:
    (.02, .08, .01) is (.98, .92, .99). ValueError outside 0 (exclusive) to 1.
    """
    for number, beta in enumerate((beta1, beta2, beta3), 1):
        if not 0 < beta <= 1:
            raise ValueError(f"adan_beta{number}={beta}: expected more than 0, at most 1")
    # 1 - 0.08 is 0.92 only to 16 digits; the option should read as it would be typed
    return (round(1 - beta1, 12), round(1 - beta2, 12), round(1 - beta3, 12))


@dataclass(frozen=True)
class LoggingConfig:
    """Section `logging`."""

    folder: str = option(
        "trainlogs",
        help="parent of the run folder",
        affects_result=False,
        common=True,
        file_name=True,
    )
    run_id: str | None = option(
        None,
        help="name of the run folder; unset: torchrun's run id, or time, model, 4 digits",
        check=check_name,
        affects_result=False,
        common=True,
    )
    log_level: int = option(
        1,
        help="0: evaluate once, at the end; 1: after every epoch; 2: also log steps",
        low=0,
        affects_result=False,
        high=2,
    )
    tensorboard: bool = option(True, help="write scalars for TensorBoard", affects_result=False)
    wandb: str | None = option(
        None,
        help="project of Weights & Biases to log to as well (WANDB_MODE=offline: a folder)",
        affects_result=False,
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


def parser() -> config.SectionParser:
    """The options of train_imagenet.py."""
    return config.section_parser(
        "train_imagenet.py",
        "Train a nested (MRL, MRL-E) or fixed-feature model on .beton files or image folders.\n\n"
        "    matryoshka train --model.mrl=1 --training.epochs=16 \\\n"
        "        --data.train_dataset=train.beton --data.val_dataset=val.beton\n"
        "    torchrun --nproc_per_node=8 train/train_imagenet.py --model.mrl=1 \\\n"
        "        --config-file=rn50_configs/rn50_40_epochs.yaml \\\n"
        "        --data.train_dataset=train.beton --data.val_dataset=val.beton",
        SECTIONS,
    )
