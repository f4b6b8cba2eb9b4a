"""Saved logits, softmax or predictions with their labels, validated.

They come from the results.json of an evaluation, or from array files of any origin.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matryoshka.data.imagenet import CLASSES, wnids
from matryoshka.evaluation.analysis import entropy_confidence, top_confidence
from matryoshka.evaluation.options import SCORES
from matryoshka.files import check_regular, read_regular

MAX_CLASSES = 10_000_000
METADATA = ("checkpoint", "arch", "head", "dataset", "data", "tta", "precision")


class ArrayError(ValueError):
    """Arrays that are missing or inconsistent; the message names file or option and the remedy."""

    user_error = True


@dataclass(frozen=True)
class PredictionArrays:
    """Scores or predictions of G prefixes for N images of C classes.

    scores: float [G, N, C] logits or softmax, a memory map; None if only predictions were saved.
    predictions: int64 [G, N], empty if scores were saved. labels: int64 [N]. class_names: of the C
    classes, None if unknown. metadata: provenance of the arrays. macs: multiply-adds of each of the
    G, if each of them runs on its own (the widths of a family); None for prefixes of one trunk, and
    if unknown.
    """

    scores: np.ndarray | None
    are_logits: bool
    predictions: np.ndarray
    labels: np.ndarray
    dims: tuple[int, ...]
    num_classes: int
    class_names: list[str] | None
    metadata: dict[str, Any]
    macs: tuple[int, ...] | None = None

    def answers(self, images: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Predictions int64 [G, n] and confidences float32 [G, n] of some images, or of all.

        Without scores, the confidences are NaN.
        """
        if self.scores is None:
            predictions = self.predictions[:, images]
            return predictions, np.full(predictions.shape, np.nan, np.float32)
        # a slice of all images keeps the memory map, which is then read in parts
        scores = self.scores if isinstance(images, slice) else self.scores[:, images]
        return top_confidence(scores, logits=self.are_logits)

    def entropy_confidence(self) -> np.ndarray:
        """1 - entropy / log C of all images, float32 [G, N]. Needs scores."""
        assert self.scores is not None
        return entropy_confidence(self.scores, logits=self.are_logits)

    def logits(self, g: int, images: np.ndarray) -> np.ndarray:
        """Logits of prefix number g for some images, float32 [n, C].

        For saved softmax this is its logarithm, which equals the logits up to a constant per image.
        """
        assert self.scores is not None
        rows = np.asarray(self.scores[g][images], np.float32)
        if self.are_logits:
            return rows
        return np.log(np.maximum(rows, np.finfo(np.float32).tiny))  # no logarithm of 0


def from_results(path: str | Path) -> PredictionArrays:
    """Open the arrays that a results.json names, in the same folder."""
    file = Path(path)
    try:
        results = json.loads(read_regular(file))
        names = dict(results["arrays"])
        dims = [int(d) for d in results["prefixes"]]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise ArrayError(
            f"{file}: not the results.json of an evaluation; make one with eval --output"
        ) from None
    classes = results.get("class_names")
    if not _all_strings(names.values()) or not (classes is None or _all_strings(classes)):
        raise ArrayError(
            f"{file}: damaged: arrays and class_names must hold strings; make it again with "
            "eval --output"
        )

    kind = next((kind for kind in SCORES if kind in names), None)
    if kind is None or "gt" not in names:
        missing = "gt" if kind else "logits"
        raise ArrayError(f"{file}: names no {missing} array; evaluate with --save_logits --save_gt")
    arrays = _open(
        kind,
        file.parent / names[kind],
        file.parent / names["gt"],
        dims=dims,
        class_names=classes,
        metadata={key: results.get(key) for key in METADATA},
    )
    # Older files lack both keys.
    if results.get("one_pass", True):
        return arrays
    return replace(arrays, macs=_macs_of(file, results.get("macs"), dims))


def _macs_of(file: Path, macs: Any, dims: Sequence[int]) -> tuple[int, ...]:
    """The multiply-adds of each width, from results.json."""
    stored = macs if isinstance(macs, Mapping) else {}
    values = [value for dim in dims if type(value := stored.get(str(dim))) is int and value > 0]
    if len(values) < len(dims):
        raise ArrayError(
            f"{file}: damaged: macs must hold the multiply-adds of each width; make it again with "
            "eval --output"
        )
    return tuple(values)


def _all_strings(values: Any) -> bool:
    if isinstance(values, str | Mapping):
        return False
    try:
        return all(isinstance(value, str) for value in values)
    except TypeError:
        return False


def from_files(options: Mapping[str, Any]) -> PredictionArrays:
    """Open the arrays of --logits, --softmax or --predictions with --gt and --dims."""
    kinds = [kind for kind in SCORES if options[kind]]
    if len(kinds) != 1 or not options["gt"] or not options["dims"]:
        raise ArrayError(
            "give --results, or one of --logits, --softmax and --predictions with --gt and --dims"
        )
    kind = kinds[0]
    dims = list(options["dims"])
    macs = options.get("macs")
    if macs is not None and len(macs) != len(dims):
        raise ArrayError(f"--macs names {len(macs)} costs, --dims {len(dims)} widths")
    arrays = _open(
        kind,
        Path(options[kind]),
        Path(options["gt"]),
        dims=dims,
        class_names=None,
        metadata={"scores": options[kind], "gt": options["gt"]},
    )
    return replace(arrays, macs=macs)


