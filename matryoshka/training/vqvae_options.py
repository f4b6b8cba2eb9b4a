"""Options of train_vqvae.py, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from matryoshka import config
from matryoshka.config import option
from matryoshka.config.limits import MAX_SEED, MAX_THREADS
from matryoshka.runtime import DEVICES

SUFFIX = ".safetensors"


def _check_path(path: str) -> None:
    if not path.endswith(SUFFIX):
        raise ValueError(f"expected a name that ends in {SUFFIX}")


def _check_patch(patch: int) -> None:
    if patch & (patch - 1):
        raise ValueError("expected a power of two: the encoder halves the image")


def _check_channels(values: tuple[float, ...]) -> None:
    if len(values) != 3:
        raise ValueError(f"expected three numbers, one per channel, not {len(values)}")


@dataclass(frozen=True)
class DataConfig:
    """Section `data`."""

    train_dataset: str = option(
        help=".beton/.ffcv file or image folder", common=True, existing=True
    )
    val_dataset: str | None = option(
        None,
        help=".beton/.ffcv file or image folder for the last error; unset: the training set",
        common=True,
        existing=True,
    )
    size: int = option(32, help="pixels per side, a multiple of the patch", low=2, high=1024)
    mean: tuple[float, ...] = option(
        (0.485, 0.456, 0.406),
        help="of the normalisation; the transformer is trained with the same",
        low=0,
        high=1,
        check=_check_channels,
    )
    std: tuple[float, ...] = option(
        (0.229, 0.224, 0.225),
        help="of the normalisation",
        above=0,
        high=1,
        check=_check_channels,
    )
    num_workers: int = option(0, help="decoding threads; 0: all cores", low=0, high=MAX_THREADS)


@dataclass(frozen=True)
class ModelConfig:
    """Section `model`; the defaults are those of the published configuration."""

    patch: int = option(
        4,
        help="pixels per code and side, a power of two",
        low=2,
        high=256,
        common=True,
        check=_check_patch,
    )
    codes: int = option(512, help="number of codes", low=2, high=65536, common=True)
    code_dim: int = option(
        64,
        help="width of a code; a transformer as wide needs no linear map of the tokens",
        low=1,
        high=16384,
        common=True,
    )
    hiddens: int = option(128, help="channels of the encoder", low=2, high=4096)
    residual_hiddens: int = option(32, help="inside the residual layers", low=1, high=4096)
    residual_layers: int = option(2, help="of encoder and decoder, each", low=1, high=64)
    commitment: float = option(0.25, help="weight of the distance to the codes", low=0, high=100)
    decay: float = option(0.99, help="of the codes' moving averages", low=0, below=1)


@dataclass(frozen=True)
class TrainingConfig:
    """Section `training`."""

    steps: int = option(25000, help="updates", low=1, high=10**9, common=True)
    batch_size: int = option(512, help="images per update", low=1, high=65536, common=True)
    lr: float = option(3e-4, help="learning rate of Adam", above=0, high=10, common=True)
    seed: int = option(0, help="of weights and order", low=0, high=MAX_SEED)
    log_every: int = option(500, help="updates from line to line", low=1, high=10**9)
    device: str = option(
        "auto", help="auto: CUDA, else MPS, else CPU", choices=DEVICES, common=True
    )


@dataclass(frozen=True)
class OutputConfig:
    """Section `output`."""

    path: str = option(
        "vqvae.safetensors",
        help="the file to write; replaced when the new one is whole",
        common=True,
        check=_check_path,
        file_name=True,
    )


SECTIONS = {
    "data": DataConfig,
    "model": ModelConfig,
    "training": TrainingConfig,
    "output": OutputConfig,
}


def parser() -> config.SectionParser:
    """The options of train_vqvae.py."""
    return config.section_parser(
        "train_vqvae.py",
        "A VQ-VAE on small images; its encoder makes the tokens of vitfixedposvqvae.\n\n"
        "    matryoshka vqvae --data.train_dataset=train.beton --output.path=vqvae.safetensors\n"
        "    matryoshka train --model.arch=vitfixedposvqvae \\\n"
        "        --model.arch_options=vqvae=vqvae.safetensors",
        SECTIONS,
    )
