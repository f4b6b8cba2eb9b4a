"""Sources of images for the writer: image folders and scikit-learn's digits.

A source has `classes` (list of str, or None), `labels` (int64 [N]), `len()`, `read(i)` -> the bytes
of an image file, and `name(i)` -> its name for lists and messages. `write_beton` needs no more: a
new source is one class. `decode_image` decodes the bytes of any image file to RGB.
"""

from __future__ import annotations

import io
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from matryoshka.arrays import integers, takes
from matryoshka.data import _native
from matryoshka.data.catalogue import HELD_OUT
from matryoshka.data.fingerprint import Content, hash_folder
from matryoshka.data.layout import JPG, RAW, BetonError, Samples
from matryoshka.data.pages import MapFeed
from matryoshka.data.reader import BetonFile
from matryoshka.environment import is_installed
from matryoshka.files import as_text, read_regular

HEIF_EXTENSIONS = (".heic", ".heif")
HAS_HEIF = is_installed("pillow_heif")  # the extra [heif]
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"),
    *(HEIF_EXTENSIONS if HAS_HEIF else ()),
)

# The formats of photos only: Pillow's other readers (PostScript, ...) must not see hostile files.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF")
# Pillow's limit for "decompression bombs" (Image.MAX_IMAGE_PIXELS is half of it), here for every
# decoder: half a gigabyte of RGB.
MAX_PIXELS = 178_956_970
_ORIENTATION = 0x0112  # the EXIF tag
_STRIP = 1 << 20  # pixels that are converted together


class _Stored(NamedTuple):
    """One image as `ImageFolder.fetch` returns it; the default is an image that is unreadable."""

    data: bytes = b""
    mode: int = RAW
    width: int = 0
    height: int = 0


class Decoded(NamedTuple):
    """A decoded image, and the properties of its file.

    pixels: uint8 [H, W, 3] RGB. content: Pillow's name of the file format. grayscale, cmyk: the
    colour space of the file. orientation: the EXIF tag, 1 (upright) to 8, not applied. damage: why
    the native decoder refused a file that Pillow could read, else "".
    """

    pixels: np.ndarray
    content: str
    grayscale: bool = False
    cmyk: bool = False
    orientation: int = 1
    damage: str = ""


def is_jpeg(data: bytes) -> bool:
    return data[:2] == b"\xff\xd8"


