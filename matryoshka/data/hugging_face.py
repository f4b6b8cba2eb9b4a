"""Data sets of the Hugging Face hub, or local parquet files, as sources (extra [hf])."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.data.catalogue import HELD_OUT, HUGGING_FACE
from matryoshka.data.hub import offline_without_network, quiet_hub
from matryoshka.data.layout import BetonError
from matryoshka.data.reader import printable
from matryoshka.files import read_regular


class MissingPartError(BetonError):
    """A data set without a part to evaluate on."""


class HuggingFaceImages:
    """An image and a label column of one split, as a source (see sources.py).

    name: OWNER/NAME on the hub, or a local parquet file or folder of parquet files. split: a name
    or an expression of `datasets`; a name of HELD_OUT also finds another of them. The set is
    downloaded, and kept as Arrow files in `cache`, by `datasets`; images are then read one by one.

    image_column: default: the column of images. label_column: default: the column of class labels,
    else the only column of integers; it may hold integers or text. classes: the labels' names; None
    if they are numbers without names. labels: int64 [N]; -1 where a row has no label.

    BetonError for a missing set, split or column, or if several columns could be meant.
    """

    def __init__(
        self,
        name: str,
        split: str | None,
        *,
        cache: str | Path,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        self._shown = f"{HUGGING_FACE}{name}"
        try:
            import datasets
        except ImportError:
            raise BetonError(
                f"{self._shown}: needs the package `datasets`: pip install 'matryoshka-vision[hf]'"
            ) from None
        if split is None:
            raise BetonError(f"{self._shown}: give the split to read, such as train")
        rows = self._loaded(datasets, name, split, Path(cache) / "huggingface")
        features: dict[str, Any] = dict(rows.features)
        image = self._image_column(datasets, features, image_column)
        if isinstance(features[image], datasets.Image):  # the stored bytes: the writer decodes
            rows = rows.cast_column(image, datasets.Image(decode=False))
        label = self._label_column(datasets, features, label_column)
        self._rows = rows.select_columns([image])
        self._image = image
        self._split = split
        self.labels, self.classes = self._labels(rows, label, features[label])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        """The bytes of an image; none where a row has no image. OSError for a missing file."""
        stored = self._rows[index][self._image]
        if isinstance(stored, dict):
            if stored.get("bytes") is None and stored.get("path"):
                return read_regular(stored["path"])
            stored = stored.get("bytes")
        return stored if isinstance(stored, bytes) else b""

    def name(self, index: int) -> str:
        return f"{self._split}/{index}"

    # ---------------------------------------------------------------- columns

    def _loaded(self, datasets: Any, name: str, split: str, cache: Path) -> Any:
        path = Path(name)
        options = {"split": split, "cache_dir": str(cache)}
        try:
            with _only_errors(datasets):
                if path.is_file():
                    files = {split: str(path)}
                    return datasets.load_dataset("parquet", data_files=files, **options)
                if path.is_dir():
                    return self._part(datasets, str(path.resolve()), options)
                with offline_without_network():
                    return self._part(datasets, name, options)
        except MissingPartError:
            raise
        except Exception as error:  # datasets and its back ends raise many types
            text = str(error).strip() or type(error).__name__
            reason = printable(text.splitlines()[0])[:300]
            remedy = ""
            if not path.exists():
                remedy = "; without a network, give hf: and a local parquet file or folder"
            raise BetonError(
                f"{self._shown}: split {split} cannot be read: {reason}{remedy}"
            ) from error

    def _part(self, datasets: Any, path: str, options: dict[str, Any]) -> Any:
        """The rows of options["split"]; `test` and `val` are the part that is held out."""
        split = options["split"]
        if split in HELD_OUT:
            parts = datasets.load_dataset(path, cache_dir=options["cache_dir"])
            for name in sorted(HELD_OUT, key=lambda name: name != split):
                if name in parts:
                    return parts[name]
            raise MissingPartError(
                f"{self._shown}: split {split} cannot be read: its splits are {', '.join(parts)}"
            )
        return datasets.load_dataset(path, **options)

    def _image_column(self, datasets: Any, features: dict[str, Any], wanted: str | None) -> str:
        if wanted is not None:
            return self._existing("image_column", wanted, features)
        found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        return self._only("image_column", found, features, "images")

    def _label_column(self, datasets: Any, features: dict[str, Any], wanted: str | None) -> str:
        if wanted is not None:
            return self._existing("label_column", wanted, features)
        found = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        if not found:
            found = [
                name
                for name, kind in features.items()
                if isinstance(kind, datasets.Value) and "int" in kind.dtype
            ]
        return self._only("label_column", found, features, "labels")

    def _existing(self, option: str, wanted: str, features: dict[str, Any]) -> str:
        if wanted not in features:
            raise BetonError(
                f"{self._shown}: {option}={wanted}: no such column; it has {', '.join(features)}"
            )
        return wanted

    def _only(self, option: str, found: list[str], features: dict[str, Any], what: str) -> str:
        if len(found) == 1:
            return found[0]
        problem = f"columns {', '.join(found)} hold {what}" if found else f"no column of {what}"
        raise BetonError(
            f"{self._shown}: {problem}; give {option}, one of {', '.join(found or features)}"
        )

    def _labels(self, rows: Any, column: str, kind: Any) -> tuple[np.ndarray, list[str] | None]:
        values = rows.select_columns([column]).with_format("arrow")[:].column(column)
        if getattr(kind, "names", None):
            return self._integers(values, column), list(kind.names)
        if getattr(kind, "dtype", "") in ("string", "large_string"):
            texts = values.to_pylist()
            classes = sorted({text for text in texts if text is not None})
            number = {text: label for label, text in enumerate(classes)}
            return np.array([number.get(text, -1) for text in texts], np.int64), classes
        return self._integers(values, column), None

    def _integers(self, values: Any, column: str) -> np.ndarray:
        labels = values.fill_null(-1).to_numpy() if "int" in str(values.type) else None
        if labels is None:
            raise BetonError(
                f"{self._shown}: label_column={column}: has {values.type}, expected integers or "
                "text"
            )
        return labels.astype(np.int64)


@contextmanager
def _only_errors(datasets: Any) -> Generator[None]:
    """Neither retries nor bars on a standard error that is not a terminal."""
    shows_bars = datasets.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        with quiet_hub():
            yield
    finally:
        if shows_bars:
            datasets.enable_progress_bars()
