"""ImageNet-1K and its test sets: where they lie under one root, and which outputs of a model their folders mean.

dataset = open_dataset(find("R", "/data/imagenet"))
labelling = match("R", dataset, model)
labelling.labels[batch.labels], labelling.select(logits)        # int64 [B] in 0..199, [G, B, 200]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka.data import BetonFile, ImageFolder
from matryoshka.models import NestedModel

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
    """A data set that is not there, or whose labels do not mean the model's outputs; the message has the remedy."""

    user_error = True


class Labelling(NamedTuple):
    """labels: int64 [K], the label that each label of the data set stands for, -1 for none. columns: int64 [C], the
    outputs that those labels count, None for all. names: [C] names of the labels, where they are known."""

    labels: Tensor
    columns: Tensor | None = None
    names: list[str] | None = None

    def to(self, device: torch.device) -> Labelling:
        return self._replace(
            labels=self.labels.to(device), columns=None if self.columns is None else self.columns.to(device)
        )

    def select(self, logits: Tensor) -> Tensor:
        """[G, B, outputs] -> [G, B, C]."""
        return logits if self.columns is None else logits.index_select(2, self.columns)


@cache
def _lists() -> dict[str, list[str]]:
    return json.loads(Path(__file__).with_name("imagenet_sets.json").read_text())


def wnids(name: str = "V1") -> list[str]:
    """WordNet ids of the classes of a data set in the order of its labels: 1000, for A, R and O 200 of them."""
    return _lists()[name.lower() if name in SUBSETS else "1k"]


def canonical(name: str) -> str:
    """A name in any capitalisation as FOLDERS has it. ImageNetError lists the known ones."""
    known = {key.lower(): key for key in FOLDERS}
    if name.lower() not in known:
        raise ImageNetError(f"--dataset {name}: unknown; known: {', '.join(FOLDERS)}")
    return known[name.lower()]


def find(name: str, root: str | Path) -> Path:
    """The folder of a data set below `root`; `root` itself where that is a file, or holds no such folder."""
    path = Path(root)
    names = FOLDERS[name]
    if not path.exists():
        raise ImageNetError(
            f"--data-root {root}: no such file or folder; give a .beton file, a folder of class folders, or the "
            f"folder that holds {names[0]}/"
        )
    for folder in names:
        if (path / folder).is_dir():
            return path / folder
    variants = sorted(p.name for p in path.glob("imagenetv2-*") if p.is_dir()) if name == "V2" else []
    if variants:
        raise ImageNetError(f"--data-root {root}: no {names[0]}/ there; give one of {', '.join(variants)} itself")
    return path


def find_outside(root: str | Path) -> Path:
    """The folder of ImageNet-O below `root`: images of classes that ImageNet-1K lacks."""
    path = Path(root) / OUTSIDE
    if not path.is_dir():
        raise ImageNetError(f"--data-root {root}: --dataset O needs {OUTSIDE}/ and {FOLDERS['O'][0]}/ in it")
    return path


def match(name: str, dataset: BetonFile | ImageFolder, model: NestedModel) -> Labelling:
    """What the labels of `dataset`, opened as data set `name`, mean for `model`.

    A class folder counts by its name, a WordNet id or (V2) a number, never by its rank among the folders that are
    there; a .beton without names has the set's own labels. As V1, any data set with the model's classes will do. As O,
    classes that are not among its 200 get the label -1.
    ImageNetError, or the model's own, names what disagrees.
    """
    names, count = dataset.classes, model.spec.num_classes
    if len(dataset) and not 0 <= dataset.labels.min() <= dataset.labels.max() < dataset.num_classes:
        raise ImageNetError(
            f"{dataset.path}: has labels outside of its {dataset.num_classes} classes; write it again with sound labels"
        )
    same = Labelling(torch.arange(dataset.num_classes), None, names)
    if name == "V1" and names and names == model.classes:
        return same
    known = _class_indices(name, names or [])
    if name == "V1" and (count != CLASSES or not known or model.classes not in (None, wnids())):
        model.check_classes(dataset)
        return same
    if count != CLASSES:
        raise ImageNetError(f"--dataset {name}: needs a model of {CLASSES} classes, this one has {count}")
    if model.classes not in (None, wnids()):
        raise ImageNetError(
            f"--dataset {name}: the model's classes are not ImageNet-1K's, in the order of their WordNet ids "
            f"(its first is {model.classes[0] if model.classes else '?'!r}, not {wnids()[0]!r})"
        )
    kept = wnids(name)
    columns = torch.tensor([wnids().index(wnid) for wnid in kept]) if name in SUBSETS else None
    position = {wnids().index(wnid): label for label, wnid in enumerate(kept)}
    if name == "O":  # its own images have other classes: these are those of V1
        whole = match("V1", dataset, model)
        of_class = [known.get(folder, -1) for folder in names] if names else whole.labels.tolist()
        return Labelling(torch.tensor([position.get(i, -1) for i in of_class]), columns, kept)
    if not names:
        if dataset.num_classes > len(kept):
            raise ImageNetError(
                f"{dataset.path}: has labels up to {dataset.num_classes - 1}, but {name} has {len(kept)} classes; "
                "write it with its class names"
            )
        return Labelling(same.labels, columns, kept)
    strangers = [folder for folder in names if known.get(folder) not in position]
    if strangers:
        raise ImageNetError(
            f"{dataset.path}: {strangers[0]!r} is no class of {name} ({len(strangers)} of {len(names)} folders are "
            f"not); give the folder that holds {name}'s class folders, or {FOLDERS[name][0]}/"
        )
    return Labelling(torch.tensor([position[known[folder]] for folder in names]), columns, kept)


def _class_indices(name: str, folders: Sequence[str]) -> dict[str, int]:
    """{folder: class index among the 1000}, of the folders whose name tells it."""
    index = {wnid: i for i, wnid in enumerate(wnids())}
    if name == "V2" or len(folders) == CLASSES:  # a few numbers may be any data set's classes
        index |= {str(i): i for i in range(CLASSES)}
    return {folder: index[folder] for folder in folders if folder in index}
