"""The interface of a dataset that a Loader reads.

`BetonFile`, `ImageFolder` and `Subset` implement it. A dataset may consist of several files: its
`fetch` returns one `Samples` per file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from matryoshka.data.fingerprint import Content
from matryoshka.data.layout import Samples
from matryoshka.data.pages import Feed, PagedFile


class Dataset(Protocol):
    """Stored images with labels.

    path: where they are. labels: int64 [N]. classes: names by label, or None. num_classes: the
    number of labels.
    """

    path: Path

    @property
    def classes(self) -> list[str] | None: ...

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """A sample's name for messages."""
        ...

    def fetch(self, indices: np.ndarray) -> list[Samples]:
        """The stored images of `indices` (int64 [B]), grouped by file."""
        ...

    def feed(self, batches: list[np.ndarray], unreadable: dict[int, str] | None = None) -> Feed:
        """A feed of these batches of indices.

        unreadable: receives the reason, by index, of images whose file cannot be read; without it
        they are an error.
        """
        ...

    def pages(self) -> np.ndarray | None:
        """The page that holds each sample, int64 [N]; None where samples are not in pages."""
        ...

    def paged(self) -> PagedFile | None:
        """The file opened for reads into bounded memory; None where `feed` needs no more memory
        than that.
        """
        ...

    def fingerprint(self) -> int:
        """A number that changes with the sizes or names of the images; part of the fingerprint of
        embeddings, and of loader states of older versions.
        """
        ...

    def content(self) -> Content:
        """What tells the stored images from others; part of a loader's state. BetonError if they
        cannot be read.
        """
        ...

    def preload(self) -> None:
        """Ask the system to read everything into the page cache, in the background."""
        ...

    def close(self) -> None:
        """Close the file; the metadata remain."""
        ...
