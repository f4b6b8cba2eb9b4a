"""Test data of the loader bench: photos, .beton files of them, a file of 1.28 million samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from matryoshka.data import BetonFile, ImageFolder, layout, write_beton

SMALL = 32  # pixels per side, as CIFAR's images
CLASSES = ["class0", "class1"]


@dataclass
class Material:
    """The files of one run, with `images` photos or more, by repetition. The file `ffcv` exists if
    FFCV's writer works.
    """

    root: Path
    photos: Path | None
    images: int
    with_ffcv: bool = True
    small_photos: Path | None = None
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.originals = self.root / "originals"
        self.folder = self.root / "photos"
        self._prepare()
        data = ImageFolder(self.folder)
        self.jpg = self.root / "jpg.beton"
        self.raw = self.root / "raw.beton"
        self.small = self.root / "small.beton"
        write_beton(data, self.jpg, max_resolution=500, write_mode="jpg", jpeg_quality=90)
        write_beton(data, self.raw, max_resolution=256, write_mode="raw")
        if self.small_photos is None:
            self.pieces = _pieces(data, 16 * self.images)
        else:
            self.pieces = _small(self.small_photos)
        write_beton(_Pieces(self.pieces), self.small, max_resolution=SMALL, write_mode="raw")
        self.ffcv = self.root / "ffcv.beton"
        if not self.with_ffcv:
            return
        try:
            from matryoshka.data.ffcv_backend import write_with_ffcv

            write_with_ffcv(data, self.ffcv, max_resolution=500, write_mode="jpg", jpeg_quality=90)
        except Exception as error:
            self.failed["FFCV's writer"] = str(error).splitlines()[0]

    def _prepare(self) -> None:
        """Write originals/ (unchanged photos) and photos/ (JPEGs up to 500 pixels, quality 90)."""
        if self.photos is None:
            whole = [Image.fromarray(image) for image in load_sample_images().images]
            sources = []
            # Ten pieces of each photo, so that more than two files differ.
            for image in whole:
                for k in range(10):
                    sources.append(image.crop((8 * k, 4 * k, 540 + 8 * k, 380 + 4 * k)))
            original = [None] * len(sources)
        else:
            data = ImageFolder(self.photos)
            original = [data.read(i) for i in range(len(data))]
            sources = [
                Image.open(data.path / data.name(i)).convert("RGB") for i in range(len(data))
            ]
        for i in range(-(-self.images // len(sources)) * len(sources)):
            image = sources[i % len(sources)]
            stored = original[i % len(sources)]
            name = f"{CLASSES[i % 2]}/{i:05d}.jpg"
            for folder in (self.originals, self.folder):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if i < len(sources):
                if stored is None:
                    image.save(self.originals / name, quality=95)
                else:
                    (self.originals / name).write_bytes(stored)
            if max(image.size) > 500:
                image = image.copy()
                image.thumbnail((500, 500))
            image.save(self.folder / name, quality=90)


def _pieces(data: ImageFolder, n: int) -> np.ndarray:
    """Random pieces of a photo, uint8 [n, SMALL, SMALL, 3]."""
    rng = np.random.default_rng(0)
    photo = np.asarray(Image.open(data.path / data.name(0)).convert("RGB"))
    y = rng.integers(0, photo.shape[0] - SMALL + 1, n)
    x = rng.integers(0, photo.shape[1] - SMALL + 1, n)
    return np.stack([photo[b : b + SMALL, a : a + SMALL] for a, b in zip(x, y, strict=True)])


def _small(folder: Path) -> np.ndarray:
    """Every image of a folder of CIFAR, uint8 [n, SMALL, SMALL, 3]."""
    data = ImageFolder(folder)
    return np.stack(
        [np.asarray(Image.open(data.path / data.name(i)).convert("RGB")) for i in range(len(data))]
    )


class _Pieces:
    """A source of small images."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.classes = CLASSES
        self.labels = np.arange(len(pixels)) % 2

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"{index}.ppm"

    def read(self, index: int) -> bytes:
        return b"P6 %d %d 255\n" % (SMALL, SMALL) + self.pixels[index].tobytes()


def kilobytes(path: Path) -> float:
    """Mean size of a stored image in kB."""
    with BetonFile(path) as data:
        return float(data.size.mean()) / 1000


def write_many(path: Path, samples: int) -> None:
    """Write a .beton of `samples` images of 50 kB that are holes: only metadata is on the disk."""
    record = layout.record_dtype([layout.IMAGE, layout.INT])
    page = layout.DEFAULT_PAGE
    size = 50_000
    fields = np.array(
        [(layout.IMAGE, b"image", b""), (layout.INT, b"label", b"")], layout.DESCRIPTOR
    )
    first = layout.align(layout.HEADER.itemsize + fields.nbytes + samples * record.itemsize, page)
    index = np.arange(samples, dtype=np.uint64)
    per_page = page // size  # a sample never crosses the end of a page
    pointer = first + index // per_page * page + index % per_page * size
    records = np.zeros(samples, record)
    records["f0"]["width"] = 500
    records["f0"]["height"] = 375
    records["f0"]["pointer"] = pointer
    records["f1"] = index % 1000
    table = np.zeros(samples, layout.TABLE_ROW)
    table["sample"] = index
    table["pointer"] = pointer
    table["size"] = size
    end = first + -(-samples // per_page) * page
    header = np.array((layout.VERSION, 2, page, samples, end), layout.HEADER)
    with open(path, "wb") as file:
        for part in (header, fields, records):
            file.write(part.tobytes())
        # The pages are never written: the file system stores the gap as a hole.
        file.seek(end)
        file.write(table.tobytes())
