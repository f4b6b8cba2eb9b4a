"""Pictures from outside: what a browser sends, and those of the data sets that an index was made
of.

Both are decoded by the checked decoder, and only pixels go further. Of a data set only images that
it has itself are read, by their number, and only if they still have the name that the index knows.
"""

from __future__ import annotations

import errno
import io
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from matryoshka.data import BetonError, BetonFile, ImageFolder, _native, open_dataset
from matryoshka.data.layout import RAW
from matryoshka.data.sources import decode_image
from matryoshka.files import open_regular

UPLOADS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # what browsers can show
MAX_PIXELS = 50_000_000  # of an upload: 150 MB of RGB
MAX_FILE = 256 << 20  # bytes of a data set's file
SIZES = 16, 640  # pixels of the longer side of what is sent
QUALITY = 85
# seconds until a data set that was refused is looked for again: it may have been mounted since
RETRY = 5.0


class Refusal(ValueError):
    """What somebody asks for and does not get. status: of HTTP; the message names nothing of this
    machine.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def read_upload(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of an image file, as it was stored: EXIF orientations are not applied, as
    nowhere in the data path. Refusal.
    """
    try:
        with Image.open(io.BytesIO(data), formats=UPLOADS) as image:  # reads the header only
            width, height = image.size
    except Image.DecompressionBombError:
        raise Refusal(
            400, f"the picture has more than {MAX_PIXELS // 10**6} million pixels"
        ) from None
    except Exception:  # a hostile file makes Pillow raise nearly anything
        raise Refusal(
            415, "this is not a JPEG, PNG, WebP, GIF or BMP picture; convert it to one of these"
        ) from None
    if width * height > MAX_PIXELS:
        raise Refusal(
            400,
            f"the picture has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} million",
        )
    try:
        return decode_image(data).pixels
    except ValueError:
        raise Refusal(400, "the picture is damaged") from None


class Pictures:
    """The data sets of an index, opened once each where they can be.

    replaced: where data sets lie now, by the path that the index has. fingerprint: of a data set,
    as its embeddings' meta.json has it: an image of a .beton is known by its number, which tells
    nothing of another file.
    """

    def __init__(
        self,
        replaced: Mapping[str, str] | None = None,
        fingerprint: Callable[[BetonFile | ImageFolder], str] | None = None,
    ) -> None:
        self._replaced, self._fingerprint = dict(replaced or {}), fingerprint
        self._opened: dict[tuple[str, str | None], BetonFile | ImageFolder] = {}
        self._refused: dict[tuple[str, str | None], tuple[Refusal, float]] = {}  # until when
        self._lock = threading.Lock()

    def place(self, about: Mapping[str, Any]) -> str:
        """Where the data set is looked for; "" where the index does not say."""
        path = str(about.get("path") or "")
        return self._replaced.get(path, path)

    def open(self, about: Mapping[str, Any]) -> BetonFile | ImageFolder:
        """about: what the index has of a data set. Refusal where it is not there or not the same."""
        key = place, fingerprint = self.place(about), about.get("fingerprint")
        with self._lock:
            if key not in self._opened:
                error, until = self._refused.get(key, (None, 0.0))
                if error is not None and time.monotonic() < until:
                    raise Refusal(error.status, str(error))
                try:
                    self._opened[key] = self._open(place, fingerprint)
                except Refusal as error:
                    self._refused[key] = error, time.monotonic() + RETRY
                    raise
            return self._opened[key]

    def _open(self, place: str, fingerprint: str | None) -> BetonFile | ImageFolder:
        if not place:
            raise Refusal(404, "the index does not say where its pictures are")
        try:
            data = open_dataset(place)
            same = True  # a folder's files are told by their names, one by one
            if isinstance(data, BetonFile):
                if fingerprint and self._fingerprint:
                    same = self._fingerprint(data) == fingerprint
                elif not _names(data):  # any file has a number 7
                    raise Refusal(
                        404,
                        "the index cannot tell this data set from others: no fingerprint, no names",
                    )
        except (BetonError, OSError):
            gone = "cannot be read" if os.path.exists(place) else "is not there any more"
            raise Refusal(404, f"the data set {gone}") from None
        if not same:
            raise Refusal(404, "the data set is not the one that the index was made of")
        return data

    def pixels(self, about: Mapping[str, Any], number: int, name: str) -> np.ndarray:
        """uint8 [H, W, 3] of an image by its number; name: what the index calls it, with or without
        a text before. Refusal.
        """
        data = self.open(about)
        if not 0 <= number < len(data) or not name.endswith(_name(data, number)):
            raise Refusal(404, "the data set has changed since the index was made")
        try:
            if isinstance(data, ImageFolder):
                return decode_image(_read_inside(data.path, data.name(number))).pixels
            (found,) = data.fetch(np.array([number]))
            start, size = int(found.offset[0]), int(found.size[0])
            stored = np.asarray(found.data)[start : start + size]
            if found.mode[0] == RAW:
                return stored.reshape(int(found.height[0]), int(found.width[0]), 3)
            return decode_image(stored.tobytes()).pixels
        except Refusal:
            raise
        except OSError:
            raise Refusal(404, "the picture cannot be read any more") from None
        except ValueError:  # also BetonError, of a file that was cut off
            raise Refusal(404, "the picture is damaged") from None

    def jpeg(self, about: Mapping[str, Any], number: int, name: str, size: int) -> bytes:
        """A picture as `pixels` gives it, its longer side at most `size`, as JPEG."""
        pixels = self.pixels(about, number, name)
        height, width = pixels.shape[:2]
        scale = min(1.0, size / max(height, width))
        shape = max(1, round(height * scale)), max(1, round(width * scale))
        if scale < 1:
            pixels = _native.resize(np.ascontiguousarray(pixels), *shape)
        return _native.encode(np.ascontiguousarray(pixels), QUALITY, 0)


def _name(data: BetonFile | ImageFolder, number: int) -> str:
    """As `matryoshka embed` names an image."""
    if isinstance(data, ImageFolder):
        return data.name(number)
    names = _names(data)
    return names[number] if names else str(number)


def _names(data: BetonFile) -> list[str] | None:
    return (data.manifest or {}).get("names")


def _read_inside(root: Path, name: str) -> bytes:
    """A regular file that lies in `root`, wherever links may lead. Refusal for one outside,
    OSError.
    """
    inside = root.resolve(strict=True)
    file = (root / name).resolve(strict=True)
    if not file.is_relative_to(inside):
        raise Refusal(404, "the picture is a link to a file outside of the data set")
    # a link may have replaced the file since it was resolved: not followed
    try:
        with open_regular(file, max_bytes=MAX_FILE, follow_links=False) as opened:
            return opened.read(MAX_FILE)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EFBIG):
            raise Refusal(404, "the picture is not a regular file, or too large") from None
        raise
