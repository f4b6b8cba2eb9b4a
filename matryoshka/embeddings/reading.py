"""Embeddings of a data set as a folder of arrays that are memory-mapped, never unpickled.

    X.npy         float32 or float16 [N, D]: row i is image i of the data set
    y.npy         int64 [N]: labels, numbers of the data set's classes
    ids.npy       uint8 [bytes]: the names of the images in UTF-8, one after the other
    ids_ends.npy  int64 [N]: where in ids.npy each name ends
    meta.json     what the embeddings are of, and what made them; written last, a folder without it is none

Until all rows are there, everything is in the hidden folder `.unfinished`: see writing.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

FORMAT = "matryoshka-embeddings-1"
DTYPES = ("float32", "float16")
ARRAYS = ("X.npy", "y.npy", "ids.npy", "ids_ends.npy")
META = "meta.json"
WORK = ".unfinished"
AGAIN = "embed again, with --overwrite"


class EmbeddingError(ValueError):
    """A folder of embeddings that cannot be read or written; the message names the file and the
    remedy.
    """

    user_error = True


def trunk_sha256(model) -> str:
    """Hex digest of what decides a NestedModel's features: names, shapes, types and bytes of the
    trunk's weights.

    The same for every file format and for every head on the same trunk.
    """
    import torch  # readers of arrays can do without

    digest = hashlib.sha256()
    for name, value in sorted(model.trunk.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Ids(Sequence[str]):
    """The names of the images, decoded when they are asked for. text: uint8 [bytes]; ends: int64
    [N].
    """

    def __init__(self, path: Path, text: np.ndarray, ends: np.ndarray) -> None:
        self._path, self._text, self._ends = path, text, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """IndexError for a number outside, EmbeddingError for a damaged file."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, end = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        if not 0 <= start <= end <= len(self._text):
            raise EmbeddingError(
                f"{self._path}: the name of row {index} is outside of the file; {AGAIN}"
            )
        try:
            return self._text[start:end].tobytes().decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise EmbeddingError(
                f"{self._path}: the name of row {index} is damaged; {AGAIN}"
            ) from None


@dataclass(frozen=True)
class Embeddings:
    """X: float32 or float16 [N, D]; y: int64 [N]; both memory maps that cannot be written to. ids:
    N names.

    meta: what meta.json says, see docs/retrieval.md.
    """

    path: Path
    X: np.ndarray
    y: np.ndarray
    ids: Ids
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.X)

    @property
    def classes(self) -> list[str] | None:
        """Names by label, where the data set has them."""
        return self.meta["data"]["classes"]


def open_embeddings(folder: str | os.PathLike) -> Embeddings:
    """Opens in milliseconds whatever the size: types, shapes and file sizes are checked, numbers
    are not read.

    EmbeddingError, one line, for a folder that is not there, not finished or not whole.
    """
    path = Path(folder)
    meta = read_meta(path)
    rows, columns = meta["rows"], meta["columns"]
    ends = _mapped(path / "ids_ends.npy", "int64", (rows,))
    text = _mapped(path / "ids.npy", "uint8", (max(0, int(ends[-1])),))
    X = _mapped(path / "X.npy", meta["dtype"], (rows, columns))
    return Embeddings(
        path, X, _mapped(path / "y.npy", "int64", (rows,)), Ids(path / "ids.npy", text, ends), meta
    )


def labels_like(queries: Embeddings, database: Embeddings) -> np.ndarray:
    """int64 [N]: the labels of `queries` as numbers of the database's classes; -1 for classes that
    it lacks.

    Classes are matched by name, ImageNet V2's folders (0 to 999) with WordNet ids. Where one side
    has no names, labels are taken as they are, if there are as many classes. EmbeddingError where
    no class is common to both.
    """
    return matched_labels(
        np.asarray(queries.y),
        *(
            Classes(one.path, one.classes, one.meta["data"]["num_classes"])
            for one in (queries, database)
        ),
    )


class Classes(NamedTuple):
    """What labels mean. path: of the data, for messages; names: by label, where there are names;
    count: of classes.
    """

    path: Path
    names: list[str] | None
    count: int


