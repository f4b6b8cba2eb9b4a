"""The images of a run of train_cifar10.py, found from its options: test set and validation part.

run = run_of("runs/vit_lr0.0001_cifar10/RUN/model.safetensors")
name, dataset = images_of_run(run, "validation")    # the images that chose the best epoch
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from matryoshka import json_files
from matryoshka.checkpoint.run_files import PARAMS, run_of
from matryoshka.config import ConfigError
from matryoshka.data import BetonFile, ImageFolder, open_dataset
from matryoshka.data.named import validation_part
from matryoshka.data.split import held_out
from matryoshka.data.subset import Subset
from matryoshka.files import read_regular

PARTS = ("test", "validation")
_NEEDED = (
    *("cifar.data", "cifar.dataset", "cifar.val_share", "cifar.select_on_test"),
    *("data.train_dataset", "data.val_dataset", "training.seed"),
)


def run_with_images(path: str) -> Path | None:
    """`run_of` if it is a run of train_cifar10.py, whose options name its images; else None."""
    run = run_of(path)
    return run if run is not None and _options(run) is not None else None


def images_of_run(
    run: Path, split: str | None = None
) -> tuple[str | None, BetonFile | ImageFolder | Subset]:
    """(name of the public data set or None, images) of a part of a run: test or validation.

    The validation part is cut off the training set as the run did it, from its share and seed.
    ConfigError if the run has no such part, or if its files are not here any more.
    """
    options = _options(run)
    assert options is not None, "see run_with_images"
    name = options.dataset if options.data is None else None
    if split in (None, "test"):
        return name, _opened(run, options.test)
    if split not in ("validation", "val", "valid"):
        raise ConfigError(f"--split {split}: {run} has the parts {' and '.join(PARTS)}")
    if options.select_on_test:
        raise ConfigError(f"--split {split}: {run} chose its epoch on the test set; use that")
    if options.val_share == 0:
        raise ConfigError(
            f"--split {split}: {run} kept no image for validation (--val_share 0); train with a "
            "share, or name other images with --data-root"
        )
    if (path := validation_part(options.data)) is not None:
        return name, _opened(run, path)
    train = _opened(run, options.train)
    return name, held_out(train, options.val_share, options.seed)[1]


def check_same_images(model: str, other: str, split: str | None = None) -> None:
    """ConfigError if two models were trained with different images for `split` of their runs.

    One model may have been trained on the validation images of the other, or on its test images.
    """
    runs = run_with_images(model), run_with_images(other)
    if runs[0] == runs[1]:
        return
    names = ["test"]
    if split not in (None, "test"):
        names += ["train", "data", "val_share", "seed", "select_on_test"]
    found = []
    for run in runs:
        options = None if run is None else _options(run)
        found.append(None if options is None else [getattr(options, name) for name in names])
    if None in found or found[0] != found[1]:
        raise ConfigError(
            f"{model} and {other} are of runs with different images; name those to compare them "
            "on: --dataset cifar10, or --data-root"
        )


def _opened(run: Path, path: str | Path) -> BetonFile | ImageFolder:
    if not Path(path).exists():
        raise ConfigError(
            f"{path}: images of {run}, not here any more; give others: --dataset cifar10, or "
            "--data-root"
        )
    return open_dataset(path)


def _options(run: Path) -> SimpleNamespace | None:
    """The options that say what a run's images are; None if these are not among its options."""
    try:
        params, _ = json_files.decode(read_regular(run / PARAMS))
        values = {name.partition(".")[2]: params[name] for name in _NEEDED}
        share, seed = float(values["val_share"]), int(values["seed"])
        paths = [Path(values[name]) for name in ("train_dataset", "val_dataset")]
    except json_files.JsonFileError as error:
        raise ConfigError(f"{run / PARAMS}: {error}") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
    return SimpleNamespace(
        dataset=values["dataset"],
        data=values["data"],
        val_share=share,
        seed=seed,
        select_on_test=bool(values["select_on_test"]),
        train=paths[0],
        test=paths[1],
    )
