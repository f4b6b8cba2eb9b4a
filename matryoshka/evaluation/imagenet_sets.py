"""ImageNet's test sets: which outputs of a model their class folders mean.

dataset = open_dataset(find("R", "/data/imagenet"))
labelling = match("R", dataset, model)
labelling.labels[batch.labels], labelling.select(logits)        # int64 [B] in 0..199, [G, B, 200]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka.data import BetonFile, ImageFolder
from matryoshka.data.imagenet import CLASSES, FOLDERS, SUBSETS, ImageNetError, wnids
from matryoshka.models import NestedModel


class Labelling(NamedTuple):
    """labels: int64 [K], the label that each label of the data set stands for, -1 for none.
    columns: int64 [C], the outputs that those labels count, None for all. names: [C] names of the
    labels, where they are known.
    """

    labels: Tensor
    columns: Tensor | None = None
    names: list[str] | None = None

    def to(self, device: torch.device) -> Labelling:
        return self._replace(
            labels=self.labels.to(device),
            columns=None if self.columns is None else self.columns.to(device),
        )

    def select(self, logits: Tensor) -> Tensor:
        """[G, B, outputs] -> [G, B, C]."""
        return logits if self.columns is None else logits.index_select(2, self.columns)


def match(name: str, dataset: BetonFile | ImageFolder, model: NestedModel) -> Labelling:
    """What the labels of `dataset`, opened as data set `name`, mean for `model`.

    A class folder counts by its name, a WordNet id or (V2) a number, never by its rank among the
    folders that are there; a .beton without names has the set's own labels. As V1, any data set
    with the model's classes will do. As O, classes that are not among its 200 get the label -1.
    ImageNetError, or the model's own, names what disagrees.
    """
    names, count = dataset.classes, model.spec.num_classes
    if len(dataset) and not 0 <= dataset.labels.min() <= dataset.labels.max() < dataset.num_classes:
        raise ImageNetError(
            f"{dataset.path}: has labels outside of its {dataset.num_classes} classes; write it "
            "again with sound labels"
        )
    same = Labelling(torch.arange(dataset.num_classes), None, names)
    if name == "V1" and names and names == model.classes:
        return same
    known = _class_indices(name, names or [])
    if name == "V1" and (count != CLASSES or not known or model.classes not in (None, wnids())):
        model.check_classes(dataset)
        return same
    if count != CLASSES:
        raise ImageNetError(
            f"--dataset {name}: needs a model of {CLASSES} classes, this one has {count}"
        )
    if model.classes not in (None, wnids()):
        raise ImageNetError(
            f"--dataset {name}: the model's classes are not ImageNet-1K's, in the order of their "
            "WordNet ids "
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
                f"{dataset.path}: has labels up to {dataset.num_classes - 1}, but {name} has "
                f"{len(kept)} classes; "
                "write it with its class names"
            )
        return Labelling(same.labels, columns, kept)
    strangers = [folder for folder in names if known.get(folder) not in position]
    if strangers:
        raise ImageNetError(
            f"{dataset.path}: {strangers[0]!r} is no class of {name} ({len(strangers)} of "
            f"{len(names)} folders are "
            f"not); give the folder that holds {name}'s class folders, or {FOLDERS[name][0]}/"
        )
    return Labelling(torch.tensor([position[known[folder]] for folder in names]), columns, kept)


def _class_indices(name: str, folders: Sequence[str]) -> dict[str, int]:
    """{folder: class index among the 1000}, of the folders whose name tells it."""
    index = {wnid: i for i, wnid in enumerate(wnids())}
    if name == "V2" or len(folders) == CLASSES:  # a few numbers may be any data set's classes
        index |= {str(i): i for i in range(CLASSES)}
    return {folder: index[folder] for folder in folders if folder in index}
