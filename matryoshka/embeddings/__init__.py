"""The embeddings of a data set on disk: a folder of memory-mapped arrays."""

from matryoshka.embeddings.reading import (
    EmbeddingError,
    Embeddings,
    labels_like,
    open_embeddings,
    trunk_sha256,
)

__all__ = ["EmbeddingError", "Embeddings", "labels_like", "open_embeddings", "trunk_sha256"]
