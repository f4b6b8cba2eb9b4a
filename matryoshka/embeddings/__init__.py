"""The embeddings of a data set on disk: a folder of memory-mapped arrays."""

from typing import TYPE_CHECKING

from matryoshka import lazy

if TYPE_CHECKING:
    from matryoshka.embeddings.reading import (
        EmbeddingError,
        Embeddings,
        adapted_sha256,
        embedding_sha256,
        labels_like,
        open_embeddings,
        trunk_sha256,
    )

__all__ = [
    "EmbeddingError",
    "Embeddings",
    "adapted_sha256",
    "embedding_sha256",
    "labels_like",
    "open_embeddings",
    "trunk_sha256",
]

__getattr__ = lazy.attribute(
    __name__,
    {
        "reading": (
            "EmbeddingError",
            "Embeddings",
            "adapted_sha256",
            "embedding_sha256",
            "labels_like",
            "open_embeddings",
            "trunk_sha256",
        )
    },
)
