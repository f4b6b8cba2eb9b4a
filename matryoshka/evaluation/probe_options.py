"""Options of linear_probe.py, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from matryoshka import config
from matryoshka.config import check_name, option
from matryoshka.config.limits import (
    MAX_BATCH,
    MAX_COUNT,
    MAX_DIM,
    MAX_EPOCHS,
    MAX_NESTING_START,
    MAX_RATE,
    MAX_SEED,
    MAX_THREADS,
)
from matryoshka.runtime import DEVICES, PRECISIONS

SOLVERS = ("lbfgs", "sgd")


@dataclass(frozen=True)
class FrozenConfig:
    """Section `model`."""

    path: str = option(
        help="model whose backbone is used: a checkpoint (.safetensors, .pt), "
        "torchvision:NAME[.WEIGHTS], timm:NAME",
        common=True,
        existing=True,
    )
    dims: tuple[int, ...] | None = option(
        None,
        help="prefix lengths, e.g. 8,12,512; unset: powers of two from 2^nesting_start to the "
        "width",
        low=1,
        common=True,
        high=MAX_DIM,
    )
    nesting_start: int = option(
        3, help="the shortest prefix is 2^nesting_start", low=0, high=MAX_NESTING_START
    )
    efficient: bool = option(False, help="MRL-E: one classifier sliced per prefix")
    device: str = option(
        "auto", help="auto: CUDA, else MPS, else CPU", choices=DEVICES, common=True
    )
    precision: str = option(
        "fp32",
        help="precision of the backbone; fp32: without TF32; auto: bf16 or fp16 on CUDA, else fp32",
        choices=PRECISIONS,
    )


@dataclass(frozen=True)
class DataConfig:
    """Section `data`."""

    train_dataset: str = option(
        help=".beton/.ffcv file or image folder", common=True, existing=True
    )
    val_dataset: str = option(help=".beton/.ffcv file or image folder", common=True, existing=True)
    num_workers: int = option(0, help="decoding threads; 0: all cores", low=0, high=MAX_THREADS)
    batch_size: int = option(256, help="images per forward pass", low=1, high=65536, common=True)


@dataclass(frozen=True)
class ProbeConfig:
    """Section `probe`."""

    solver: str = option(
        "lbfgs",
        help="lbfgs: full batch, to the tolerance; sgd: mini-batches",
        choices=SOLVERS,
        common=True,
    )
    weight_decay: tuple[float, ...] = option(
        (1e-5, 1e-4, 1e-3),
        help="one value, or several to choose from on a held-out tenth",
        low=0,
        nonempty=True,
        common=True,
        high=1e9,
    )
    max_iter: int = option(1000, help="lbfgs: largest number of iterations", low=1, high=MAX_COUNT)
    tolerance: float = option(
        1e-4,
        help="lbfgs: largest entry of the gradient, as a share of that at zero weights",
        above=0,
        high=1,
    )
    epochs: int = option(20, help="sgd: epochs", low=1, high=MAX_EPOCHS)
    lr: float | None = option(
        None,
        help="sgd: learning rate; unset: 1 / the curvature, for each prefix",
        above=0,
        high=MAX_RATE,
    )
    batch_size: int = option(1024, help="sgd: images per step", low=1, high=MAX_BATCH)
    precision: str = option(
        "auto",
        help="precision of the solver; auto: fp64, on MPS fp32",
        choices=("auto", "fp64", "fp32"),
    )
    seed: int = option(0, help="seed of the held-out tenth and of sgd", low=0, high=MAX_SEED)


@dataclass(frozen=True)
class LoggingConfig:
    """Section `logging`."""

    folder: str = option("trainlogs", help="parent of the run folder", common=True, file_name=True)
    run_id: str | None = option(
        None,
        help="name of the run folder; unset: time, probe, 4 digits",
        check=check_name,
        common=True,
    )


SECTIONS = {
    "model": FrozenConfig,
    "data": DataConfig,
    "probe": ProbeConfig,
    "logging": LoggingConfig,
}


def parser() -> config.SectionParser:
    """The options of linear_probe.py."""
    return config.section_parser(
        "linear_probe.py",
        "Nested linear classifiers on the frozen features of any model: the linear probe.\n\n"
        "    matryoshka probe --model.path=torchvision:resnet50 \\\n"
        "        --data.train_dataset=train.beton --data.val_dataset=val.beton",
        SECTIONS,
    )
