"""CIFAR-10, CIFAR-100, STL-10 and Tiny-ImageNet, read from their authors' archives, as sources.

The archives are read as they are: nothing is unpacked under a name that a file inside gives.
"""

from __future__ import annotations

import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from matryoshka.data.catalogue import FOLDS
from matryoshka.data.layout import BetonError

_BLOCK = 1 << 20
# What damaged archives raise; OSError: gzip's.
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError)


class PixelImages:
    """Images of one size from arrays, as a source (see sources.py).

    planes: uint8 [N, 3, H, W]. labels: int64 [N]. name: of the file in lists.
    """

    def __init__(
        self, planes: np.ndarray, labels: np.ndarray, classes: list[str], name: str
    ) -> None:
        self._planes = planes
        self._name = name
        self.labels = labels
        self.classes = classes

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return np.ascontiguousarray(self._planes[index].transpose(1, 2, 0))

    def read(self, index: int) -> bytes:
        # PPM: the pixels behind a short header, which costs next to nothing to write and read
        pixels = self.pixels(index)
        height, width = pixels.shape[:2]
        return b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()

    def name(self, index: int) -> str:
        return f"{self._name}/{index:06d}"


class ZippedImages:
    """Image files inside a zip file, as a source. names: of the files. labels: int64 [N]."""

    def __init__(
        self, archive: zipfile.ZipFile, names: list[str], labels: np.ndarray, classes: list[str]
    ) -> None:
        self._archive = archive
        self._names = names
        self.labels = labels
        self.classes = classes

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        try:
            return self._archive.read(self._names[index])
        except _DAMAGE as error:
            raise BetonError(f"{self._archive.filename}: {self._names[index]}: {error}") from error

    def name(self, index: int) -> str:
        return self._names[index]


def cifar10(archive: Path, split: str) -> PixelImages:
    """CIFAR-10 (Krizhevsky 2009): 50,000 images for training, 10,000 to test."""
    files = [f"data_batch_{k}.bin" for k in range(1, 6)] if split == "train" else ["test_batch.bin"]
    inside = _Tar(archive, "cifar-10-batches-bin", [*files, "batches.meta.txt"])
    rows = np.concatenate([inside.rows(file, 1 + 3072) for file in files])
    return _cifar(rows, 1, inside.lines("batches.meta.txt"), f"cifar10/{split}")


def cifar100(archive: Path, split: str) -> PixelImages:
    """CIFAR-100 with its 100 fine labels."""
    file, names = f"{split}.bin", "fine_label_names.txt"
    inside = _Tar(archive, "cifar-100-binary", [file, names])
    rows = inside.rows(file, 2 + 3072)  # the coarse label, then the fine one
    return _cifar(rows, 2, inside.lines(names), f"cifar100/{split}")


def _cifar(rows: np.ndarray, label_bytes: int, classes: list[str], name: str) -> PixelImages:
    labels = rows[:, label_bytes - 1].astype(np.int64)
    _check_labels(labels, classes, name)
    return PixelImages(rows[:, label_bytes:].reshape(-1, 3, 32, 32), labels, classes, name)


def stl10(archive: Path, split: str) -> PixelImages:
    """STL-10 (Coates et al. 2011): train (5,000), test (8,000), unlabeled (100,000), and fold0 to
    fold9, the 1,000 training images of each of the ten folds. Labels of unlabeled are -1.
    """
    part = "train" if split in FOLDS else split
    files = [f"{part}_X.bin", "class_names.txt"]
    if part != "unlabeled":
        files.append(f"{part}_y.bin")
    if split in FOLDS:
        files.append("fold_indices.txt")
    inside = _Tar(archive, "stl10_binary", files)
    # Column after column: the last axis is y.
    planes = inside.rows(f"{part}_X.bin", 3 * 96 * 96).reshape(-1, 3, 96, 96).swapaxes(2, 3)
    classes = inside.lines("class_names.txt")
    labels = np.full(len(planes), -1, np.int64)
    if part != "unlabeled":
        labels = inside.rows(f"{part}_y.bin", 1)[:, 0].astype(np.int64) - 1
        if len(labels) != len(planes):
            raise BetonError(f"{archive}: {len(planes)} images and {len(labels)} labels in {part}")
        _check_labels(labels, classes, f"{archive}: {part}")
    if split in FOLDS:
        folds = inside.lines("fold_indices.txt")
        try:
            chosen = np.array([int(word) for word in folds[FOLDS.index(split)].split()])
            labels, planes = labels[chosen], planes[chosen]
        except (ValueError, IndexError) as error:
            raise BetonError(f"{archive}: fold_indices.txt: {error}") from error
    return PixelImages(planes, labels, classes, f"stl10/{split}")


