"""The embeddings of a data set on disk: a folder of memory-mapped arrays."""

from typing import TYPE_CHECKING

from matryoshka import lazy

if TYPE_CHECKING:
    from matryoshka.embeddings.reading import (
        EmbeddingError,
        Embeddings,
        labels_like,
        open_embeddings,
        trunk_sha256,
    )

__all__ = ["EmbeddingError", "Embeddings", "labels_like", "open_embeddings", "trunk_sha256"]

__getattr__ = lazy.attribute(
    __name__,
    {
        "reading": (
            "EmbeddingError",
            "Embeddings",
            "labels_like",
            "open_embeddings",
            "trunk_sha256",
        )
    },
)
