"""ImageNet-1K and its test sets: lists of classes, and where the sets lie under one root."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

FOLDERS = {  # data set -> names of its folder, the first that is there
    "V1": ("val",),
    "V2": ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency"),
    "A": ("imagenet-a",),
    "R": ("imagenet-r", "imagenet-r_"),
    "Sketch": ("sketch",),
    "O": ("val",),  # the images whose classes are among ImageNet-O's, to tell its images from
}
OUTSIDE = "imagenet-o"
CLASSES = 1000
SUBSETS = ("A", "R", "O")  # of 200 classes each


class ImageNetError(ValueError):
    """A data set that is not there, or whose labels do not mean the model's outputs; the message
    has the remedy.
    """

    user_error = True


@cache
def _lists() -> dict[str, list[str]]:
    return json.loads(Path(__file__).with_name("imagenet.json").read_text())


def wnids(name: str = "V1") -> list[str]:
    """WordNet ids of the classes of a data set in the order of its labels: 1000, for A, R and O 200
    of them.
    """
    return _lists()[name.lower() if name in SUBSETS else "1k"]


def canonical(name: str) -> str:
    """A name in any capitalisation as FOLDERS has it. ImageNetError lists the known ones."""
    known = {key.lower(): key for key in FOLDERS}
    if name.lower() not in known:
        raise ImageNetError(f"--dataset {name}: unknown; known: {', '.join(FOLDERS)}")
    return known[name.lower()]


def find(name: str, root: str | Path) -> Path:
    """The folder of a data set below `root`; `root` itself where that is a file, or holds no such
    folder.
    """
    path = Path(root)
    names = FOLDERS[name]
    if not path.exists():
        raise ImageNetError(
            f"--data-root {root}: no such file or folder; give a .beton file, a folder of class "
            "folders, or the "
            f"folder that holds {names[0]}/"
        )
    for folder in names:
        if (path / folder).is_dir():
            return path / folder
    variants = (
        sorted(p.name for p in path.glob("imagenetv2-*") if p.is_dir()) if name == "V2" else []
    )
    if variants:
        raise ImageNetError(
            f"--data-root {root}: no {names[0]}/ there; give one of {', '.join(variants)} itself"
        )
    return path


def find_outside(root: str | Path) -> Path:
    """The folder of ImageNet-O below `root`: images of classes that ImageNet-1K lacks."""
    path = Path(root) / OUTSIDE
    if not path.is_dir():
        raise ImageNetError(
            f"--data-root {root}: --dataset O needs {OUTSIDE}/ and {FOLDERS['O'][0]}/ in it"
        )
    return path
