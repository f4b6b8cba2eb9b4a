"""The images of an evaluation: a test set of ImageNet, a public set by name, or the user's own.

name, path = find_images(options)       # ("cifar10", data/cifar10-test.beton)
dataset = open_dataset(path)
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from matryoshka.config import ConfigError
from matryoshka.config.options import did_you_mean
from matryoshka.data.bars import Bars
from matryoshka.data.catalogue import HUGGING_FACE, SETS
from matryoshka.data.imagenet import FOLDERS, canonical_name, find_dataset, imagenet_root
from matryoshka.data.named import named_dataset
from matryoshka.evaluation.options import CACHE

OWN = "V1"  # the data set whose folder may be any folder
HELD_OUT = ("test", "val")  # names of the part to evaluate on


def find_images(options: SimpleNamespace) -> tuple[str, Path]:
    """(name of the data set, path of its images) that EvaluationSetOptions mean.

    A public set is downloaded and written to the cache unless it is there, or unless --data-root
    has its images: a .beton file, a folder of class folders, or a folder with test/ or val/.
    ConfigError for a name that is unknown, and for options that this data set does not have.
    """
    name, root = options.dataset, options.data_root
    if not is_public(name):
        check_imagenet_name(options)
        name = canonical_name(name)
        root = imagenet_root(root)
        path = find_dataset(name, root)
        if name == OWN and path == Path(root) and (path / "train").is_dir():
            path = part_of(path, HELD_OUT[0])
        return name, path

    name = name if name.startswith(HUGGING_FACE) else name.lower()
    split = options.split or HELD_OUT[0]
    if root is not None:
        if options.cache is not None:
            raise ConfigError("--cache is for data sets without --data-root; drop one of the two")
        return name, part_of(Path(root), split)
    with Bars() as progress:
        return name, named_dataset(name, split, options.cache or CACHE, progress=progress)


def is_public(name: str) -> bool:
    """Whether this is a data set of data.catalogue, or of the Hugging Face hub."""
    return name.lower() in SETS or name.startswith(HUGGING_FACE)


def check_imagenet_name(options: SimpleNamespace) -> None:
    """ConfigError unless --dataset is a test set of ImageNet, without options of other sets."""
    name = options.dataset
    if name.lower() not in (key.lower() for key in FOLDERS):
        known = [*FOLDERS, *SETS]
        raise ConfigError(
            f"--dataset {name}: unknown; known: {', '.join(known)}, {HUGGING_FACE}OWNER/NAME"
            f"{did_you_mean(name, known)}; your own images: --data-root"
        )
    for flag in ("split", "cache"):
        if getattr(options, flag) is not None:
            raise ConfigError(
                f"--{flag} is for public data sets such as cifar10; --dataset {name} has none"
            )


def part_of(root: Path, split: str) -> Path:
    """The part `split` of a folder with train/, test/ or val/; `root` itself if it has none."""
    names = sorted(HELD_OUT, key=lambda part: part != split) if split in HELD_OUT else [split]
    for name in names:
        for path in (root / name, root / f"{name}.beton"):
            if path.exists():
                return path
    return root
