"""Options of compare_dims.py, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from matryoshka.config import FlagParser, flat_parser, option
from matryoshka.config.limits import MAX_COUNT
from matryoshka.evaluation.options import CACHE
from matryoshka.runtime import RuntimeOptions

MAPS = ("tsne", "pca", "none")
MAP_ROWS = 2000  # t-SNE takes seconds for them


@dataclass(frozen=True, kw_only=True)
class DimsOptions:
    """Models, images, and what is drawn."""

    path: tuple[str, ...] = option(
        help="run folder, model files, or a folder of exports with one dim each",
        metavar="PATH ...",
        words=True,
        nonempty=True,
        common=True,
        existing=True,
    )
    dataset: str | None = option(
        None,
        help="cifar10, cifar100, stl10, tiny-imagenet, hf:OWNER/NAME or a path of your own; unset: "
        "the run's test set",
        common=True,
        file_name=True,
    )
    data_root: str | None = option(
        None,
        help="the images, in place of a download: a .beton file, a folder of class folders, or a "
        "folder with test/ or val/",
        metavar="PATH",
        common=True,
        existing=True,
    )
    split: str | None = option(
        None,
        help="part of --dataset to evaluate on, unset: test or val; of a run: test or validation",
        common=True,
    )
    cache: str | None = option(
        None, help=f"folder of downloaded data sets; unset: {CACHE}", metavar="DIR", file_name=True
    )
    output: str | None = option(
        None,
        help="folder of the results, created if missing; unset: dims/ in the run folder, or here",
        metavar="DIR",
        common=True,
        file_name=True,
    )
    resolution: int | None = option(
        None, help="pixels of a side; unset: as the checkpoint says", low=1, high=8192
    )
    map: str = option(
        "tsne", help="two-dimensional maps of the embeddings", choices=MAPS, common=True
    )
    max_samples: int = option(
        MAP_ROWS,
        help="largest number of embeddings in a map; -1: all",
        flag="--max_samples",
        low=-1,
        common=True,
        high=MAX_COUNT,
    )
    perplexity: float = option(30.0, help="neighbours that t-SNE counts", above=0, below=1e6)
    seed: int = option(42, help="seed of the sample and of t-SNE", low=0, high=2**32 - 1)
    tensorboard: str | None = option(
        None,
        help="also write loss and accuracy to this folder of TensorBoard, with the dim as step",
        metavar="DIR",
        file_name=True,
    )
    no_latency: bool = option(False, help="do not measure the latency")
    batches: tuple[int, ...] = option(
        (1, 128), help="batch sizes of the latency", low=1, high=65536, nonempty=True
    )


def dims_parser() -> FlagParser:
    """The options of compare_dims.py."""
    return flat_parser(
        "compare_dims.py",
        "Every dim of a model, or of several exports: accuracy, parameters, multiply-adds, "
        "latency, file size, confusion matrices and maps of the embeddings.\n\n"
        "    matryoshka dims --path runs/NET/RUN\n"
        "    matryoshka dims --path checkpoint/nested_models --dataset cifar10\n"
        "    matryoshka dims --path a.safetensors b.pth --data-root photos --output compared\n\n"
        "Prints a table; writes dims.json, dims.csv, a confusion matrix of each dim as PNG and "
        "CSV, and the plots as PNG. matryoshka report shows dims.json of a run.",
        DimsOptions,
        RuntimeOptions,
    )
