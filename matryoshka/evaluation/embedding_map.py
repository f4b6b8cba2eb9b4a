"""Two-dimensional maps of embeddings, one for each prefix, and the file of them in an index.

    points = embedding_map(embeddings, method="pca", seed=0, max_rows=5000)   # float32 [N, 2]
    write_map(index, make_map(embeddings, dims, method="pca", seed=0))
    read_map(index)                                        # None without a map of these rows

Row numbers change when an index is built or compacted, so that a map belongs to one first part.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from matryoshka.arrays import floats, takes
from matryoshka.files import check_regular, write_atomically
from matryoshka.retrieval.store import Index

METHODS = ("pca", "tsne")
MAP_FILE = "map.safetensors"
MAX_ROWS = 5000  # t-SNE takes a minute for them, and a screen shows no more points
PERPLEXITY = 30.0  # scikit-learn's default
SMALLEST_SPREAD = 1e-5  # of rows of length 1: below are rounding errors of float32


class EmbeddingMap(NamedTuple):
    """Points of some rows, for G prefixes.

    dims: the prefixes. rows: int64 [n], rising. points: float32 [G, n, 2]. means, axes: float32
    [G, D] and [G, 2, D], zeros beyond each prefix: PCA's, by which any embedding has a place; G is
    0 there for t-SNE.
    """

    method: str
    dims: tuple[int, ...]
    rows: np.ndarray
    points: np.ndarray
    means: np.ndarray
    axes: np.ndarray

    @takes(vectors=floats("m D"))
    def place(self, dim: int, vectors: np.ndarray) -> np.ndarray:
        """Points of embeddings [m, D] on the map of a prefix, float32 [m, 2]; NaN for t-SNE."""
        if not len(self.axes):
            return np.full((len(vectors), 2), np.nan, np.float32)
        at = self.dims.index(dim)
        centred = unit_prefixes(vectors, dim) - self.means[at, :dim]
        return centred @ self.axes[at, :, :dim].T


@takes(embeddings=floats("N D+"))
def embedding_map(
    embeddings: np.ndarray,
    *,
    method: str = "pca",
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    perplexity: float = PERPLEXITY,
) -> np.ndarray:
    """A point of the plane for each embedding, float32 [N, 2], by scikit-learn's PCA or t-SNE.

    embeddings: float [N, D]; each is scaled to length 1, because searches compare cosines. Rows
    outside of a random sample of `max_rows`, and rows with NaN or infinity, get NaN. perplexity: of
    t-SNE, at most a third of the rows. ValueError for another method.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    rows = sample_rows(embeddings, max_rows, seed)
    out = np.full((len(embeddings), 2), np.nan, np.float32)
    chosen = unit_prefixes(embeddings[rows], embeddings.shape[1])
    out[rows] = _points(chosen, method, seed, perplexity)[0]
    return out