def decode_image(data: bytes) -> Decoded:
    """Decode the bytes of an image file to RGB. ValueError with the reason if that fails.

    JPEG is decoded natively. Pillow decodes all other formats, and JPEGs that the native decoder
    refuses: first frame, alpha dropped as in torchvision's ImageFolder, 16-bit samples scaled to 8.
    """
    if not data:
        raise ValueError("the file is empty")
    if is_jpeg(data):
        damage = ""
        try:
            components = checked_jpeg_size(data)[2]
            if components in (1, 3):  # Pillow converts CMYK
                pixels = _native.decode(data)
                return Decoded(
                    pixels, "JPEG", grayscale=components == 1, orientation=_exif_orientation(data)
                )
        except ValueError as error:
            damage = str(error)
        # Pillow's name may be MPO, for a JPEG with further pictures behind the first.
        return _decode_with_pillow(data)._replace(content="JPEG", damage=damage)
    return _decode_with_pillow(data)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation, 1 to 8, to pixels uint8 [H, W, 3]."""
    # EXIF 2.3, tag 0x0112: 5 to 8 swap rows and columns; 2, 3, 6, 7 and 3, 4, 7, 8 mirror them.
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def checked_jpeg_size(data: bytes) -> tuple[int, int, int]:
    """(width, height, components). ValueError for a damaged header and for MAX_PIXELS or more."""
    width, height, components = _native.jpeg_size(data)
    _check_pixels(width, height)
    return width, height, components


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} is more than {MAX_PIXELS} pixels")


def _exif_orientation(data: bytes) -> int:
    if b"Exif\0\0" not in data:  # true of most photos of a dataset, which then skip Pillow
        return 1
    try:
        return _orientation(Image.open(io.BytesIO(data), formats=_FORMATS))
    except Exception:  # Pillow's header parser raises many types; the pixels may still be good
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as above
        return 1
    return value if value in range(1, 9) else 1


def _formats_of(data: bytes) -> tuple[str, ...]:
    """The formats that Pillow tries for a file."""
    # `ftyp` begins all files of the ISO base media format: AVIF, HEIF, MP4.
    if not HAS_HEIF or data[4:8] != b"ftyp":
        return _FORMATS
    from pillow_heif import register_heif_opener

    register_heif_opener(thumbnails=False)
    return (*_FORMATS, "HEIF")


def _decode_with_pillow(data: bytes) -> Decoded:
    try:
        with Image.open(io.BytesIO(data), formats=_formats_of(data)) as image:
            _check_pixels(*image.size)
            return Decoded(
                _to_rgb(image),
                image.format or "?",
                grayscale=image.mode in ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L"),
                cmyk=image.mode == "CMYK",
                orientation=_orientation(image),
            )
    except Image.UnidentifiedImageError:
        # the original message contains a memory address, and manifests must be reproducible
        raise ValueError("is not an image in a known format, or its header is damaged") from None
    except Exception as error:
        # Pillow raises nearly any exception for hostile files (struct.error, SyntaxError, ...)
        raise ValueError(str(error) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # 16 bits; Pillow's `convert` would clip values above 255
        width, height = image.size
        out = np.empty((height, width, 3), np.uint8)
        rows = max(1, _STRIP // width)  # in strips: a small file may hold a hundred million pixels
        for top in range(0, height, rows):
            values = np.asarray(image.crop((0, top, width, min(top + rows, height))))
            if values.min() < 0 or values.max() > 0xFFFF:
                raise ValueError("32-bit pixels have no defined range")
            # 65535 = 257 * 255: the largest 16-bit value becomes the largest 8-bit value.
            out[top : top + rows] = (values // 257)[:, :, None]
        return out
    image.info.pop("transparency", None)  # dropped in any case; Pillow warns about a palette's
    width, height = image.size
    if width * height <= _STRIP:
        return np.array(image.convert("RGB"))
    # A large image at once would take 14 bytes a pixel: Pillow copies it twice.
    out = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        out[top:bottom] = np.asarray(image.crop((0, top, width, bottom)).convert("RGB"))
    return out


# Names of a data set's parts, not of classes: train, and one or more of the others.
PARTS = ("train", *HELD_OUT)


def parts_in(folder: str | os.PathLike) -> list[str]:
    """The folders of `folder` if all are parts of a data set, `train` and others; else []."""
    if not os.path.isdir(folder):
        return []
    inside = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    visible = sorted(name for name in inside if not name.startswith("."))
    if "train" not in visible or len(visible) < 2 or not set(PARTS).issuperset(visible):
        return []
    return visible


def class_names(root: Path, folders: Sequence[str]) -> list[str]:
    """The names of class folders as text (files.as_text). BetonError where two are the same."""
    names = [as_text(folder) for folder in folders]
    for name, count in Counter(names).items():
        if count > 1:
            raise BetonError(
                f"{as_text(str(root))}: {count} class folders have the name {name} when bytes that "
                "are not UTF-8 are written as \\xNN; rename one"
            )
    return names


class ImageFolder:
    """A folder with one subfolder per class, `root/<class>/**/<image>`, as a source and a dataset.

    The layout is that of torchvision's ImageFolder. path: the root. classes: names of the
    subfolders, sorted, as text (files.as_text); a label is a position in it. labels: int64 [N].
    Samples are sorted by class, folder, file name. Hidden files and folders are ignored, symbolic
    links are followed. left_out: paths relative to the root of the other files that are not
    samples: those of other types, HEIC without pillow-heif, and all files beside the class folders.

    BetonError if the folder is missing, has no class folders, or a class has no images.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.path = Path(root)
        if not self.path.exists():
            raise BetonError(f"{self.path}: no such folder")
        if not self.path.is_dir():
            raise BetonError(f"{self.path}: is not a folder")
        visible = [entry for entry in os.scandir(self.path) if not entry.name.startswith(".")]
        folders = sorted(entry.name for entry in visible if entry.is_dir())
        self.classes = class_names(self.path, folders)
        self.left_out = sorted(entry.name for entry in visible if not entry.is_dir())
        if not self.classes:
            raise BetonError(
                f"{self.path}: has no class folders (expected {self.path}/<class>/<image>)"
            )
        self._names: list[str] = []
        counts = []
        for name in folders:
            others: list[str] = []
            images = sorted(_images(self.path / name, others=others))
            self.left_out += sorted(os.path.join(name, other) for other in others)
            if not images:
                raise BetonError(
                    f"{self.path / name}: has no images ({' '.join(EXTENSIONS)})"
                    + ("; HEIC: pip install pillow-heif" if self.heif() else "")
                )
            self._names += [os.path.join(name, folder, file) for folder, file in images]
            counts.append(len(images))
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def read(self, index: int) -> bytes:
        """The bytes of an image file. OSError if it cannot be read."""
        return read_regular(self.path / self._names[index])

    def name(self, index: int) -> str:
        """The file's path, relative to the root."""
        return self._names[index]

    def ignored(self) -> dict[str, int]:
        """Number of files that are not samples, by extension; files beside the class folders
        separately.
        """
        kinds: Counter[str] = Counter()
        for name in self.left_out:
            folder, file = os.path.split(name)
            extension = as_text(os.path.splitext(file)[1].lower()) or "no extension"
            kinds[extension if folder else f"{extension} beside the class folders"] += 1
        return dict(sorted(kinds.items()))

    def heif(self) -> list[str]:
        """HEIC files that are not samples because pillow-heif is not installed."""
        if HAS_HEIF:
            return []
        return [name for name in self.left_out if name.lower().endswith(HEIF_EXTENSIONS)]

    def preload(self) -> None:
        """Do nothing: files are read batch by batch."""

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def fingerprint(self) -> int:
        """Checksum of the file names."""
        return zlib.crc32("\n".join(self._names).encode(errors="surrogateescape"))

    def content(self) -> Content:
        """Names of all files; sizes and bytes of some. Hashes of all bytes are not known."""
        return Content(hash_folder(self.path, self._names))

    @takes(indices=integers("B"))
    def fetch(self, indices: np.ndarray, unreadable: dict[int, str] | None = None) -> list[Samples]:
        """Read the images of `indices` (int64 [B]) into one buffer, to train from a folder.

        JPEGs that the native decoder supports are returned as stored, all other images as raw RGB.
        An image that cannot be read is a BetonError that names the file; with `unreadable`, the
        reason goes there, by index, and the sample has no bytes and size 0 x 0.
        """

        def stored_or_nothing(index: int) -> _Stored:
            try:
                return self._stored(index)
            except (OSError, ValueError) as error:
                if unreadable is None:
                    raise BetonError(f"{self.path / self._names[index]}: {error}") from error
                unreadable[index] = str(error)
                return _Stored()

        # Reads wait for the disk and Pillow releases the GIL: threads help both.
        with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1)), "matryoshka-folder") as readers:
            stored = list(readers.map(stored_or_nothing, indices.tolist()))
        size = np.array([len(image.data) for image in stored], np.uint64)
        samples = Samples(
            data=np.frombuffer(b"".join(image.data for image in stored), np.uint8),
            offset=np.cumsum(size) - size,
            size=size,
            mode=np.array([image.mode for image in stored], np.uint8),
            width=np.array([image.width for image in stored], np.int32),
            height=np.array([image.height for image in stored], np.int32),
        )
        return [samples]

    def feed(self, batches: list[np.ndarray], unreadable: dict[int, str] | None = None) -> MapFeed:
        return MapFeed(partial(self.fetch, unreadable=unreadable), batches)

    def pages(self) -> None:
        return None

    def paged(self) -> None:
        return None

    def _stored(self, index: int) -> _Stored:
        """Read one image. OSError or ValueError if it cannot be read."""
        data = self.read(index)
        if is_jpeg(data):
            try:
                width, height, components = checked_jpeg_size(data)
                if components in (1, 3):
                    return _Stored(data, JPG, width, height)
            except ValueError:
                pass  # decode_image tries Pillow and gives the reason
        pixels = decode_image(data).pixels
        height, width = pixels.shape[:2]
        return _Stored(pixels.tobytes(), RAW, width, height)


