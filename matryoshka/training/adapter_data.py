"""Embeddings of any encoder as the input of `matryoshka adapt`, in three parts.

given = read_input("embeddings/photos")       # or a folder with embeddings.npy, or a .npy file
parts = split(given, "random", validation=0.15, test=0.15, seed=0)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from matryoshka.embeddings.reading import META, WORK, open_embeddings
from matryoshka.files import check_regular
from matryoshka.models.adapter import AdapterError

ROWS = "embeddings.npy"
LABELS = "labels.npy"
CHECKED_ROWS = 65_536  # in one step of a pass over all of them


@dataclass(frozen=True)
class Given:
    """Embeddings float [N, D], their labels int64 [N] or None, and the encoder's entry of meta.json
    or None.
    """

    path: Path
    rows: np.ndarray
    labels: np.ndarray | None
    encoder: dict[str, Any] | None


class Parts(NamedTuple):
    """Row numbers of the three parts, int64, rising."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


# ---------------------------------------------------------------- reading


def read_input(path: str, labels_file: str | None = None) -> Given:
    """The embeddings of a path and their labels, checked.

    labels_file: labels instead of those of the path. EmbeddingError or AdapterError, one line, for
    anything that is not a whole set of finite embeddings with as many labels.
    """
    place = Path(path)
    if place.is_dir() and not (place / ROWS).is_file():
        given = _of_embed(place)
    else:
        file = place / ROWS if place.is_dir() else place
        beside = place / LABELS if place.is_dir() else None
        labels = _labels(beside) if beside is not None and beside.is_file() else None
        given = Given(place, _rows(file), labels, None)
    if labels_file is not None:
        given = Given(place, given.rows, _labels(Path(labels_file)), given.encoder)
    _check(given, labels_file)
    return given


def _of_embed(folder: Path) -> Given:
    if not (folder / META).is_file() and not (folder / WORK).is_dir():
        raise AdapterError(
            f"{folder}: has neither {META} of `matryoshka embed` nor {ROWS}; give a folder with one"
        )
    stored = open_embeddings(folder)
    stored.verify()
    encoder = stored.meta["model"]
    if "adapter" in encoder:
        raise AdapterError(
            f"{folder}: its embeddings are behind an adapter already; embed without --adapter"
        )
    labels = np.asarray(stored.y)
    # Images without classes have -1.
    return Given(folder, stored.X, labels if labels.max() >= 0 else None, encoder)


def _array(file: Path) -> np.ndarray:
    try:
        check_regular(file)
        # Never a pickle: open_memmap maps numbers only.
        return np.lib.format.open_memmap(file, "r")
    except OSError as error:
        raise AdapterError(f"{file}: {error.strerror or error}") from None
    except Exception:  # numpy's parser raises many types for a damaged header
        raise AdapterError(f"{file}: is not a whole .npy file of numbers") from None


def _rows(file: Path) -> np.ndarray:
    rows = _array(file)
    if rows.ndim != 2 or rows.dtype.kind != "f" or 0 in rows.shape:
        raise AdapterError(
            f"{file}: is {rows.dtype} {list(rows.shape)}, expected floating point [rows, numbers]"
        )
    return rows


def _labels(file: Path) -> np.ndarray:
    labels = _array(file)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise AdapterError(
            f"{file}: is {labels.dtype} {list(labels.shape)}, expected integer classes [rows]"
        )
    return labels.astype(np.int64)


def _check(given: Given, labels_file: str | None) -> None:
    """AdapterError for NaN, and labels that are not those of the rows."""
    labels = given.labels
    where = labels_file or given.path
    if labels is not None:
        if len(labels) != len(given.rows):
            raise AdapterError(
                f"{where}: {len(labels):,} labels for {len(given.rows):,} embeddings; give one for "
                "each"
            )
        if labels.min() < 0:
            row = int(labels.argmin())
            raise AdapterError(
                f"{where}: the label of row {row} is {labels[row]}; classes are numbers from 0 on"
            )
    for first in range(0, len(given.rows), CHECKED_ROWS):
        with np.errstate(over="ignore"):  # numbers of float64 beyond float32
            part = np.asarray(given.rows[first : first + CHECKED_ROWS], np.float32)
        finite = np.isfinite(part).all(1)
        if not finite.all():
            row = first + int(finite.argmin())
            raise AdapterError(
                f"{given.path}: row {row} has NaN or infinity; leave such embeddings out"
            )


# ---------------------------------------------------------------- three parts


def split(
    labels: np.ndarray | None, count: int, kind: str, *, validation: float, test: float, seed: int
) -> Parts:
    """Three parts of `count` rows, at random.

    kind: random, in which each part has its share of every class; or classes, in which each has
    whole classes, at least one. AdapterError for shares that leave a part without rows.
    """
    rng = np.random.default_rng(seed)
    if kind == "classes":
        assert labels is not None
        classes = rng.permutation(np.unique(labels))
        groups = [np.isin(labels, part) for part in _cut(classes, validation, test)]
        parts = Parts(*(np.flatnonzero(group) for group in groups))
    else:
        order = rng.permutation(count)
        if labels is not None:
            # The images of a class follow each other, and each part takes its share of them.
            order = order[np.argsort(labels[order], kind="stable")]
        parts = Parts(*(np.sort(part) for part in _cut(order, validation, test)))
    sizes = [len(part) for part in parts]
    if min(sizes) < 2:
        what = "classes" if kind == "classes" else "embeddings"
        raise AdapterError(
            f"--validation {validation:g}, --test {test:g}: the parts have {sizes[0]:,}, "
            f"{sizes[1]:,} and {sizes[2]:,} embeddings; give more {what}, or other shares"
        )
    return parts


def _cut(values: np.ndarray, validation: float, test: float) -> list[np.ndarray]:
    """The values of the three parts, each taken at even distances."""
    tested = _evenly(len(values), test)
    rest = values[~tested]
    validated = _evenly(len(rest), validation / (1 - test))
    return [rest[~validated], rest[validated], values[tested]]


def _evenly(count: int, share: float) -> np.ndarray:
    """bool [count], true for `share` of them at even distances."""
    before = np.floor(np.arange(count + 1) * share + 0.5)
    return np.diff(before) > 0