# ---------------------------------------------------------------- checks


def _open(
    kind: str,
    file: Path,
    labels_file: Path,
    *,
    dims: list[int],
    class_names: list[str] | None,
    metadata: dict[str, Any],
) -> PredictionArrays:
    array = _read_array(file)
    axes = 2 if kind == "predictions" else 3
    if array.ndim == axes - 1:  # upstream saves a fixed feature without the axis of prefixes
        array = array[None]
    _check_shape(kind, file, array)
    labels = _read_labels(labels_file, file, array)
    _check_dims(file, array, dims)

    if kind == "predictions":
        classes = _check_predictions(file, array, labels, class_names)
    else:
        classes = array.shape[2]
        actual = _guess_kind(array)
        if kind != actual:
            raise ArrayError(f"{file}: holds {actual}, not {kind}; give it as --{actual}")
    if not 0 <= labels.min() <= labels.max() < classes:
        raise ArrayError(
            f"{labels_file}: has labels outside 0 to {classes - 1}; it belongs to another array"
        )

    if class_names is None and classes == CLASSES:
        class_names = wnids()  # upstream's arrays have no names; its models classify ImageNet
    if class_names is not None and len(class_names) != classes:
        raise ArrayError(f"{file}: has {classes} classes, results.json names {len(class_names)}")
    only_predictions = kind == "predictions"
    return PredictionArrays(
        scores=None if only_predictions else array,
        are_logits=kind == "logits",
        predictions=np.asarray(array, np.int64) if only_predictions else np.empty((0, 0), np.int64),
        labels=labels,
        dims=tuple(dims),
        num_classes=classes,
        class_names=class_names,
        metadata=metadata,
    )


def _check_shape(kind: str, file: Path, array: np.ndarray) -> None:
    if kind == "predictions":
        axes = 2
        numbers = np.integer
        shape = "[prefixes, images]"
    else:
        axes = 3
        numbers = np.floating
        shape = "[prefixes, images, classes]"
    if array.ndim != axes or not np.issubdtype(array.dtype, numbers) or not array.size:
        raise ArrayError(f"{file}: is {array.dtype} {list(array.shape)}, expected {kind} {shape}")


def _read_labels(labels_file: Path, file: Path, array: np.ndarray) -> np.ndarray:
    labels = _read_array(labels_file)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ArrayError(
            f"{labels_file}: is {labels.dtype} {list(labels.shape)}, expected one integer label "
            "per image"
        )
    if len(labels) != array.shape[1]:
        raise ArrayError(
            f"{labels_file}: has {len(labels)} labels, {file.name} {array.shape[1]} images; give "
            "both files of one run"
        )
    return np.asarray(labels, np.int64)


def _check_dims(file: Path, array: np.ndarray, dims: Sequence[int]) -> None:
    shown = ",".join(map(str, dims))
    if len(dims) != len(array):
        raise ArrayError(f"{file}: has {len(array)} prefixes, --dims {shown} names {len(dims)}")
    if list(dims) != sorted(set(dims)) or dims[0] < 1:
        raise ArrayError(f"--dims {shown}: expected positive and increasing lengths")


def _check_predictions(
    file: Path, array: np.ndarray, labels: np.ndarray, class_names: list[str] | None
) -> int:
    """The number of classes of saved predictions."""
    # Without class names the largest prediction gives the number of classes, and with it the size
    # of later arrays.
    if array.max() > MAX_CLASSES:
        raise ArrayError(
            f"{file}: has predictions of {array.max()}, more than {MAX_CLASSES:,} classes"
        )
    if class_names:
        classes = len(class_names)
    else:
        classes = int(max(array.max(), labels.max())) + 1
    if not 0 <= array.min() <= array.max() < classes:
        raise ArrayError(f"{file}: has predictions outside 0 to {classes - 1}")
    return classes


def _guess_kind(array: np.ndarray) -> str:
    """softmax if sampled rows are not negative and sum to 1, else logits."""
    # 16 images of each prefix: the array may be larger than memory.
    every = max(1, array.shape[1] // 16)
    rows = np.asarray(array[:, ::every], np.float64)
    # 0.02: rows of float16 sum to 1 only roughly
    return "softmax" if rows.min() >= 0 and np.allclose(rows.sum(2), 1, atol=0.02) else "logits"


def _read_array(path: Path) -> np.ndarray:
    """A .npy file as a memory map; upstream's .pth, a tensor, without unpickling objects."""
    if not path.exists():
        raise ArrayError(f"{path}: no such file")
    check_regular(path)
    try:
        if path.suffix == ".npy":
            return np.lib.format.open_memmap(path, "r")
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return tensor.numpy()
    except (
        ValueError,
        RuntimeError,
        EOFError,
        KeyError,
        AttributeError,
        TypeError,
        pickle.UnpicklingError,
    ):
        raise ArrayError(
            f"{path}: not a whole array; expected .npy, or a tensor that torch.save wrote"
        ) from None