def tiny_imagenet(archive: Path, split: str) -> ZippedImages:
    """Tiny-ImageNet (Stanford's CS231n, 2015): 200 classes, 100,000 images of 64 x 64 pixels for
    training, 10,000 in `val`. classes: WordNet ids, sorted.
    """
    try:
        opened = zipfile.ZipFile(archive)
        files = opened.namelist()
        classes = sorted(opened.read("tiny-imagenet-200/wnids.txt").decode().split())
        annotations = opened.read("tiny-imagenet-200/val/val_annotations.txt").decode()
    except (*_DAMAGE, KeyError, UnicodeDecodeError) as error:
        raise BetonError(f"{archive}: is not Tiny-ImageNet's zip file: {error}") from error
    class_of = {}  # of the validation images, whose folder does not say it
    for line in annotations.splitlines():
        file, wnid = line.split("\t")[:2]
        class_of[f"tiny-imagenet-200/val/images/{file}"] = wnid
    labels_of = {name: label for label, name in enumerate(classes)}
    names, labels = [], []
    for name in sorted(files):
        if not name.startswith(f"tiny-imagenet-200/{split}/") or not name.endswith(".JPEG"):
            continue
        wnid = name.split("/")[2] if split == "train" else class_of.get(name, "")
        if wnid not in labels_of:
            raise BetonError(f"{archive}: {name} has no class of wnids.txt")
        names.append(name)
        labels.append(labels_of[wnid])
    return ZippedImages(opened, names, np.array(labels, np.int64), classes)


READERS: dict[str, Callable[[Path, str], PixelImages | ZippedImages]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "stl10": stl10,
    "tiny-imagenet": tiny_imagenet,
}


class _Tar:
    """Some files of a tar archive, copied once into nameless temporary files beside it."""

    def __init__(self, archive: Path, folder: str, files: list[str]) -> None:
        self._archive = archive
        self._files: dict[str, np.ndarray] = {}  # bytes, uint8 [N]
        missing = {f"{folder}/{file}": file for file in files}
        try:
            with tarfile.open(archive, "r|*") as opened:  # one pass: gzip cannot go back
                for member in opened:
                    file = missing.pop(member.name, None)
                    content = opened.extractfile(member) if file else None
                    if file and content:
                        self._files[file] = self._copied(content)
                    if not missing:
                        break
        except _DAMAGE as error:
            raise BetonError(f"{archive}: cannot be read: {error}") from error
        if missing:
            raise BetonError(f"{archive}: has no file {' and no '.join(missing)}")

    def _copied(self, content: IO[bytes]) -> np.ndarray:
        # In the folder of the archive, which has the room: that of the system may be in memory.
        with tempfile.TemporaryFile(dir=self._archive.parent) as file:
            while block := content.read(_BLOCK):
                file.write(block)
            file.flush()
            # The map keeps the file after its name, and its handle, are gone.
            return np.memmap(file, np.uint8, "r") if file.tell() else np.empty(0, np.uint8)

    def rows(self, file: str, length: int) -> np.ndarray:
        """The file as rows of `length` bytes, uint8 [N, length]."""
        content = self._files[file]
        if len(content) == 0 or len(content) % length:
            raise BetonError(
                f"{self._archive}: {file} has {len(content)} bytes, not a multiple of {length}"
            )
        return content.reshape(-1, length)

    def lines(self, file: str) -> list[str]:
        """The lines of a text that are not empty."""
        lines = self._files[file].tobytes().decode(errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]


def _check_labels(labels: np.ndarray, classes: list[str], name: str) -> None:
    if labels.min() < 0 or labels.max() >= len(classes):
        raise BetonError(f"{name}: labels {labels.min()} to {labels.max()} of {len(classes)} names")