@takes(embeddings=floats("N D+"))
def make_map(
    embeddings: np.ndarray,
    dims: Sequence[int],
    *,
    method: str = "pca",
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> EmbeddingMap:
    """`embedding_map` of one sample of the rows for several prefixes `dims`."""
    rows = sample_rows(embeddings, max_rows, seed)
    chosen = np.asarray(embeddings[rows], np.float32)
    dims = tuple(dims)
    points = np.zeros((len(dims), len(rows), 2), np.float32)
    fitted = len(dims) if method == "pca" else 0
    means = np.zeros((fitted, chosen.shape[1]), np.float32)
    axes = np.zeros((fitted, 2, chosen.shape[1]), np.float32)
    for at, dim in enumerate(dims):
        points[at], mean, components = _points(unit_prefixes(chosen, dim), method, seed)
        if method == "pca":
            means[at, :dim] = mean
            axes[at, : len(components), :dim] = components
    return EmbeddingMap(method, dims, rows, points, means, axes)


def map_dims(dims: Sequence[int], method: str) -> list[int]:
    """Prefixes that get a map: all for PCA, the shortest and the longest for t-SNE (slow)."""
    return list(dims) if method == "pca" else sorted({min(dims), max(dims)})


@takes(embeddings=floats("N D"))
def sample_rows(embeddings: np.ndarray, max_rows: int, seed: int) -> np.ndarray:
    """Numbers of at most `max_rows` random rows without NaN and infinity, int64, rising."""
    rows = np.arange(len(embeddings))
    if len(rows) > max_rows:
        rows = np.sort(np.random.default_rng(seed).choice(len(rows), max_rows, replace=False))
    return rows[np.isfinite(np.asarray(embeddings[rows], np.float32)).all(1)]


@takes(embeddings=floats("N D"))
def unit_prefixes(embeddings: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` numbers of each row, scaled to length 1; zeros stay zeros. float32."""
    prefixes = np.asarray(embeddings[:, :dim], np.float32)
    # By the largest number first: squares of large numbers would overflow.
    largest = np.abs(prefixes).max(1, keepdims=True)
    prefixes = prefixes / np.where(largest > 0, largest, 1)
    length = np.linalg.norm(prefixes, axis=1, keepdims=True)
    return prefixes / np.where(length > 0, length, 1)


def _points(
    rows: np.ndarray, method: str, seed: int, perplexity: float = PERPLEXITY
) -> tuple[np.ndarray, Any, Any]:
    """Points [n, 2] of rows [n, d], and PCA's mean and components; zeros where no axis exists."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    n, d = rows.shape
    points = np.zeros((n, 2), np.float32)
    # Equal rows have no axis; scikit-learn would divide by zero, and its quadtree would crash.
    is_spread = n > 1 and np.ptp(rows, axis=0).max() > SMALLEST_SPREAD
    if method == "tsne":
        if n > 3 and is_spread:
            # PCA as the start makes the global arrangement reproducible.
            init = "pca" if d > 1 else "random"
            tsne = TSNE(perplexity=min(perplexity, (n - 1) / 3), init=init, random_state=seed)
            points[:] = tsne.fit_transform(rows)
        return points, None, None
    if not is_spread:
        return points, rows.mean(0) if n else np.zeros(d), np.zeros((0, d))
    pca = PCA(min(2, n - 1, d), random_state=seed).fit(rows)
    points[:, : pca.n_components_] = pca.transform(rows)
    return points, pca.mean_, pca.components_


# ---------------------------------------------------------------- the file


def write_map(index: Index, made: EmbeddingMap) -> None:
    """Store the map of an index's first part in the folder of the index. OSError names the file."""
    about = {
        "part": index.manifest["parts"][0],
        "method": made.method,
        "dims": json.dumps(made.dims),
    }
    arrays = {
        "rows": made.rows.astype(np.int64),
        "points": made.points,
        "means": made.means,
        "axes": made.axes,
    }
    write_atomically(index.path / MAP_FILE, save(arrays, about))


def remove_map(index: Index) -> None:
    """Remove the map of an index, if it has one."""
    (index.path / MAP_FILE).unlink(missing_ok=True)


def read_map(index: Index) -> EmbeddingMap | None:
    """The map of an index; None if it has none, or a damaged one, or that of other rows."""
    try:
        check_regular(index.path / MAP_FILE)
        with safe_open(index.path / MAP_FILE, "numpy") as stored:
            about = stored.metadata()
            part = about["part"]
            made = EmbeddingMap(
                about["method"],
                tuple(json.loads(about["dims"])),
                stored.get_tensor("rows"),
                stored.get_tensor("points"),
                stored.get_tensor("means"),
                stored.get_tensor("axes"),
            )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return made if part == index.manifest["parts"][0] and _fits(made, index) else None


def _fits(made: EmbeddingMap, index: Index) -> bool:
    """Whether shapes, types and row numbers are those of a map of this index."""
    groups = len(made.dims)
    fitted = groups if made.method == "pca" else 0
    arrays = (made.points, made.means, made.axes)
    return (
        made.method in METHODS
        and groups > 0
        and all(isinstance(dim, int) and 0 < dim <= index.columns for dim in made.dims)
        and made.rows.dtype == np.int64
        and made.rows.ndim == 1
        and bool(((made.rows >= 0) & (made.rows < index.parts[0].count)).all())
        and all(array.dtype == np.float32 for array in arrays)
        and made.points.shape == (groups, len(made.rows), 2)
        and made.means.shape == (fitted, index.columns)
        and made.axes.shape == (fitted, 2, index.columns)
        and all(bool(np.isfinite(array).all()) for array in arrays)
    )
