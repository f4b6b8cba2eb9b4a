"""Read a folder of embeddings: memory-mapped arrays, never unpickled.

    X.npy         float32 or float16 [N, D]: row i is image i of the data set
    y.npy         int64 [N]: labels, indices of the data set's classes
    ids.npy       uint8 [bytes]: the names of the images in UTF-8, concatenated
    ids_ends.npy  int64 [N]: the end of each name in ids.npy
    meta.json     the data, the model, the code, and hashes of the other files; written last, only
                  finished folders have it

Unfinished embeddings are in the hidden folder `.unfinished`: see writing.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import xxhash

from matryoshka.files import open_regular, read_regular
from matryoshka.json_files import JsonFileError, decode

FORMAT = "matryoshka-embeddings-1"
DTYPES = ("float32", "float16")
ARRAYS = ("X.npy", "y.npy", "ids.npy", "ids_ends.npy")
META = "meta.json"
HASHES = "hashes"  # in meta.json: XXH3 with 128 bits of every byte of each array's file
WORK = ".unfinished"
AGAIN = "embed again, with --overwrite"


class EmbeddingError(ValueError):
    """Embeddings that cannot be read or written; the message names the file and the remedy."""

    user_error = True


def trunk_sha256(model) -> str:
    """Hex digest of what determines a NestedModel's features: names, shapes, types and bytes of the
    trunk's weights.

    Independent of the file format and of the head.
    """
    import torch  # here, because readers of arrays need no torch

    digest = hashlib.sha256()
    for name, value in sorted(model.trunk.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def embedding_sha256(model) -> str:
    """Hex digest of what determines a NestedModel's embeddings: `trunk_sha256`, and, behind an
    adapter, `adapted_sha256` of it.
    """
    encoder = trunk_sha256(model)
    return encoder if model.adapter is None else adapted_sha256(encoder, model.adapter.sha256())


def adapted_sha256(encoder: str, adapter: str) -> str:
    """The digest of an encoder and its adapter, from theirs."""
    return hashlib.sha256(f"{encoder} {adapter}".encode()).hexdigest()


class Ids(Sequence[str]):
    """The names of the images, decoded on access. text: uint8 [bytes]; ends: int64 [N]."""

    def __init__(self, path: Path, text: np.ndarray, ends: np.ndarray) -> None:
        self._path = path
        self._text = text
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """IndexError for an index out of range, EmbeddingError for a damaged file."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # resolves negative indices
        # Checked at each access: reading all ends when the folder is opened would take seconds.
        start = int(self._ends[index - 1]) if index else 0
        end = int(self._ends[index])
        if not 0 <= start <= end <= len(self._text):
            raise EmbeddingError(
                f"{self._path}: the name of row {index} is beyond the end of the file; {AGAIN}"
            )
        try:
            return self._text[start:end].tobytes().decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise EmbeddingError(
                f"{self._path}: the name of row {index} is damaged; {AGAIN}"
            ) from None


@dataclass(frozen=True)
class Embeddings:
    """An open folder of embeddings; the arrays are read-only memory maps."""

    path: Path
    X: np.ndarray  # float32 or float16 [N, D]
    y: np.ndarray  # int64 [N]
    ids: Ids  # N names
    meta: dict[str, Any]  # meta.json, see docs/retrieval.md

    def __len__(self) -> int:
        return len(self.X)

    @property
    def classes(self) -> list[str] | None:
        """Class names by label; None if the data set has none."""
        return self.meta["data"]["classes"]

    def verify(self) -> bool:
        """Compare every byte of the files with the hashes in meta.json, at 10 GB/s and core.

        False for embeddings of an older version, which have no hashes. EmbeddingError names the
        file that differs.
        """
        hashes = self.meta.get(HASHES)
        if hashes is None:
            return False
        for name, expected in hashes.items():
            if hash_file(self.path / name) != expected:
                raise EmbeddingError(
                    f"{self.path / name}: its bytes are not those that were written; {AGAIN}"
                )
        return True


def open_embeddings(folder: str | os.PathLike) -> Embeddings:
    """Open a folder of embeddings in milliseconds, independent of its size.

    Checks types, shapes and file sizes but reads no rows. EmbeddingError, one line, if the folder
    does not exist, is not finished or is damaged.
    """
    path = Path(folder)
    meta = read_meta(path)
    rows = meta["rows"]
    columns = meta["columns"]
    ends = _memory_map(path / "ids_ends.npy", "int64", (rows,))
    text = _memory_map(path / "ids.npy", "uint8", (max(0, int(ends[-1])),))
    X = _memory_map(path / "X.npy", meta["dtype"], (rows, columns))
    y = _memory_map(path / "y.npy", "int64", (rows,))
    return Embeddings(path, X, y, Ids(path / "ids.npy", text, ends), meta)