def matched_labels(labels: np.ndarray, queries: Classes, database: Classes) -> np.ndarray:
    """As `labels_like`, of any data: labels int64 [N] of the queries."""
    ours, theirs = queries.names, database.names
    if ours is None or theirs is None:
        if queries.count != database.count:
            raise EmbeddingError(
                f"{queries.path}: has {queries.count} classes, {database.path} {database.count}, "
                "and one of them no "
                "names for them; embed data sets with class names"
            )
        return labels
    if not 0 <= labels.min() <= labels.max() < len(ours):
        raise EmbeddingError(
            f"{queries.path / 'y.npy'}: has labels outside of its {len(ours)} classes; {AGAIN}"
        )
    if ours == theirs:
        return labels
    number = {name: label for label, name in enumerate(theirs)}
    if sorted(ours) == sorted(map(str, range(1000))):
        from matryoshka.data.imagenet import wnids  # imports torch

        ours = [wnids()[int(name)] for name in ours]
    matched = np.array([number.get(name, -1) for name in ours], np.int64)
    if (matched < 0).all():
        raise EmbeddingError(
            f"{queries.path}: none of its classes ({ours[0]!r}, ...) is one of {database.path} "
            f"({theirs[0]!r}, ...)"
        )
    return matched[labels]


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json, checked. EmbeddingError, one line."""
    file = folder / META
    if folder.is_file():
        raise EmbeddingError(
            f"{folder}: is a file; `matryoshka embed --output DIR` makes a folder of embeddings"
        )
    if not folder.is_dir():
        raise EmbeddingError(f"{folder}: no such folder; `matryoshka embed --output` makes one")
    if not file.is_file():
        if (folder / WORK).is_dir():
            raise EmbeddingError(
                f"{folder}: is not finished (no {META}): start the same command again"
            )
        raise EmbeddingError(
            f"{folder}: holds no embeddings (no {META}); `matryoshka embed --output DIR` makes them"
        )
    try:
        meta = json.loads(file.read_bytes())
        if meta["format"] != FORMAT:
            raise EmbeddingError(
                f"{file}: is of the format {str(meta['format'])[:40]!r}, not {FORMAT}"
            )
        classes = meta["data"]["classes"]
        sound = (
            all(type(meta[key]) is int and 1 <= meta[key] < 1 << 48 for key in ("rows", "columns"))
            and meta["dtype"] in DTYPES
            and type(meta["normalised"]) is bool
            and isinstance(meta["model"]["weights_sha256"], str)
            and (
                classes is None
                or (isinstance(classes, list) and all(isinstance(c, str) for c in classes))
            )
        )
    except EmbeddingError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError):
        sound = False
    if not sound:
        raise EmbeddingError(f"{file}: is damaged, or not the {META} of embeddings; {AGAIN}")
    return meta


def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A .npy file of exactly this type, shape and size as a memory map."""
    expected = f"{dtype} [{', '.join(map(str, shape))}]"
    try:
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError
            stored_shape, fortran, stored = np.lib.format.read_array_header_1_0(file)
            start, size = file.tell(), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise EmbeddingError(f"{path}: {error.strerror}; it belongs to {META}, {AGAIN}") from None
    except Exception:  # of a damaged header numpy's parser raises many types
        raise EmbeddingError(f"{path}: is not a whole .npy file; {AGAIN}") from None
    if stored != np.dtype(dtype) or stored_shape != shape or (fortran and len(shape) > 1):
        what = f"{stored} [{', '.join(map(str, stored_shape))}]"
        raise EmbeddingError(
            f"{path}: is {what[:80]}, not {expected} as the other files say; {AGAIN}"
        )
    if size != start + int(np.prod(shape, dtype=object)) * stored.itemsize:
        raise EmbeddingError(
            f"{path}: has {size} bytes, too few or too many for {expected}; {AGAIN}"
        )
    if 0 in shape:
        return np.empty(shape, stored)
    return np.memmap(path, stored, "r", start, shape)
