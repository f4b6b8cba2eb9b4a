"""A subset of a dataset, as a dataset."""

from __future__ import annotations

import zlib

import numpy as np

from matryoshka.arrays import ArrayError, as_array, as_int64, integers, takes
from matryoshka.data.dataset import Dataset
from matryoshka.data.fingerprint import Content, selected
from matryoshka.data.layout import Samples
from matryoshka.data.pages import MapFeed
from matryoshka.data.sources import ImageFolder


class Subset:
    """The samples `indices` (integers [n], any order) of an opened dataset, as a dataset.

    Labels keep their meaning: classes and num_classes are those of `dataset`, which must stay
    open. A subset has no pages: it is always read through `dataset.fetch`. ArrayError for indices
    that are not integers, or that the dataset does not have.
    """

    def __init__(self, dataset: Dataset, indices: np.ndarray) -> None:
        self.dataset = dataset
        self.indices = as_int64(as_array(indices, "indices"), "indices")
        if self.indices.ndim != 1:
            raise ArrayError(f"indices: are {list(self.indices.shape)}, expected [n]")
        total = len(dataset.labels)
        if len(self.indices) and not 0 <= self.indices.min() <= self.indices.max() < total:
            raise ArrayError(
                f"indices: are {self.indices.min()} to {self.indices.max()} of {total} samples"
            )
        self.path = dataset.path
        self.classes = dataset.classes
        self.num_classes = dataset.num_classes
        self.labels = dataset.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.indices[index]))

    @takes(indices=integers("B"))
    def fetch(self, indices: np.ndarray) -> list[Samples]:
        return self.dataset.fetch(self.indices[indices])

    def feed(self, batches: list[np.ndarray], unreadable: dict[int, str] | None = None) -> MapFeed:
        if unreadable is None or not isinstance(self.dataset, ImageFolder):
            return MapFeed(self.fetch, batches)
        folder = self.dataset

        def fetch(indices: np.ndarray) -> list[Samples]:
            of_folder: dict[int, str] = {}
            samples = folder.fetch(self.indices[indices], of_folder)
            for index in indices.tolist():
                if (reason := of_folder.get(int(self.indices[index]))) is not None:
                    unreadable[index] = reason
            return samples

        return MapFeed(fetch, batches)

    def pages(self) -> None:
        return None

    def paged(self) -> None:
        return None

    def fingerprint(self) -> int:
        return zlib.crc32(self.indices.tobytes(), self.dataset.fingerprint())

    def content(self) -> Content:
        # Another selection is another dataset for a loader's state.
        return selected(self.dataset.content(), self.indices)

    def preload(self) -> None:
        self.dataset.preload()

    def close(self) -> None:
        self.dataset.close()