def hash_file(path: Path) -> str:
    """32 hex digits of all bytes of a file. EmbeddingError."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        raise EmbeddingError(f"{path}: {error.strerror}; it belongs to {META}, {AGAIN}") from None


def labels_like(queries: Embeddings, database: Embeddings) -> np.ndarray:
    """The labels of `queries` as class indices of `database`, int64 [N]; -1 for classes that it
    lacks.

    Classes are matched by name, ImageNet V2's folders (0 to 999) with WordNet ids. If one side has
    no names, labels are returned unchanged, provided that the numbers of classes are equal.
    All are -1 if a side has no classes. EmbeddingError if the two have no class in common.
    """
    return matched_labels(np.asarray(queries.y), classes_of(queries), classes_of(database))


class Classes(NamedTuple):
    """The classes that labels refer to."""

    path: Path  # of the data, for messages
    names: list[str] | None  # by label, if they are known
    count: int


def classes_of(embeddings: Embeddings) -> Classes:
    return Classes(embeddings.path, embeddings.classes, embeddings.meta["data"]["num_classes"])


def matched_labels(labels: np.ndarray, queries: Classes, database: Classes) -> np.ndarray:
    """`labels_like` for any data: labels int64 [N] of the queries."""
    query_names = queries.names
    database_names = database.names
    if not queries.count or not database.count:  # images without classes: no row is relevant
        return np.full(len(labels), -1, np.int64)
    if query_names is None or database_names is None:
        if queries.count != database.count:
            raise EmbeddingError(
                f"{queries.path}: has {queries.count} classes, {database.path} {database.count}, "
                "and one of them has no names for them; embed data sets with class names"
            )
        return labels
    if not 0 <= labels.min() <= labels.max() < len(query_names):
        raise EmbeddingError(
            f"{queries.path / 'y.npy'}: has labels outside of its {len(query_names)} classes; "
            f"{AGAIN}"
        )
    if query_names == database_names:
        return labels

    if sorted(query_names) == sorted(map(str, range(1000))):  # V2's folders
        from matryoshka.data.imagenet import wnids  # imports torch

        query_names = [wnids()[int(name)] for name in query_names]
    # -1 for classes that the database lacks: their queries have no relevant rows.
    label_of_name = {name: label for label, name in enumerate(database_names)}
    matched = np.array([label_of_name.get(name, -1) for name in query_names], np.int64)
    if (matched < 0).all():
        raise EmbeddingError(
            f"{queries.path}: none of its classes ({query_names[0]!r}, ...) is one of "
            f"{database.path} ({database_names[0]!r}, ...)"
        )
    return matched[labels]


def read_meta(folder: Path) -> dict[str, Any]:
    """Read and validate meta.json. EmbeddingError, one line."""
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
            f"{folder}: has no embeddings (no {META}); `matryoshka embed --output DIR` makes them"
        )
    try:
        meta, _ = decode(read_regular(file))
        if meta["format"] != FORMAT:
            raise EmbeddingError(f"{file}: format {str(meta['format'])[:40]!r}, expected {FORMAT}")
        is_valid = _is_valid_meta(meta)
    except JsonFileError as error:
        raise EmbeddingError(f"{file}: is damaged: {error}; or {AGAIN}") from None
    except EmbeddingError:
        raise
    except (KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise EmbeddingError(f"{file}: is damaged, or not the {META} of embeddings; {AGAIN}")
    return meta


def _is_valid_meta(meta: dict[str, Any]) -> bool:
    """Whether the fields that readers use are valid. KeyError or TypeError if one is missing."""
    for key in ("rows", "columns"):
        # the bound keeps sizes computed from them within 64 bits
        if type(meta[key]) is not int or not 1 <= meta[key] < 1 << 48:
            return False
    classes = meta["data"]["classes"]
    names_are_valid = classes is None or (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    )
    return (
        names_are_valid
        and meta["dtype"] in DTYPES
        and type(meta["normalised"]) is bool
        and isinstance(meta["model"]["weights_sha256"], str)
        # Embeddings of an older version have no hashes.
        and (HASHES not in meta or {*meta[HASHES]} == {*ARRAYS})
    )


def _memory_map(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A .npy file of exactly this type, shape and size as a read-only memory map."""
    expected = f"{dtype} [{', '.join(map(str, shape))}]"
    try:
        with open_regular(path) as file:
            # Version 1.0, which writing.py writes. numpy.load would also unpickle objects.
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError
            stored_shape, fortran, stored = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise EmbeddingError(f"{path}: {error.strerror}; it belongs to {META}, {AGAIN}") from None
    except Exception:  # numpy's parser raises many types for a damaged header
        raise EmbeddingError(f"{path}: is not a whole .npy file; {AGAIN}") from None
    if stored != np.dtype(dtype) or stored_shape != shape or (fortran and len(shape) > 1):
        actual = f"{stored} [{', '.join(map(str, stored_shape))}]"
        raise EmbeddingError(
            f"{path}: is {actual[:80]}, expected {expected} by the other files; {AGAIN}"
        )
    # dtype=object: Python integers, which do not overflow
    if size != start + int(np.prod(shape, dtype=object)) * stored.itemsize:
        raise EmbeddingError(
            f"{path}: has {size} bytes, too few or too many for {expected}; {AGAIN}"
        )
    if 0 in shape:
        return np.empty(shape, stored)  # an empty file cannot be mapped
    return np.memmap(path, stored, "r", start, shape)
