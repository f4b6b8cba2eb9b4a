"""Archives in the formats of CIFAR, STL-10 and Tiny-ImageNet, a few images each."""

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from matryoshka.data import catalogue


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def cifar10_files(rng) -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Contents of the archive; {split: (pixels [N, 32, 32, 3], labels [N])}."""
    files, parts = {"cifar-10-batches-bin/batches.meta.txt": b"cat\ndog\n\n"}, {}
    for split, names in (
        ("train", [f"data_batch_{k}.bin" for k in range(1, 6)]),
        ("test", ["test_batch.bin"]),
    ):
        pixels = rng.integers(0, 256, (3 * len(names), 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, 2, len(pixels))
        for k, name in enumerate(names):
            content = b""
            for image, label in zip(pixels[3 * k : 3 * k + 3], labels[3 * k :], strict=False):
                planes = [image[:, :, channel].tobytes() for channel in range(3)]
                content += bytes([label]) + b"".join(planes)
            files[f"cifar-10-batches-bin/{name}"] = content
        parts[split] = pixels, labels
    return files, parts


def cifar100_files(rng):
    files, parts = {"cifar-100-binary/fine_label_names.txt": b"apple\nbee\ncup\n"}, {}
    files["cifar-100-binary/coarse_label_names.txt"] = b"food\nanimal\n"
    for split in ("train", "test"):
        pixels = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, 3, 4)
        files[f"cifar-100-binary/{split}.bin"] = b"".join(
            bytes([1, label]) + image.transpose(2, 0, 1).tobytes()
            for image, label in zip(pixels, labels, strict=True)
        )
        parts[split] = pixels, labels
    return files, parts


def stl10_files(rng):
    names = "airplane\nbird\ncar\n"
    files, parts = {"stl10_binary/class_names.txt": names.encode()}, {}
    for split, count in (("train", 20), ("test", 3), ("unlabeled", 2)):
        pixels = rng.integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
        labels = rng.integers(0, 3, count)
        # channel by channel, column by column
        files[f"stl10_binary/{split}_X.bin"] = b"".join(
            image[:, column, channel].tobytes()
            for image in pixels
            for channel in range(3)
            for column in range(96)
        )
        if split != "unlabeled":
            files[f"stl10_binary/{split}_y.bin"] = bytes((labels + 1).tolist())
        parts[split] = pixels, labels if split != "unlabeled" else np.full(count, -1)
    folds = [rng.choice(20, 6, replace=False) for _ in range(10)]
    lines = [" ".join(map(str, fold)) for fold in folds]
    files["stl10_binary/fold_indices.txt"] = "\n".join(lines).encode()
    for k, fold in enumerate(folds):
        parts[f"fold{k}"] = parts["train"][0][fold], parts["train"][1][fold]
    return files, parts


def tiny_imagenet_zip(path: Path, rng) -> dict[str, dict[str, tuple[np.ndarray, str]]]:
    """Write the archive; {split: {file: (pixels as Pillow reads them, WordNet id)}}."""
    parts = {"train": {}, "val": {}}
    annotations = ""
    wnids = ["n02124075", "n01443537", "n03100240"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny-imagenet-200/wnids.txt", "\n".join(wnids) + "\n")
        archive.writestr("tiny-imagenet-200/words.txt", "n01443537\tgoldfish, Carassius auratus\n")
        for k in range(9):
            wnid = wnids[int(rng.integers(3))] if k > 2 else wnids[k]
            split = "val" if k > 5 else "train"
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "JPEG", quality=90)
            file = f"val_{k}.JPEG" if split == "val" else f"{wnid}_{k}.JPEG"
            folder = "val/images" if split == "val" else f"train/{wnid}/images"
            archive.writestr(f"tiny-imagenet-200/{folder}/{file}", content.getvalue())
            annotations += f"{file}\t{wnid}\t0\t32\t44\t62\n" if split == "val" else ""
            parts[split][file] = np.asarray(Image.open(content)), wnid
        archive.writestr("tiny-imagenet-200/train/n01443537/n01443537_boxes.txt", "a\t1\n")
        archive.writestr("tiny-imagenet-200/test/images/test_0.JPEG", b"-")
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", annotations)
    return parts


def announce(monkeypatch, name: str, archive: Path, url: str = "http://127.0.0.1:9") -> None:
    """Make `archive` the one that the catalogue expects for the set `name`."""
    content = archive.read_bytes()
    file = catalogue.RemoteFile(
        f"{url}/{archive.name}", hashlib.md5(content).hexdigest(), len(content)
    )
    monkeypatch.setitem(catalogue.SETS, name, replace(catalogue.SETS[name], archive=file))
