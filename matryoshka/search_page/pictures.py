"""Untrusted pictures: uploads of a browser, and images of an index's data sets.

The checked decoder decodes both, and only pixels leave this module. Images of a data set are read
by their number, only if they still have the name that the index knows.
"""

from __future__ import annotations

import errno
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from matryoshka.data import BetonError, BetonFile, ImageFolder, _native
from matryoshka.data.layout import RAW
from matryoshka.data.sources import decode_image, open_images, upright
from matryoshka.files import open_regular
from matryoshka.search_page.memory import PixelMemory, decoding_bytes
from matryoshka.search_page.refusal import Refusal

UPLOAD_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # formats that browsers can show
MAX_PIXELS = 50_000_000  # of an upload: 150 MB of RGB
MAX_FILE = 256 << 20  # bytes of a data set's file
SIZES = 16, 1024  # smallest and largest longer side of a picture, pixels
QUALITY = 85
# A data set that was refused is tried again after this time; it may have been mounted since.
RETRY_SECONDS = 5.0


def read_upload(data: bytes, exif_rotate: bool = False) -> np.ndarray:
    """Decode an image file to uint8 [H, W, 3]. Refusal.

    exif_rotate: apply the EXIF orientation, as the index's images were stored; the data path does
    not apply it otherwise.
    """
    check_upload(data)
    try:
        decoded = decode_image(data)
    except ValueError:
        raise Refusal(400, "the picture is damaged") from None
    return upright(decoded.pixels, decoded.orientation) if exif_rotate else decoded.pixels


