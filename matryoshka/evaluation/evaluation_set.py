"""The images of an evaluation: a test set of ImageNet, a public set by name, or the user's own.

name, dataset = open_evaluation_images(options, "model.safetensors")  # ("cifar10", its test set)
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from matryoshka.config import ConfigError
from matryoshka.config.options import did_you_mean
from matryoshka.data import BetonFile, ImageFolder, open_dataset
from matryoshka.data.bars import Bars
from matryoshka.data.catalogue import HUGGING_FACE, SETS
from matryoshka.data.imagenet import FOLDERS, canonical_name, find_dataset, imagenet_root
from matryoshka.data.named import named_dataset, part_of
from matryoshka.data.subset import Subset
from matryoshka.evaluation.options import CACHE
from matryoshka.evaluation.run_images import images_of_run, run_with_images

OWN = "V1"  # the data set whose folder may be any folder
TEST = "test"  # the part to evaluate on; a set may call it val


def open_evaluation_images(
    options: SimpleNamespace, model: str
) -> tuple[str, BetonFile | ImageFolder | Subset]:
    """(name of the data set, images) that EvaluationSetOptions mean for a model file.

    Without --dataset and --data-root the images of the model's run, if it is one of
    train_cifar10.py; else V1. ConfigError as find_images and images_of_run.
    """
    if options.dataset is None and options.data_root is None:
        run = run_with_images(model)
        if run is not None:
            if options.cache is not None:
                raise ConfigError(f"--cache: the images are those of {run}; add --dataset")
            name, images = images_of_run(run, options.split)
            return name or OWN, images
    name, path = find_images(options)
    return name, open_dataset(path)


def find_images(options: SimpleNamespace) -> tuple[str, Path]:
    """(name of the data set, path of its images) that EvaluationSetOptions mean.

    A public set is downloaded and written to the cache unless it is there, or unless --data-root
    has its images: a .beton file, a folder of class folders, or a folder with test/ or val/.
    ConfigError for a name that is unknown, and for options that this data set does not have.
    """
    name, root = options.dataset or OWN, options.data_root
    if is_own(name):
        if root is not None or options.cache is not None:
            flag = "cache" if root is None else "data-root"
            raise ConfigError(f"--dataset {name} names the images itself; drop --{flag}")
        return OWN, part_of(Path(name), options.split or TEST)
    if not is_public(name):
        check_imagenet_name(name, options)
        name = canonical_name(name)
        root = imagenet_root(root)
        path = find_dataset(name, root)
        if name == OWN and path == Path(root) and (path / "train").is_dir():
            path = part_of(path, TEST)
        return name, path

    name = name if name.startswith(HUGGING_FACE) else name.lower()
    split = options.split or TEST
    if root is not None:
        if options.cache is not None:
            raise ConfigError("--cache is for data sets without --data-root; drop one of the two")
        return name, part_of(Path(root), split)
    with Bars() as progress:
        return name, named_dataset(name, split, options.cache or CACHE, progress=progress)


def is_public(name: str) -> bool:
    """Whether this is a data set of data.catalogue, or of the Hugging Face hub."""
    return name.lower() in SETS or name.startswith(HUGGING_FACE)


def is_own(name: str) -> bool:
    """Whether this is a path of the user's own images; a name wins over a file called like it."""
    is_name = is_public(name) or name.lower() in (key.lower() for key in FOLDERS)
    return not is_name and Path(name).exists()


def check_imagenet_name(name: str, options: SimpleNamespace) -> None:
    """ConfigError unless `name` is a test set of ImageNet, without options of other sets."""
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
