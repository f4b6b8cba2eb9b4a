"""Image files outside a dataset, cropped as a Loader does for evaluation; for query images."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from matryoshka.arrays import takes, uint8
from matryoshka.data import _native
from matryoshka.data.crops import CenterCrop
from matryoshka.data.layout import BetonError
from matryoshka.data.sources import EXTENSIONS, decode_image
from matryoshka.files import read_regular


def image_files(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """The files of one path or of several: a folder means the images below it, sorted by path.

    Hidden files and folders are left out. BetonError for a folder without images.
    """
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        if not os.path.isdir(path):
            found.append(Path(path))
            continue
        inside = [
            file
            for file in sorted(Path(path).rglob("*"))
            if file.name.lower().endswith(EXTENSIONS)
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
            and file.is_file()
        ]
        if not inside:
            raise BetonError(f"{path}: has no images ({' '.join(EXTENSIONS)})")
        found += inside
    return found


def read_images(
    paths: str | os.PathLike | Iterable[str | os.PathLike], crop: CenterCrop
) -> np.ndarray:
    """Decode and crop image files: uint8 [B, size, size, 3]; paths: as for `image_files`.

    EXIF orientations are not applied, as everywhere in the data path. BetonError, one line, for a
    file that cannot be read or decoded.
    """
    squares = []
    for path in image_files(paths):
        try:
            squares.append(central_square(decode_image(read_regular(path)).pixels, crop))
        except OSError as error:
            raise BetonError(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise BetonError(f"{path}: {error}") from None
    return np.stack(squares) if squares else np.empty((0, crop.size, crop.size, 3), np.uint8)


@takes(pixels=uint8("H+ W+ 3"))
def central_square(pixels: np.ndarray, crop: CenterCrop) -> np.ndarray:
    """Cut and resize the central crop: uint8 [H, W, 3] -> [size, size, 3]."""
    height, width = np.array(pixels.shape[:2], np.int32)[:, None]  # [1] each
    x, y, w, h, _ = crop.crops(width, height, np.zeros(1, np.int64), 0, 0)[0].tolist()
    return _native.resize(np.ascontiguousarray(pixels[y : y + h, x : x + w]), crop.size, crop.size)