def check_upload(data: bytes) -> None:
    """Refusal for a file whose header has another format, or too many pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=UPLOAD_FORMATS) as image:  # reads the header only
            width, height = image.size
    except Image.DecompressionBombError:
        raise Refusal(
            400, f"the picture has more than {MAX_PIXELS // 10**6} million pixels"
        ) from None
    except Exception:  # hostile files make Pillow raise many types
        raise Refusal(
            415, "this is not a JPEG, PNG, WebP, GIF or BMP picture; convert it to one of these"
        ) from None
    # From the header, before any memory is allocated: a small file may declare a huge image.
    if width * height > MAX_PIXELS:
        raise Refusal(
            400,
            f"the picture has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} million",
        )


class Pictures:
    """The data sets of an index, each opened once.

    moved: present paths of data sets, by the path that the index has. fingerprint: computes the
    fingerprint in the embeddings' meta.json. A .beton needs it, because its images are known by
    their numbers, which every other file has as well.
    """

    def __init__(
        self,
        moved: Mapping[str, str] | None = None,
        fingerprint: Callable[[BetonFile | ImageFolder], str] | None = None,
    ) -> None:
        self.memory = PixelMemory()
        self._moved = dict(moved or {})
        self._fingerprint = fingerprint
        self._opened: dict[tuple[str, str | None], BetonFile | ImageFolder] = {}
        # with the time of the next attempt
        self._refused: dict[tuple[str, str | None], tuple[Refusal, float]] = {}
        self._lock = threading.Lock()

    def path_of(self, source: Mapping[str, Any]) -> str:
        """The path of a data set; "" if the index has none."""
        path = str(source.get("path") or "")
        return self._moved.get(path, path)

    def open(self, source: Mapping[str, Any]) -> BetonFile | ImageFolder:
        """A data set by its description in the index. Refusal if it is missing or another one."""
        path = self.path_of(source)
        fingerprint = source.get("fingerprint")
        key = path, fingerprint
        with self._lock:
            if key not in self._opened:
                error, until = self._refused.get(key, (None, 0.0))
                if error is not None and time.monotonic() < until:
                    raise Refusal(error.status, str(error))
                try:
                    self._opened[key] = self._open(path, fingerprint)
                except Refusal as error:
                    self._refused[key] = error, time.monotonic() + RETRY_SECONDS
                    raise
            return self._opened[key]

    def _open(self, path: str, fingerprint: str | None) -> BetonFile | ImageFolder:
        if not path:
            raise Refusal(404, "the index has no path of its pictures")
        try:
            # A list of files is found again if it was all images of their folder.
            data = open_images([path])
            is_same = True  # of a folder, `pixels` compares the name of each file
            if isinstance(data, BetonFile):
                if fingerprint and self._fingerprint:
                    is_same = self._fingerprint(data) == fingerprint
                elif not _names(data):  # every file has an image 7
                    raise Refusal(
                        404,
                        "the index cannot tell this data set from others: no fingerprint, no names",
                    )
        except (BetonError, OSError):
            reason = "cannot be read" if os.path.exists(path) else "does not exist"
            raise Refusal(404, f"the data set {reason}") from None
        if not is_same:
            raise Refusal(404, "the data set is not the one that the index was made from")
        return data

    def are_upright(self, source: Mapping[str, Any]) -> bool:
        """Whether the data set's images were stored with their EXIF orientation applied."""
        try:
            data = self.open(source)
        except Refusal:
            return False
        if not isinstance(data, BetonFile):
            return False
        return bool((data.manifest or {}).get("options", {}).get("exif_rotate"))

    @contextmanager
    def upload(self, data: bytes, exif_rotate: bool) -> Iterator[np.ndarray]:
        """The pixels of `read_upload`, which count against `memory` until they are given back."""
        check_upload(data)
        with self.memory.taken(decoding_bytes(data)):
            yield read_upload(data, exif_rotate)

    @contextmanager
    def pixels(self, source: Mapping[str, Any], number: int, name: str) -> Iterator[np.ndarray]:
        """An image by its number, uint8 [H, W, 3], which counts against `memory`. Refusal.

        name: the index's name of it, which may have a prefix.
        """
        stored = self._stored(source, number, name)
        if isinstance(stored, np.ndarray):
            yield stored
            return
        with self.memory.taken(decoding_bytes(stored)):
            try:
                pixels = decode_image(stored).pixels
            except ValueError:
                raise Refusal(404, "the picture is damaged") from None
            yield pixels

    def _stored(self, source: Mapping[str, Any], number: int, name: str) -> bytes | np.ndarray:
        """An image as its data set has it: an encoded file, or pixels. Refusal."""
        data = self.open(source)
        # endswith: `matryoshka index add --prefix` puts a text before the name.
        if not 0 <= number < len(data) or not name.endswith(_name(data, number)):
            raise Refusal(404, "the data set has changed since the index was made")
        try:
            if isinstance(data, ImageFolder):
                return _read_inside(data.path, data.name(number))
            (samples,) = data.fetch(np.array([number]))
            start = int(samples.offset[0])
            size = int(samples.size[0])
            stored = np.asarray(samples.data)[start : start + size].copy()
            samples.check()
            if samples.mode[0] == RAW:
                return stored.reshape(int(samples.height[0]), int(samples.width[0]), 3)
            return stored.tobytes()
        except Refusal:
            raise
        except OSError:
            raise Refusal(404, "the picture cannot be read") from None
        except ValueError:  # includes BetonError, for a truncated file
            raise Refusal(404, "the picture is damaged") from None

    def jpeg(self, source: Mapping[str, Any], number: int, name: str, size: int) -> bytes:
        """The image of `pixels` as JPEG, with at most `size` pixels on its longer side."""
        with self.pixels(source, number, name) as pixels:
            height, width = pixels.shape[:2]
            scale = min(1.0, size / max(height, width))
            shape = max(1, round(height * scale)), max(1, round(width * scale))
            shown = np.ascontiguousarray(pixels)
            if scale < 1:
                shown = _native.resize(shown, *shape)
            return _native.encode(shown, QUALITY, 0)


def _name(data: BetonFile | ImageFolder, number: int) -> str:
    """The name that `matryoshka embed` gives to an image."""
    if isinstance(data, ImageFolder):
        return data.name(number)
    names = _names(data)
    return names[number] if names else str(number)


def _names(data: BetonFile) -> list[str] | None:
    """Names of the images, if the file was written with them."""
    return (data.manifest or {}).get("names")


def _read_inside(root: Path, name: str) -> bytes:
    """Read a regular file inside `root`. Refusal for links that lead outside, OSError."""
    inside = root.resolve(strict=True)
    file = (root / name).resolve(strict=True)
    if not file.is_relative_to(inside):
        raise Refusal(404, "the picture is a link to a file outside the data set")
    # a link may have replaced the file since it was resolved: not followed
    try:
        with open_regular(file, max_bytes=MAX_FILE, follow_links=False) as opened:
            return opened.read(MAX_FILE)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EFBIG):
            raise Refusal(404, "the picture is not a regular file, or too large") from None
        raise
