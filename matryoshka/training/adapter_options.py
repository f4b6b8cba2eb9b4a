"""Options of adapt.py, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from matryoshka.config import FlagParser, flat_parser, option
from matryoshka.config.limits import (
    MAX_COUNT,
    MAX_DECAY,
    MAX_DIM,
    MAX_EPOCHS,
    MAX_RATE,
    MAX_SEED,
    MAX_TEMPERATURE,
    MAX_THREADS,
    MIN_TEMPERATURE,
)

MAPS = ("linear", "residual")
LOSSES = ("auto", "nca", "supcon", "classes", "neighbours", "similarity")
SPLITS = ("random", "classes")


def _increasing(numbers: Sequence[int]) -> None:
    if any(a >= b for a, b in pairwise(numbers)):
        raise ValueError("expected increasing numbers")


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Embeddings of any encoder."""

    embeddings: str = option(
        help="folder that `matryoshka embed` wrote; a folder with embeddings.npy [N, D] and, if "
        "there are classes, labels.npy [N]; or such an array, a .npy file",
        metavar="PATH",
        common=True,
        existing=True,
    )
    labels: str | None = option(
        None,
        help=".npy file of integer classes [N]; unset: those of the folder",
        metavar="FILE",
        common=True,
        existing=True,
    )
    output: str = option(
        help="folder of the results, created if missing", metavar="DIR", common=True, file_name=True
    )
    overwrite: bool = option(False, help="replace the results in it", common=True)


@dataclass(frozen=True, kw_only=True)
class MapOptions:
    """The map."""

    dims: tuple[int, ...] | None = option(
        None,
        help="prefixes to fit; the longest is the width of the result; unset: powers of two from 8 "
        "to the width, and the width",
        metavar="D,D,...",
        low=1,
        nonempty=True,
        check=_increasing,
        common=True,
        high=MAX_DIM,
    )
    map: str = option(
        "linear",
        help="linear: a matrix that starts as the rotation of PCA, or, with labels, as a "
        "discriminant analysis; residual: a small network is added to its result",
        choices=MAPS,
        common=True,
    )
    hidden: int | None = option(
        None, help="residual: width of the network; unset: that of the result", low=1, high=65536
    )
    loss: str = option(
        "auto",
        help="with labels nca: a near image is of the same class, supcon: all images of a class "
        "are near, classes: nested cross-entropy; without labels neighbours: keeps who is near at "
        "full width, similarity: keeps its cosines; auto: nca or neighbours",
        choices=LOSSES,
        common=True,
    )


@dataclass(frozen=True, kw_only=True)
class PartOptions:
    """The three parts of the embeddings."""

    split: str = option(
        "random",
        help="random: each part has its share of every class; classes: each part has classes of "
        "its own, for a map that must serve unseen classes",
        choices=SPLITS,
        common=True,
    )
    validation: float = option(
        0.15,
        help="share to stop by, and to choose between the map and PCA",
        above=0,
        below=1,
        common=True,
    )
    test: float = option(0.15, help="share for the table", above=0, below=1, common=True)
    seed: int = option(
        0, help="seed of the parts and of the training", low=0, high=MAX_SEED, common=True
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The training of the map."""

    epochs: int = option(40, help="at most; 0: PCA alone", low=0, high=100_000, common=True)
    patience: int = option(
        10,
        help="epochs without a better validation before the training stops",
        low=1,
        high=MAX_EPOCHS,
    )
    batch_size: int = option(1024, help="embeddings per step", low=2, high=1 << 20)
    lr: float | None = option(
        None, help="peak rate of AdamW; unset: that of the loss", above=0, high=MAX_RATE
    )
    weight_decay: float = option(1e-4, help="of AdamW", low=0, high=MAX_DECAY)
    temperature: float | None = option(
        None,
        help="of the cosines, but for similarity; unset: that of the loss",
        low=MIN_TEMPERATURE,
        high=MAX_TEMPERATURE,
    )
    neighbours: int = option(
        10, help="similarity: nearest of each batch that count again", low=1, high=MAX_COUNT
    )
    threads: int = option(
        0, help="of PyTorch; 0: its default", low=0, high=MAX_THREADS, affects_result=False
    )


def adapt_parser() -> FlagParser:
    """The options of adapt.py."""
    return flat_parser(
        "adapt.py",
        "Good prefixes for the embeddings of any frozen encoder: a map behind it, fitted in "
        "minutes on a CPU.\n\n"
        "    matryoshka adapt --embeddings embeddings/photos --output adapters/photos\n"
        "    matryoshka adapt --embeddings clip/embeddings.npy --dims 16,64,256 --output "
        "adapters/clip\n"
        "    matryoshka embed --path model.safetensors --data photos \\\n"
        "        --adapter adapters/photos/adapter.safetensors --output embeddings/short\n\n"
        "The map becomes the adapter if it is better than plain PCA on the validation part, else "
        "PCA does; the table of raw prefixes, PCA, a random rotation and the adapter comes from a "
        "third part. "
        "docs/adapters.md describes the files.",
        InputOptions,
        MapOptions,
        PartOptions,
        TrainingOptions,
    )
