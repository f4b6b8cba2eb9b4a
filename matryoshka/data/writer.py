"""Samples -> one .beton file and its side file `<file>.json`.

    manifest = write_beton(ImageFolder("imagenet/train"), "train.beton", max_resolution=500,
    write_mode="jpg")

The bytes are a pure function of the samples and the options: threads decode, resize and encode, one
place decides the order. Both files appear under their names only when they are whole and on the
disk.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from matryoshka.data import _native, layout
from matryoshka.data.layout import BetonError
from matryoshka.data.options import WriteOptions
from matryoshka.data.reader import manifest_path
from matryoshka.data.sources import _exif_orientation, decode_image, upright
from matryoshka.files import Replacement as _Replacement

# A window of chunks is held in memory: a chunk of large raw images is cut to this many bytes.
_CHUNK_BYTES = 16 << 20
# The errors of a file that is not there for us; any other OSError (a disk that fails) stops the
# writing.
_UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError)


class Source(Protocol):
    """What is written, see sources.py."""

    classes: list[str]
    labels: np.ndarray

    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes: ...
    def name(self, index: int) -> str: ...


class _Stored(NamedTuple):
    """One encoded sample, or the reason why there is none."""

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

    num_workers, chunk_size: threads (0: all cores) and samples per unit of work; they do not change
    the file. progress(done, total) is called after every sample. options: the fields of
    WriteOptions.

    Images that no decoder reads are left out and listed in the manifest. BetonError for options
    that make no sense, a folder that does not exist, a full disk, or when no image could be read;
    the source's exceptions pass through. After any error or Ctrl-C there is no new file, and an old
    one at `path` is as it was.
    """
    path = Path(path)
    wanted = WriteOptions(**options)
    if wanted.write_mode == "proportion" and wanted.compress_probability is None:
        wanted = replace(wanted, compress_probability=0.5)
    if num_workers < 0 or chunk_size < 1:
        raise BetonError(
            f"{path}: not written: {num_workers=}, {chunk_size=}: expected at least 0 and 1"
        )
    if wanted.subset != -1 and not 1 <= wanted.subset <= len(source):
        raise BetonError(
            f"{path}: not written: subset={wanted.subset}: expected -1 (all) or 1 to {len(source)}"
        )
    _check_place(path)
    indices = select_subset(source.labels, wanted.subset, wanted.seed)
    raw_bytes = 3 * wanted.max_resolution**2
    workers = num_workers or _cores()
    chunk = max(1, min(chunk_size, _CHUNK_BYTES // raw_bytes))
    manifest = _Manifest(source, wanted)

    with (
        _Replacement(path) as file,
        _Replacement(manifest_path(path)) as side,
        closing(_encode_all(source, indices, wanted, workers, chunk)) as samples,
    ):
        pages = layout.Pages(file.write, len(indices), layout.page_size_for(raw_bytes))
        for done, sample in enumerate(samples, 1):
            manifest.add(sample)
            if sample.width:
                label = int(source.labels[sample.index])
                pages.add(sample.payload, sample.mode, sample.width, sample.height, label)
            if progress is not None:
                progress(done, len(indices))
        if not pages.count:
            first = (
                manifest.broken[0]
                if manifest.broken
                else {"name": "-", "reason": "the source is empty"}
            )
            raise BetonError(
                f"{path}: not written: none of {len(indices)} images could be read; "
                f"the first is {first['name']}: {first['reason']}"
            )
        num_bytes = pages.finish()
        content = manifest.content(pages.count, num_bytes)
        side.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n", 0)
        file.flush()
        side.flush()
        side.publish()  # first: a .beton must never be seen with the class names of an older one
        file.publish()
    return content


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_place(path: Path) -> None:
    """Find out now, not after hours, that the file cannot get its name."""
    if path.is_dir():
        raise BetonError(f"{path}: is a folder, a file is written")
    try:
        path.parent.mkdir(exist_ok=True)
    except FileNotFoundError:
        raise BetonError(f"{path}: the folder {path.parent.parent} does not exist") from None
    except FileExistsError:
        raise BetonError(f"{path}: {path.parent} is not a folder") from None


def select_subset(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Positions of n samples, evenly over the classes, sorted, int64 [n]; all of them for n = -1.

    Classes differ by at most one sample, except where one has too few. A pure function of (labels,
    n, seed).
    """
    if n == -1:
        return np.arange(len(labels))
    shuffled = np.argsort(np.random.Philox(key=seed).random_raw(len(labels)), kind="stable")
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    turn = np.arange(len(labels)) - np.repeat(
        first, counts
    )  # each class gives its k-th sample in turn k
    return np.sort(by_class[np.argsort(turn, kind="stable")[:n]])


# ------------------------------------------------------------------------------------ decode, encode


def _encode_all(
    source: Source, indices: np.ndarray, options: WriteOptions, workers: int, chunk: int
) -> Generator[_Stored]:
    """Every sample in the order of `indices`; few more chunks than threads are in memory at a time."""

    def encode_chunk(part: list[int]) -> list[_Stored]:
        return [_encode(source, index, options) for index in part]

    with ThreadPoolExecutor(workers, "matryoshka-writer") as pool:
        window = deque()
        try:
            for start in range(0, len(indices), chunk):
                window.append(pool.submit(encode_chunk, indices[start : start + chunk].tolist()))
                if len(window) > workers + 2:
                    yield from window.popleft().result()
            while window:
                yield from window.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _encode(source: Source, index: int, options: WriteOptions) -> _Stored:
    name = source.name(index)
    try:
        data = source.read(index)
    except _UNREADABLE as error:
        return _Stored(index, notes=(("broken", error.strerror or type(error).__name__),))
    if options.transcode != "never" and (copy := _transcoded(data, index, options)):
        return copy
    try:
        image = decode_image(data)
    except ValueError as error:
        return _Stored(index, notes=(("broken", str(error)),))

    pixels, notes = image.pixels, []
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

    height, width = pixels.shape[:2]
    if max(height, width) > options.max_resolution:
        height, width = reduced_size(height, width, options.max_resolution)
        notes.append(("resized", ""))
        pixels = _native.resize(pixels, height, width)
    if _stored_as_jpg(options, pixels.nbytes, index):
        payload, mode = _native.encode(pixels, int(options.jpeg_quality)), layout.JPG
    else:
        payload, mode = np.ascontiguousarray(pixels).reshape(-1).data, layout.RAW
    return _Stored(index, payload, mode, width, height, tuple(notes))


def _transcoded(data: bytes, index: int, options: WriteOptions) -> _Stored | None:
    """The source's own coefficients with restart markers; None where they cannot or need not be
    kept.
    """
    try:
        width, height, components = _native.jpeg_size(data)
        turned = _exif_orientation(data) != 1
        if max(width, height) > options.max_resolution or (turned and options.exif_rotate):
            return None
        if options.transcode == "fit" and not _stored_as_jpg(options, 3 * width * height, index):
            return None
        payload = _native.transcode(data)
    except ValueError:  # not a JPEG, progressive, CMYK, damaged
        return None
    notes = (("grayscale", ""),) * (components == 1) + (("exif_orientation", ""),) * turned
    return _Stored(index, payload, layout.JPG, width, height, notes, len(data))


def reduced_size(height: int, width: int, max_resolution: int) -> tuple[int, int]:
    """(height, width) of a larger image, its long side brought to `max_resolution`; cut off, as
    FFCV does.
    """
    ratio = max_resolution / max(width, height)
    return max(1, int(ratio * height)), max(1, int(ratio * width))


def _stored_as_jpg(options: WriteOptions, raw_bytes: int, index: int) -> bool:
    if options.write_mode == "proportion":
        share = options.compress_probability
        return share is not None and _uniform(options.seed, index) < share
    if options.write_mode == "smart":  # without a threshold everything is raw, as FFCV does
        return options.smart_threshold is not None and raw_bytes > options.smart_threshold
    return options.write_mode == "jpg"


def _uniform(seed: int, index: int) -> float:
    """In [0, 1) from (seed, index) alone: two rounds of splitmix64."""
    mask, value = (1 << 64) - 1, seed
    for word in (0, index):
        value = ((value ^ word) + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return (value >> 11) / (1 << 53)


class _Manifest:
    """What was done with which sample; nothing in it depends on time, machine or threads."""

    def __init__(self, source: Source, options: WriteOptions) -> None:
        self._source, self._options = source, options
        self._names: list[str] = []
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
        name = self._source.name(sample.index)
        for kind, reason in sample.notes:
            if kind in self._counts:
                self._counts[kind] += 1
            else:
                self._lists[kind].append({"name": name} | ({"reason": reason} if reason else {}))
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
            **({"names": self._names} if self._options.names else {}),
        }
