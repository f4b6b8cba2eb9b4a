"""ImageNet-1K and its test sets: class lists, and the folders of the sets below one root."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

FOLDERS = {  # dataset -> possible names of its folder; the first that exists is used
    "V1": ("val",),
    "V2": ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency"),
    "A": ("imagenet-a",),
    "R": ("imagenet-r", "imagenet-r_"),
    "Sketch": ("sketch",),
    "O": ("val",),  # in-distribution images, of ImageNet-O's 200 classes
}
OOD_FOLDER = "imagenet-o"  # the out-of-distribution images of dataset O
CLASSES = 1000
SUBSETS = ("A", "R", "O")  # 200 classes each


class ImageNetError(ValueError):
    """A missing dataset, or one whose labels do not match the model's outputs; the message names
    the remedy.
    """

    user_error = True


@cache
def _lists() -> dict[str, list[str]]:
    return json.loads(Path(__file__).with_name("imagenet.json").read_text())


def wnids(name: str = "V1") -> list[str]:
    """WordNet ids of a dataset's classes in label order: 1000, or 200 for A, R and O."""
    return _lists()[name.lower() if name in SUBSETS else "1k"]


def canonical(name: str) -> str:
    """Normalise the capitalisation of a dataset name. ImageNetError if it is unknown."""
    known = {key.lower(): key for key in FOLDERS}
    if name.lower() not in known:
        raise ImageNetError(f"--dataset {name}: unknown; known: {', '.join(FOLDERS)}")
    return known[name.lower()]


def find(name: str, root: str | Path) -> Path:
    """The folder of a dataset below `root`; `root` itself if it is a file or has no such folder."""
    path = Path(root)
    names = FOLDERS[name]
    if not path.exists():
        raise ImageNetError(
            f"--data-root {root}: no such file or folder; give a .beton file, a folder of class "
            f"folders, or the folder that contains {names[0]}/"
        )
    for folder in names:
        if (path / folder).is_dir():
            return path / folder
    variants = (
        sorted(p.name for p in path.glob("imagenetv2-*") if p.is_dir()) if name == "V2" else []
    )
    if variants:
        raise ImageNetError(
            f"--data-root {root}: no {names[0]}/ in it; give one of {', '.join(variants)} itself"
        )
    return path


def find_imagenet_o(root: str | Path) -> Path:
    """The folder of ImageNet-O below `root`: images of classes that ImageNet-1K does not have."""
    path = Path(root) / OOD_FOLDER
    if not path.is_dir():
        raise ImageNetError(
            f"--data-root {root}: --dataset O needs {OOD_FOLDER}/ and {FOLDERS['O'][0]}/ in it"
        )
    return path
