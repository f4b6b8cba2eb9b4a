"""Options of reading and writing data sets, without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from matryoshka.config import check_fields, option
from matryoshka.config.limits import MAX_COUNT, MAX_THREADS
from matryoshka.data.catalogue import (
    FOLDER,
    HUGGING_FACE,
    SETS,
    check_set_name,
    check_split,
    known_names,
)
from matryoshka.data.layout import BetonError

ORDERS = ("random", "quasi_random", "sequential")
ON_ERROR = ("error", "skip")  # what a loader does with an image that cannot be decoded
MODES = ("proportion", "jpg", "raw", "smart")
# copies only baseline JPEGs within max_resolution; about twice the bytes of quality 90
TRANSCODE = ("never", "fit", "always")
MAX_RESOLUTION = 26_754  # the largest square whose pixels fit into the largest page
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """Options that determine the bytes of a .beton. BetonError for illegal values."""

    max_resolution: int = option(
        help="longest side in pixels; larger images are reduced to it",
        low=1,
        high=MAX_RESOLUTION,
        common=True,
    )
    write_mode: str = option(
        "smart",
        help="how images are stored; proportion and smart decide per image",
        choices=MODES,
        common=True,
    )
    compress_probability: float | None = option(
        None, help="share stored as jpg, only for proportion (0.5)", low=0, high=1
    )
    smart_threshold: int | None = option(
        None,
        help="only for smart: jpg above this number of raw bytes; unset: all raw",
        low=0,
        high=MAX_COUNT,
    )
    jpeg_quality: float = option(90, help="JPEG quality", low=1, high=100, common=True)
    transcode: str = option(
        "never",
        help="copy JPEGs losslessly; fit: if stored as jpg; always: also instead of raw",
        choices=TRANSCODE,
    )
    subset: int = option(
        -1,
        help="number of samples to store, evenly over the classes; -1: all",
        low=-1,
        common=True,
        high=MAX_COUNT,
    )
    seed: int = option(
        0, help="seed of the subset and of proportion's choices", low=0, high=MAX_SEED
    )
    exif_rotate: bool = option(
        False, help="rotate photos by their EXIF tag before storing them", common=True
    )
    names: bool = option(False, help="keep every original file name in the side file", common=True)

    def __post_init__(self) -> None:
        try:
            check_fields(self)
        except ValueError as error:
            raise BetonError(str(error)) from None
        for name, mode in (("compress_probability", "proportion"), ("smart_threshold", "smart")):
            value = getattr(self, name)
            if value is not None and self.write_mode != mode:
                raise BetonError(
                    f"{name}={value} is for write_mode={mode}, not write_mode={self.write_mode}"
                )


def _set_or_folder(name: str) -> None:
    if not Path(name).is_dir():
        check_set_name(name)


@dataclass(frozen=True, kw_only=True)
class WriterConfig(WriteOptions):
    """Section `cfg` of write_imagenet.py."""

    write_path: str = option(
        help="the .beton to write; an old one is replaced once the new one is complete",
        common=True,
        file_name=True,
    )
    max_resolution: int | None = option(  # type: ignore[assignment]
        None,
        help="longest side in pixels; larger images are reduced to it; default: that of a set "
        "named in cfg.dataset",
        low=1,
        high=MAX_RESOLUTION,
        common=True,
    )
    dataset: str = option(
        FOLDER,
        help=f"{FOLDER}: the folder data_dir; or a set to download: {known_names()}; or a folder "
        "of class folders, or one with train/ and test/",
        check=_set_or_folder,
        common=True,
        file_name=True,
    )
    split: str | None = option(
        None, help="part of a named set, or of the folder cfg.dataset, such as train", common=True
    )
    data_dir: str | None = option(
        None, help="the folder that holds the class folders", common=True, file_name=True
    )
    cache_dir: str = option("./data", help="folder for the downloads of named sets", file_name=True)
    image_column: str | None = option(
        None, help="for hf: column of the images; default: the only one of that type"
    )
    label_column: str | None = option(
        None, help="for hf: column of the labels; default: the only one of that type"
    )
    num_workers: int = option(
        0,
        help="threads, 0: all cores; does not change the file",
        low=0,
        affects_result=False,
        common=True,
        high=MAX_THREADS,
    )
    chunk_size: int = option(
        100,
        help="largest number of samples per unit of work; does not change the file",
        low=1,
        affects_result=False,
        high=MAX_COUNT,
    )
    writer: str = option(
        "native", help="ffcv: FFCV's own writer, for comparison", choices=("native", "ffcv")
    )

    def __post_init__(self) -> None:
        is_public = self.dataset in SETS
        if self.max_resolution is None:
            if not is_public:
                raise BetonError("cfg.max_resolution is required: longest side in pixels")
            object.__setattr__(self, "max_resolution", SETS[self.dataset].side)
        super().__post_init__()
        if is_public:
            try:
                check_split(self.dataset, self.split)
            except ValueError as error:
                raise BetonError(f"cfg.dataset={error}; give cfg.split") from None
        unused = []
        if self.dataset != FOLDER:
            unused.append("data_dir")
        if not self.dataset.startswith(HUGGING_FACE):
            unused += ["image_column", "label_column"]
        for name in unused:
            if (value := getattr(self, name)) is not None:
                raise BetonError(f"cfg.{name}={value} is not used with cfg.dataset={self.dataset}")

    def options(self) -> dict[str, Any]:
        """The keyword arguments of write_beton."""
        return {f.name: getattr(self, f.name) for f in fields(WriteOptions)}
