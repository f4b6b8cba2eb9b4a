"""Writer of .beton files and their side files `<file>.json`.

    source = ImageFolder("imagenet/train")
    manifest = write_beton(source, "train.beton", max_resolution=500, write_mode="jpg")

The bytes are a pure function of the samples and the options: threads decode, resize and encode, one
loop writes the results in order. Both files get their names only when they are complete and on the
disk.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from matryoshka import json_files
from matryoshka.data import _native, layout
from matryoshka.data.layout import BetonError
from matryoshka.data.options import WriteOptions
from matryoshka.data.reader import BetonFile, manifest_path
from matryoshka.data.sources import (
    ImageFolder,
    _exif_orientation,
    checked_jpeg_size,
    decode_image,
    upright,
)
from matryoshka.environment import available_cores
from matryoshka.files import AtomicFile, as_text

# Several chunks are in memory at a time: chunks of large raw images are limited to this size.
_CHUNK_BYTES = 16 << 20
# Errors of one file, which is then left out; any other OSError (a failing disk) ends the write.
_UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError)


class Source(Protocol):
    """A source of images to write, see sources.py."""

    @property
    def classes(self) -> list[str] | None: ...
    @property
    def labels(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes: ...
    def name(self, index: int) -> str: ...


class _Stored(NamedTuple):
    """One encoded sample; width 0 if the image could not be read."""

    index: int
    payload: bytes | memoryview = b""
    mode: int = layout.RAW
    width: int = 0
    height: int = 0
    notes: tuple[tuple[str, str], ...] = ()  # (kind, reason), counted or listed in the manifest
    source_bytes: int = 0  # of a transcoded JPEG


def write_beton(
    source: Source,
    path: str | os.PathLike,
    *,
    num_workers: int = 0,
    chunk_size: int = 100,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> dict:
    """Write `source` to `path` and return the manifest, which is also written to `<path>.json`.

    num_workers: threads, 0 for all cores. chunk_size: samples per unit of work. Neither changes the
    file. progress(done, total) is called after every sample. options: the fields of WriteOptions.

    Images that no decoder can read are left out and listed in the manifest. BetonError for an
    illegal option, a missing folder, and if no image could be read; FileError for a full disk;
    exceptions of the source propagate. After any error or Ctrl-C there is no new file, and an old
    one at `path` is unchanged.
    """
    path = Path(path)
    settings = WriteOptions(**options)
    if settings.write_mode == "proportion" and settings.compress_probability is None:
        settings = replace(settings, compress_probability=0.5)
    check_arguments(path, num_workers, chunk_size, settings.subset, len(source))
    check_destination(path)
    for name in source.classes or ():
        if as_text(name) != name:  # before the work, not after it
            raise BetonError(f"{path}: not written: the class name {as_text(name)} is not text")
    indices = select_subset(source.labels, settings.subset, settings.seed)
    raw_bytes = 3 * settings.max_resolution**2  # of the largest image that is stored
    workers = num_workers or available_cores()
    chunk = max(1, min(chunk_size, _CHUNK_BYTES // raw_bytes))
    manifest = _Manifest(source, settings)

    with (
        AtomicFile(path) as file,
        AtomicFile(manifest_path(path)) as side,
        closing(_encode_all(source, indices, settings, workers, chunk)) as samples,
    ):
        pages = layout.PageWriter(file.write, len(indices), layout.page_size_for(raw_bytes))
        for done, sample in enumerate(samples, 1):
            manifest.add(sample)
            if sample.width:
                label = int(source.labels[sample.index])
                pages.add(sample.payload, sample.mode, sample.width, sample.height, label)
            if progress is not None:
                progress(done, len(indices))
        if not pages.count:
            empty = {"name": "-", "reason": "the source is empty"}
            first = manifest.broken[0] if manifest.broken else empty
            raise BetonError(
                f"{path}: not written: none of {len(indices)} images could be read; "
                f"the first is {first['name']}: {first['reason']}"
            )
        num_bytes = pages.finish()
        # The hash that a reader will compute: the file is whole, only its name is to come.
        with BetonFile(file.temporary) as written:
            hashes = pages.hashes | {"sampled": written.content().sampled}
        content = manifest.content(pages.count, num_bytes) | {"xxh3_128": hashes}
        side.append(json_files.encode(content))
        # Both on the disk before either gets its name.
        file.flush()
        side.flush()
        side.publish()  # first: a .beton must never be seen with the class names of an older one
        file.publish()
    return content


def left_out(source: Source) -> dict[str, Any]:
    """The manifest's record of files in an image folder that are not samples; empty without any."""
    if not isinstance(source, ImageFolder) or not source.left_out:
        return {}
    heif = [{"name": as_text(name), "reason": "pip install pillow-heif"} for name in source.heif()]
    return {"ignored": source.ignored()} | ({"heif": heif} if heif else {})


