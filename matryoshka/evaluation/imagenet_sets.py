"""Map the class folders of ImageNet's test sets to a model's outputs.

dataset = open_dataset(find_dataset("R", "/data/imagenet"))
mapping = match("R", dataset, model)
mapping.labels[batch.labels], mapping.select(logits)            # int64 [B] in 0..199, [G, B, 200]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka.data import BetonFile, ImageFolder
from matryoshka.data.imagenet import CLASSES, FOLDERS, SUBSETS, ImageNetError, wnids
from matryoshka.data.subset import Subset
from matryoshka.models import NestedModel


class LabelMapping(NamedTuple):
    """Maps the K labels of a data set to C evaluated classes, and these to outputs of a model."""

    labels: Tensor  # int64 [K]: the class of each label of the data set, -1 to leave it out
    columns: Tensor | None = None  # int64 [C]: the outputs of the classes, None for all outputs
    names: list[str] | None = None  # [C]: names of the classes, if they are known

    def to(self, device: torch.device) -> LabelMapping:
        columns = None if self.columns is None else self.columns.to(device)
        return self._replace(labels=self.labels.to(device), columns=columns)

    def select(self, logits: Tensor) -> Tensor:
        """Logits of the evaluated classes: [G, B, outputs] -> [G, B, C]."""
        return logits if self.columns is None else logits.index_select(2, self.columns)


def match(name: str, dataset: BetonFile | ImageFolder | Subset, model: NestedModel) -> LabelMapping:
    """The LabelMapping of `dataset`, opened as data set `name`, for `model`.

    A class folder is matched by its name, a WordNet id or (V2) a class number, never by its rank
    among the folders present. A .beton file without class names has the set's own labels. V1, and
    names that are not ImageNet's, accept any data set with the model's classes. For O, images of V1
    outside of its 200 classes get the label -1. ImageNetError or ModelError names the disagreement.
    """
    if len(dataset) and not 0 <= dataset.labels.min() <= dataset.labels.max() < dataset.num_classes:
        raise ImageNetError(
            f"{dataset.path}: has labels outside of its {dataset.num_classes} classes; write it "
            "again with valid labels"
        )
    names = dataset.classes
    identity = LabelMapping(torch.arange(dataset.num_classes), None, names)
    if name not in FOLDERS:
        model.check_classes(dataset)
        return identity
    if name == "V1":
        if names and names == model.classes:
            return identity
        # Some of ImageNet's classes are matched by name below; other data must have the model's
        # classes.
        is_imagenet_model = model.spec.num_classes == CLASSES and model.classes in (None, wnids())
        if not is_imagenet_model or not _class_indices(name, names or []):
            model.check_classes(dataset)
            return identity
    _check_imagenet_model(name, model)

    # Label of each of the 1000 classes in this set: 0 to 999, or 0 to 199 for a subset.
    set_wnids = wnids(name)
    indices = [wnids().index(wnid) for wnid in set_wnids]
    label_of_class = {index: label for label, index in enumerate(indices)}
    columns = torch.tensor(indices) if name in SUBSETS else None
    class_of_folder = _class_indices(name, names or [])

    if name == "O":
        # `dataset` is V1 here: ImageNet-O's own images have none of the 1000 classes.
        if names:
            classes = [class_of_folder.get(folder, -1) for folder in names]
        else:
            classes = match("V1", dataset, model).labels.tolist()
        labels = torch.tensor([label_of_class.get(index, -1) for index in classes])
        return LabelMapping(labels, columns, set_wnids)
    if not names:
        if dataset.num_classes > len(set_wnids):
            raise ImageNetError(
                f"{dataset.path}: has labels up to {dataset.num_classes - 1}, but {name} has "
                f"{len(set_wnids)} classes; write it with its class names"
            )
        return LabelMapping(identity.labels, columns, set_wnids)

    # By name, not by position: in V2, folder 10 sorts before 2, and some folders may be missing.
    unknown = [folder for folder in names if class_of_folder.get(folder) not in label_of_class]
    if unknown:
        raise ImageNetError(
            f"{dataset.path}: {unknown[0]!r} is not a class of {name} ({len(unknown)} of "
            f"{len(names)} folders are not); give the folder that contains {name}'s class folders, "
            f"or {FOLDERS[name][0]}/"
        )
    labels = torch.tensor([label_of_class[class_of_folder[folder]] for folder in names])
    return LabelMapping(labels, columns, set_wnids)


def _check_imagenet_model(name: str, model: NestedModel) -> None:
    """ImageNetError unless the model's outputs are the classes of ImageNet-1K in their order."""
    if model.spec.num_classes != CLASSES:
        raise ImageNetError(
            f"--dataset {name}: needs a model of {CLASSES} classes, this one has "
            f"{model.spec.num_classes}"
        )
    if model.classes not in (None, wnids()):
        first = model.classes[0] if model.classes else "?"
        raise ImageNetError(
            f"--dataset {name}: the model's classes are not ImageNet-1K's in the order of their "
            f"WordNet ids (its first is {first!r}, not {wnids()[0]!r})"
        )


def _class_indices(name: str, folders: Sequence[str]) -> dict[str, int]:
    """{folder: class index among the 1000} of the folders whose name is a WordNet id or a number.

    Numbers count only for V2 and for exactly 1000 folders: a few folders with numbers may be the
    classes of any data set.
    """
    index = {wnid: i for i, wnid in enumerate(wnids())}
    if name == "V2" or len(folders) == CLASSES:
        index |= {str(i): i for i in range(CLASSES)}
    return {folder: index[folder] for folder in folders if folder in index}
