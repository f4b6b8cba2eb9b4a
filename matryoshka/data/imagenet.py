"""ImageNet-1K and its test sets: class lists, normalisation, and the folders of the sets below one
root.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

# Data set -> possible names of its folder; the first that exists is used.
FOLDERS = {
    "V1": ("val",),
    "V2": ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency"),
    "A": ("imagenet-a",),
    "R": ("imagenet-r", "imagenet-r_"),
    "Sketch": ("sketch",),
    # The in-distribution side of ImageNet-O: V1's images of its 200 classes.
    "O": ("val",),
}
OOD_FOLDER = "imagenet-o"  # ImageNet-O's own images, of classes that ImageNet-1K lacks
CLASSES = 1000
SUBSETS = ("A", "R", "O")  # 200 of the 1000 classes each
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageNetError(ValueError):
    """A missing data set, or one whose labels do not match the model's outputs; the message has the
    remedy.
    """

    user_error = True


@cache
def _lists() -> dict[str, list[str]]:
    return json.loads(Path(__file__).with_name("imagenet.json").read_text())


def wnids(name: str = "V1") -> list[str]:
    """WordNet ids of a data set's classes, in label order: 1000, or 200 for A, R and O."""
    return _lists()[name.lower() if name in SUBSETS else "1k"]


def canonical_name(name: str) -> str:
    """The key of FOLDERS that equals `name` in any case. ImageNetError lists the known ones."""
    known = {key.lower(): key for key in FOLDERS}
    if name.lower() not in known:
        raise ImageNetError(f"--dataset {name}: unknown; known: {', '.join(FOLDERS)}")
    return known[name.lower()]


def imagenet_root(given: str | None) -> str:
    """The folder of the data sets: `given`, else $IMAGENET_DIR, else upstream's default."""
    return given or os.environ.get("IMAGENET_DIR", "../../IMAGENET")


def find_dataset(name: str, root: str | Path) -> Path:
    """The folder of data set `name` below `root`.

    `root` itself if it is a file or has no such folder: it may be the data set.
    """
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
    if name == "V2":  # the other samplings of V2 are different data sets: never pick one silently
        variants = sorted(p.name for p in path.glob("imagenetv2-*") if p.is_dir())
        if variants:
            raise ImageNetError(
                f"--data-root {root}: no {names[0]}/ in it; give one of {', '.join(variants)} "
                "itself"
            )
    return path


def find_imagenet_o(root: str | Path) -> Path:
    """The folder of ImageNet-O's images, whose classes ImageNet-1K lacks, below `root`."""
    path = Path(root) / OOD_FOLDER
    if not path.is_dir():
        raise ImageNetError(
            f"--data-root {root}: --dataset O needs {OOD_FOLDER}/ and {FOLDERS['O'][0]}/ in it"
        )
    return path
