"""Some samples of a dataset as a dataset."""

from __future__ import annotations

import zlib

import numpy as np

from matryoshka.data.layout import Samples
from matryoshka.data.reader import BetonFile
from matryoshka.data.sources import ImageFolder


class Subset:
    """The samples `indices` (int64 [n], any order) of an opened dataset, whose classes and labels
    it keeps.

    `dataset` has to stay open. A Loader takes it in place of a dataset; not with in_memory=False or
    quasi_random.
    """

    def __init__(self, dataset: BetonFile | ImageFolder, indices: np.ndarray) -> None:
        self.dataset, self.indices = dataset, np.asarray(indices, np.int64)
        self.path, self.classes, self.num_classes = (
            dataset.path,
            dataset.classes,
            dataset.num_classes,
        )
        self.labels = dataset.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: np.ndarray) -> Samples:
        return self.dataset.fetch(self.indices[indices])

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.indices[index]))

    def preload(self) -> None:
        self.dataset.preload()

    def fingerprint(self) -> int:
        return zlib.crc32(self.indices.tobytes(), self.dataset.fingerprint())