def check_arguments(
    path: Path, num_workers: int, chunk_size: int, subset: int, samples: int
) -> None:
    """BetonError for an argument of write_beton outside its legal range."""
    reason = None
    if num_workers < 0:
        reason = f"num_workers={num_workers}: expected 0 (all cores) or more"
    elif chunk_size < 1:
        reason = f"chunk_size={chunk_size}: expected 1 or more"
    elif subset != -1 and not 1 <= subset <= samples:
        reason = f"subset={subset}: expected -1 (all) or 1 to {samples}"
    if reason:
        raise BetonError(f"{path}: not written: {reason}")


def check_destination(path: Path) -> None:
    """Fail before the work, not after it, if the file cannot get its name."""
    if path.is_dir():
        raise BetonError(f"{path}: is a folder; give the name of a file")
    try:
        path.parent.mkdir(exist_ok=True)
    except FileNotFoundError:
        raise BetonError(f"{path}: the folder {path.parent.parent} does not exist") from None
    except FileExistsError:
        raise BetonError(f"{path}: {path.parent} is not a folder") from None


def select_subset(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Positions of n samples, evenly over the classes, sorted, int64 [n]; all of them for n = -1.

    The classes' counts differ by one at most, except where a class has too few samples. A pure
    function of (labels, n, seed).
    """
    if n == -1:
        return np.arange(len(labels))
    # The raw stream, which NumPy guarantees across versions, as in order.py.
    shuffled = np.argsort(np.random.Philox(key=seed).random_raw(len(labels)), kind="stable")
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    # round robin: each class contributes its k-th sample in round k
    turn = np.arange(len(labels)) - np.repeat(first, counts)
    return np.sort(by_class[np.argsort(turn, kind="stable")[:n]])


# ---------------------------------------------------------------- decode, encode


def _encode_all(
    source: Source, indices: np.ndarray, options: WriteOptions, workers: int, chunk: int
) -> Generator[_Stored]:
    """Yield every sample in the order of `indices`; workers + 3 chunks are in memory at most."""

    def encode_chunk(part: list[int]) -> list[_Stored]:
        return [_encode(source, index, options) for index in part]

    with ThreadPoolExecutor(workers, "matryoshka-writer") as pool:
        window = deque()
        try:
            for start in range(0, len(indices), chunk):
                window.append(pool.submit(encode_chunk, indices[start : start + chunk].tolist()))
                # Two chunks beyond the workers' keep them busy while this thread writes.
                if len(window) > workers + 2:
                    yield from window.popleft().result()
            while window:
                yield from window.popleft().result()
        finally:  # also when the consumer stops early or Ctrl-C interrupts it
            pool.shutdown(wait=True, cancel_futures=True)


def _encode(source: Source, index: int, options: WriteOptions) -> _Stored:
    name = source.name(index)
    try:
        data = source.read(index)
    except _UNREADABLE as error:
        return _Stored(index, notes=(("broken", error.strerror or type(error).__name__),))
    if options.transcode != "never":
        copy = _transcoded(data, index, options)
        if copy is not None:
            return copy
    try:
        image = decode_image(data)
    except ValueError as error:
        return _Stored(index, notes=(("broken", str(error)),))

    # ---- properties of the file, for the manifest ----
    pixels = image.pixels
    notes = []
    if image.grayscale:
        notes.append(("grayscale", ""))
    if image.cmyk:
        notes.append(("cmyk", ""))
    if image.damage:
        notes.append(("damaged", image.damage))
    if image.content != "JPEG" and name.lower().endswith((".jpg", ".jpeg")):
        notes.append(("other_content", image.content))
    if image.orientation != 1:
        notes.append(("exif_orientation", ""))
        if options.exif_rotate:
            pixels = upright(pixels, image.orientation)

    # ---- size and storage ----
    height, width = pixels.shape[:2]
    if max(height, width) > options.max_resolution:
        height, width = reduced_size(height, width, options.max_resolution)
        notes.append(("resized", ""))
        pixels = _native.resize(pixels, height, width)
    if _stored_as_jpg(options, pixels.nbytes, index):
        payload = _native.encode(pixels, int(options.jpeg_quality))
        mode = layout.JPG
    else:
        payload = np.ascontiguousarray(pixels).reshape(-1).data
        mode = layout.RAW
    return _Stored(
        index, payload=payload, mode=mode, width=width, height=height, notes=tuple(notes)
    )


def _transcoded(data: bytes, index: int, options: WriteOptions) -> _Stored | None:
    """The coefficients of a source JPEG, with restart markers added; None if the image must be
    decoded, also where its copy would differ: native/proof.hpp compares them.
    """
    try:
        width, height, components = checked_jpeg_size(data)
        is_turned = _exif_orientation(data) != 1
        # Resizing and rotating need pixels.
        if max(width, height) > options.max_resolution or (is_turned and options.exif_rotate):
            return None
        if options.transcode == "fit" and not _stored_as_jpg(options, 3 * width * height, index):
            return None
        payload = _native.transcode(data)
    except ValueError:  # not a JPEG, progressive, CMYK, damaged
        return None
    notes = []
    if components == 1:
        notes.append(("grayscale", ""))
    if is_turned:
        notes.append(("exif_orientation", ""))
    return _Stored(
        index,
        payload=payload,
        mode=layout.JPG,
        width=width,
        height=height,
        notes=tuple(notes),
        source_bytes=len(data),
    )


def reduced_size(height: int, width: int, max_resolution: int) -> tuple[int, int]:
    """(height, width) after reducing the long side to `max_resolution`; rounded down as in FFCV."""
    ratio = max_resolution / max(width, height)
    return max(1, int(ratio * height)), max(1, int(ratio * width))


def _stored_as_jpg(options: WriteOptions, raw_bytes: int, index: int) -> bool:
    if options.write_mode == "proportion":
        # A hash of the index, not a stream: the choice must not depend on the order of threads.
        share = options.compress_probability
        return share is not None and _uniform(options.seed, index) < share
    if options.write_mode == "smart":  # without a threshold everything is raw, as in FFCV
        return options.smart_threshold is not None and raw_bytes > options.smart_threshold
    return options.write_mode == "jpg"


def _uniform(seed: int, index: int) -> float:
    """A uniform number in [0, 1), a hash of (seed, index): two rounds of splitmix64.

    Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators" (OOPSLA).
    """
    mask = (1 << 64) - 1
    value = seed
    for word in (0, index):
        value = ((value ^ word) + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return (value >> 11) / (1 << 53)


class _Manifest:
    """The record of how samples were stored; independent of time, machine and threads."""

    def __init__(self, source: Source, options: WriteOptions) -> None:
        self._source = source
        self._options = options
        self._names: list[str] = []
        # From 0, so that the manifest lists every count.
        self._counts: dict[str, int] = dict.fromkeys(
            ("jpg", "raw", "resized", "grayscale", "exif_orientation"), 0
        )
        if options.transcode != "never":
            self._counts |= dict.fromkeys(
                ("transcoded", "transcoded_source_bytes", "transcoded_bytes"), 0
            )
        self._lists: dict[str, list[dict]] = {
            "cmyk": [],
            "other_content": [],
            "damaged": [],
            "broken": [],
        }

    @property
    def broken(self) -> list[dict]:
        return self._lists["broken"]

    def add(self, sample: _Stored) -> None:
        name = as_text(self._source.name(sample.index))
        for kind, reason in sample.notes:
            if kind in self._counts:
                self._counts[kind] += 1
            else:
                entry = {"name": name}
                if reason:
                    entry["reason"] = reason
                self._lists[kind].append(entry)
        if sample.width:
            self._counts["jpg" if sample.mode == layout.JPG else "raw"] += 1
            if sample.source_bytes:
                self._counts["transcoded"] += 1
                self._counts["transcoded_source_bytes"] += sample.source_bytes
                self._counts["transcoded_bytes"] += len(sample.payload)
            if self._options.names:
                self._names.append(name)

    def content(self, num_samples: int, num_bytes: int) -> dict:
        return {
            "num_samples": num_samples,
            "num_bytes": num_bytes,
            "classes": self._source.classes,
            "options": asdict(self._options),
            "counts": self._counts,
            **self._lists,
            **left_out(self._source),
            **({"names": self._names} if self._options.names else {}),
        }
