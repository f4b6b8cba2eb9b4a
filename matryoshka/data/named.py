"""Data sets by name: downloaded and written as .beton once, then found in a folder.

train = named_dataset("cifar10", "train")           # data/cifar10-train.beton
test = named_dataset("my/photos", "test")           # my/photos/test, or my/photos/val
mean, std = normalisation("cifar10")
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matryoshka.config.options import did_you_mean
from matryoshka.data.catalogue import (
    FOLDER,
    HELD_OUT,
    HUGGING_FACE,
    SETS,
    check_split,
    known_names,
    normalisation,
)
from matryoshka.data.downloads import Progress, downloaded
from matryoshka.data.hugging_face import HuggingFaceImages
from matryoshka.data.layout import BetonError
from matryoshka.data.reader import BetonFile
from matryoshka.data.small_sets import READERS
from matryoshka.data.sources import PARTS, Digits
from matryoshka.data.writer import Source, write_beton

__all__ = [
    "CACHE",
    "named_dataset",
    "named_source",
    "normalisation",
    "part_of",
    "validation_part",
]

CACHE = "./data"
_RAW_BYTES = 3 * 96 * 96  # larger images of hf: data sets are stored as JPEG


def named_source(
    name: str,
    split: str | None,
    *,
    cache: str | Path = CACHE,
    image_column: str | None = None,
    label_column: str | None = None,
    progress: Progress | None = None,
) -> Source:
    """A split of a public data set, or of `hf:OWNER/NAME`, as a source for write_beton.

    cache: folder of downloads. image_column, label_column: of hf: (see HuggingFaceImages).
    BetonError for an unknown name or split, and for a download that fails.
    """
    if name.startswith(HUGGING_FACE):
        return HuggingFaceImages(
            name.removeprefix(HUGGING_FACE),
            split,
            cache=cache,
            image_column=image_column,
            label_column=label_column,
        )
    try:
        check_split(name, split)
    except ValueError as error:
        raise BetonError(str(error)) from None
    assert split is not None
    archive = SETS[name].archive
    if archive is None:
        return Digits(split)
    return READERS[name](downloaded(archive, Path(cache), progress), split)


def named_dataset(
    name_or_path: str | os.PathLike,
    split: str,
    cache: str | Path = CACHE,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    max_resolution: int = 256,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Path of a data set that `open_dataset` opens.

    name_or_path: a name of catalogue.SETS; `hf:OWNER/NAME`, or `hf:` and a local parquet file or
        folder; a .beton file or a folder of class folders, which is returned as it is; or a folder
        of parts, such as train/ and test/, or train.beton and test.beton.
    split: "train"; "test" or "val": the part to evaluate on, under the name that it has there; or
        any other part of a named set.
    cache: where a named set is downloaded to, and written as `<name>-<split>.beton` unless that is
        there. Small images are stored raw.
    max_resolution: of the images of hf: sets, in pixels. num_workers: threads, 0 for all cores.
    progress: called with (task, done, total).

    BetonError, one line, for anything that cannot be found, fetched or read. Files appear under
    their names only when they are whole; two processes may prepare the same set.
    """
    name = os.fspath(name_or_path)
    options = {}
    if name in SETS:
        if split in ("test", "val"):
            split = SETS[name].held_out
        stem = f"{name}-{split}"
        options = {"max_resolution": SETS[name].side, "write_mode": "raw"}
    elif name.startswith(HUGGING_FACE):
        # every choice that decides the content is in the name
        identity = (name, split, image_column, label_column, max_resolution, _changes(name))
        readable = re.sub(r"[^\w.-]+", "-", f"{name}-{split}")[:100]
        stem = f"{readable}-{zlib.crc32(repr(identity).encode()):08x}"
        options = {
            "max_resolution": max_resolution,
            "write_mode": "smart",
            "smart_threshold": _RAW_BYTES,
        }
    else:
        return part_of(Path(name), split)
    path = Path(cache) / f"{stem}.beton"
    if path.exists():
        BetonFile(path).close()  # an error that names it, if it is damaged
        return path
    source = named_source(
        name,
        split,
        cache=cache,
        image_column=image_column,
        label_column=label_column,
        progress=progress,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beton(
        source,
        path,
        num_workers=num_workers,
        progress=partial(progress, f"write {path.name}") if progress else None,
        **options,
    )
    return path


def _changes(name: str) -> list[tuple[str, int, int]]:
    """(path, size, time) of the local files behind an hf: name; empty for a set of the hub."""
    path = Path(name.removeprefix(HUGGING_FACE))
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    return [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def part_of(path: Path, split: str) -> Path:
    """The part of a folder that `split` means; the path itself if it has no parts.

    BetonError if nothing is there, or if the folder has parts, but not this one.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        names = [FOLDER, *SETS]
        hint = did_you_mean(str(path), names)
        raise BetonError(f"{path}: no such file or folder, and not {known_names()}{hint}")
    folders = {entry.name for entry in path.iterdir() if entry.is_dir()}
    visible = {name for name in folders if not name.startswith(".")}
    # One folder with another name: the folders are classes, of which one may be called train.
    candidates = {name: path / name for name in visible} if visible <= set(PARTS) else {}
    files = {part: path / f"{part}.beton" for part in PARTS}
    candidates |= {part: file for part, file in files.items() if file.is_file()}
    if not candidates:
        return path
    wanted = [split]
    if split in HELD_OUT:
        wanted = sorted(HELD_OUT, key=lambda part: part != split)
    for part in wanted:
        if part in candidates:
            return candidates[part]
    raise BetonError(f"{path}: has {', '.join(candidates)}, but no {' or '.join(wanted)}")


def validation_part(data: Sequence[str] | None) -> Path | None:
    """`val` of the one folder `data`, if it has `test` as well: then it is for validation.

    Each is a folder, or a .beton file.
    """
    if data is None or len(data) != 1:
        return None
    found = {}
    for part in ("val", "test"):
        for path in (Path(data[0]) / part, Path(data[0]) / f"{part}.beton"):
            if path.exists():
                found.setdefault(part, path)
    return found["val"] if len(found) == 2 else None