class FlatImages(ImageFolder):
    """Images without classes, as a dataset: those of a folder and its subfolders, or some files.

    path: the folder, or the one that holds all files. classes: empty. labels: int64 [N], all -1.
    Samples are sorted by path. Hidden files and folders are ignored, symbolic links are followed.

    BetonError for a missing file, one with another extension than EXTENSIONS, or no images.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]) -> None:
        # not ImageFolder's constructor: it expects class folders
        files = [Path(path) for path in paths]
        self.left_out: list[str] = []
        if len(files) == 1 and files[0].is_dir():
            self.path = files[0]
            found = _images(self.path, others=self.left_out)
            names = [os.path.join(folder, file) for folder, file in found]
            if not names:
                raise BetonError(f"{self.path}: has no images ({' '.join(EXTENSIONS)})")
        else:
            for file in files:
                if not file.is_file():
                    raise BetonError(f"{file}: no such file")
                if not file.name.lower().endswith(EXTENSIONS):
                    raise BetonError(f"{file}: is not an image ({' '.join(EXTENSIONS)})")
            # absolute: paths with and without a root have no common folder
            whole = [os.path.abspath(file) for file in files]
            self.path = Path(os.path.commonpath([os.path.dirname(file) for file in whole]))
            names = [os.path.relpath(file, self.path) for file in whole]
        self._names = sorted(set(names))
        self.classes = []
        self.labels = np.full(len(self._names), -1, np.int64)


def _images(
    root: Path,
    folder: str = "",
    above: tuple[tuple[int, int], ...] = (),
    *,
    others: list[str],
) -> Iterator[tuple[str, str]]:
    """Yield (folder relative to root, file name) of every image below `root`; append the other
    files to `others`.
    """
    status = os.stat(root / folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a symbolic link to one of its own parents
        return
    with os.scandir(root / folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                below = os.path.join(folder, entry.name)
                yield from _images(root, below, (*above, identity), others=others)
            elif entry.name.lower().endswith(EXTENSIONS):
                yield folder, entry.name
            else:
                others.append(os.path.join(folder, entry.name))


class Digits:
    """scikit-learn's handwritten digits as a source: 1,797 images of 10 classes, no download.

    The 8x8 images of 17 grey levels are scaled to 0..255 and enlarged to 32x32. split: "train"
    (80 %) or "val", stratified and always the same.
    """

    SIZE = 32

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        if split not in ("train", "val"):
            raise BetonError(f"digits: split={split!r}: expected train or val")
        loaded = load_digits(return_X_y=True)
        pixels, labels = np.asarray(loaded[0]), np.asarray(loaded[1])
        everything = np.arange(len(labels))
        train, val = train_test_split(everything, test_size=0.2, random_state=0, stratify=labels)
        self._positions = np.sort(train if split == "train" else val)
        # Grey levels 0 to 16 become 0 to 255.
        self._images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self.classes = [str(digit) for digit in range(10)]
        self.labels: np.ndarray = labels[self._positions].astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """An RGB image of 32x32 pixels."""
        small = Image.fromarray(self._images[self._positions[index]])
        return small.resize((self.SIZE, self.SIZE), Image.Resampling.BICUBIC).convert("RGB")

    def read(self, index: int) -> bytes:
        file = io.BytesIO()
        self.image(index).save(file, "PNG")
        return file.getvalue()

    def name(self, index: int) -> str:
        return f"{self.classes[self.labels[index]]}/{self._positions[index]:04d}.png"


def write_digits_folder(root: str | os.PathLike) -> None:
    """Write the digits as JPEG files, `root/{train,val}/<class>/<number>.jpg`."""
    for split in ("train", "val"):
        digits = Digits(split)
        for index in range(len(digits)):
            path = (Path(root) / split / digits.name(index)).with_suffix(".jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            digits.image(index).save(path, quality=95)


def open_dataset(path: str | os.PathLike) -> BetonFile | ImageFolder:
    """Open a .beton file or an image folder; BetonError for anything else."""
    if os.path.isdir(path):
        return ImageFolder(path)
    if os.path.exists(path):
        return BetonFile(path)
    raise BetonError(f"{os.fspath(path)}: no such file or folder")


def open_images(paths: Sequence[str | os.PathLike]) -> BetonFile | ImageFolder:
    """Open images with or without classes.

    One .beton file; one folder of class folders; one folder that has images itself, which then
    have no classes; or image files. BetonError for anything else.
    """
    if not paths:
        raise BetonError("no images given")
    path = Path(paths[0])
    if len(paths) == 1 and path.is_dir():
        return FlatImages(paths) if _has_images(path) else ImageFolder(path)
    if len(paths) == 1 and not path.name.lower().endswith(EXTENSIONS):
        return open_dataset(path)
    for path in map(Path, paths):
        if path.is_dir() or path.suffix == ".beton":
            raise BetonError(f"{path}: give one folder or .beton file, or several image files")
    return FlatImages(paths)


def _has_images(folder: Path) -> bool:
    """Whether image files are directly in a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            hidden = entry.name.startswith(".")
            if not hidden and entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                return True
    return False
